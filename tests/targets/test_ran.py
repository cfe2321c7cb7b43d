"""The whole model on targets that run on any machine: prompt and decoding, against numpy.

Each runs in a process of its own with DEV, and the test asserts which device and renderer it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import GOLDEN

from qwen3_tg.checkpoint import locate

pytestmark = pytest.mark.targets
ROOT = Path(__file__).parent.parent.parent
# DEV: tinygrad's device, its renderer, and what a float32 model may be off by, of the spread of its
# logits. The CPU with clang is what all other tests run on. WebGPU has exponentials of its own.
TARGETS = {
    "CPU:LLVM": ("CPU", "CPULLVMRenderer", 2e-4),
    "CPU:X86": ("CPU", "X86Renderer", 2e-4),
    "CL": ("CL", "OpenCLRenderer", 1e-3),
    "WEBGPU": ("WEBGPU", "WGSLRenderer", 1e-3),
}
KINDS = ["tiny", "tied_float32", "multi_query_float16", "moe_bfloat16", "yarn_bfloat16"]
IDS = [5, 17, 33, 120, 7, 9, 100, 42, 3, 11, 113, 60]  # every vocabulary here has them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dev", TARGETS)
def test_the_model_agrees_with_numpy(dev: str, kind: str, needs_device: Any) -> None:
    needs_device(dev)
    device, renderer, tolerance = TARGETS[dev]
    path = locate("tiny") if kind == "tiny" else GOLDEN / kind
    found = run(dev, device, path)
    assert (found["device"], found["renderer"]) == (device, renderer)
    reference = qwen3_tg_numpy.load(path)
    right = reference.logits([*IDS, *found["generated"]])
    scale = float(np.std(right))
    error = np.abs(np.array(found["logits"]) - right[: len(IDS)]).max() / scale
    assert error < tolerance, f"prompt: {error:.2g} of the logits' spread"
    error = np.abs(np.array(found["decoded"]) - right[-1]).max() / scale
    assert error < tolerance, f"decoded: {error:.2g} of the logits' spread"
    # a token is the reference's, or as good as that
    for n, id in enumerate(found["generated"]):
        row = right[len(IDS) - 1 + n]
        assert row.max() - row[id] < 2 * tolerance * scale, n
    assert found["batch"] < tolerance
    assert found["kept"] == {"tokens": 4 * len(IDS), "same": True}


def run(dev: str, device: str, path: Path) -> dict[str, Any]:
    child = Path(__file__).with_name("child.py")
    paths = [str(ROOT), str(ROOT / "backends")]
    environment = os.environ | {"DEV": dev, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("CACHEDB", None)
    command = [sys.executable, str(child), str(path), device, json.dumps(IDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["dtype"] == "float32"
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", str(GOLDEN / "tied_float32"), "--tokens", "9", "--device", "CPU"],
        ["kernels", str(GOLDEN / "tied_float32"), "--device", "CPU"],
        ["--device", "CPU", "What is 37 + 85?"],
        ["check", str(GOLDEN / "tied_float32"), "--tokens", "9"],
    ],
    ids=["check", "kernels", "answer", "the first that works"],
)
def test_the_cpu_computes_where_another_device_comes_first(
    arguments: list[str], needs_device: Any
) -> None:
    """tinygrad's own choice would be OpenCL here, for whatever names no device."""
    needs_device("CL")
    environment = {name: value for name, value in os.environ.items() if name != "DEV"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    command = [sys.executable, "-m", "qwen3_tg", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CPU" in done.stdout or done.stdout == "122\n"
