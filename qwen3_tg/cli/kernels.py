"""`qwen3 kernels`: what each operation of a model becomes, here or on a device elsewhere."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen3_tg import __version__
from qwen3_tg import device as devices
from qwen3_tg.cli import terminal
from qwen3_tg.errors import UsageError
from qwen3_tg.kernels.report import Column, Row, html, rows
from qwen3_tg.plan import Source, check_form, find_source, stored_as

_WIDTH = 44


def kernels(options: argparse.Namespace) -> int:
    """Lower, compile or time, and print. The exit code: 1 where a kernel did not compile."""
    source = _source(options)
    layers = source.config.num_hidden_layers
    if not 0 <= options.layer < layers:
        raise UsageError(f"--layer must be from 0 to {layers - 1}, found {options.layer}")
    bandwidth = None
    if options.html and not Path(options.html).parent.is_dir():
        raise UsageError(f"--html: {Path(options.html).parent} is no folder")
    if options.target is not None:
        if options.device or options.kernels or options.threads:
            raise UsageError(
                "--target is for a device that is not here: leave away --device, --kernels and "
                "--threads"
            )
        columns = [_lowered(name, source, options) for name in _targets(options.target)]
    else:
        column, bandwidth = _here(source, options)
        columns = [column]
    title = f"{source.name}, layer {options.layer} of {layers}"
    if options.html:
        _write(Path(options.html), html(title, columns, bandwidth))
        terminal.note(f"written: {options.html}")
    if options.json:
        print(json.dumps(_as_json(source, options.layer, columns, bandwidth), indent=2))
    elif not options.html:
        print(f"{title}, from {source.where}")
        for column in columns:
            _print(column, bandwidth, options.source)
    return 1 if any(column.problems for column in columns) else 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UsageError(f"--html: {path}: {e.strerror or e}") from None


def _source(options: argparse.Namespace) -> Source:
    found = find_source(options.model or "tiny", bool(options.quant), terminal.note)
    if options.quant is None:
        return found
    form = check_form(options.quant)
    return Source(found.name, found.where, found.config, stored_as(found.config, form), form)


def _targets(typed: list[str]) -> list[str]:
    from qwen3_tg.kernels.targets import TARGETS, find_target

    names = [name for text in typed for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--target names no target; known: {', '.join(TARGETS)}, or all")
    if any(name.strip().lower() == "all" for name in names):
        return list(TARGETS)
    return list(dict.fromkeys(find_target(name).name for name in names))


def _lowered(name: str, source: Source, options: argparse.Namespace) -> Column:
    from qwen3_tg.kernels.compilers import CompileProblem, compiler_for
    from qwen3_tg.kernels.lower import lowered
    from qwen3_tg.kernels.targets import find_target, policy_for, renderer_of

    target = find_target(name)
    policy = policy_for(target, options.dtype, options.kv_dtype)
    how = source.config, source.weights, options.layer, policy, renderer_of(target)
    with terminal.progress(f"{name}: lowering") as on_kernel:
        made = list(lowered(*how, on_kernel))
    compiler = compiler_for(target)
    problems: dict[int, str] = {}
    if isinstance(compiler, str):
        outcome = f"lowered; not compiled: {compiler}"
    else:
        done: dict[str, str | None] = {}
        with terminal.progress(f"{name}: {compiler.name}") as on_kernel:
            for number, kernel in enumerate(made):
                if kernel.source not in done:
                    try:
                        compiler.run(kernel.source)
                        done[kernel.source] = None
                    except CompileProblem as e:
                        done[kernel.source] = str(e)
                if problem := done[kernel.source]:
                    problems[number] = problem
                on_kernel(number + 1, len(made))
        right = len(made) - len(problems)
        word = "compiled" if compiler.compiles else "lowered; checked"
        outcome = f"{word} by {compiler.name}: {right} of {len(made)} kernels"
    types = f"{policy.dtype}, cache {policy.kv_dtype}"
    return Column(name, f"{target.language} for {target.hardware}", types, made, outcome, problems)


def _here(source: Source, options: argparse.Namespace) -> tuple[Column, float]:
    from tinygrad.device import Device

    from qwen3_tg.bench.bandwidth import read_bandwidth
    from qwen3_tg.bench.random_weights import with_random_values
    from qwen3_tg.kernels.cpu import measured
    from qwen3_tg.kernels.lower import lowered

    policy = devices.choose(
        options.device, options.dtype, options.kv_dtype, options.kernels, options.threads
    )
    devices.check_single(policy, "kernels")
    weights = source.weights if source.is_here else with_random_values(source.weights)
    how = source.config, weights, options.layer, policy
    default = devices.as_default(policy.device)
    with default, terminal.progress(f"{policy.device}: timing") as on_kernel:
        if policy.kernels == "generic":
            made = list(lowered(*how, on_kernel=on_kernel))
            language = type(Device[policy.device].renderer).__name__.removesuffix("Renderer")
        else:
            made = list(measured(*how, on_kernel))
            language = f"C, {policy.kernels} kernels"
    bandwidth = read_bandwidth(policy)
    types = f"{policy.dtype}, cache {policy.kv_dtype}"
    return Column(policy.device, language, types, made, "ran here"), bandwidth


def _print(column: Column, bandwidth: float | None, sources: bool) -> None:
    print(f"\n{column.name}: {column.language}, {column.types}; {column.outcome}")
    timed = bandwidth is not None
    if bandwidth is not None:
        print(f"a copy of memory: {bandwidth / 1e9:.1f} GB/s; above 100 %: from caches")
    phase = ""
    for row in rows([column]):
        if row.phase != phase:
            phase = row.phase
            head = f"{'MB':>9} {'MFLOP':>9}" + (f" {'µs':>9} {'GB/s':>6} {'%':>4}" if timed else "")
            print(f"\n{phase:<{_WIDTH}} {head}")
        _print_row(row, column, bandwidth, sources)
    for number, problem in column.problems.items():
        kernel = column.kernels[number]
        print(f"\n{kernel.phase}, {kernel.step}, {kernel.name} did not compile:\n{problem}")


def _print_row(row: Row, column: Column, bandwidth: float | None, sources: bool) -> None:
    made = row.kernels[0]
    for kernel in made:
        numbers = f"{kernel.nbytes / 1e6:9.3f} {kernel.flop / 1e6:9.2f}"
        if kernel.seconds is not None and bandwidth:
            share = 100 * kernel.nbytes / kernel.seconds / bandwidth
            speed = kernel.nbytes / kernel.seconds / 1e9
            numbers += f" {kernel.seconds * 1e6:9.1f} {speed:6.2f} {share:4.0f}"
        problem = "  DOES NOT COMPILE" if column.kernels.index(kernel) in column.problems else ""
        step = f"{row.step} ({kernel.name})" if len(row.step) + len(kernel.name) < 90 else row.step
        if len(step) > _WIDTH:
            print(step)
            step = ""
        print(f"{step:<{_WIDTH}} {numbers}{problem}")
        if sources:
            print("    " + kernel.source.strip().replace("\n", "\n    ") + "\n")


def _as_json(
    source: Source, layer: int, columns: list[Column], bandwidth: float | None
) -> dict[str, Any]:
    return {
        "qwen3_tg": __version__,
        "model": source.name,
        "layer": layer,
        "copy_bytes_per_s": bandwidth,
        "targets": [
            {
                "name": column.name,
                "language": column.language,
                "types": column.types,
                "outcome": column.outcome,
                "kernels": [
                    asdict(kernel) | {"problem": column.problems.get(number)}
                    for number, kernel in enumerate(column.kernels)
                ],
            }
            for column in columns
        ],
    }
