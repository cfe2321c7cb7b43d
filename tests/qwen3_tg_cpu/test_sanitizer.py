"""ThreadSanitizer watches the kernels' threads: it sees no race, and sees one that is planted."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_threads.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_threads", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_no_race_is_seen(tool: ModuleType) -> None:
    code, text = tool.check(tool.program_text(), threads=3)
    assert code == 0, text
    assert "3 threads, two callers, 1440 steps, done" in text


@pytest.mark.long
def test_a_planted_race_is_seen(tool: ModuleType) -> None:
    """Steps read floats that another thread may still be writing.

    The barriers around experts' numbers stay: with wild ones the program would crash instead.
    """
    barrier = "        barrier(pool);\n    }\n}"
    text = tool.program_text()
    assert text.count(barrier) == 1
    kept = "step[0] == ROUTE || step[0] == GROUP || step[STEP_NUMBERS] == ROUTE"
    text = text.replace(barrier, barrier.replace("barrier(pool)", f"if ({kept}) barrier(pool)"))
    # Threads meet by chance: on two quiet cores in each run, with ten runs at once in every other.
    for _ in range(6):
        code, report = tool.check(text, threads=3)
        if code != 0:
            break
    assert code == 1
    assert re.search(r"data race.*", report)
