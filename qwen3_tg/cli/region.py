"""The last lines of a terminal, which may yet be written over; all above them stay.

Only what changed is written: where a line grows, its new end. So nothing flickers, and a terminal
that keeps what scrolls out of it keeps every finished line once.
"""

from __future__ import annotations

import os
from typing import TextIO


class Region:
    """Lines that are shown on `stream`, a terminal, below what was there. They may hold the codes
    of colours, and each is at most as wide as the terminal."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._shown: list[str] = []
        self._columns = 0

    def size(self) -> os.terminal_size:
        """Columns and lines; 80 x 24 where the terminal does not say."""
        try:
            found = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):  # a stream of a test has no number
            found = os.terminal_size((0, 0))
        return os.terminal_size((found.columns or 80, found.lines or 24))

    def update(self, done: list[str], live: list[str]) -> None:
        """Show `done`, which stays, and below it as many of the last lines of `live` as fit."""
        columns, rows = self.size()
        if len(live) >= rows:
            live = live[len(live) - rows + 1 :]
        same_width = self._columns in (0, columns)
        new = [*done, *live]
        same = _common(self._shown, new) if same_width else 0
        text = self._continued(new, same) if same_width else None
        if text is None:
            same = min(same, max(0, len(new) - 1))  # the cursor belongs at the end of a line
            text = self._back(same, columns) + "\n".join(new[same:])
        if done and not live:
            text += "\n"
        if text:
            self._stream.write(text)
            self._stream.flush()
        self._shown, self._columns = live, columns

    def _continued(self, new: list[str], same: int) -> str | None:
        """What to write where the last line only grows or lines follow; else None."""
        last = len(self._shown) - 1
        if last < 0:
            return "\n".join(new)
        if same > last:
            return "".join("\n" + line for line in new[same:])
        if same == last < len(new) and new[last].startswith(self._shown[last]):
            return "\n".join([new[last][len(self._shown[last]) :], *new[last + 1 :]])
        return None

    def _back(self, same: int, columns: int) -> str:
        """Move to the start of the first line that changes, and clear from there on."""
        changing = self._shown[same:]
        # a terminal that became narrower has wrapped them
        rows = sum(max(1, -(-_width(line) // columns)) for line in changing)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"


def _common(old: list[str], new: list[str]) -> int:
    pairs = zip(old, new, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))


def _width(line: str) -> int:
    from rich.text import Text

    return Text.from_ansi(line).cell_len
