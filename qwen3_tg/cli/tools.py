"""Tools in a chat: each command is confirmed, run and shown; for a tool without one the user types
the result. Whoever reads is told the truth: what is shown is what runs, word for word."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen3_tg.cli import terminal
from qwen3_tg.cli.tool_commands import Limits, run_command
from qwen3_tg.cli.tool_files import FileTool, read_tools
from qwen3_tg.errors import UsageError, check_count
from qwen3_tg.reply import End, Piece, ToolCall
from qwen3_tg.tool_loop import Ask, ToolLoop
from qwen3_tg.tools import Tool, Toolbox, ToolError, ToolResult

_QUESTION = "run it? yes, no, or always for {name} [y/n/a] "
_DECLINED = "the user did not allow this call"
_SHOWN_LINES, _SHOWN_LETTERS = 20, 2000
# where --tool-timeout, --tool-output and --tool-rounds do not say otherwise
_SECONDS, _OUTPUT_BYTES, _ROUNDS = 30.0, 16384, 10


def chat_tools(options: argparse.Namespace) -> ChatTools:
    """The tools of --tools, if any. Raises UsageError before anything is loaded."""
    seconds = options.tool_timeout
    check_count("--tool-rounds", options.tool_rounds, least=1)
    check_count("--tool-output", options.tool_output, least=1)
    if seconds is not None and not 0 < seconds < 1e6:
        raise UsageError(
            f"--tool-timeout must be above 0 seconds and below 1,000,000, found {seconds:g}"
        )
    for name in ("yes_tools", "tool_rounds", "tool_output", "tool_timeout"):
        if getattr(options, name) and not options.tools:
            raise UsageError(f"--{name.replace('_', '-')} has no meaning without --tools FILE")
    tools = read_tools(options.tools) if options.tools else []
    commands = [tool.name for tool in tools if tool.command]
    if commands and not options.yes_tools and not sys.stdin.isatty():
        raise UsageError(
            f"the commands of {', '.join(commands)} are confirmed on a terminal, and stdin is none:"
            " --yes-tools runs them unasked"
        )
    limits = Limits(seconds or _SECONDS, options.tool_output or _OUTPUT_BYTES)
    return ChatTools(tools, limits, options.tool_rounds or _ROUNDS, options.yes_tools)


class ChatTools:
    """What a conversation knows of its tools, if it has any, and which are always allowed."""

    def __init__(self, tools: Sequence[FileTool], limits: Limits, max_rounds: int, yes: bool):
        self._limits, self._max_rounds = limits, max_rounds
        self._allowed = {tool.name for tool in tools if yes}
        self._box = Toolbox([Tool(t.schema, t.parameters, self._runner(t)) for t in tools])

    @property
    def schemas(self) -> list[Mapping[str, Any]] | None:
        return self._box.schemas or None

    def answer(self, ask: Ask, messages: Sequence[Mapping[str, Any]]) -> ToolLoop:
        """Answer these messages, with as many rounds of calls as it takes."""
        return ToolLoop(ask, messages, self._box, self._max_rounds)

    def _runner(self, tool: FileTool) -> Callable[[dict[str, Any]], str]:
        return lambda arguments: self._run(tool, arguments)

    def _run(self, tool: FileTool, arguments: dict[str, Any]) -> str:
        if tool.command is None:
            return _typed_result(tool.name)
        words = tool.words(arguments)
        stdin = None if tool.has_places else json.dumps(arguments, ensure_ascii=False)
        read = f" with {json.dumps(arguments)} on stdin" if stdin else ""
        terminal.note(f"command: {' '.join(map(_readable, words))}{read}")
        if tool.name not in self._allowed and not self._confirm(tool.name):
            raise ToolError(_DECLINED)
        return run_command(words, stdin, self._limits)

    def _confirm(self, name: str) -> bool:
        while (answer := _ask(_QUESTION.format(name=name))) is not None:
            answer = answer.strip().lower()
            if answer in ("a", "always"):
                self._allowed.add(name)
            if answer in ("y", "yes", "a", "always"):
                return True
            if answer in ("n", "no"):
                return False
        return False


NO_TOOLS = ChatTools([], Limits(1, 1), 1, yes=False)


def _typed_result(name: str) -> str:
    if (result := _ask(f"the result of {name}, in one line: ")) is None:
        raise ToolError("the user gave no result")
    return result


def _ask(question: str) -> str | None:
    """A line of the user's, without its end; None at the end of the input."""
    with _typing_is_shown():
        sys.stderr.write(question)
        sys.stderr.flush()
        line = sys.stdin.buffer.readline()
    if not line:
        sys.stderr.write("\n")
        return None
    return line.decode("utf-8", errors="replace").rstrip("\r\n")


@contextlib.contextmanager
def _typing_is_shown() -> Iterator[None]:
    """A terminal that takes and shows whole lines, whatever a chat has made of it. Keys that were
    pressed before the question are no answer to it and are dropped."""
    try:
        import termios

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, termios.error):  # a pipe, or a system without
        yield
        return
    shown = [*before]
    shown[3] |= termios.ECHO | termios.ICANON
    termios.tcsetattr(number, termios.TCSAFLUSH, shown)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def _readable(word: str) -> str:
    """A word of a command as a shell takes it, with letters that hide or turn others escaped."""
    return shlex.quote(word) if word.isprintable() else f"${word!a}"


def _beginning(text: str) -> str:
    """As much of a result as one reads; the model gets all of it."""
    lines = text[:_SHOWN_LETTERS].split("\n")[:_SHOWN_LINES]
    shown = "\n".join(lines)
    left = len(text) - len(shown)
    return f"{shown} ... ({left:,} more letters, for the model)" if left else text


class ToolPrinter:
    """Shows all turns of an answer as `ReplyPrinter` shows one; calls and results dim on stderr.
    `make` makes the printer of a turn, by its number."""

    def __init__(self, make: Callable[[int], terminal.ReplyPrinter]):
        self._make, self._turn = make, make(0)
        self._turns = 1
        self._calls: list[ToolCall] = []
        self.ends: list[End] = []

    @property
    def thinking(self) -> str:
        return self._turn.thinking

    @property
    def text(self) -> str:
        """The answer of the turn that is on."""
        return self._turn.text

    @property
    def reason(self) -> str:
        return self._turn.reason

    @property
    def unanswered(self) -> str:
        return self._turn.unanswered

    def show(self, piece: Piece | ToolResult) -> None:
        if isinstance(piece, ToolCall):
            self._calls.append(piece)
        elif isinstance(piece, ToolResult):
            terminal.note(f"result: {_beginning(piece.content)}")
            if self._turn.reason:  # what comes next is another turn
                self._turn = self._make(self._turns)
                self._turns += 1
        else:
            self._turn.show(piece)
            if isinstance(piece, End):
                self.ends.append(piece)
                for call in self._calls:
                    terminal.note(f"call: {call.name} {json.dumps(call.arguments)}")
                self._calls = []

    def notice(self, text: str) -> None:
        """Tell what was done in the middle of a turn."""
        self._turn.notice(text)

    def finish(self) -> None:
        if not self._turn.reason:
            self._turn.finish()
