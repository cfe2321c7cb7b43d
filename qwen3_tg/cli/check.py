"""`qwen3 check`: whether a device computes a model right, and which step does not."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

from qwen3_tg import __version__
from qwen3_tg import device as devices
from qwen3_tg.check.run import WRONG, Layer, Report, Step, check
from qwen3_tg.cli import terminal


def run(options: argparse.Namespace) -> int:
    """Compare, print what was found, and give the exit code: 0 right, 1 wrong."""
    policy = devices.choose(
        options.device, options.dtype, options.kv_dtype, options.kernels, options.threads
    )
    began = time.perf_counter()

    def on_layer(layer: Layer, number: int, total: int) -> None:
        each = (time.perf_counter() - began) / number
        worst = max(layer.steps, key=lambda step: step.times)
        mark = "WRONG" if layer.wrong else "right"
        terminal.note(
            f"{number} of {total}: {layer.name} {mark}, at most {_times(worst)} ({_bare(worst)}); "
            f"{each * (total - number):.0f} s left"
        )

    report = check(options.model or "tiny", policy, options.context, options.tokens, on_layer)
    if options.json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print(report, time.perf_counter() - began)
    return 1 if report.first_wrong else 0


def _print(report: Report, seconds: float) -> None:
    policy = report.policy
    print(f"model    {report.model} ({', '.join(report.formats)})")
    how = f", {policy.kernels} kernels" if policy.device == "CPU" else ""
    types = f"{policy.dtype}, cache {policy.kv_dtype}{how}"
    print(f"device   {policy.device} ({report.renderer}), {types}")
    yarn = ", with YaRN" if report.yarn else ""
    print(
        f"did      a prompt of {report.prompt_tokens} in chunks of {policy.prefill_chunk} and 2 "
        f"single positions{yarn}, in {seconds:.0f} s"
    )
    print()
    print("step                        largest error, where 1 is what rounding makes, 10 is wrong")
    for step in _worst_of_each_kind(report):
        mark = "  WRONG" if step.is_wrong else ""
        print(f"{_bare(step):<26}  {_times(step):>9}  {step.name}{mark}")
    last = report.layers[-1]
    print()
    print(
        f"at the end the logits are {last.grown:.1e} of their size away from the reference's, "
        f"where rounding makes {last.expected:.1e}; the next token is "
        + ("the same" if report.same_token else "another one")
    )
    print(_verdict(report))


def _verdict(report: Report) -> str:
    step, policy = report.first_wrong, report.policy
    if step is None:
        if not report.layers[-1].grown <= WRONG * report.layers[-1].expected:
            return (
                "verdict: every step is right, but errors grow more than rounding explains: "
                "compare with --dtype float32"
            )
        return f"verdict: {policy.device} computes this model right"
    where = f"{step.name} at position {step.position}"
    joined = " (alone it is right: wrong in the same kernel as the steps before it)"
    return (
        f"verdict: WRONG on {policy.device}: {where}{joined if step.joined else ''}, "
        f"error {step.error:.2g} where rounding makes {step.typical:.2g}\n{_advice(report, step)}"
    )


def _advice(report: Report, step: Step) -> str:
    policy = report.policy
    if policy.kernels != "generic":
        return "what to do: run with --kernels generic, and report this with the output of --json"
    if policy.dtype == "float16":
        return "what to do: half-precision numbers overflow at 65,504: try --dtype float32"
    if policy.dtype != "float32":
        return "what to do: try --dtype float32; if that is right, the device's bfloat16 is not"
    if step.joined:
        return (
            "what to do: the compiler joins these steps wrongly: try NOOPT=1, a newer driver or "
            "another device, and report it to tinygrad with the output of --json"
        )
    return "what to do: try a newer driver or another --device, and report the output of --json"


def _worst_of_each_kind(report: Report) -> list[Step]:
    """The largest error of each kind of step over all layers, in the order of computation."""
    worst: dict[str, Step] = {}
    for layer in report.layers:
        for step in layer.steps:
            kind = _bare(step)
            if kind not in worst or step.times > worst[kind].times:
                worst[kind] = step
    return list(worst.values())


def _bare(step: Step) -> str:
    """Its kind: without the number of the layer."""
    parts = step.name.split(".")
    if parts[0] != "layers":
        return step.name
    return ".".join(parts[2:]) or "whole block"


def _times(step: Step) -> str:
    return f"{step.times:.2f}" if step.times < 1000 else f"{step.times:.0e}"


def _as_json(report: Report) -> dict[str, Any]:
    policy = asdict(report.policy) | {"native": sorted(report.policy.native)}
    first = report.first_wrong
    return {
        "qwen3_tg": __version__,
        "model": report.model,
        "formats": report.formats,
        "policy": policy,
        "renderer": report.renderer,
        "prompt_tokens": report.prompt_tokens,
        "yarn": report.yarn,
        "wrong_from_times": WRONG,
        "right": first is None,
        "first_wrong": asdict(first) if first else None,
        "same_token": report.same_token,
        "layers": [asdict(layer) for layer in report.layers],
    }
