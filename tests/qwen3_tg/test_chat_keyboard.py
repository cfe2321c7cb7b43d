"""The line editor: keys that are pressed, and what comes of them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwen3_tg.cli import history, keyboard
from qwen3_tg.cli.history import open_history

PASTE, END_PASTE = "\x1b[200~", "\x1b[201~"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as found, create_app_session(input=found, output=DummyOutput()):
        yield found


class TestKeys:
    @pytest.mark.parametrize(
        ("typed", "message"),
        [
            ("hello\r", "hello"),
            ("one\x1b\rtwo\r", "one\ntwo"),  # Alt-Enter
            ("one\\\rtwo\\\rthree\r", "one\ntwo\nthree"),
            ('"""\r/help\r\r"""\r', "/help"),
            ('"""one"""\r', "one"),
            ('"""one\r"""\r', "one"),
            (f"{PASTE}one\r\ntwo\r\n{END_PASTE}three\r", "one\ntwo\nthree"),
            (f"{PASTE}one\n/clear\n{END_PASTE}\r", "one\n/clear\n"),
            ("你好\x7f吗\r", "你吗"),
            ("half\x03whole\r", "whole"),  # Ctrl-C drops the line
            ("\r", ""),
        ],
    )
    def test_what_is_typed_is_what_is_sent(self, keys: PipeInput, typed: str, message: str) -> None:
        keys.send_text(typed)
        found = keyboard.Keyboard(InMemoryHistory()).read()
        assert found is not None and keyboard.message(found) == message

    @pytest.mark.parametrize(
        ("typed", "message"),
        [
            ("/rea\tno\t\r", "/read notes.txt"),
            ("/REA\tno\t\r", "/read notes.txt"),
            ("/thinking s\t\r", "/thinking show"),
            ("/thinking f\told\r", "/thinking fold"),
            ("/s\t\r", "/s"),
            ("/nothing\t\r", "/nothing"),
            ("no\tcommand\r", "nocommand"),
        ],
    )
    def test_tab_completes_however_fast_it_is_pressed(
        self,
        keys: PipeInput,
        typed: str,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes.txt").write_text("a text")
        keys.send_text(typed)
        assert keyboard.Keyboard(InMemoryHistory()).read() == message

    def test_a_dropped_line_can_be_brought_back(self, keys: PipeInput) -> None:
        keys.send_text("half\x03whole\r")
        known = InMemoryHistory()
        keyboard.Keyboard(known).read()
        assert known.get_strings() == ["half", "whole"]

    def test_ctrl_d_ends_and_a_second_ctrl_c_tells_so(
        self, keys: PipeInput, capsys: pytest.CaptureFixture[str]
    ) -> None:
        keys.send_text("half\x03\x03\x04")
        assert keyboard.Keyboard(InMemoryHistory()).read() is None
        assert capsys.readouterr().err == "(Ctrl-D or /exit leaves)\n"

    def test_edit_offers_the_text_for_change(self, keys: PipeInput) -> None:
        board = keyboard.Keyboard(InMemoryHistory())
        keys.send_text("\x7f3?\r")
        assert board.edit("add 12") == "add 13?"
        keys.send_text("\x7f\x03")
        assert board.edit("add 12") is None

    def test_bytes_that_are_no_utf8_do_not_break_it(self, keys: PipeInput) -> None:
        keys.send_bytes(b"caf\xe9!\r")
        text = keyboard.Keyboard(InMemoryHistory()).read()
        assert text is not None and text.encode("utf-8").startswith(b"caf")


def completions(text: str) -> list[str]:
    found = keyboard._Completer().get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


class TestCompletion:
    def test_commands_and_their_words(self) -> None:
        assert completions("/re") == ["/regen", "/read "]
        assert "/exit" in completions("/") and "/bye" not in completions("/")
        assert completions("/thinking o") == ["on", "off"]
        assert completions("/set top") == ["top_p", "top_k"]
        assert completions("/set top_k 3") == []
        assert completions("hello /re") == completions("/help ") == completions("/nonsense x") == []

    def test_files_for_those_that_take_one(self, tmp_path: Path) -> None:
        (tmp_path / "a file.txt").touch()
        for command in ("/read", "/save", "/load", "/save --force"):
            assert completions(f"{command} {tmp_path}/a ") == ["file.txt"]


class TestHistory:
    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        return tmp_path / "qwen3_tg" / "history"

    def test_it_is_kept_between_runs_for_its_owner_alone(self, file: Path, keys: PipeInput) -> None:
        keys.send_text("one\x1b\rtwo\r")
        assert keyboard.Keyboard(open_history(True)).read() == "one\ntwo"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert list(open_history(True).load_history_strings()) == ["one\ntwo"]

    def test_without_history_nothing_is_written(self, file: Path, keys: PipeInput) -> None:
        keys.send_text("secret\r")
        keyboard.Keyboard(open_history(False)).read()
        assert not file.exists()

    def test_a_file_that_others_can_read_is_made_private(self, file: Path) -> None:
        file.parent.mkdir(mode=0o700)
        file.touch(mode=0o644)
        open_history(True)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_where_it_cannot_be_kept_the_reason_is_told(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file.parent.parent.mkdir(exist_ok=True)
        file.parent.write_text("not a folder")
        assert isinstance(open_history(True), InMemoryHistory)
        assert "is not kept for the next time: File exists" in capsys.readouterr().err

    def test_a_folder_that_others_can_write_in_is_not_used(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file.parent.mkdir()
        file.parent.chmod(0o777)
        assert isinstance(open_history(True), InMemoryHistory)
        assert "others can write in" in capsys.readouterr().err

    def test_a_long_file_loses_its_older_half(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = open_history(True)
        for n in range(100):
            kept.store_string(f"line {n}\nof two")
        monkeypatch.setattr(history, "_MOST_BYTES", 1000)
        newest, *older = open_history(True).load_history_strings()
        assert newest == "line 99\nof two" and 40 < len(older) < 60
        assert older[-1].startswith("line ") and older[-1].endswith("\nof two")
