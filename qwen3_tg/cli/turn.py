"""One turn of a conversation: messages in, pieces shown as they come, the answer out."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

from qwen3_tg.cli import terminal
from qwen3_tg.cli.generate import reply
from qwen3_tg.errors import ContextError, Qwen3Error
from qwen3_tg.llm import LLM
from qwen3_tg.sampling import Sampling

Message = dict[str, Any]


def perform(
    llm: LLM,
    messages: list[Message],
    sampling: Sampling,
    options: argparse.Namespace,
    printer: terminal.ReplyPrinter,
) -> Message | None:
    """The model's message after these; None where there is none, after an error, which is told, or
    where Ctrl-C came before the answer. What was answered before Ctrl-C is the answer."""
    try:
        pieces = reply(llm, messages, sampling, options, on_notice=printer.notice)
        terminal.stream(pieces, printer.show, llm)
        if printer.reason == "context":
            terminal.note("(/clear starts anew)")
    except KeyboardInterrupt:
        with _deaf_to_ctrl_c():  # pressed twice it stops the answer, too, and nothing else
            printer.finish()
            terminal.note("(stopped)")
    except ContextError as e:
        terminal.note(f"error: {e}; /clear starts anew, /undo takes the last turn back")
        return None
    except Qwen3Error as e:
        printer.finish()
        terminal.note(f"error: {e}")
        return None
    return {"role": "assistant", "content": printer.text} if printer.text else None


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def content_of(message: Mapping[str, Any]) -> str:
    """A message's text; none where it only calls tools."""
    return message.get("content") or ""
