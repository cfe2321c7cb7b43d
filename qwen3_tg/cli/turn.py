"""One turn of a conversation: messages in, pieces shown as they come, the answer out."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_tg.cli import terminal
from qwen3_tg.cli.generate import reply, with_system
from qwen3_tg.cli.tools import ChatTools, ToolPrinter
from qwen3_tg.errors import ContextError, Qwen3Error
from qwen3_tg.llm import LLM
from qwen3_tg.reply import Piece
from qwen3_tg.sampling import Sampling

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """`messages` are those that were there and what came of them: calls of tools with their
    results, and the answer, which is what was answered before Ctrl-C. After an error rounds of
    calls that were whole before it stay; where there was none there is nothing new."""

    messages: list[Message]
    has_failed: bool
    is_stopped: bool


def perform(
    llm: LLM,
    messages: list[Message],
    sampling: Sampling,
    options: argparse.Namespace,
    printer: ToolPrinter,
    tools: ChatTools,
) -> Turn:
    """Answer these messages, with as many rounds of calls as it takes. Errors are told."""

    def ask(messages: Sequence[Mapping[str, Any]], rounds: int) -> Iterator[Piece]:
        sent = with_system(messages, options)
        return reply(
            llm, sent, sampling.next_turn(rounds), options, tools.schemas, on_notice=printer.notice
        )

    turns = tools.answer(ask, messages)
    answered: list[Message] = []
    is_stopped, problem = False, ""
    try:
        terminal.stream(turns, printer.show, llm)
        problem = printer.unanswered
        if printer.reason == "context":
            terminal.note("(/clear starts anew)")
    except KeyboardInterrupt:
        with _deaf_to_ctrl_c():  # pressed twice it stops the answer, too, and nothing else
            printer.finish()
            terminal.note("(stopped)")
        is_stopped = True
        answered = [{"role": "assistant", "content": printer.text}] if printer.text else []
    except ContextError as e:
        earlier = any(message["role"] == "assistant" for message in messages)
        todo = (
            "; /clear starts anew, /undo takes the last turn back; "
            "qwen3 chat --overflow shift leaves out the oldest turns"
        )
        problem = f"{e}{todo if earlier else ''}"
    except Qwen3Error as e:
        printer.finish()
        problem = str(e)
    if problem:
        terminal.note(f"error: {problem}")
    return Turn([*map(dict, turns.messages), *answered], bool(problem), is_stopped)


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
