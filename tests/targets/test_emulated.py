"""Half precision on the tensor cores of GPUs, as tinygrad's emulator in Python computes them: a
prompt and one position, against numpy. Slow, so the model is tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import GOLDEN

pytestmark = pytest.mark.targets
ROOT = Path(__file__).parent.parent.parent
# DEV, a checkpoint whose sizes the tensor core's tiles divide, and positions of the prompt.
CASES = [
    ("PYTHON::METAL", "multi_head_float16", 8),
    ("PYTHON::gfx1100", "untied_bfloat16", 16),
    ("PYTHON::sm_80", "untied_bfloat16", 16),
]
HALF_TOLERANCE = 0.03  # of the logits' spread; measured 0.005


@pytest.mark.parametrize(("dev", "name", "positions"), CASES)
def test_tensor_cores_agree_with_numpy(dev: str, name: str, positions: int) -> None:
    ids = [(7 * n) % 120 for n in range(positions + 1)]
    child = Path(__file__).with_name("emulated.py")
    paths = [str(ROOT), str(ROOT / "backends")]
    environment = os.environ | {"DEV": dev, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("CACHEDB", None)
    command = [sys.executable, str(child), str(GOLDEN / name), json.dumps(ids)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tensor_core_products"] > 0, "no product took them"
    right = qwen3_tg_numpy.load(GOLDEN / name).logits(ids)
    error = np.abs(np.array(found["logits"]) - right).max() / np.std(right)
    assert error < HALF_TOLERANCE, f"{error:.2g} of the logits' spread"
