"""Every example runs, as its reader would run it, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPECTED = {
    "batch.py": ["What is 24 + 216? 240\n", " tokens/s"],
    "chat.py": ["> What is 37 + 85?", "= 122 ", "= 134 "],
    "tools.py": ["calculator('123 * 45') = 5535\n5535\n", "'role': 'tool'"],
    "step_by_step.py": ["<|im_start|>assistant", "<think>"],
    "against_numpy.py": [
        "CPU: max abs error",
        "best token the same at 100%",
        "layers.0.self_attn.q_proj",
    ],
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_runs_and_prints_what_it_promises(path: Path) -> None:
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for text in EXPECTED[path.name]:
        assert text in run.stdout
