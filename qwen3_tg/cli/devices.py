"""`qwen3 devices`: what this machine can compute on, what is chosen, and what the others lack."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qwen3_tg import device as devices
from qwen3_tg.device import DeviceReport, Policy
from qwen3_tg.device.names import gib
from qwen3_tg.errors import DeviceError

_INDENT = " " * 10


def show(options: argparse.Namespace) -> None:
    """Print every device. Raises DeviceError where none works, after that."""
    chosen: Policy | None = None
    problem: DeviceError | None = None
    try:
        chosen = devices.choose(options.device)
    except DeviceError as e:
        if options.device:
            raise
        problem = e
    reports = devices.reports()
    if chosen:  # one that tinygrad does not count: it takes any number of the CPU
        known = {report.name for report in reports}
        reports += [devices.report(name) for name in chosen.devices if name not in known]
    policies = {
        report.name: chosen
        if chosen and report.name in chosen.devices
        else devices.choose(report.name)
        for report in reports
        if not report.missing
    }
    if options.json:
        found = [_as_json(report, policies.get(report.name), chosen) for report in reports]
        print(json.dumps({"chosen": chosen and chosen.device, "devices": found}, indent=2))
    else:
        for report in reports:
            print("\n".join(_lines(report, policies.get(report.name), chosen)))
    if problem:
        raise problem


def _lines(report: DeviceReport, policy: Policy | None, chosen: Policy | None) -> list[str]:
    if policy is None:
        assert report.missing is not None
        lines = [f"  {report.name:<7} no    {report.missing.what}"]
        if report.missing.command:
            lines.append(f"{_INDENT}get it with: {report.missing.command}")
        return lines
    is_chosen = chosen is not None and report.name in chosen.devices
    types = ", ".join(name for name in devices.DTYPE_NAMES if name in report.native)
    kernels = "" if policy.kernels == "generic" else f" with the CPU's {policy.kernels} kernels"
    threads = f" on {policy.threads} threads" if policy.threads else ""
    lines = [
        f"{'*' if is_chosen else ' '} {report.name:<7} works {report.what} ({report.renderer})",
        f"{_INDENT}memory: {_memory(report)}; native: {types}",
        f"{_INDENT}would compute in {policy.dtype}{kernels}{threads}, keys and values in "
        f"{policy.kv_dtype}",
    ]
    if report.is_software:
        lines.append(f"{_INDENT}this is the CPU, only slower: taken if asked for")
    if is_chosen:
        assert chosen is not None
        others = [name for name in chosen.devices if name != report.name]
        with_others = f", with {' and '.join(others)}" if others else ""
        lines.append(f"{_INDENT}chosen: {chosen.reason}{with_others}")
    return lines


def _memory(report: DeviceReport) -> str:
    total, free = report.memory.total, report.memory.free
    parts = [gib(total) if total is not None else "not known"]
    if free is not None:
        parts.append(f"{gib(free)} free")
    return ", ".join(parts)


def _as_json(report: DeviceReport, policy: Policy | None, chosen: Policy | None) -> dict[str, Any]:
    is_chosen = chosen is not None and report.name in chosen.devices
    return {
        "name": report.name,
        "works": report.missing is None,
        "what": report.what or None,
        "renderer": report.renderer or None,
        "memory_bytes": report.memory.total,
        "free_memory_bytes": report.memory.free,
        "native": sorted(report.native),
        "is_software": report.is_software,
        "dtype": policy and policy.dtype,
        "kv_dtype": policy and policy.kv_dtype,
        "kernels": policy and policy.kernels,
        "chosen": chosen.reason if is_chosen and chosen else None,
        "missing": report.missing and report.missing.what,
        "command": (report.missing and report.missing.command) or None,
    }
