"""Write the table of targets into backends/README.md, from runs on this machine.

    python tools/targets_table.py                 # everything that can be tried here, minutes
    python tools/targets_table.py --only CUDA NV  # some rows; the others stay as they are

A row says the strongest thing that happened, and never more: *ran*, with the errors that `qwen3
check` found against numpy; *compiled*, by which compiler; *checked*, of the text's syntax and
types alone; *lowered*, which is text that nothing has read. What was found is kept in
backends/targets.json, so that rows of machines that this one is not stay, with their commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "backends" / "README.md", ROOT / "backends" / "targets.json"
START, END = "<!-- targets: start -->", "<!-- targets: end -->"
MODELS = ("tiny", "tests/golden/moe_bfloat16")  # dense, and a mixture of experts
SHAPE = "Qwen3-0.6B"  # whose layer is lowered where nothing runs
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Row:
    """`dev` is tinygrad's DEV where the target may run, `options` are for `qwen3 check`; `lower`
    are the targets of `qwen3 kernels`, best first."""

    name: str
    dev: str
    options: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()


ROWS = (
    Row("CPU, own kernels", "CPU", ("--kernels", "fast")),
    Row("CPU, clang", "CPU", ("--kernels", "generic")),
    Row("CPU, LLVM", "CPU:LLVM"),
    Row("CPU, X86", "CPU:X86"),
    Row("OpenCL", "CL", (), ("OPENCL", "OPENCL:fp16")),
    Row("WebGPU", "WEBGPU", (), ("WGSL:f16", "WGSL")),
    Row("CUDA", "CUDA", (), ("CUDA:sm_90", "CUDA:sm_80")),
    Row("NV", "NV", (), ("CUDA:sm_90", "CUDA:sm_80")),
    Row("PTX", "CUDA:PTX", (), ("PTX:sm_90", "PTX:sm_80")),
    Row("AMD, LLVM", "AMD:AMDLLVM", (), ("AMD:gfx1100", "AMD:gfx1201", "AMD:gfx942")),
    Row("AMD, HIP", "AMD:HIP", (), ("HIP:gfx1100", "HIP:gfx1201", "HIP:gfx942")),
    Row("Metal", "METAL", (), ("METAL:Apple7", "METAL:Apple9")),
    Row("QCOM", "QCOM", (), ("QCOM",)),
)


@dataclass(frozen=True)
class Result:
    """What happened to a row: `outcome` is ran, ran wrong, compiled, checked or lowered."""

    outcome: str
    details: str
    error: str
    machine: str
    date: str
    commit: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose names begin so")
    names = parser.parse_args().only
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for row in ROWS:
        if names and not any(row.name.startswith(name) for name in names):
            continue
        print(row.name, flush=True)
        found = run(row) or lower(row)
        if found is None:
            print("  nothing could be tried", flush=True)
            continue
        print(f"  {found.outcome}: {found.details} {found.error}", flush=True)
        before = kept.get(row.name)
        if before and before["outcome"] == "ran" and not found.outcome.startswith("ran"):
            print("  kept: it ran elsewhere", flush=True)
            continue
        kept[row.name] = asdict(found)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    write(kept)


def run(row: Row) -> Result | None:
    """By `qwen3 check`; None where the device is not here."""
    device = row.dev.partition(":")[0]
    errors, renderer = [], ""
    for model in MODELS:
        options = ["check", model, "--device", device, *row.options, "--json"]
        done = qwen3(options, {"DEV": row.dev})
        if done.returncode == 2:
            print(f"  {done.stderr.strip().splitlines()[-1]}", flush=True)
            return None
        report = json.loads(done.stdout)
        renderer = report["renderer"]
        worst = max(s["times"] for layer in report["layers"] for s in layer["steps"])
        grown = report["layers"][-1]["grown"]
        if done.returncode == 1:
            where = report["first_wrong"]["name"]
            return result("ran wrong", f"{renderer}, {model}", f"{where} is wrong", row)
        errors.append(f"logits {grown:.1e}, steps at most {worst:.1f}")
    policy = report["policy"]
    types = f"{policy['dtype']}, cache {policy['kv_dtype']}"
    details = f"{describe(row.dev)} ({renderer}, {types})"
    return result("ran", details, "; ".join(errors), row)


def lower(row: Row) -> Result | None:
    """By `qwen3 kernels`: the strongest that all targets of a row have in common."""
    outcomes, details = [], []
    for target in row.lower:
        done = qwen3(["kernels", SHAPE, "--target", target, "--json"], {})
        if not done.stdout:
            print(f"  {done.stderr.strip()}", flush=True)
            return None
        (found,) = json.loads(done.stdout)["targets"]
        kernels = found["kernels"]
        right = sum(kernel["problem"] is None for kernel in kernels)
        words = found["outcome"]
        if right < len(kernels) or words.startswith("lowered; not"):
            outcomes.append("lowered")
        else:
            outcomes.append("compiled" if words.startswith("compiled") else "checked")
        words = words.removeprefix("compiled by ").removeprefix("lowered; ")
        details.append(f"{target}: {words}")
    if not outcomes:
        return None
    weakest = max(outcomes, key=["compiled", "checked", "lowered"].index)
    return result(weakest, "; ".join(details), "", row)


def result(outcome: str, details: str, error: str, row: Row) -> Result:
    commit = command("git", "rev-parse", "--short", "HEAD")
    today = datetime.date.today().isoformat()
    return Result(outcome, details, error, machine(), today, commit)


def describe(dev: str) -> str:
    done = qwen3(["devices", "--json"], {"DEV": dev})
    device = dev.partition(":")[0]
    found = json.loads(done.stdout)["devices"]
    return next(one["what"] for one in found if one["name"] == device)


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2]
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{' '.join(name.split())}, {platform.system()} {platform.machine()}"


def qwen3(options: list[str], more: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "backends")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
    line = [sys.executable, "-m", "qwen3_tg", *options]
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def command(*line: str) -> str:
    return subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def write(kept: Mapping[str, Mapping[str, Any]]) -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{table(kept)}{END}{after}", encoding="utf-8")


def table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown. Errors are in the order of MODELS."""
    lines = [
        "By `python tools/targets_table.py`. *Ran*: `qwen3 check` of the embedded model and of a",
        "small mixture of experts, in that order, each with the relative error of its logits",
        "against numpy and its largest error of a step, where 1 is what rounding makes and 10 is",
        f"wrong. *Compiled*: all kernels of a layer of {SHAPE}, a chunk of a prompt and one",
        "position, by the compiler that is named. *Checked*: their syntax and types. *Lowered*:",
        "their text.",
        "",
        "| target | | with | error | machine, date, commit |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        found = kept.get(row.name)
        if found is None:
            lines.append(f"| {row.name} | nothing yet | | | |")
            continue
        where = f"{found['machine']}, {found['date']}, {found['commit']}"
        cells = (row.name, found["outcome"], found["details"], found["error"], where)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
