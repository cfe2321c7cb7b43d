"""The golden cases of the text side (tests/data), for the tests that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent.parent / "data"
TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"


def read_data(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def by_name(cases: list[dict[str, Any]]) -> list[Any]:
    """Golden cases as parameters of a test."""
    return [pytest.param(case, id=case["name"]) for case in cases]
