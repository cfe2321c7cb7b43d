"""The command as a user types it: what goes to stdout and to stderr, and the exit code."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen3_tg.checkpoint import locate
from qwen3_tg.cli import main, terminal
from qwen3_tg.reply import Piece, Text, Thinking, ToolCall

COMMAND = [sys.executable, "-m", "qwen3_tg"]
SUM = "What is 37 + 85?"


def qwen3(*arguments: str, stdin: bytes = b"", **more: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a real process."""
    run = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, timeout=120, **more
    )
    return run.returncode, run.stdout.decode(), run.stderr.decode()


def heed_ctrl_c() -> None:
    """For `preexec_fn`: tests that run in the background ignore SIGINT and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def one_error(stderr: str) -> str:
    """The only line of stderr, which must be an error and no traceback."""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


class Stdin(io.TextIOWrapper):
    """A pipe that holds these bytes."""

    def __init__(self, data: bytes = b""):
        super().__init__(io.BytesIO(data), encoding="utf-8")


class Keys(Stdin):
    """These bytes, typed by somebody."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _empty_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin())


class TestGenerate:
    def test_stdout_holds_only_the_answer_and_stderr_the_thinking(self) -> None:
        code, out, err = qwen3(SUM)
        assert (code, out) == (0, "122\n")
        assert "7+5=12" in err and "122" in err
        assert "\x1b" not in out + err, "no colours in a pipe"

    def test_the_command_word_may_be_given(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--thinking", "off", "hi"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("Hello!") and err == ""

    def test_stdin_follows_the_prompt_after_an_empty_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qwen3_tg.cli.arguments import read_text

        monkeypatch.setattr(sys, "stdin", Stdin("Größe\r\n".encode()))
        assert read_text(["sum", "up"]) == "sum up\n\nGröße"
        monkeypatch.setattr(sys, "stdin", Stdin(b"text\n"))
        assert read_text([]) == "text"
        monkeypatch.setattr(sys, "stdin", Stdin(b"text\n"))
        assert read_text(["say", "-", "twice"]) == "say text twice"
        monkeypatch.setattr(sys, "stdin", Stdin(b"text\n"))
        assert read_text([], keep_end=True) == "text\n"

    def test_a_prompt_from_a_pipe(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", Stdin(SUM.encode()))
        assert main([]) == 0
        assert capsys.readouterr().out == "122\n"

    def test_raw_continues_the_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        prompt = f"<|im_start|>user\n{SUM}<|im_end|>\n<|im_start|>assistant\n"
        assert main(["--raw", prompt, "--max-new-tokens", "7"]) == 0
        out, err = capsys.readouterr()
        assert out == "<think>\n37+85\n"
        assert err == "(cut off at --max-new-tokens)\n"

    def test_verbose_tells_device_counts_times_and_seed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["-v", "--seed", "5", SUM]) == 0
        err = capsys.readouterr().err
        assert "device CPU (set by DEV), float32, fast kernels on" in err
        assert "thinking 27, answer 4; first token after" in err
        assert "ended by stop; seed 5" in err

    def test_wishes_of_the_checkpoint_that_are_not_applied_are_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(locate("tiny"), tmp_path / "model")
        wish = '{"do_sample": false, "no_repeat_ngram_size": 30}'
        (tmp_path / "model" / "generation_config.json").write_text(wish)
        assert main(["--model", str(tmp_path / "model"), SUM]) == 0
        out, err = capsys.readouterr()
        assert out == "122\n"
        assert "asks for no_repeat_ngram_size 30: not applied\n" in err

    def test_a_forbidden_token_is_not_drawn(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tokenize", "--ids", "2"]) == 0
        id = capsys.readouterr().out.strip()
        assert main(["--logit-bias", f"{id}=-inf", "--thinking-budget", "0", SUM]) == 0
        assert "2" not in capsys.readouterr().out

    def test_several_answers_are_drawn_anew_and_each_can_be_had_again(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        how = ["--temperature", "3", "--seed", "7", "--thinking", "off", "--max-new-tokens", "9"]
        assert main([*how, "--n", "3", SUM]) == 0
        out, err = capsys.readouterr()
        seeds = re.findall(r"answer . of 3, seed (\d+)", err)
        assert seeds[0] == "7" and len(set(seeds)) == 3
        assert main([*how, "--seed", seeds[2], SUM]) == 0
        last = capsys.readouterr().out
        assert out.endswith(last) and out.count("\n") >= 3
        assert main(["--n", "2", SUM]) == 2
        assert "at temperature 0 would give one answer 2 times" in one_error(
            capsys.readouterr().err
        )

    def test_an_explanation_shows_what_each_step_left_and_took(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        how = ["--temperature", "0.7", "--top-k", "3", "--presence-penalty", "0.5"]
        assert main([*how, "--explain", "--thinking", "off", "--max-new-tokens", "4", SUM]) == 0
        err = capsys.readouterr().err
        assert "token 0: " in err and "token 3: " in err and "token 4: " not in err
        steps = re.findall(r"^ +(\S+(?: \S+)?) +(\d+)  ", err, re.MULTILINE)[:5]
        assert steps == [
            ("at first", "800"),
            ("presence_penalty 0.5", "800"),
            ("temperature 0.7", "800"),
            ("top_k 3", "3"),
            ("took", "797"),
        ]

    def test_greedy_thinking_is_warned_of_where_the_checkpoint_does_not_ask_for_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(locate("tiny"), tmp_path / "model")
        (tmp_path / "model" / "generation_config.json").unlink()
        model = ["--model", str(tmp_path / "model")]
        assert main([*model, "--temperature", "0", SUM]) == 0
        assert "note: at temperature 0 thinking may repeat itself" in capsys.readouterr().err
        assert main([*model, "--temperature", "0", "--thinking", "off", SUM]) == 0
        assert "note" not in capsys.readouterr().err
        assert main(["--temperature", "0", SUM]) == 0
        assert "note" not in capsys.readouterr().err

    @pytest.mark.parametrize("bias", ["x=1", "5", "5=y", "-1=2", "5=inf", "900=1"])
    def test_a_bias_that_is_none_is_one_error(
        self, bias: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--logit-bias", bias, SUM]) == 2
        assert "bias" in one_error(capsys.readouterr().err)

    def test_verbose_plans_thinking_and_answer(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = ["-v", "--thinking-budget", "5", "--max-new-tokens", "9", SUM]
        assert main(line) == 0
        plan = "plan: prompt 18 tokens, thinking at most 5, answer at most 9; the context has 2,048"
        assert plan in capsys.readouterr().err.splitlines()
        assert main(["-v", "--thinking", "off", "--max-new-tokens", "9", SUM]) == 0
        assert "tokens, answer at most 9; the" in capsys.readouterr().err

    def test_a_thinking_budget_and_a_stop_string(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--thinking-budget", "3", "--stop", ".", SUM]) == 0
        assert "Considering the limited time by the user" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ([], "the prompt is empty"),
            (["  "], "the prompt is empty"),
            (["--nonsense", "x"], "unrecognized arguments: --nonsense"),
            (["--temperature", "hot", "x"], "--temperature"),
            (["--temperature", "-1", "x"], "temperature must be at least 0, found -1"),
            (["--top-p", "0", "x"], "top_p must be above 0"),
            (["--max-new-tokens", "0", "x"], "--max-new-tokens must be at least 1"),
            (["--context", "0", "x"], "--context must be at least 1"),
            (["--context", "9999", "x"], "context must be from 1 to 8192"),
            (["--thinking-budget", "-1", "x"], "--thinking-budget must be at least 0"),
            (
                ["--thinking", "off", "--thinking-budget", "3", "x"],
                "no meaning with --thinking off",
            ),
            (["--thinking", "perhaps", "x"], "--thinking"),
            (["--raw", "--system", "s", "x"], "--system has no meaning with --raw"),
            (["--raw", "--thinking", "on", "x"], "--thinking has no meaning with --raw"),
            (["--stop", "", "x"], "stop strings must be a list of texts"),
            (["--device", "TOASTER", "x"], "unknown device 'TOASTER'"),
            (["--model", "tiny", "chat"], "the command comes first: qwen3 chat"),
            (["chat", "hello"], "unrecognized arguments: hello"),
            (["tokenize"], "no text"),
            (["tokenize", "--decode", "x"], "--decode takes token ids, found 'x'"),
        ],
    )
    def test_a_wrong_call_is_one_line_and_exit_code_2(
        self, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert text in one_error(err)
        assert out == ""

    @pytest.mark.parametrize(
        ("model", "text"),
        [
            ("/no/such/folder", "no such directory"),
            ("no-org/no-model", "get it with: qwen3 pull no-org/no-model"),
            ("Qwen3-0.6B", "get it with: qwen3 pull Qwen/Qwen3-0.6B"),
        ],
    )
    def test_a_missing_model_is_one_line_and_exit_code_1(
        self,
        model: str,
        text: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert main(["--model", model, "hi"]) == 1
        assert text in one_error(capsys.readouterr().err)

    def test_a_prompt_longer_than_the_context(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["7" * 3000]) == 1
        assert "no room for an answer" in one_error(capsys.readouterr().err)

    def test_invalid_utf8_on_stdin_names_the_byte(self) -> None:
        code, out, err = qwen3("summarise", stdin=b"caf\xe9 ole")
        assert (code, out) == (2, "")
        assert "byte 0xe9 at offset 3" in one_error(err)

    def test_an_invalid_argument_is_one_line(self) -> None:
        run = subprocess.run([*COMMAND, b"caf\xe9"], capture_output=True, stdin=subprocess.DEVNULL)
        assert run.returncode == 2
        assert "not valid UTF-8" in one_error(run.stderr.decode())

    def test_debug_shows_the_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--debug", "--model", "/no/such", "x"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("Traceback") and err.splitlines()[-1].startswith("error: ")

    def test_an_unexpected_failure_is_one_line_too(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(options: object) -> None:
            raise ZeroDivisionError("of\ntwo lines")

        monkeypatch.setattr("qwen3_tg.cli.generate.generate", fail)
        assert main(["x"]) == 1
        line = one_error(capsys.readouterr().err)
        assert "unexpected ZeroDivisionError: of two lines (run again with --debug" in line


class TestEndings:
    def test_a_closed_pipe_is_silent_and_141(self) -> None:
        process = subprocess.Popen(
            [*COMMAND, "tokenize", "1 2 3 " * 20_000],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"    16  '1'\n"
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""

    @pytest.mark.parametrize(
        ("closed", "expected"),
        [
            ("2>&-", (0, b"122\n", b"")),
            ("<&-", (0, b"122\n", None)),
            (">&-", (2, b"", b"error: stdout is closed: there is no place for an answer\n")),
        ],
    )
    def test_a_closed_stream_is_no_surprise(
        self, closed: str, expected: tuple[int, bytes, bytes | None]
    ) -> None:
        line = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, SUM]
        run = subprocess.run(line, capture_output=True, stdin=subprocess.DEVNULL)
        err = run.stderr if expected[2] is not None else None
        assert (run.returncode, run.stdout, err) == expected

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
    @pytest.mark.parametrize("command", [[SUM], ["tokenize", "a"], ["devices"]])
    def test_a_full_disk_is_one_error(self, command: list[str]) -> None:
        with Path("/dev/full").open("w") as full:
            run = subprocess.run(
                [*COMMAND, *command],
                stdin=subprocess.DEVNULL,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1] == (
            "error: cannot write the output: No space left on device"
        )

    def test_ctrl_c_in_the_middle_of_a_del_is_not_lost(self) -> None:
        class Deleted:
            def __del__(self) -> None:
                raise KeyboardInterrupt

        def run(argv: list[str], stdout_is_closed: bool) -> int:
            Deleted()
            time.sleep(10)
            return 0

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(sys.modules["qwen3_tg.cli.main"], "_run_and_report", run)
                main([])
        finally:
            signal.signal(signal.SIGINT, before)

    def test_debug_of_other_programs_prints_nothing(self) -> None:
        assert qwen3(SUM, env=os.environ | {"DEBUG": "1"})[:2] == (0, "122\n")
        assert qwen3(SUM, env=os.environ | {"DEBUG": "true"})[:2] == (0, "122\n")

    def test_ctrl_c_ends_with_130_and_leaves_nothing_running(self) -> None:
        process = subprocess.Popen(
            [*COMMAND, "--raw", "1+1+1+1"],  # never ends by itself
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=heed_ctrl_c,
        )
        assert process.stdout and process.stderr
        assert process.stdout.read(1), "it has begun to answer"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert b"Traceback" not in process.stderr.read()
        end = time.monotonic() + 15  # the system takes a while to clear away dead children
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(process.pid, 0)
                time.sleep(0.1)


class TestTokenizeAndDevices:
    def test_tokens_are_shown_with_their_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tokenize", "7ö<|im_end|>"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["22", "'7'"]
        assert lines[1].endswith("b'\\xc3'"), "half a character is shown as its byte"
        assert lines[-1].split() == ["770", "'<|im_end|>'"]

    def test_ids_count_and_decode(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["tokenize", "--ids", SUM]) == 0
        ids = capsys.readouterr().out
        assert main(["tokenize", "--count", SUM]) == 0
        assert int(capsys.readouterr().out) == len(ids.split())
        monkeypatch.setattr(sys, "stdin", Stdin(ids.encode()))
        assert main(["tokenize", "--decode"]) == 0
        assert capsys.readouterr().out == SUM + "\n"
        assert main(["tokenize", "--decode", "1 99999"]) == 2
        assert one_error(capsys.readouterr().err).endswith("the tokenizer has no token 99999")

    def test_devices_marks_the_one_it_would_take(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["devices"]) == 0
        out = capsys.readouterr().out
        (chosen,) = [line for line in out.splitlines() if line.startswith("*")]
        assert "CPU" in chosen and "works" in chosen and "ClangRenderer" in chosen
        assert "chosen: set by DEV" in out
        heads = [line for line in out.splitlines() if not line.startswith(" " * 10)]
        assert all(" works " in line or " no " in line for line in heads)
        assert main(["devices", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["chosen"] == "CPU"
        (cpu,) = [one for one in found["devices"] if one["name"] == "CPU"]
        assert cpu["works"] and cpu["memory_bytes"] > cpu["free_memory_bytes"] > 0
        assert all(one["works"] or one["missing"] for one in found["devices"])

    @pytest.mark.parametrize("words", [["serve"], ["chatt"], ["Chat"], ["run", "qwen3"]])
    def test_what_looks_like_a_command_is_sent_and_told(
        self, words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ["--thinking", "off", "--max-new-tokens", "9"]
        main([*options, *words])
        assert f"note: {words[0]!r} is no command" in capsys.readouterr().err
        main([*options, "hello there", "chatt"])
        main(["generate", *options, *words])
        assert "is no command" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "line",
        ["chat --session", "chat --tools", "--json-schema", "--grammar", "--input", "replay"],
    )
    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/full"])
    def test_what_has_no_end_is_not_read(
        self, line: str, device: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*line.split(), device]) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert told == f"error: {device} is a device that has no end, and no file"

    @pytest.mark.parametrize("name", ["session", "tools"])
    def test_an_empty_name_of_a_file_is_refused(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["chat", f"--{name}", ""]) == 2
        assert capsys.readouterr().err == f"error: --{name} must not be empty\n"


class TestChat:
    def test_each_line_of_a_pipe_is_a_turn(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = f"{SUM}\n\nnow add 12\n/thinking off\nhi\n/nonsense\n/clear\n/exit\nnever sent\n"
        monkeypatch.setattr(sys, "stdin", Stdin(lines.encode()))
        assert main(["chat"]) == 1, "as something went wrong"
        out, err = capsys.readouterr()
        answers = out.splitlines()
        assert answers[:2] == ["122", "134"]
        assert answers[2].startswith("Hello!") and len(answers) == 3
        assert "unknown command '/nonsense'" in err and "(forgotten; /undo brings it back)" in err

    def test_a_turn_that_does_not_fit_is_as_if_never_sent(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = f"{SUM}\n{'7' * 3000}\nnow add 12\n"
        monkeypatch.setattr(sys, "stdin", Stdin(lines.encode()))
        assert main(["chat"]) == 1
        out, err = capsys.readouterr()
        assert out.splitlines() == ["122", "134"]
        assert "/clear starts anew" in err

    def test_a_first_message_that_does_not_fit_is_told_nothing_of_turns(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", Stdin(f"{'7' * 3000}\n".encode()))
        assert main(["chat"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "the context 2048" in line and "/clear" not in line and "--overflow" not in line

    def test_an_answer_that_is_cut_from_its_form_fails(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", Stdin(f"{SUM}\n".encode()))
        line = ["chat", "--thinking", "off", "--regex", "[0-9]{40}", "--max-new-tokens", "2"]
        assert main(line) == 1
        assert "error: the answer is unfinished" in capsys.readouterr().err

    def test_the_same_message_again_draws_other_numbers(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = "--thinking off --temperature 3 --top-k 0 --top-p 1 --max-new-tokens 9".split()

        def run() -> list[str]:
            monkeypatch.setattr(sys, "stdin", Stdin(b"hi\n/clear\nhi\n"))
            assert main(["chat", "--seed", "1", *options]) == 0
            return capsys.readouterr().out.split("\n", 1)

        first, second = run()
        assert first not in second
        assert run() == [first, second], "the same seed, the same conversation"

    def test_what_was_answered_before_ctrl_c_is_kept(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shown: list[str] = []

        def break_off(pieces: Iterator[Piece], show: Callable[[Piece], None], llm: object) -> None:
            for piece in pieces:
                show(piece)
                shown.append(piece.text if isinstance(piece, Text) else "")
                if "".join(shown) == "122":
                    shown.append("only once")
                    raise KeyboardInterrupt

        monkeypatch.setattr(terminal, "stream", break_off)
        monkeypatch.setattr(sys, "stdin", Keys(f"{SUM}\nnow add 12\n".encode()))
        assert main(["chat"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == ["122", "134"]
        assert "(stopped)" in err

    def test_ctrl_c_stops_the_answer_and_not_the_program(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stream, calls = terminal.stream, []

        def break_off(pieces: object, show: object, llm: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            stream(pieces, show, llm)  # type: ignore[arg-type]

        monkeypatch.setattr(terminal, "stream", break_off)
        lines = f"{SUM}\nhi\nnow add 12\n".encode()
        monkeypatch.setattr(sys, "stdin", Keys(lines))
        assert main(["chat"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == ["122", "134"]
        assert "(stopped)" in err
        calls.clear()
        monkeypatch.setattr(sys, "stdin", Stdin(lines))  # a pipe: nobody sits there
        assert main(["chat"]) == 130
        assert capsys.readouterr().out.splitlines() == ["122"]

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ("--context 20", "no answer: the context was full before it began; --context N"),
            ("--thinking off --max-new-tokens 1", "no answer: --max-new-tokens ended it"),
        ],
    )
    def test_no_answer_at_all_is_an_error(
        self,
        options: str,
        why: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def white(self: object, piece: Piece) -> None:
            show(self, Text("\n") if isinstance(piece, Text) else piece)  # type: ignore[arg-type]

        show = terminal.ReplyPrinter.show
        if "--max-new-tokens" in options:
            monkeypatch.setattr(terminal.ReplyPrinter, "show", white)
        monkeypatch.setattr(sys, "stdin", Stdin(b""))
        assert main([*options.split(), SUM]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {why}")
        monkeypatch.setattr(sys, "stdin", Stdin(f"{SUM}\n".encode()))
        assert main(["chat", *options.split()]) == 1
        assert f"error: {why}" in capsys.readouterr().err

    def test_v_tells_the_seed_that_the_answer_can_be_had_again_with(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = "--thinking off --temperature 3 --top-k 0 --top-p 1 --max-new-tokens 9 -v".split()

        def run(lines: bytes, seed: str) -> tuple[str, list[str]]:
            monkeypatch.setattr(sys, "stdin", Stdin(lines))
            assert main(["chat", "--seed", seed, *options]) == 0
            out, err = capsys.readouterr()
            return out, re.findall(r"; seed (\d+)", err)

        both, seeds = run(b"hi\n/regen\n", "5")
        assert seeds[0] == "5" and int(seeds[1]) < 2**53
        assert "".join(run(b"hi\n", seed)[0] for seed in seeds) == both


PROMPT = "\x1b[?2004h"  # prompt_toolkit is ready for keys


class TestRealTerminal:
    """The command on a terminal of its own, with a keyboard."""

    def test_a_conversation_with_keys(self) -> None:
        process, screen = self.start("chat", "-v")
        self.wait(screen, PROMPT)
        os.write(screen, f"{SUM}\r".encode())
        shown = self.wait(screen, PROMPT)
        assert "\n122\r\n" in shown
        assert "\x1b[2m" in shown, "thinking is dim"
        os.write(screen, b"half a line\x03")  # Ctrl-C drops the line and stays
        self.wait(screen, PROMPT)
        os.write(screen, b"now add 12\r")
        assert "\n134\r\n" in self.wait(screen, PROMPT)
        os.write(screen, b"\x04")  # Ctrl-D
        assert process.wait(30) == 0

    def test_ctrl_c_while_it_answers_stops_only_the_answer(self) -> None:
        process, screen = self.start("chat")
        self.wait(screen, PROMPT)
        os.write(screen, f"{SUM}\r".encode())
        self.wait(screen, "reading the prompt")
        os.write(screen, b"\x03")
        assert "(stopped)" in self.wait(screen, PROMPT)
        os.write(screen, b"/exit\r")
        assert process.wait(30) == 0

    def test_the_cursor_is_back_after_ctrl_c_of_a_single_answer(self) -> None:
        process, screen = self.start(SUM)
        self.wait(screen, "reading the prompt")
        os.write(screen, b"\x03")
        assert process.wait(30) == 130
        shown = self.rest(screen)
        assert "Traceback" not in shown
        assert shown.rfind("\x1b[?25h") >= shown.rfind("\x1b[?25l"), "the cursor stays hidden"

    def start(self, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
        def take_the_terminal() -> None:
            heed_ctrl_c()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        screen, keyboard = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
            preexec_fn=take_the_terminal,
        )
        os.close(keyboard)
        return process, screen

    def wait(self, screen: int, text: str, timeout_s: float = 60) -> str:
        """Read the screen until `text` comes; all that was read."""
        shown, end = "", time.monotonic() + timeout_s
        while text not in shown:
            assert time.monotonic() < end, f"{text!r} did not come: {shown!r}"
            if select.select([screen], [], [], 1)[0]:
                shown += os.read(screen, 4096).decode(errors="replace")
        return shown

    def rest(self, screen: int) -> str:
        shown = b""
        with contextlib.suppress(OSError):  # Linux says EIO at the end
            while part := os.read(screen, 4096):
                shown += part
        return shown.decode(errors="replace")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestTerminal:
    def test_thinking_is_dim_and_control_characters_never_reach_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        printer = terminal.ReplyPrinter()
        printer.show(Thinking("hm"))
        printer.show(Text("a\x1b[2Jb\x07\n\tc"))
        printer.show(ToolCall("f", {"x": 1}))
        printer.finish()
        assert err.getvalue() == "\x1b[2mhm\x1b[0m\n\n"
        assert out.getvalue() == 'a\ufffd[2Jb\ufffd\n\tc\n{"name": "f", "arguments": {"x": 1}}\n'

    @pytest.mark.parametrize(("value", "is_dim"), [("", True), ("1", False)])
    def test_no_color_is_obeyed_unless_it_is_empty(
        self, value: str, is_dim: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", value)
        assert terminal.dim("x") == ("\x1b[2mx\x1b[0m" if is_dim else "x")
        assert terminal.obeys_codes(), "Markdown and folding stay"
