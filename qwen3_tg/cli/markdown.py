"""Markdown as it streams in, to lines for a terminal.

A block (a paragraph, an item of a list, a line of code) is certain once another has begun after it
on a whole line; until then its lines may change, as `**` in the first line may be closed in the
third. What Markdown would drop stays: tags, backslashes (of LaTeX), line breaks, the address of a
link. Knows nothing of cursors; region.py does.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import rich.markdown as rich_markdown
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

# HTML is text here, and so are escapes, which LaTeX is full of; a line of dashes is always a rule.
_NOT_MARKDOWN = ["html_block", "html_inline", "escape", "entity", "image", "autolink"]
_PARSER = MarkdownIt("commonmark").enable(["strikethrough", "table"])
_PARSER.disable([*_NOT_MARKDOWN, "reference", "lheading"])
_LINE = re.compile(r"[^\n]*\n|[^\n]+")  # Python's own splitlines() knows more ends of a line
_PADDING = re.compile(r"(\x1b\[[\d;]*m\s*\x1b\[0m|\s)+$")
_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,}) *([^\n`]*)")
_LEAST_COLUMNS = 6  # for text within lists and quotes
# Colours that can be read on a dark terminal and on a light one.
_CODE_COLOURS = "ansi_dark"
_THEME = Theme(
    {f"markdown.h{n}": "bold" for n in range(2, 7)}
    | {
        "markdown.h1": "bold underline",
        "markdown.code": "cyan",
        "markdown.item.bullet": "none",
        "markdown.item.number": "none",
        "markdown.block_quote": "italic",
        "markdown.link": "none",
        "markdown.link_url": "underline",
        "markdown.hr": "dim",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)


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
        done += [*self._due(), *_rendered(Text(text_lines[code].strip(), "dim"), 0)]
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
                done += _rendered(Text(bare, "dim"), 0)
                return True
            self._code.append(_unindented(line, indent))
        done += self._coloured(language, len(self._code) - len(whole))
        return False

    def _coloured(self, language: str, start: int) -> list[str]:
        """Lines of code from `start` on, in the colours they have after those before. They are not
        wrapped: the terminal does that, and then they are copied as they are."""
        if start >= len(self._code):
            return []
        text = _highlight("\n".join(self._code), language)
        return [_rendered(line, 0)[0] for line in text.split("\n", allow_blank=True)[start:]][
            : len(self._code) - start
        ]

    def _live_code(self, columns: int) -> list[str]:
        assert self._fence is not None
        indent, marker, language = self._fence
        if not self._pending or set(self._pending.strip()) <= {marker[0]}:  # the end, perhaps
            return []
        line = _unindented(self._pending, indent)
        text = _highlight("\n".join([*self._code, line]), language)
        return _rendered(text.split("\n", allow_blank=True)[len(self._code)], columns)

    def _render(self, text: str, columns: int) -> list[str]:
        """Blocks with an empty line between them where the text has any."""
        text_lines = _LINE.findall(text)
        starts = [start for start, _ in _blocks(text)]
        found: list[str] = []
        for start, end in pairwise([*starts, len(text_lines)]):
            block = "".join(text_lines[start:end])
            found += [*self._due(), *_rendered(_Markdown(block), columns)]
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
    for token in _PARSER.parse(text):
        is_item = token.level == 1 and token.type == "list_item_open"
        is_block = token.level == 0 and not token.type.endswith("list_open")
        if token.map and token.nesting >= 0 and (is_item or is_block):
            found.append((token.map[0], token.type))
    return found


def _unindented(line: str, indent: str) -> str:
    return line[min(len(indent), len(line) - len(line.lstrip(" "))) :]


def _highlight(code: str, language: str) -> Text:
    syntax = Syntax("", language.split(" ")[0] or "text", theme=_CODE_COLOURS)
    text = syntax.highlight(code)
    text.no_wrap, text.overflow = False, "fold"
    return text


@lru_cache(maxsize=4)
def _console(columns: int) -> Console:
    return Console(
        width=columns, height=1000, force_terminal=True, theme=_THEME, highlight=False, emoji=False
    )


def _rendered(what: RenderableType, columns: int) -> list[str]:
    """The lines of it, with codes for colours; columns 0 are as many as a line takes."""
    console = _console(columns or 80)
    with console.capture() as capture:
        console.print(what, soft_wrap=not columns)
    text = capture.get() if not columns else capture.get().strip("\n")
    return [_PADDING.sub("", line) for line in text.removesuffix("\n").split("\n")]


class _Heading(rich_markdown.Heading):
    LEVEL_ALIGN: ClassVar = {}  # none is centred


class _Code(rich_markdown.CodeBlock):
    """Code within another block; that on its own is taken line by line."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _highlight(str(self.text).rstrip("\n"), self.lexer_name)


class _List(rich_markdown.ListElement):
    """With a point after a number."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first = None if self.list_type == "bullet_list_open" else self.list_start or 0
        for n, item in enumerate(self.items):
            mark = " • " if first is None else f"{first + n:2}. "
            yield from _within(item.elements, mark, " " * len(mark), console, options)


class _Quote(rich_markdown.BlockQuote):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _within(self.elements, "▌ ", "▌ ", console, options, self.style)


def _within(
    elements: RenderableType,
    first: str,
    other: str,
    console: Console,
    options: ConsoleOptions,
    style: Style | None = None,
) -> RenderResult:
    """Blocks in a block, with a mark before the first line and one before each other; without
    them where it is so deep that hardly any room is left."""
    if options.max_width - len(first) < _LEAST_COLUMNS:
        first = other = ""
    inside = options.update(width=options.max_width - len(first))
    for line in console.render_lines(elements, inside, style=style):
        yield from (Segment(first, style), *line, Segment.line())
        first = other


class _Table(rich_markdown.TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            table.show_edge = False
            yield table


class _Rule(rich_markdown.HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("─" * min(options.max_width, 40), console.get_style("markdown.hr"))


class _Markdown(rich_markdown.Markdown):
    """One block as rich shows it."""

    elements: ClassVar = rich_markdown.Markdown.elements | {
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "hr": _Rule,
        "blockquote_open": _Quote,
        "bullet_list_open": _List,
        "ordered_list_open": _List,
        "table_open": _Table,
    }

    def __init__(self, markup: str):
        super().__init__("", justify="default", hyperlinks=False, code_theme=_CODE_COLOURS)
        self.parsed = _PARSER.parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                _keep_line_break(child)


def _keep_line_break(token: Token) -> None:
    """A model that breaks a line means it."""
    if token.type == "softbreak":
        token.type = "hardbreak"
