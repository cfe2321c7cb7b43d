"""What a conversation shows: Markdown as it streams, and lines of a terminal that are rewritten."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from qwen3_tg.cli import terminal
from qwen3_tg.cli.markdown import MarkdownStream
from qwen3_tg.cli.region import Region
from qwen3_tg.cli.screen import ScreenPrinter
from qwen3_tg.reply import End, Text, Thinking

CODE = re.compile(r"\x1b\[[\d;]*m")
DOCUMENT = """\
# Größe 标题

Hello **bold
across** and `code`, \\( x_1 \\) <b>tags</b> [link](http://a.b/c)

1. one
2. 你好你好你好你好你好你好你好你好你好你好你好你好
   - nested

     a paragraph
10. ten

| a | b |
|---|--:|
| 1 | 2 |

text before
```python
def f(x):
    '''of
    two lines'''
    return x + 1  # a comment that is wider than forty columns are

```
> a quote
---
```
code
```

the end
"""
SHOWN = """\
Größe 标题

Hello bold
across and code, \\( x_1 \\) <b>tags</b>
link (http://a.b/c)

 1. one
 2. 你好你好你好你好你好你好你好你好你好
    你好你好你好
     • nested
       a paragraph
10. ten

a  b
────
1  2

text before
```python
def f(x):
    '''of
    two lines'''
    return x + 1  # a comment that is wider than forty columns are

```
▌ a quote
────────────────────────────────────────
```
code
```

the end"""


def shown(pieces: list[str], columns: int = 40) -> list[str]:
    stream, found = MarkdownStream(), []
    for piece in pieces:
        stream.push(piece)
        found += stream.lines(columns)[0]
    done, live = stream.lines(columns, finished=True)
    assert live == []
    return [CODE.sub("", line) for line in found + done]


class TestMarkdown:
    @pytest.mark.parametrize("size", [1, 3, 10, 10_000])
    def test_however_it_is_cut_it_looks_the_same(self, size: int) -> None:
        pieces = [DOCUMENT[n : n + size] for n in range(0, len(DOCUMENT), size)]
        assert shown(pieces) == SHOWN.splitlines()

    @pytest.mark.parametrize(
        "text",
        [
            "<div>\nhtml\n</div>",
            "\\[ \\frac{a}{b} \\]",
            "[name]: http://a.b",
            "line\nbreaks\nstay",
            "a &amp; b",
            "![alt](x.png)",
            "~~~\nnever closed",
            "```",
            "122",
            "",
        ],
    )
    def test_nothing_that_is_no_mark_is_lost(self, text: str) -> None:
        found = "\n".join(shown(list(text)))
        assert re.sub(r"\W", "", found) == re.sub(r"\W", "", text)

    def test_code_is_shown_line_by_line_as_it_comes_and_not_wrapped(self) -> None:
        stream = MarkdownStream()
        stream.push("```\n" + "x" * 100 + "\nsecond")
        done, live = stream.lines(40)
        assert [CODE.sub("", line) for line in done] == ["```", "x" * 100]
        assert [CODE.sub("", line) for line in live] == ["second"]

    def test_what_is_live_is_never_wider_than_the_terminal(self) -> None:
        stream = MarkdownStream()
        for letter in DOCUMENT:
            stream.push(letter)
            live = stream.lines(20)[1]
            assert all(cell_len(CODE.sub("", line)) <= 20 for line in live)

    @settings(deadline=None)
    @given(st.text(alphabet="ab *`_~#>-+1.|\n\\[]()<&:\t你", max_size=80))
    def test_no_text_breaks_it(self, text: str) -> None:
        stream = MarkdownStream()
        for letter in text:
            stream.push(letter)
            live = stream.lines(10)[1]
            assert all(cell_len(CODE.sub("", line)) <= 10 for line in live)
        letters = re.sub(r"[^ab你]", "", "".join(shown(list(text), columns=10)))
        kept = {c: text.count(c) for c in "ab你"}
        languages = re.findall(r"[`~]{3}[^\n]*", text)  # of code may be cut off
        if not languages:
            assert {c: letters.count(c) for c in "ab你"} == kept


class Screen(io.StringIO):
    """A terminal that knows what `Region` writes; lines that scroll out of it are kept."""

    def __init__(self, columns: int = 40, rows: int = 8):
        super().__init__()
        self.columns, self.rows = columns, rows

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\d*[a-zA-Z]|\x1b\[[\d;]*m|.|\n", self.getvalue(), re.S):
            if part == "\n":
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            elif part == "\r":
                column = 0
            elif part.endswith("A") and part[0] == "\x1b":
                row -= int(part[2:-1])
                assert row >= max(0, len(lines) - self.rows), "above the top of the screen"
            elif part == "\x1b[J":
                lines = [*lines[:row], lines[row][:column]]
            elif part[0] != "\x1b":
                lines[row] = lines[row][:column] + part
                column += 1
        return lines


def take_the_streams(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Not a fixture, as pytest takes the streams itself between a fixture and its test."""
    found = Screen()
    size = os.terminal_size((found.columns, found.rows))
    monkeypatch.setattr(terminal, "size", lambda stream: size)
    monkeypatch.setattr(sys, "stdout", found)
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return found


class TestRegion:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.text("ab", max_size=3), max_size=12))))
    def test_the_screen_shows_what_is_done_and_the_last_of_what_is_live(
        self, updates: list[tuple[int, list[str]]]
    ) -> None:
        screen = Screen()
        region = Region(screen)
        region.size = lambda: (40, 8)  # type: ignore[method-assign, assignment, return-value]
        everything: list[str] = []
        for count, lines in updates:
            everything += lines[:count]
            live = lines[count:]
            region.update(lines[:count], live)
            expected = everything + live[-7:]
            found = screen.lines()
            assert "\n".join(found).rstrip("\n") == "\n".join(expected).rstrip("\n")

    def test_a_line_that_grows_is_not_written_again(self) -> None:
        screen = Screen()
        region = Region(screen)
        for text in ("a", "ab", "abc"):
            region.update([], [text])
        region.update(["abc", "d"], ["e"])
        assert screen.getvalue() == "abc\nd\ne"


