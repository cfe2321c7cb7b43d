"""How a reply looks: the answer on stdout, thinking dim on stderr, no moving of the cursor (that is
screen.py's)."""

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
_NO_ANSWER = {
    "context": "no answer: the context was full before it began; --context N makes it larger",
    "length": "no answer: --max-new-tokens ended it before it began",
    "loop": "no answer: it repeated itself before it began",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ReplyPrinter:
    """Prints pieces as they come. `text` is the answer so far, `thinking` what was thought before
    it, `reason` why it ended and `end` the counts. `seed` and `verbose` are for what is said at the
    end, or with `speed` in a few words. Another look of it overrides the four methods that show and
    end a part."""

    def __init__(self, seed: int = 0, verbose: bool = False, speed: bool = False) -> None:
        self.text, self.thinking, self.reason = "", "", ""
        self.end: End | None = None
        self._seed, self._verbose, self._speed = seed, verbose, speed
        self._is_thinking = False  # a line of thinking is unfinished
        self._is_answering = False

    def show(self, piece: Piece) -> None:
        if isinstance(piece, Thinking):
            self._is_thinking = True
            self.thinking += piece.text
            self.show_thinking(piece.text)
        elif isinstance(piece, End):
            self.reason, self.end = piece.reason, piece
            self.finish()
            note_end(piece, self._seed, self._verbose)
            if self._speed and not self._verbose:
                note(speed(piece))
        else:
            self._end_thinking()
            text = piece.text if isinstance(piece, Text) else _call(piece)
            if not isinstance(piece, Text) and self.text and not self.text.endswith("\n"):
                text = "\n" + text  # a call has a line of its own
            self._is_answering = True
            self.text += text
            self.show_text(text)

    @property
    def unanswered(self) -> str:
        """Why there is no answer, where something ended the reply before there was one; or ""."""
        return "" if self.text.strip() else _NO_ANSWER.get(self.reason, "")

    def finish(self) -> None:
        """End the line, whether the reply is whole or was interrupted."""
        self._end_thinking()
        if self._is_answering:
            self._is_answering = False
            self.end_text()

    def _end_thinking(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            self.end_thinking()

    def notice(self, text: str) -> None:
        """Tell what was done in the middle of the reply."""
        notice(text)

    def show_thinking(self, text: str) -> None:
        _write(sys.stderr, text, is_dim=True)

    def end_thinking(self) -> None:
        _write(sys.stderr, "\n\n")

    def show_text(self, text: str) -> None:
        _write(sys.stdout, text)

    def end_text(self) -> None:
        if not self.text.endswith("\n"):
            _write(sys.stdout, "\n")


def _call(piece: ToolCall) -> str:
    return json.dumps({"name": piece.name, "arguments": piece.arguments}) + "\n"


def note(text: str) -> None:
    """A remark of ours, dim, on stderr; on a terminal no word of it is broken."""
    if sys.stderr.isatty():
        lines = wrapped(harmless(text), size(sys.stderr).columns)
        sys.stderr.write("".join(f"{dim(line)}\n" for line in lines))
        sys.stderr.flush()
    else:
        _write(sys.stderr, f"{text}\n")


def notice(text: str) -> None:
    """What was done in the middle of an answer, whose line has not ended."""
    note(f"\n({text})")


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
    elif end.reason == "loop":
        note("(cut off: it repeats itself; --no-loop-guard lets it)")
    if not verbose:
        return
    note(f"{counts(end)}; ended by {end.reason}; seed {seed}")
    if end.guessed_tokens:
        gain = f"; {end.gain:.2f} times as fast as without" if end.gain else ""
        note(f"guesses: {end.right_guesses} of {end.guessed_tokens} tokens right{gain}")


def counts(end: End) -> str:
    """How many tokens of each kind, and how fast."""
    later = end.thinking_tokens + end.answer_tokens - 1
    speed = f", then {later / end.later_tokens_s:.1f} tokens/s" if end.later_tokens_s > 0 else ""
    return (
        f"prompt {end.prompt_tokens} tokens, thinking {end.thinking_tokens}, "
        f"answer {end.answer_tokens}; first token after {end.first_token_s:.2f} s{speed}"
    )


def kept(texts: int, nbytes: int) -> str:
    """What is kept besides the conversation at hand."""
    others = f"{texts} other text{'s' * (texts != 1)}"
    return f"kept: what is computed of {others}, {nbytes:,} bytes of main memory"


def speed(end: End) -> str:
    """In a few words, for after each answer of a conversation."""
    later = end.thinking_tokens + end.answer_tokens - 1
    used = end.prompt_tokens + end.thinking_tokens + end.answer_tokens
    fast = f", {later / end.later_tokens_s:.1f} tokens/s" if end.later_tokens_s > 0 else ""
    return f"({end.answer_tokens} tokens{fast}; {used:,} tokens of context)"


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


def harmless(text: str) -> str:
    """Without the control characters that a terminal would obey."""
    return _CONTROL.sub("\ufffd", text)


def size(stream: TextIO) -> os.terminal_size:
    """Columns and lines of a terminal; 80 x 24 where it does not say."""
    try:
        found = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # a stream in memory has no number
        found = os.terminal_size((0, 0))
    return os.terminal_size((found.columns or 80, found.lines or 24))


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken between words where there are any."""
    from rich.console import Console
    from rich.text import Text

    lines = Text(text, overflow="fold").wrap(Console(width=columns), columns)
    return [line.plain.rstrip() for line in lines]


def dim(line: str) -> str:
    """With the codes around it, for a terminal that shows them and a user who wants them."""
    wished = not os.environ.get("NO_COLOR")  # no-color.org
    return f"{_DIM}{line}{_RESET}" if line and wished and obeys_codes() else line


def obeys_codes() -> bool:
    """Whether it is likely that a terminal shows colours and moves its cursor."""
    return os.environ.get("TERM", "dumb") != "dumb"


def _write(stream: TextIO, text: str, is_dim: bool = False) -> None:
    if stream.isatty():
        text = dim(harmless(text)) if is_dim else harmless(text)
    stream.write(text)
    stream.flush()
