"""How a reply looks: the answer on stdout, thinking dim on stderr, no moving of the cursor."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from qwen3_tg.device import Policy
from qwen3_tg.llm import LLM
from qwen3_tg.reply import End, Piece, Text, Thinking, ToolCall

_Shown = TypeVar("_Shown")
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
# What a model writes can be anything, and a terminal obeys control characters: none but tab and
# line break reach it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ReplyPrinter:
    """Prints pieces as they come. `text` is the answer so far, `reason` why it ended. `seed` and
    `verbose` are for what is said at the end."""

    def __init__(self, seed: int = 0, verbose: bool = False) -> None:
        self.text, self.reason = "", ""
        self._seed, self._verbose = seed, verbose
        self._thinking = False  # a line of thinking is unfinished

    def show(self, piece: Piece) -> None:
        if isinstance(piece, Thinking):
            self._thinking = True
            _write(sys.stderr, piece.text, dim=True)
        elif isinstance(piece, Text):
            self._end_thinking()
            self.text += piece.text
            _write(sys.stdout, piece.text)
        elif isinstance(piece, ToolCall):
            self._end_thinking()
            call = json.dumps({"name": piece.name, "arguments": piece.arguments}) + "\n"
            if self.text and not self.text.endswith("\n"):
                call = "\n" + call  # a call has a line of its own
            self.text += call
            _write(sys.stdout, call)
        else:
            self.reason = piece.reason
            self.finish()
            note_end(piece, self._seed, self._verbose)

    def finish(self) -> None:
        """End the line, whether the reply is whole or was interrupted."""
        self._end_thinking()
        if self.text and not self.text.endswith("\n"):
            _write(sys.stdout, "\n")

    def _end_thinking(self) -> None:
        if self._thinking:
            _write(sys.stderr, "\n\n")
        self._thinking = False


def note(text: str) -> None:
    """A remark of ours, dim, on stderr."""
    _write(sys.stderr, text, dim=True)
    _write(sys.stderr, "\n")


def note_device(policy: Policy, seconds: float) -> None:
    how = f", {policy.kernels} kernels on {policy.threads} threads" if policy.threads else ""
    what = f"device {policy.device} ({policy.reason}), {policy.dtype}{how}"
    note(f"{what}; loaded in {seconds:.1f} s")


def note_end(end: End, seed: int, verbose: bool) -> None:
    """Why it ended where that is not the model's own wish, and with `verbose` counts and times."""
    if end.reason == "length":
        note("(cut off at --max-new-tokens)")
    elif end.reason == "context":
        note("(cut off: the context is full)")
    if not verbose:
        return
    later = end.thinking_tokens + end.answer_tokens - 1
    speed = f", then {later / end.later_tokens_s:.1f} tokens/s" if end.later_tokens_s > 0 else ""
    note(
        f"prompt {end.prompt_tokens} tokens, thinking {end.thinking_tokens}, "
        f"answer {end.answer_tokens}; first token after {end.first_token_s:.2f} s{speed}; "
        f"ended by {end.reason}; seed {seed}"
    )


@contextmanager
def loading() -> Iterator[Callable[[int, int], None]]:
    """A progress bar for loading, on a terminal and where it lasts.

    Gives a function to call with the bytes done and all of them."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        began, task = time.monotonic(), None

        def update(done: int, total: int) -> None:
            nonlocal task
            if task is None and time.monotonic() - began > 0.5:
                task = progress.add_task("loading", total=total)
            if task is not None:
                progress.update(task, completed=done)

        yield update


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A line that counts, on a terminal. Gives a function to call with how many of all are done."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what, spinner="dots") as status:
        yield lambda done, total: status.update(f"{what}, {done} of {total}")


def stream(pieces: Iterator[_Shown], show: Callable[[_Shown], None], llm: LLM) -> None:
    """Show all pieces; on a terminal a sign of life stands there until the first one."""
    with _waiting(llm):
        first = next(pieces, None)
    if first is not None:
        show(first)
    for piece in pieces:
        show(piece)


@contextmanager
def _waiting(llm: LLM) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    reading = "reading the prompt"
    with Console(stderr=True).status(reading, spinner="dots") as status:

        def on_kernels(done: int, total: int) -> None:
            making = f"making kernel {done} of {total}, once for this model and device"
            status.update(making if done < total else reading)

        llm.on_kernels = on_kernels
        try:
            yield
        finally:
            llm.on_kernels = None


def _obeys_codes() -> bool:
    return os.environ.get("TERM", "dumb") != "dumb" and "NO_COLOR" not in os.environ


def _write(stream: TextIO, text: str, dim: bool = False) -> None:
    if stream.isatty():
        text = _CONTROL.sub("\ufffd", text)
        text = f"{_DIM}{text}{_RESET}" if dim and _obeys_codes() else text
    stream.write(text)
    stream.flush()
