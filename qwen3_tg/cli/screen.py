"""A reply on a terminal: thinking that folds into one line, and an answer in Markdown."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from qwen3_tg.cli import terminal
from qwen3_tg.cli.markdown import MarkdownStream
from qwen3_tg.cli.region import Region
from qwen3_tg.reply import Piece

_THINKING_ROWS = 10  # shown of thinking while it streams; as many as half of the terminal has


class ScreenPrinter(terminal.ReplyPrinter):
    """`count` tells how many tokens a thinking was. `full`: thinking stays as it is. Where stderr
    is not a terminal the thinking goes there as it comes."""

    def __init__(
        self, seed: int, verbose: bool, count: Callable[[str], int], full: bool = False
    ) -> None:
        super().__init__(seed, verbose, speed=True)
        self._count, self._folds = count, sys.stderr.isatty() and not full
        self._thoughts, self._answer = Region(sys.stderr), Region(sys.stdout)
        self._markdown = MarkdownStream()
        self._notices: list[str] = []
        self._tail = ""  # of the thinking, from the start of a line on the screen
        self._began, self._next_look = 0.0, 0.0

    def show(self, piece: Piece) -> None:
        with _ctrl_c_later():  # in the middle of rendering it would lose lines
            super().show(piece)

    def notice(self, text: str) -> None:
        self._notices.append(text)  # told once no line of the reply is rewritten any more

    def finish(self) -> None:
        super().finish()
        for text in self._notices:
            terminal.note(f"({text})")
        self._notices = []

    def show_thinking(self, text: str) -> None:
        if not self._folds:
            return super().show_thinking(text)
        self._began = self._began or time.perf_counter()
        self._tail += terminal.harmless(text)
        self._now_and_then(self._show_thoughts)
        return None

    def end_thinking(self) -> None:
        if not self._folds:
            return super().end_thinking()
        self._thoughts.update([], [])
        count = self._count(self.thinking)
        seconds = time.perf_counter() - self._began
        terminal.note(f"thought for {count} token{'s' * (count != 1)}, {seconds:.1f} s")
        return None

    def show_text(self, text: str) -> None:
        self._markdown.push(terminal.harmless(text))
        self._now_and_then(self._show_answer)

    def end_text(self) -> None:
        self._show_answer(finished=True)

    def _now_and_then(self, look: Callable[[], None]) -> None:
        """Rendering a long block takes a while: at most a quarter of the time goes into it."""
        now = time.perf_counter()
        if now >= self._next_look:
            look()
            later = time.perf_counter()
            self._next_look = later + 3 * (later - now)

    def _show_thoughts(self) -> None:
        columns, rows = self._thoughts.size()
        lines = terminal.wrapped(self._tail, columns)
        shown = lines[-max(1, min(_THINKING_ROWS, rows // 2)) :]
        self._thoughts.update([], [terminal.dim(line) for line in shown])
        if len(lines) > 4 * _THINKING_ROWS:  # so that wrapping takes no longer and longer
            end = self._tail[len(self._tail.rstrip()) :]
            self._tail = "\n".join(lines[-_THINKING_ROWS:]) + end

    def _show_answer(self, finished: bool = False) -> None:
        self._answer.update(*self._markdown.lines(self._answer.size().columns, finished))


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C takes effect when this ends."""
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
