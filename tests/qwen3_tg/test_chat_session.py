"""Conversations in files: whole or not at all, and refused with the reason."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.cli import main, session
from qwen3_tg.cli.session import Session
from qwen3_tg.errors import UsageError

SUM = "What is 37 + 85?"
MESSAGES = [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "ja\n"}]
SESSION = Session("tiny", "0123", "Be terse.", MESSAGES, {"top_k": 3, "thinking": "off"}, 2)


def run(monkeypatch: pytest.MonkeyPatch, lines: str, *options: str) -> int:
    """`qwen3 chat` with these lines from a pipe."""
    stdin = io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    return main(["chat", *options])


def texts(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text())["messages"]]


class TestFile:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        session.write(tmp_path / "s", SESSION)
        assert session.read(tmp_path / "s") == SESSION

    def test_it_is_private_and_a_chosen_mode_stays(self, tmp_path: Path) -> None:
        file = tmp_path / "s"
        session.write(file, SESSION)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.chmod(0o644)
        session.write(file, SESSION)
        assert stat.S_IMODE(file.stat().st_mode) == 0o644

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "s")
        session.write(tmp_path / "link", SESSION)
        assert (tmp_path / "link").is_symlink() and session.read(tmp_path / "s") == SESSION

    def test_a_crash_in_the_middle_loses_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session.write(tmp_path / "s", SESSION)

        def crash(number: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            session.write(tmp_path / "s", replace(SESSION, messages=[]))
        assert session.read(tmp_path / "s") == SESSION
        assert os.listdir(tmp_path) == ["s"], "no half file is left"  # noqa: PTH208

    def test_a_folder_that_is_not_there_is_one_error(self, tmp_path: Path) -> None:
        with pytest.raises(
            UsageError, match=r"cannot be written: No such file.*nothing was changed"
        ):
            session.write(tmp_path / "no" / "s", SESSION)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"format": "other"}, "JSON, but not a conversation"),
            ({"version": 2}, "a conversation of version 2, expected 1"),
            ({"messages": None}, "'messages' must be list, found NoneType"),
            ({"messages": [{"role": "robot", "content": ""}]}, "message 0: role must be one of"),
            ({"messages": [{"role": "user", "content": 3}]}, "content must be a text, found int"),
            ({"messages": [{"role": "system", "content": ""}]}, "message 0 is a system message"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
            ({"settings": {"top_k": "3"}}, "top_k must be an integer, at least 0"),
            ({"settings": {"top_k": -3}}, "top_k must be at least 0"),
            ({"settings": {"top_p": True}}, "top_p must be a number"),
            ({"settings": {"device": "CPU"}}, "there is no setting 'device'"),
            ({"settings": {"thinking": "maybe"}}, "thinking must be on or off"),
            ({"draws": -1}, "'draws' must be at least 0"),
            ({"more": 1}, "'more' is unknown"),
        ],
    )
    def test_a_damaged_file_is_refused_with_the_reason(
        self, tmp_path: Path, change: dict[str, Any], error: str
    ) -> None:
        file = tmp_path / "s"
        session.write(file, SESSION)
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(UsageError) as caught:
            session.read(file)
        assert str(caught.value).startswith(f"{file}: ") and error in str(caught.value)

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"", "not valid JSON at line 1"),
            (b'{"format":\n "qwen3_tg con', "not valid JSON at line 2"),
            (b"[" * 100_000, "not valid JSON"),
            (b"\xff\xfe", "byte 0 is not UTF-8"),
            (b"[]", "JSON, but not a conversation"),
        ],
    )
    def test_another_file_is_refused_with_the_reason(
        self, tmp_path: Path, data: bytes, error: str
    ) -> None:
        (tmp_path / "s").write_bytes(data)
        with pytest.raises(UsageError, match=error):
            session.read(tmp_path / "s")
        assert (tmp_path / "s").read_bytes() == data

    def test_every_field_is_needed(self, tmp_path: Path) -> None:
        session.write(tmp_path / "s", SESSION)
        whole = json.loads((tmp_path / "s").read_text())
        for name in set(whole) - {"format", "version"}:
            (tmp_path / "s").write_text(json.dumps({k: v for k, v in whole.items() if k != name}))
            with pytest.raises(UsageError, match=f"damaged: it has no '{name}'"):
                session.read(tmp_path / "s")

    def test_a_longer_context_is_no_other_model(self) -> None:
        config = open_checkpoint("tiny").config
        longer = config.with_context(2 * config.max_position_embeddings)[0]
        assert longer.yarn is not None
        assert session.fingerprint(longer) == session.fingerprint(config)
        other = replace(config, hidden_size=config.hidden_size * 2)
        assert session.fingerprint(other) != session.fingerprint(config)


class TestChat:
    def test_a_session_goes_on_in_the_next_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "s"
        options = ("--session", str(file))
        assert run(monkeypatch, f"/set top_k 7\n/system Add.\n{SUM}\n", *options) == 0
        assert "is kept in" in capsys.readouterr().err
        assert run(monkeypatch, "now add 12\n/set\n/system\n", *options, "--top-p", "0.5") == 0
        out, err = capsys.readouterr()
        assert out == "134\n" and texts(file) == [SUM, "122", "now add 12", "134"]
        assert f"(2 messages from {file}, a system message, top_k 7, top_p 0.5)" in err
        assert "top_k              7" in err and "top_p              0.5" in err
        assert "(system message: Add.)" in err

    def test_every_change_is_kept_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "s"
        assert run(monkeypatch, f"{SUM}\nhi\n/undo\n", "--session", str(file)) == 0
        assert texts(file) == [SUM, "122"]
        assert run(monkeypatch, "/clear\n", "--session", str(file)) == 0
        assert texts(file) == []

    def test_a_damaged_session_is_refused_and_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "s").write_text("{")
        assert run(monkeypatch, "hi\n", "--session", str(tmp_path / "s")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "not a conversation, or damaged" in line
        assert (tmp_path / "s").read_text() == "{"

    def test_save_and_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "s"
        lines = [SUM, f"/save {file}", "/clear", "/load", f"/load {file}", "now add 12", "/save"]
        assert run(monkeypatch, "\n".join(lines)) == 1
        out, err = capsys.readouterr()
        assert out == "122\n134\n" and "/load takes a file" in err
        assert texts(file) == [SUM, "122", "now add 12", "134"]

    def test_save_does_not_write_over_another_file_unless_forced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "thesis.txt"
        file.write_text("years of work")
        assert run(monkeypatch, f"/save\n/save {file}\n") == 1
        err = capsys.readouterr().err
        assert "/save takes a file" in err and f"/save --force {'FILE'}" in err
        assert file.read_text() == "years of work"
        assert run(monkeypatch, f"/save --force {file}\n") == 0
        assert texts(file) == []

    def test_a_file_that_does_not_load_leaves_the_conversation(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "s").write_text("{}")
        lines = f"{SUM}\n/load {tmp_path / 's'}\n/load {tmp_path / 'no'}\nnow add 12\n"
        assert run(monkeypatch, lines) == 1
        out, err = capsys.readouterr()
        assert out == "122\n134\n"
        assert "JSON, but not a conversation" in err and "not readable: No such file" in err

    def test_after_load_the_session_is_the_loaded_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        old, other = tmp_path / "old", tmp_path / "other"
        assert run(monkeypatch, "hi\n", "--session", str(other), "--thinking", "off") == 0
        capsys.readouterr()
        lines = f"{SUM}\n/load {other}\nhi\n/clear\n/undo\n"
        assert run(monkeypatch, lines, "--session", str(old)) == 0
        assert texts(old) == [SUM, "122"], "what was kept there is not lost"
        assert len(texts(other)) == 4
        err = capsys.readouterr().err
        assert f"(from now on it is kept there, and {old} stays as it is)" in err
        assert f"(forgotten in {other}, too; /undo brings it back)" in err

    def test_nothing_is_said_to_be_kept_where_it_cannot(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(monkeypatch, "hi\n", "--session", str(tmp_path / "no" / "s")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "cannot be written" in line

    def test_what_the_command_line_says_is_told_and_goes_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = str(tmp_path / "s")
        assert run(monkeypatch, f"{SUM}\n", "--session", file, "--max-new-tokens", "30") == 0
        options = ["--max-new-tokens", "9", "--system", "Be brief.", "--temperature", "0"]
        capsys.readouterr()
        assert run(monkeypatch, "/set\n/system\n", "--session", file, *options) == 0
        err = capsys.readouterr().err
        (told,) = [line for line in err.splitlines() if line.startswith("(2 messages from")]
        assert "a system message" in told and "max_new_tokens 9" in told and "30" not in told
        assert "(system message: Be brief.)" in err

    def test_another_model_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        session.write(tmp_path / "s", replace(SESSION, model="Qwen3-8B"))
        assert run(monkeypatch, "", "--session", str(tmp_path / "s")) == 0
        assert "was had with Qwen3-8B, another model; tiny goes on" in capsys.readouterr().err
