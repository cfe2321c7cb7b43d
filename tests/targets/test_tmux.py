"""`qwen3 chat` as a person sees it: a terminal of tmux, keys, and what is on the screen."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytestmark = pytest.mark.targets
ROOT = Path(__file__).parent.parent.parent
SCRIPTED = Path(__file__).parent / "scripted_chat.py"
SUM = "What is 37 + 85?"


class Tmux:
    """A terminal in a server of its own, so that no other is touched."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._starts = 0

    def __call__(self, *words: str, text: str | None = None) -> str:
        socket = str(
            self._folder / f"tmux{self._starts}"
        )  # one server may end while another starts
        command = ["tmux", "-S", socket, "-f", "/dev/null", *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(
        self, *options: str, columns: int = 80, rows: int = 24, script: Any = None, **env: str
    ) -> None:
        """`qwen3 chat`, or with `script` a model that says what is in it."""
        program = ["-m", "qwen3_tg", "chat"] if script is None else [str(SCRIPTED)]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
        given = {"PYTHONPATH": paths, "XDG_STATE_HOME": str(self._folder), "LC_ALL": "C.UTF-8"}
        given |= {"SCRIPT": json.dumps(script)} | env
        names = [f"{name}={value}" for name, value in given.items()]
        inside = shlex.join(
            ["env", "-u", "COLUMNS", "-u", "LINES", *names, sys.executable, *program, *options]
        )
        self._starts += 1
        size = ["-x", str(columns), "-y", str(rows)]
        self("new-session", "-d", *size, f"cd {self._folder}; {inside}; echo left $?; sleep 600")
        self.wait_for(lambda: self.screen()[-1] == ">")

    def end(self) -> None:
        if self._starts:
            self("kill-server")

    def keys(self, *keys: str) -> None:
        self("send-keys", *keys)

    def type(self, text: str) -> None:
        """A line, and Enter."""
        self("send-keys", "-l", text)
        self.keys("Enter")

    def paste(self, text: str) -> None:
        self("load-buffer", "-", text=text)
        self("paste-buffer", "-p")

    def screen(self) -> list[str]:
        """All lines, with those that scrolled away; none of those that are empty at the end."""
        return self("capture-pane", "-p", "-S", "-").rstrip("\n").split("\n")

    def wait(self, text: str) -> list[str]:
        """The lines, once there is such a text in them."""
        return self.wait_for(lambda: text in "\n".join(self.screen()))

    def wait_ready(self) -> list[str]:
        """The lines, once an answer is followed by an empty prompt."""
        return self.wait_for(lambda: self.screen()[-1] == ">" and len(self.screen()) > 2)

    def wait_for(self, true: Callable[[], bool]) -> list[str]:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end, "\n".join(self.screen())
            time.sleep(0.05)
        return self.screen()


@pytest.fixture
def tmux(absent: Callable[[str], NoReturn], tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        absent("tmux is not installed")
    found = Tmux(tmp_path)
    yield found
    found.end()


def without_figures(line: str) -> str:
    return re.sub(r"[\d.]+ (tokens/s|s$)", r"N \1", line)


def test_thinking_folds_and_the_answer_stays(tmux: Tmux) -> None:
    tmux.start()
    tmux.type(SUM)
    lines = tmux.wait("tokens/s")
    assert [without_figures(line) for line in lines[1:5]] == [
        f"> {SUM}",
        "thought for 27 tokens, N s",
        "122",
        "(4 tokens, N tokens/s; 49 tokens of context)",
    ]
    tmux.type("/thinking show")
    assert "7+5=12" in tmux.wait("3+8+1=12")
    tmux.type("/thinking full")
    tmux.type("now add 12")
    lines = tmux.wait("71 tokens of context")
    end = next(n for n, line in enumerate(lines) if "71 tokens of context" in line)
    assert lines[end - 4 : end] == ["1+0=1", "134", "", "134"]
    tmux.keys("C-d")
    assert tmux.wait("left 0")


def test_ctrl_c_keeps_the_answer_so_far_and_then_tells_how_to_leave(tmux: Tmux) -> None:
    tmux.start(script=[[["text", "one two three four " * 50, 0.05]], [["text", "fine", 0]]])
    tmux.type("count")
    tmux.wait("one two three")
    tmux.keys("C-c")
    lines = tmux.wait("(stopped)")
    assert any(line.startswith("one two three") for line in lines)
    tmux.wait_ready()
    tmux.keys("C-c")
    tmux.wait("(Ctrl-D or /exit leaves)")
    tmux.type("/stats")
    tmux.wait("2 messages, 1 of you")
    tmux.type("/exit")
    tmux.wait("left 0")


def test_more_lines_in_a_message(tmux: Tmux) -> None:
    tmux.start("--session", "s", script=[[["text", "ok", 0]]])

    def sent() -> list[str]:
        messages = json.loads((tmux._folder / "s").read_text())["messages"]
        return [message["content"] for message in messages if message["role"] == "user"]

    tmux("send-keys", "-l", "one")
    tmux.keys("M-Enter")
    tmux.type("two")
    tmux.wait_for(lambda: sent() == ["one\ntwo"])
    tmux.type("three\\")
    tmux.type("four")
    tmux.wait_for(lambda: sent()[1:] == ["three\nfour"])
    for line in ('"""', "/clear", '"""'):
        tmux.type(line)
    tmux.wait_for(lambda: sent()[2:] == ["/clear"])
    tmux.paste("pasted\n/clear\n  你好")
    tmux.wait("你好")
    assert len(sent()) == 3, "a paste is not sent by its line breaks"
    tmux.keys("Enter")
    tmux.wait_for(lambda: sent()[3:] == ["pasted\n/clear\n  你好"])


def test_history_and_completion(tmux: Tmux) -> None:
    tmux.start(script=[[["text", "ok", 0]]])
    tmux.type("remember me")
    tmux.wait_ready()
    tmux.keys("C-d")
    tmux.wait("left 0")
    tmux.end()
    (tmux._folder / "notes.txt").write_text("a text")
    tmux.start(script=[[["text", "ok", 0]]])

    def recalled() -> bool:
        tmux.keys("Up")  # again, as the file is read in the background
        time.sleep(0.2)
        return tmux.screen()[-1] == "> remember me"

    tmux.wait_for(recalled)
    tmux.keys("C-u")
    tmux("send-keys", "-l", "/rea")
    tmux.wait("put a text file into the next message")
    tmux.keys("Tab")
    tmux("send-keys", "-l", "no")
    tmux.keys("Tab")
    tmux.wait("> /read notes.txt")
    tmux.keys("Enter")
    tmux.wait("6 bytes")


def test_edit_opens_the_last_message(tmux: Tmux) -> None:
    tmux.start()
    tmux.type(SUM)
    tmux.wait("tokens/s")
    tmux.type("/edit")
    tmux.wait(f"edit> {SUM}")
    tmux.keys("BSpace", "BSpace")
    tmux.type("6?")
    tmux.wait("123")
    tmux.type("/stats")
    tmux.wait("2 messages, 1 of you")


def test_keys_pressed_while_it_answers_come_after_the_answer(tmux: Tmux) -> None:
    tmux.start(script=[[["text", "slowly it goes", 0.1]]])
    tmux.type("hi")
    tmux.wait("slo")
    tmux("send-keys", "-l", "ahead")
    lines = tmux.wait("> ahead")
    assert "slowly it goes" in lines


THOUGHT = "A long thought with wide 你好 characters goes on and on. " * 40
CODE = "\n".join(f"x{n} = {n}  # 数字" for n in range(30))
ANSWER = (
    "# Title\n\nSome **bold\nwords** and a word: " + "long " * 60 + "\n\n"
    "1. 你好你好你好你好你好你好你好你好你好你好你好你好你好你好你好\n2. two\n\n"
    f"```python\n{CODE}\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nThe end."
)


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (40, 12), (20, 6)])
def test_streaming_leaves_on_the_screen_what_rendering_at_once_does(
    tmux: Tmux, columns: int, rows: int
) -> None:
    from qwen3_tg.cli.markdown import MarkdownStream

    script = [[["thinking", THOUGHT, 0.0005], ["text", ANSWER, 0.002]]]
    tmux.start(columns=columns, rows=rows, script=script)
    tmux.type("hi")
    lines = tmux.wait("tokens/s")
    stream = MarkdownStream()
    stream.push(ANSWER)
    at_once = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in stream.lines(columns, True)[0]]
    start = lines.index("Title")
    assert lines[start : start + len(at_once)] == at_once
    before = " ".join(lines[:start])
    assert re.search(r"> hi thought for \d+ tokens, [\d.]+ s$", before), before


def test_a_terminal_that_changes_its_size_loses_nothing_of_the_answer(tmux: Tmux) -> None:
    words = [f"word{n}" for n in range(120)]
    tmux.start(script=[[["text", " ".join(words), 0.004]]])
    tmux.type("hi")
    tmux.wait("word20")
    tmux("resize-window", "-x", "50", "-y", "30")
    tmux.wait("word60")
    tmux("resize-window", "-x", "100", "-y", "30")
    text = " ".join(tmux.wait("tokens/s"))
    assert " ".join(words) in re.sub(r"\s+", " ", text)


def test_plain_shows_the_text_as_it_is(tmux: Tmux) -> None:
    tmux.start("--plain", script=[[["thinking", "hm", 0], ["text", "**bold**", 0]]])
    tmux.type("hi")
    lines = tmux.wait("tokens/s")
    assert lines[2:5] == ["hm", "", "**bold**"]
