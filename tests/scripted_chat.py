"""`qwen3 chat` with a model that answers what the environment says, for tests of its looks.

SCRIPT is JSON: a list of answers, each a list of [kind, text, seconds to wait after each character
of it]; the last answer is given again and again. Everything else is the command as it is."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from qwen3_tg.cli import main
from qwen3_tg.llm import LLM
from qwen3_tg.reply import End, Piece, Text, Thinking

ANSWERS = json.loads(os.environ["SCRIPT"])


def answer(llm: LLM, messages: list[dict[str, Any]], **options: Any) -> Iterator[Piece]:
    parts = ANSWERS.pop(0) if len(ANSWERS) > 1 else ANSWERS[0]
    for kind, text, wait_s in parts:
        for character in text:
            yield Thinking(character) if kind == "thinking" else Text(character)
            time.sleep(wait_s)
    yield End("stop", 10, 5, 20, 0.1, 1.0)


if __name__ == "__main__":
    LLM.chat = answer  # type: ignore[method-assign, assignment]
    sys.exit(main(["chat", *sys.argv[1:]]))
