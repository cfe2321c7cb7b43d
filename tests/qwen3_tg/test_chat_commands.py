"""What the commands of a conversation do, without a terminal."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qwen3_tg
from qwen3_tg.cli import arguments, terminal
from qwen3_tg.cli.commands import COMMANDS, Commands, Leave, parse
from qwen3_tg.cli.conversation import Conversation
from qwen3_tg.cli.keep import Keeper
from qwen3_tg.cli.tools import chat_tools
from qwen3_tg.llm import LLM
from qwen3_tg.reply import Piece, Text

SUM, MORE = "What is 37 + 85?", "now add 12"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return qwen3_tg.load("tiny")


class Chat:
    """A conversation, its commands, and what was noted."""

    def __init__(self, llm: LLM, *words: str, edited: str | None = None):
        self.options: argparse.Namespace = arguments.parse(["chat", *words])
        self.talk = Conversation(llm, self.options, lambda seed: terminal.ReplyPrinter(seed))
        self.keeper = Keeper(self.talk, "tiny")
        self.offered: list[str] = []

        def edit(text: str) -> str | None:
            self.offered.append(text)
            return edited

        self.commands = Commands(self.talk, self.keeper, edit)

    def say(self, *lines: str) -> None:
        for line in lines:
            if not self.commands.obey(line):
                self.talk.ask(line)

    @property
    def texts(self) -> list[str]:
        return [message["content"] for message in self.talk.messages]


@pytest.fixture
def noted(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What went to stderr since the last call."""
    return lambda: capsys.readouterr().err


