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
    barrier = "        barrier(pool);\n    }\n}"
    text = tool.program_text()
    assert text.count(barrier) == 1
    without = barrier.replace("barrier(pool)", "if (step[0] != LINEAR) barrier(pool)")
    code, report = tool.check(text.replace(barrier, without), threads=3)
    assert code == 1
    assert re.search(r"data race.*", report)
