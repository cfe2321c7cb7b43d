"""Record what transformers' get_json_schema makes of the functions of the tests.

Run with transformers installed, torch is not needed:

    python tools/make_tool_schemas.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers.utils import get_json_schema

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS / "qwen3_tg"))

from tool_functions import FUNCTIONS  # noqa: E402

schemas = {function.__name__: get_json_schema(function) for function in FUNCTIONS}
text = json.dumps(schemas, indent=1)
(TESTS / "data" / "tool_schemas.json").write_text(text + "\n", encoding="utf-8")