def stop_at(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Ctrl-C once an answer is so far; at "" before its first piece."""

    def stream(pieces: Iterator[Piece], show: Callable[[Piece], None], llm: object) -> None:
        so_far = ""
        for piece in pieces:
            if so_far == text:
                raise KeyboardInterrupt
            show(piece)
            so_far += piece.text if isinstance(piece, Text) else ""

    monkeypatch.setattr(terminal, "stream", stream)


class TestParse:
    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("/help", ("/help", "")),
            ("/HELP  x ", ("/help", "x")),
            ("/system several\nlines", ("/system", "several\nlines")),
            ("/think", ("/think", "")),
            ("/no_think  ", ("/no_think", "")),
            ("/think what is 1 + 1?", None),
            ("/usr/bin/env is what?", None),
            ("/2 is a half", None),
            (" /help", None),
            ("help", None),
            ("/", None),
            ("", None),
        ],
    )
    def test_a_command_is_a_slash_and_a_word(
        self, line: str, found: tuple[str, str] | None
    ) -> None:
        assert parse(line) == found


class TestTurns:
    def test_undo_takes_the_last_turn_back(self, llm: LLM, noted: Callable[[], str]) -> None:
        chat = Chat(llm)
        chat.say(SUM, MORE, "/undo")
        assert chat.texts == [SUM, "122"]
        assert "2 messages left" in noted()
        chat.say(MORE)
        assert chat.texts == [SUM, "122", MORE, "134"], "the sum before is known still"
        chat.say("/undo", "/undo", "/undo")
        assert chat.texts == [] and "nothing to take back" in noted()

    def test_undo_brings_back_what_clear_forgot(self, llm: LLM) -> None:
        chat = Chat(llm)
        chat.say(SUM, "/clear")
        assert chat.texts == []
        chat.say("/clear", "/undo")
        assert chat.texts == [SUM, "122"]

    def test_regen_draws_other_numbers_and_the_seed_says_which(self, llm: LLM) -> None:
        words = "--thinking off --temperature 3 --top-k 0 --top-p 1 --max-new-tokens 9 --seed 1"

        def answers() -> list[str]:
            chat = Chat(llm, *words.split())
            found = []
            for line in ("hi", "/regen", "/regen"):
                chat.say(line)
                assert chat.texts[0] == "hi" and len(chat.texts) == 2
                found.append(chat.texts[1])
            return found

        first = answers()
        assert len(set(first)) == 3
        assert answers() == first

    def test_edit_changes_the_question_and_keeps_earlier_turns(self, llm: LLM) -> None:
        chat = Chat(llm, edited="now add 13")
        chat.say(SUM, MORE, "/edit")
        assert chat.offered == [MORE]
        assert chat.texts == [SUM, "122", "now add 13", "135"]

    def test_an_edit_that_is_dropped_changes_nothing(
        self, llm: LLM, noted: Callable[[], str]
    ) -> None:
        chat = Chat(llm, edited=None)
        chat.say("/edit", "/regen")
        assert noted().count("nothing was asked yet") == 2
        chat.say(SUM, "/edit")
        assert chat.texts == [SUM, "122"] and "nothing was changed" in noted()

    def test_what_was_stopped_before_its_answer_can_be_asked_again(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat = Chat(llm)
        chat.say(SUM)
        with monkeypatch.context() as patch:
            stop_at(patch, "")
            chat.say(MORE)
        assert chat.texts == [SUM, "122"]
        chat.say("/regen")
        assert chat.texts == [SUM, "122", MORE, "134"]

    def test_a_stopped_regen_without_an_answer_keeps_the_old_one(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch, noted: Callable[[], str]
    ) -> None:
        chat = Chat(llm)
        chat.say(SUM)
        stop_at(monkeypatch, "")
        chat.say("/regen")
        assert chat.texts == [SUM, "122"] and "what was said before stays" in noted()

    def test_what_was_answered_before_ctrl_c_is_kept(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat = Chat(llm)
        stop_at(monkeypatch, "12")
        chat.say(SUM)
        assert chat.texts == [SUM, "12"]

    def test_only_what_differs_is_computed(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        computed: list[int] = []
        run = llm._engine._run

        def counted(kind: str, new: list[int], start: int) -> Any:
            computed.append(len(new) if kind == "prefill" else 0)
            return run(kind, new, start)

        monkeypatch.setattr(llm._engine, "_run", counted)
        chat = Chat(llm, "--thinking", "off", edited="now add 13")
        chat.say("Please say hello to everybody in this whole wide world, at length", "thanks")
        long = sum(computed)
        computed.clear()
        chat.say("/edit")
        assert 0 < sum(computed) < long / 3


class TestSettings:
    def test_set_changes_what_the_next_turn_draws_with(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[dict[str, Any]] = []
        chat_method = LLM.chat

        def chat(self: LLM, messages: Any, **options: Any) -> Any:
            seen.append(options)
            return chat_method(self, messages, **options)

        monkeypatch.setattr(LLM, "chat", chat)
        talk = Chat(llm)
        talk.say("/set temperature 0.5", "/set frequency_penalty -0.5", "/set top_k 3")
        talk.say("/set max_new_tokens 2", "/set thinking_budget 5", "/set seed 7", SUM)
        sampling = seen[0]["sampling"]
        assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 7)
        assert sampling.frequency_penalty == -0.5
        assert (seen[0]["max_new_tokens"], seen[0]["thinking_budget"]) == (2, 5)
        talk.say("/set temperature default", SUM)
        assert seen[1]["sampling"].temperature == llm.default_sampling().temperature

    def test_temperature_0_is_warned_of_where_the_command_line_would(
        self, llm: LLM, noted: Callable[[], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        advice = replace(llm.checkpoint.generation, temperature=0.6)
        monkeypatch.setattr(llm, "checkpoint", replace(llm.checkpoint, generation=advice))
        talk = Chat(llm)
        talk.say("/set temperature 0")
        assert "at temperature 0 thinking may repeat itself without end" in noted()
        talk.say("/set temperature 0.5", "/set top_k 3", "/no_think", "/set temperature 0")
        assert "without end" not in noted()

    @pytest.mark.parametrize(
        ("argument", "error"),
        [
            ("temperature -1", "temperature must be at least 0, found -1.0"),
            ("temperature hot", "temperature must be a number, at least 0, found 'hot'"),
            ("temperature nan", "temperature must be at least 0, found nan"),
            ("top_p 0", "top_p must be above 0 and at most 1, found 0.0"),
            ("top_k 1.5", "top_k must be an integer, at least 0"),
            ("min_p 2", "min_p must be from 0 to 1, found 2.0"),
            ("seed -1", "seed must be from 0 to 2**128 - 1, found -1"),
            ("repetition_penalty 0", "repetition_penalty must be above 0, found 0.0"),
            ("presence_penalty inf", "presence_penalty must be a number, found inf"),
            ("max_new_tokens 0", "max_new_tokens must be at least 1"),
            ("thinking_budget -1", "thinking_budget must be at least 0"),
            ("logit_bias 1", "there is no setting 'logit_bias'"),
            ("top_p", "/set top_p needs a value"),
        ],
    )
    def test_a_wrong_value_names_the_range_and_changes_nothing(
        self, llm: LLM, noted: Callable[[], str], argument: str, error: str
    ) -> None:
        chat = Chat(llm)
        before = vars(chat.talk.options).copy()
        chat.say(f"/set {argument}")
        (line,) = noted().splitlines()
        assert line.startswith("error: ") and error in line
        assert vars(chat.talk.options) == before

    def test_set_alone_shows_all_with_their_ranges(
        self, llm: LLM, noted: Callable[[], str]
    ) -> None:
        chat = Chat(llm, "--top-k", "7")
        chat.say("/set")
        shown = noted()
        assert re.search(r"top_k +7 +at least 0", shown)
        assert re.search(r"max_new_tokens +- +at least 1", shown)
        assert len(shown.splitlines()) == 11

    def test_think_and_no_think_switch_and_with_text_go_to_the_model(
        self, llm: LLM, noted: Callable[[], str]
    ) -> None:
        chat = Chat(llm)
        chat.say("/no_think")
        assert not chat.talk.thinks and "thinking is off" in noted()
        chat.say("/think", SUM, "/no_think hi")
        assert chat.talk.thinks
        assert chat.texts[:3] == [SUM, "122", "/no_think hi"]

    def test_a_model_without_a_switch_says_so(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch, noted: Callable[[], str]
    ) -> None:
        monkeypatch.setattr(LLM, "can_choose_to_think", False)
        chat = Chat(llm)
        chat.say("/no_think", "/thinking off")
        assert noted().count("no switch for thinking") == 2 and chat.talk.thinks

    def test_the_last_thinking_can_be_shown(self, llm: LLM, noted: Callable[[], str]) -> None:
        chat = Chat(llm)
        chat.say(SUM)
        noted()
        chat.say("/thinking show")
        assert noted() == "37+85\n7+5=12\n3+8+1=12\n122\n"
        chat.say("/thinking loudly")
        assert "takes on, off, show, full or fold, found 'loudly'" in noted()

    def test_system_sets_shows_and_takes_away(self, llm: LLM, noted: Callable[[], str]) -> None:
        chat = Chat(llm, "--system", "first")
        for line, shown in (("", "first"), (" You add.", "You add."), (" none", "none")):
            chat.say(f"/system{line}")
            assert noted() == f"(system message: {shown})\n"
        assert chat.talk.options.system is None
        assert chat.options.system == "first", "the command line's options are not changed"

    def test_a_template_that_takes_no_system_message_refuses_it(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch, noted: Callable[[], str]
    ) -> None:
        monkeypatch.setattr(LLM, "render", lambda *arguments, **more: "without it")
        chat = Chat(llm)
        chat.say("/system You add.")
        assert "takes no system message" in noted() and chat.talk.options.system is None


class TestOther:
    def test_help_names_every_command(self, llm: LLM, noted: Callable[[], str]) -> None:
        Chat(llm).say("/help")
        shown = noted()
        assert all(c.usage in shown for c in COMMANDS.values() if c.what)
        assert max(map(len, shown.splitlines())) <= 80

    def test_tools_are_listed(self, llm: LLM, noted: Callable[[], str], tmp_path: Path) -> None:
        Chat(llm).say("/tools")
        assert noted() == "(no tools)\n"
        function = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
        (tmp_path / "t.json").write_text(json.dumps([{"type": "function", "function": function}]))
        options = arguments.parse(["chat", "--tools", str(tmp_path / "t.json")])
        talk = Conversation(
            llm, options, lambda seed: terminal.ReplyPrinter(seed), chat_tools(options)
        )
        Commands(talk, Keeper(talk, "tiny"), None).obey("/tools")
        assert noted() == "add: adds\n"

    def test_what_the_system_refuses_ends_no_conversation(
        self, llm: LLM, noted: Callable[[], str]
    ) -> None:
        chat = Chat(llm)
        for line in ("/save ~nosuchuser/x", "/load ~nosuchuser/x", "/read " + "x" * 300):
            chat.say(line)
            assert noted().startswith("error: ")

    def test_undo_of_a_load_goes_back_to_the_former_file(self, llm: LLM, tmp_path: Path) -> None:
        for name, question in (("a", "What is 1 + 2?"), ("b", "What is 37 + 85?")):
            chat = Chat(llm, "--system", f"in {name}")
            chat.keeper.start(str(tmp_path / name))
            chat.say(question)
            chat.keeper.after_a_turn()
        before = (tmp_path / "b").read_text()
        chat = Chat(llm)
        chat.keeper.start(str(tmp_path / "a"))
        chat.say(f"/load {tmp_path / 'b'}")
        assert chat.talk.options.system == "in b"
        chat.say("/undo")
        chat.keeper.after_a_turn()
        assert (tmp_path / "b").read_text() == before
        assert chat.talk.options.system == "in a"
        chat.say("What is 2 + 2?")
        chat.keeper.after_a_turn()
        assert (tmp_path / "b").read_text() == before
        assert "What is 2 + 2?" in (tmp_path / "a").read_text()

    def test_turns_that_are_left_out_stay_in_the_conversation(
        self, llm: LLM, noted: Callable[[], str]
    ) -> None:
        short = qwen3_tg.load("tiny", context=160)
        chat = Chat(short, "--overflow", "shift", "--thinking-budget", "30")
        chat.say(*["What is 37 + 85?"] * 7)
        assert chat.texts == ["What is 37 + 85?", "122"] * 7
        assert "no longer sent" in noted()
        chat.say("/undo")
        assert len(chat.texts) == 12

    def test_another_conversation_is_sent_whole_after_turns_were_left_out(
        self, tmp_path: Path, noted: Callable[[], str]
    ) -> None:
        short = qwen3_tg.load("tiny", context=160)
        chat = Chat(short, "--overflow", "shift", "--thinking-budget", "10")
        chat.say(SUM, "Who are you?", f"/save {tmp_path / 's'}", "/clear")
        chat.say(*["What is 37 + 85?"] * 7)
        left_out = len(chat.talk.messages)
        noted()
        chat.say("/stats")
        used = int(re.findall(r"context: (\d+) of 160", noted())[0])
        assert used <= 160, "what is sent is counted"
        chat.say(f"/load {tmp_path / 's'}")
        assert short.tokenizer
        whole = len(short.tokenizer.encode(short.render(chat.talk.messages)))
        assert chat.talk.used_tokens() == whole
        chat.say("/undo")
        assert len(chat.talk.messages) == left_out and chat.talk.used_tokens() == used

    def test_two_programs_do_not_write_over_each_others_turns(
        self, llm: LLM, tmp_path: Path, noted: Callable[[], str]
    ) -> None:
        file = tmp_path / "s"
        chat, other = Chat(llm), Chat(llm)
        chat.keeper.start(str(file))
        other.keeper.start(str(file))
        other.say(SUM)
        other.keeper.after_a_turn()
        chat.keeper.after_a_turn()
        before = file.read_text()
        chat.say("What is 2 + 2?")
        noted()
        for _ in range(2):
            chat.keeper.after_a_turn()
        assert noted().count("another program has changed") == 1
        assert file.read_text() == before
        other.say("/undo")
        other.keeper.after_a_turn()
        assert file.read_text() != before, "the other goes on"
        file.write_text("mine")
        other.say(f"/save {file}")
        assert "another program has changed it" in noted() and file.read_text() == "mine"
        other.say(f"/save --force {file}")
        assert "messages" in file.read_text()

    @pytest.mark.parametrize("line", ["/undo 2", "/regen now", "/help x", "/clear all", "/exit 1"])
    def test_a_command_that_takes_nothing_says_so(
        self, llm: LLM, noted: Callable[[], str], line: str
    ) -> None:
        chat = Chat(llm)
        chat.say(SUM, line)
        command, word = line.split()
        assert f"error: {command} stands alone, found '{word}' after it" in noted()
        assert len(chat.texts) == 2
        chat.say("/clear", "/clear")
        assert "(there is nothing to forget)" in noted()

    def test_exit_leaves(self, llm: LLM) -> None:
        for line in ("/exit", "/quit", "/bye"):
            with pytest.raises(Leave):
                Chat(llm).say(line)

    def test_stats_count_what_the_next_turn_finds(self, llm: LLM, noted: Callable[[], str]) -> None:
        chat = Chat(llm)
        chat.say("/stats")
        assert "0 of 2,048 tokens used" in noted()
        chat.say(SUM)
        noted()
        chat.say("/stats")
        shown = noted()
        assert llm.tokenizer
        used = len(llm.tokenizer.encode(llm.render(chat.talk.messages)))
        assert f"context: {used} of 2,048 tokens used as the next turn finds it" in shown
        assert f"{2048 - used:,} left" in shown
        assert "2 messages, 1 of you" in shown and "thinking 27, answer 4" in shown

    def test_stats_say_what_else_is_kept(self, noted: Callable[[], str]) -> None:
        llm = qwen3_tg.load("tiny")
        chat = Chat(llm, "--temperature", "0")
        chat.say(SUM, "now add 12", "/stats")
        assert "kept:" not in noted()
        chat.say("/clear", "Who are you?", "/stats")
        count, nbytes = llm.kept
        assert count == 1 and f"1 other text, {nbytes:,} bytes of main" in noted()

    def test_a_file_goes_into_the_next_message_only(
        self, llm: LLM, tmp_path: Path, noted: Callable[[], str]
    ) -> None:
        file = tmp_path / "a b.txt"
        file.write_bytes("Größe\r\n".encode())
        chat = Chat(llm, edited="what else?")
        chat.say(f"/read {file}")
        assert ": 9 bytes, 8 tokens, go into" in noted() and list(chat.talk.files) == [str(file)]
        chat.say("/read", "what?", "and?")
        assert f"({file} goes into the next message" in noted()
        assert chat.texts[0] == "a b.txt:\n\nGröße\n\nwhat?"
        assert chat.texts[2] == "and?"
        chat.say("/undo", "/regen", "/undo", f"/read {file}", "what?", "/edit")
        assert chat.offered == ["what?"], "the line editor shows what was typed, not the file"
        assert chat.texts[0] == "a b.txt:\n\nGröße\n\nwhat else?"

    @pytest.mark.parametrize(
        ("content", "error"),
        [
            (None, "not readable: No such file"),
            (b"a\0b", "binary (a zero byte at 1); expected a text file"),
            (b"caf\xe9", "not valid UTF-8: byte 0xe9 at offset 3"),
            (b" \n", "empty"),
            (b"7" * 3000, "3,000 tokens; the context has room for 2,048 more"),
            (b"7" * 200_000, "200,000 bytes do not fit in 2,048 tokens"),
        ],
    )
    def test_a_file_that_is_no_text_or_too_long_is_refused(
        self,
        llm: LLM,
        tmp_path: Path,
        noted: Callable[[], str],
        content: bytes | None,
        error: str,
    ) -> None:
        file = tmp_path / "file"
        if content is not None:
            file.write_bytes(content)
        chat = Chat(llm)
        chat.say(f"/read {file}")
        (line,) = noted().splitlines()
        assert line.startswith(f"error: {file}: {error}") and chat.talk.files == {}

    def test_a_folder_and_a_device_are_refused(
        self, llm: LLM, tmp_path: Path, noted: Callable[[], str]
    ) -> None:
        chat = Chat(llm)
        chat.say(f"/read {tmp_path}", "/read /dev/zero")
        shown = noted()
        assert "a folder; expected a text file" in shown
        assert "a device or a pipe; expected a text file" in shown
