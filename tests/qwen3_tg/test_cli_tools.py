"""--tools: files of tools, commands that are confirmed, limited and run by no shell."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_tg.cli import main, terminal
from qwen3_tg.cli import tools as cli_tools
from qwen3_tg.cli.tool_commands import Limits, run_command
from qwen3_tg.cli.tool_files import read_tools
from qwen3_tg.cli.tools import ChatTools
from qwen3_tg.errors import UsageError
from qwen3_tg.llm import LLM
from qwen3_tg.reply import End, Piece, ToolCall
from qwen3_tg.tools import ToolError, ToolResult

QUESTION = "What is 123 * 45?"
LIMITS = Limits(seconds=20, output_bytes=1000)
COMPUTE = (
    "import sys; a, s, b = sys.argv[1].split(); a, b = int(a), int(b);"
    "print({'+': a + b, '-': a - b, '*': a * b}[s])"
)


def entry(command: Any = None, name: str = "calculator", **parameters: Any) -> dict[str, Any]:
    """A tool of a file. `parameters` None: one that is required, `expression`."""
    properties = parameters or {"expression": {"type": "string", "description": "e.g. 2 + 3"}}
    required = [name for name, about in properties.items() if "default" not in about]
    schema = {"type": "object", "properties": properties, "required": required}
    about = "Evaluate a math expression."
    function = {"name": name, "description": about, "parameters": schema}
    tool: dict[str, Any] = {"type": "function", "function": function}
    return tool if command is None else tool | {"command": command}


CALCULATOR = entry([sys.executable, "-c", COMPUTE, "{expression}"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tools.json"


def write(file: Path, *entries: Any) -> str:
    file.write_text(json.dumps(entries), encoding="utf-8")
    return str(file)


def stdin_is(monkeypatch: pytest.MonkeyPatch, text: str, tty: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    if tty:
        stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stream)


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("[", "not valid JSON: Expecting value"),
            ("{}", "expected a list of functions, found dict {}"),
            ("[]", "expected a list of functions, found list []"),
            (json.dumps([entry(), 5]), "[1]: expected an object, found int"),
            (json.dumps([entry(), entry()]), "[1]: the name 'calculator' is that of [0]"),
            (json.dumps([entry("wc -w")]), "[0].command: expected a list of words"),
            (json.dumps([entry([])]), "[0].command: expected a list of words"),
            (json.dumps([entry(["{expression}"])]), "[0].command[0]: the program itself cannot"),
            (json.dumps([entry(["a", "{x}"])]), "[0].command[1]: {x} is no parameter; they are: "),
            (json.dumps([entry() | {"comand": []}]), "[0]: unknown field 'comand'"),
            (json.dumps([{"function": {"name": "a b"}}]), "[0].function.name: expected"),
        ],
    )
    def test_a_bad_file_is_one_error_with_file_and_field_before_anything_is_loaded(
        self, file: Path, text: str, problem: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file.write_text(text, encoding="utf-8")
        assert main(["--model", "/none", "--tools", str(file), "hi"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(file) in line and problem in line

    def test_a_missing_file(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--tools", str(file), "hi"]) == 2
        assert f"error: --tools {file}: No such file" in capsys.readouterr().err

    def test_a_place_for_what_may_be_missing_needs_a_default(self, file: Path) -> None:
        tool = entry(["a", "{n}"], n={"type": "integer"})
        del tool["function"]["parameters"]["required"]
        with pytest.raises(UsageError, match=r'\{n\} may be left away .* give it a "default"'):
            read_tools(write(file, tool))

    def test_arguments_go_to_their_places_and_stay_one_word(self, file: Path) -> None:
        command = ["a", "--x={x}", "{n}", "{l}", "{print $1}", "{x}"]
        kinds = {"x": {"type": "string"}, "n": {"type": "integer", "default": -3}, "l": {}}
        (tool,) = read_tools(write(file, entry(command, **kinds)))
        words = tool.words({"x": "b; rm -rf {n} $(c)", "l": [1, "ü"]})
        said = "b; rm -rf {n} $(c)"
        assert words == ["a", f"--x={said}", "-3", '[1, "ü"]', "{print $1}", said]

    def test_a_text_never_becomes_an_option(self, file: Path) -> None:
        bare, guarded = read_tools(
            write(file, entry(["cat", "{expression}"]), entry(["cat", "--", "{expression}"], "b"))
        )
        with pytest.raises(ToolError, match="'--help' begins with -"):
            bare.words({"expression": "--help"})
        assert guarded.words({"expression": "--help"}) == ["cat", "--", "--help"]


def python(code: str, stdin: str | None = None, limits: Limits = LIMITS) -> str:
    return run_command([sys.executable, "-c", code], stdin, limits)


class TestCommands:
    def test_arguments_come_on_stdin_and_what_is_printed_is_the_result(self) -> None:
        assert python("import sys; print(sys.stdin.read().upper())", "größe") == "GRÖSSE"
        assert python("import sys; print(repr(sys.stdin.read()))") == "''"

    def test_one_that_never_reads_is_no_problem(self) -> None:
        assert python("print(1)", "x" * 1_000_000) == "1"

    def test_output_is_cut_at_the_limit_between_characters_and_the_command_goes_on(
        self, tmp_path: Path
    ) -> None:
        done = tmp_path / "done"
        code = f"print('aä' * 500000, flush=True); open({str(done)!r}, 'w')"
        out = python(code, limits=Limits(20, 5))
        assert out == "aäa\n(cut: the first 5 of 1500001 bytes)"
        assert done.exists()

    def test_a_failure_tells_its_code_and_all_it_printed(self) -> None:
        code = "import sys; print('out'); print('why', file=sys.stderr); sys.exit(3)"
        with pytest.raises(ToolError, match=r"exit code 3\nout\nwhy$"):
            python(code)

    def test_what_takes_too_long_is_ended_with_all_that_it_started(self, tmp_path: Path) -> None:
        alive = tmp_path / "alive"
        child = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
        code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
        began = time.monotonic()
        with pytest.raises(ToolError, match=r"longer than 1 s and was stopped\nfirst"):
            python(code + "; print('first', flush=True); time.sleep(60)", limits=Limits(1, 100))
        assert time.monotonic() - began < 10
        time.sleep(3)
        assert not alive.exists()

    def test_one_that_leaves_something_behind_with_its_output_is_ended_too(self) -> None:
        code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('x', flush=True)"
        began = time.monotonic()
        with pytest.raises(ToolError, match="longer than 1 s"):
            python(code, limits=Limits(1, 100))
        assert time.monotonic() - began < 10

    def test_ctrl_c_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended: list[int | None] = []
        wait = subprocess.Popen.wait

        def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            ended.append(wait(self))
            return 0

        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            python("import time; time.sleep(60)")
        assert ended == [-9]

    @pytest.mark.parametrize("words", [["/no/such"], ["echo", "a\0b"], ["echo", "\ud800"]])
    def test_what_cannot_be_run_is_told(self, words: list[str]) -> None:
        with pytest.raises(ToolError, match="cannot be run"):
            run_command(words, None, LIMITS)


class TestConfirmation:
    def ask(
        self,
        monkeypatch: pytest.MonkeyPatch,
        file: Path,
        answers: str,
        calls: int = 1,
        yes: bool = False,
        tool: dict[str, Any] = CALCULATOR,
    ) -> list[ToolResult]:
        stdin_is(monkeypatch, answers)
        box = ChatTools(read_tools(write(file, tool)), LIMITS, 10, yes)._box
        return [box.run(ToolCall("calculator", {"expression": "2 + 3"})) for _ in range(calls)]

    def test_yes_no_and_always(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = self.ask(monkeypatch, file, "y\nno\nwhat?\nAlways\n", calls=4)
        refused = "error: the user did not allow this call"
        assert [r.content for r in results] == ["5", refused, "5", "5"]
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("run it?") == 4, (
            "asked again after what is no answer, and not after always"
        )
        assert "'2 + 3'" in err

    def test_the_end_of_the_input_is_no(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        assert self.ask(monkeypatch, file, "")[0].failed

    def test_yes_tools_asks_nothing(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.ask(monkeypatch, file, "", yes=True)[0].content == "5"
        assert "run it?" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "shown"),
        [
            ("5\n6", "result: 5\n6\n"),
            ("y\n" * 50, "result: " + "y\n" * 19 + "y ... (61 more letters, for the model)\n"),
            ("x" * 3000, f"result: {'x' * 2000} ... (1,000 more letters, for the model)\n"),
        ],
    )
    def test_the_beginning_of_a_result_is_shown(
        self, content: str, shown: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        printer = cli_tools.ToolPrinter(lambda turn: terminal.ReplyPrinter())
        printer.show(ToolResult(ToolCall("f", {}), content))
        assert capsys.readouterr().err == shown

    def test_the_user_types_the_result_of_a_tool_without_a_command(
        self, monkeypatch: pytest.MonkeyPatch, file: Path
    ) -> None:
        (typed,) = self.ask(monkeypatch, file, "fünf\n", tool=entry())
        assert typed == ToolResult(typed.call, "fünf")
        (nothing,) = self.ask(monkeypatch, file, "", tool=entry())
        assert nothing.content == "error: the user gave no result"

    def test_a_terminal_shows_what_is_typed_and_earlier_keys_are_no_answer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen, keyboard = pty.openpty()
        before = termios.tcgetattr(keyboard)
        before[3] &= ~termios.ECHO  # as while an answer is printed
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
        os.write(screen, b"y\n")  # typed before the question, for the next message
        assert select.select([keyboard], [], [], 10)[0], "it arrives later than it is written"

        class Stderr(io.StringIO):
            def write(self, text: str) -> int:
                assert termios.tcgetattr(keyboard)[3] & termios.ECHO
                os.write(screen, b"n\n")
                return len(text)

        with open(keyboard, encoding="utf-8") as stdin:  # noqa: PTH123 (a number)
            monkeypatch.setattr(sys, "stdin", stdin)
            monkeypatch.setattr(sys, "stderr", Stderr())
            assert cli_tools._ask("run it? ") == "n"
            assert not termios.tcgetattr(keyboard)[3] & termios.ECHO, "as it was"
        os.close(screen)

    def test_what_is_shown_hides_nothing(self) -> None:
        shown = cli_tools._readable("a\u202eb\nrm -rf /\x1b[2J")
        assert shown == "$'a\\u202eb\\nrm -rf /\\x1b[2J'"
        assert cli_tools._readable("a b") == "'a b'"


class TestChat:
    def test_a_command_is_run_and_the_model_answers_with_its_result(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdin_is(monkeypatch, f"{QUESTION}\nnow subtract 40\n")
        assert main(["chat", "--yes-tools", "--tools", write(file, CALCULATOR)]) == 0
        out, err = capsys.readouterr()
        assert out == "5535\n5495\n", "the answer alone"
        assert 'call: calculator {"expression": "123 * 45"}' in err and "result: 5535" in err

    def test_a_confirmed_command_on_a_terminal(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdin_is(monkeypatch, f"{QUESTION}\ny\n", tty=True)
        assert main(["chat", "--tools", write(file, CALCULATOR)]) == 0
        out, err = capsys.readouterr()
        assert out == "5535\n" and "run it?" in err

    def test_a_result_that_the_user_types_comes_from_the_next_line_of_a_pipe(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdin_is(monkeypatch, f"{QUESTION}\n5535\n")
        assert main(["chat", "--tools", write(file, entry())]) == 0
        assert capsys.readouterr().out == "5535\n"

    def test_a_command_that_fails_is_told_to_the_model_and_ends_nothing(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdin_is(monkeypatch, f"{QUESTION}\n")
        tool = entry(["sh", "-c", "exit 3"], name="calculator")
        code = main(["chat", "--yes-tools", "--tools", write(file, tool), "--max-new-tokens", "50"])
        assert code == 0
        assert "result: error: exit code 3" in capsys.readouterr().err

    def test_what_was_run_is_remembered_after_ctrl_c_and_after_too_many_rounds(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of a model that always calls, and whose call in its fifth turn the user stops."""
        asked: list[list[Any]] = []
        call = ToolCall("calculator", {"expression": "2 + 3"})
        stop = ToolCall("calculator", {"expression": "stop"})

        def script(self: LLM, messages: list[Any], *_: Any, **__: Any) -> Iterator[Piece]:
            asked.append(messages)
            yield from [stop if len(asked) == 5 else call, End("stop", 1, 0, 1, 0.0, 0.0)]

        def run(words: list[str], *_: Any) -> str:
            if "stop" in words:
                raise KeyboardInterrupt
            return "5"

        monkeypatch.setattr(LLM, "chat", script)
        monkeypatch.setattr(cli_tools, "run_command", run)
        stdin_is(monkeypatch, "first\nsecond\nthird\n", tty=True)
        options = ["--yes-tools", "--tools", write(file, CALCULATOR), "--tool-rounds", "2"]
        assert main(["chat", *options]) == 0
        err = capsys.readouterr().err
        assert "called tools in 2 rounds and wants to go on" in err and "(stopped)" in err
        roles = [[message["role"][0] for message in messages] for messages in asked]
        first = ["u", "a", "t", "a", "t"]
        assert roles[:3] == [["u"], first[:3], first], "the first question with its two rounds"
        assert roles[3:5] == [[*first, "u"], [*first, "u", "a", "t"]], "the second goes on from it"
        assert roles[5] == [*first, "u", "a", "t", "u"], "stopped in a round, it keeps the others"

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["--tools", "FILE"], "confirmed on a terminal, and stdin is none"),
            (["--yes-tools"], "--yes-tools has no meaning without --tools"),
            (["--tool-timeout", "5"], "--tool-timeout has no meaning without --tools"),
            (["--tool-output", "500"], "--tool-output has no meaning without --tools"),
            (["--tool-rounds", "3"], "--tool-rounds has no meaning without --tools"),
            (["--tool-timeout", "0"], "--tool-timeout must be above 0"),
            (["--tool-output", "0"], "--tool-output must be at least 1"),
            (["--tool-rounds", "0"], "--tool-rounds must be at least 1"),
        ],
    )
    def test_a_wrong_call_is_refused_before_anything_is_loaded(
        self,
        arguments: list[str],
        problem: str,
        monkeypatch: pytest.MonkeyPatch,
        file: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        stdin_is(monkeypatch, "hi\n")
        path = write(file, CALCULATOR)
        given = [path if word == "FILE" else word for word in arguments]
        assert main(["chat", "--model", "/none", *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line


class TestOneQuestion:
    def test_calls_are_printed_as_json_and_nothing_is_run(
        self, monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdin_is(monkeypatch, "")
        ran = file.parent / "ran"
        assert main(["--tools", write(file, entry(["touch", str(ran)])), QUESTION]) == 0
        out, _ = capsys.readouterr()
        call = {"name": "calculator", "arguments": {"expression": "123 * 45"}}
        assert [json.loads(line) for line in out.splitlines()] == [call]
        assert not ran.exists()

    def test_raw_text_has_no_tools(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--raw", "--tools", "x", "hi"]) == 2
        assert "--tools has no meaning with --raw" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_no_thread_and_no_file_is_left_open() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        python("print(1)", "{}")
    time.sleep(0.2)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before  # noqa: PTH208
