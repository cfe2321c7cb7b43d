"""How a block of Markdown looks on a terminal: rich's renderer, so that nothing is lost.

What Markdown drops stays: tags, backslashes (of LaTeX), line breaks, the address of a link.
"""

from __future__ import annotations

import re
from functools import lru_cache
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
PARSER = MarkdownIt("commonmark").enable(["strikethrough", "table"])
PARSER.disable([*_NOT_MARKDOWN, "reference", "lheading"])
_PADDING = re.compile(r"(\x1b\[[\d;]*m\s*\x1b\[0m|\s)+$")
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


def highlight(code: str, language: str) -> Text:
    """Code in colours; of a language that is not known, in none."""
    syntax = Syntax("", language.split(" ")[0] or "text", theme=_CODE_COLOURS)
    text = syntax.highlight(code)
    text.no_wrap, text.overflow = False, "fold"
    return text


@lru_cache(maxsize=4)
def _console(columns: int) -> Console:
    return Console(
        width=columns, height=1000, force_terminal=True, theme=_THEME, highlight=False, emoji=False
    )


def rendered(what: RenderableType, columns: int) -> list[str]:
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
        yield highlight(str(self.text).rstrip("\n"), self.lexer_name)


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


class Block(rich_markdown.Markdown):
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
        self.parsed = PARSER.parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                _keep_line_break(child)


def _keep_line_break(token: Token) -> None:
    """A model that breaks a line means it."""
    if token.type == "softbreak":
        token.type = "hardbreak"