class TestScreenPrinter:
    def end(self) -> End:
        return End("stop", 10, 3, 2, 0.1, 2.0)

    def test_thinking_folds_and_the_answer_is_rendered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen = take_the_streams(monkeypatch)
        printer = ScreenPrinter(0, False, lambda text: len(text))
        for piece in (Thinking("hm\n"), Thinking("hmm"), Text("**12"), Text("2**"), self.end()):
            printer._next_look = 0.0  # every piece is shown
            printer.show(piece)
        lines = screen.lines()
        assert re.fullmatch(r"thought for 6 tokens, 0\.\d s", lines[0])
        assert lines[1:3] == ["122", "(2 tokens, 2.0 tokens/s; 15 tokens of"]
        assert "\x1b[2mhmm" in screen.getvalue() and "\x1b[1m122\x1b[0m" in screen.getvalue()
        assert (printer.text, printer.thinking) == ("**122**", "hm\nhmm")

    def test_a_long_thinking_stays_on_the_screen_while_it_streams(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen = take_the_streams(monkeypatch)
        printer = ScreenPrinter(0, False, lambda text: 1)
        words = "one two three four five 你好 six seven " * 200
        for n in range(0, len(words), 7):
            printer._next_look = 0.0  # every piece is shown
            printer.show(Thinking(words[n : n + 7]))
        assert len(screen.lines()) == 4, "half of the terminal"
        assert "".join(screen.lines()).replace(" ", "") in words.replace(" ", "")
        printer.finish()
        assert len(screen.lines()) == 2 and screen.lines()[0].startswith("thought for 1 token,")

    def test_full_thinking_is_left_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = take_the_streams(monkeypatch)
        printer = ScreenPrinter(0, False, lambda text: 1, full=True)
        for piece in (Thinking("hm"), Text("1")):
            printer.show(piece)
        printer.finish()
        assert screen.lines() == ["hm", "", "1", ""]

    def test_control_characters_never_reach_the_terminal(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen = take_the_streams(monkeypatch)
        printer = ScreenPrinter(0, False, lambda text: 1)
        for piece in (Thinking("a\x1b[2J"), Text("b\x07\x1b]0;title\x07")):
            printer.show(piece)
        printer.finish()
        assert not re.search(r"\x07|\x1b\[2J|\x1b\]", screen.getvalue())

    def test_a_notice_in_the_middle_of_an_answer_comes_after_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen = take_the_streams(monkeypatch)
        printer = ScreenPrinter(0, False, lambda text: 1)
        printer.show(Text("one "))
        printer.notice("it repeats itself")
        printer.show(Text("two"))
        printer.finish()
        printer.finish()
        assert screen.lines() == ["one two", "(it repeats itself)", ""]

    def test_ctrl_c_while_it_renders_waits_until_all_is_shown(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen = take_the_streams(monkeypatch)
        lines = MarkdownStream.lines

        def interrupted(self: MarkdownStream, columns: int, finished: bool = False) -> Any:
            found = lines(self, columns, finished)
            signal.raise_signal(signal.SIGINT)
            return found

        printer = ScreenPrinter(0, False, lambda text: 1)
        monkeypatch.setattr(MarkdownStream, "lines", interrupted)
        with pytest.raises(KeyboardInterrupt):
            printer.show(Text("one\n\ntwo"))
        assert screen.lines() == ["one", "", "two"] and printer.text == "one\n\ntwo"

    def test_notes_are_wrapped_between_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = take_the_streams(monkeypatch)
        terminal.note("several words that are longer than a line of the terminal")
        assert screen.lines() == [
            "several words that are longer than a",
            "line of the terminal",
            "",
        ]
