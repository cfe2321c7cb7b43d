"""Markdown as it streams in, to lines for a terminal.

A block (a paragraph, an item of a list, a line of code) is certain once another has begun after it
on a whole line; until then its lines may change, as `**` in the first line may be closed in the
third. Colours are for markdown_looks.py, the cursor is for region.py.
"""

from __future__ import annotations

import re
from itertools import pairwise

from rich.text import Text

from qwen3_tg.cli.markdown_looks import PARSER, Block, highlight, rendered

_LINE = re.compile(r"[^\n]*\n|[^\n]+")  # Python's own splitlines() knows more ends of a line
_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,}) *([^\n`]*)")


class MarkdownStream:
    """Feed text with `push`; `lines` gives what it looks like."""

    def __init__(self) -> None:
        self._pending = ""  # what is not yet certain
        self._gap = False  # an empty line is due before what comes next
        self._begun = False
        self._fence: tuple[str, str, str] | None = None  # of open code: indent, marker, language
        self._code: list[str] = []  # its lines so far

    def push(self, text: str) -> None:
        self._pending += text

    def lines(self, columns: int, finished: bool = False) -> tuple[list[str], list[str]]:
        """Lines that are new and certain, each given once, and lines that may yet change.
        `finished`: no more text comes, and all of it is certain."""
        if finished and not self._pending.endswith("\n"):
            self._pending += "\n"
        done: list[str] = []
        while self._take_text(done, columns) if self._fence is None else self._take_code(done):
            pass
        if self._fence is not None:
            return done, self._live_code(columns)
        if finished:
            done += self._render(self._pending, columns)
            self._pending = ""
        gap, begun = self._gap, self._begun
        live = self._render(self._pending, columns)
        self._gap, self._begun = gap, begun  # it is rendered again
        return done, live

    def _take_text(self, done: list[str], columns: int) -> bool:
        """Render blocks that are certain; True if code begins after them."""
        whole = self._pending[: self._pending.rfind("\n") + 1]
        text_lines = _LINE.findall(whole)
        blocks = _blocks(whole)
        code = next((start for start, kind in blocks if kind == "fence"), None)
        end = code if code is not None else blocks[-1][0] if blocks else 0
        before = "".join(text_lines[:end])
        done += self._render(before, columns)
        self._pending = self._pending[len(before) :]
        if code is None or not (opening := _FENCE.match(text_lines[code])):
            return False
        self._fence, self._code = (opening[1], opening[2], opening[3].strip()), []
        self._pending = self._pending[len(text_lines[code]) :]
        done += [*self._due(), *rendered(Text(text_lines[code].strip(), "dim"), 0)]
        return True

    def _take_code(self, done: list[str]) -> bool:
        """Render whole lines of code; True if it ends."""
        assert self._fence is not None
        indent, marker, language = self._fence
        *whole, self._pending = self._pending.split("\n")
        for n, line in enumerate(whole):
            bare = line.strip()
            if len(bare) >= len(marker) and set(bare) == {marker[0]}:
                self._pending = "\n".join([*whole[n + 1 :], self._pending])
                self._fence = None
                done += self._coloured(language, len(self._code) - n)
                done += rendered(Text(bare, "dim"), 0)
                return True
            self._code.append(_unindented(line, indent))
        done += self._coloured(language, len(self._code) - len(whole))
        return False

    def _coloured(self, language: str, start: int) -> list[str]:
        """Lines of code from `start` on, in the colours they have after those before. They are not
        wrapped: the terminal does that, and then they are copied as they are."""
        if start >= len(self._code):
            return []
        text = highlight("\n".join(self._code), language)
        return [rendered(line, 0)[0] for line in text.split("\n", allow_blank=True)[start:]][
            : len(self._code) - start
        ]

    def _live_code(self, columns: int) -> list[str]:
        assert self._fence is not None
        indent, marker, language = self._fence
        if not self._pending or set(self._pending.strip()) <= {marker[0]}:  # the end, perhaps
            return []
        line = _unindented(self._pending, indent)
        text = highlight("\n".join([*self._code, line]), language)
        return rendered(text.split("\n", allow_blank=True)[len(self._code)], columns)

    def _render(self, text: str, columns: int) -> list[str]:
        """Blocks with an empty line between them where the text has any."""
        text_lines = _LINE.findall(text)
        starts = [start for start, _ in _blocks(text)]
        found: list[str] = []
        self._gap = self._gap or (bool(starts) and starts[0] > 0)
        for start, end in pairwise([*starts, len(text_lines)]):
            block = "".join(text_lines[start:end])
            found += [*self._due(), *rendered(Block(block), columns)]
            self._gap = not text_lines[end - 1].strip()
        if not starts:
            self._gap = self._gap or "\n" in text
        return found

    def _due(self) -> list[str]:
        gap, self._gap = self._gap and self._begun, False
        self._begun = True
        return [""] if gap else []


def _blocks(text: str) -> list[tuple[int, str]]:
    """The first line and the kind of each block; the items of a list are blocks of their own."""
    found = []
    for token in PARSER.parse(text):
        is_item = token.level == 1 and token.type == "list_item_open"
        is_block = token.level == 0 and not token.type.endswith("list_open")
        if token.map and token.nesting >= 0 and (is_item or is_block):
            found.append((token.map[0], token.type))
    return found


def _unindented(line: str, indent: str) -> str:
    return line[min(len(indent), len(line) - len(line.lstrip(" "))) :]
