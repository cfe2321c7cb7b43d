"""Every example runs, as its reader would run it, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What a program with strict types writes, as the docs have it.
TYPED = """
import contextlib
from pathlib import Path
from typing import Any

import qwen3_tg
from qwen3_tg import Answer, Batch, Generation, Request, Sampling, Slots

llm = qwen3_tg.load(Path("model"), draft=Path("smaller"))
messages = [{"role": "user", "content": "hi"}]
messages, dropped = llm.fit(messages)
others: list[dict[str, Any]] = []
others, dropped = llm.fit(others)
with contextlib.closing(llm.chat(messages)) as reply:
    print(next(reply))
ids: Generation = llm.generate_ids([1])
slots: Slots = llm.slots(2)
batch: Batch = llm.batch()
for answer in batch.answers([Request(messages, {"thinking": False}), messages, "a text"]):
    one: Answer = answer
print({Sampling(): 1})
llm.generate("a", temperature=0)
"""
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


def test_examples_and_what_the_docs_write_have_the_right_types(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TYPED)
    files = [*sorted(EXAMPLES.glob("*.py")), program]
    command = [sys.executable, "-m", "mypy", "--strict", *files]
    run = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=300)
    errors = [line for line in run.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, run.stdout + run.stderr  # the one that is meant
    assert 'Argument "temperature" to "generate"' in errors[0]
