"""`qwen3 chat`: a conversation. On a terminal with line editing and history; from a pipe, each line
is a message."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from qwen3_tg.chat import Message
from qwen3_tg.cli import terminal
from qwen3_tg.cli.generate import (
    check_sampling,
    choose_sampling,
    load_model,
    reply,
    with_system,
)
from qwen3_tg.cli.structured import read_constraint
from qwen3_tg.cli.tools import ChatTools, ToolPrinter, chat_tools
from qwen3_tg.errors import ContextError, Qwen3Error, UsageError
from qwen3_tg.llm import LLM
from qwen3_tg.reply import Piece

_HELP = """\
/thinking on|off   think before answering, or not
/clear             forget the conversation
/help              this text
/exit              leave (also Ctrl-D)
Ctrl-C stops an answer. A line for the model that starts with / needs a space before it, but for
/think and /no_think, the model's own switches."""
_FOR_THE_MODEL = ("/think", "/no_think")


class Conversation:
    """What has been said, and how the next turn is made."""

    def __init__(self, llm: LLM, options: argparse.Namespace, tools: ChatTools):
        self._llm, self._options, self._tools = llm, options, tools
        self.sampling = choose_sampling(options, llm)
        self._turns = 0  # asked so far, also those that /clear forgot
        self.messages: list[Message] = []

    def command(self, line: str) -> bool:
        """Obey a line such as /clear; False if it says to leave."""
        word, _, argument = line.partition(" ")
        argument = argument.strip()
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/clear":
            self.messages = []
            terminal.note("(forgotten)")
        elif word == "/thinking":
            if argument in ("on", "off"):
                self._options.thinking = argument
            elif argument:
                terminal.note("/thinking takes on or off")
            terminal.note(f"(thinking is {self._options.thinking or 'on'})")
        elif word == "/help":
            terminal.note(_HELP)
        else:
            terminal.note(f"unknown command {word!r}; /help lists them")
        return True

    def turn(self, text: str) -> None:
        """Answer a message. Stopped with Ctrl-C, what was answered so far is kept, after an error
        the results of tools; with neither, the message is as if never sent."""
        messages = [*self.messages, {"role": "user", "content": text}]
        printer = ToolPrinter(
            lambda: terminal.ReplyPrinter(self.sampling.seed, self._options.verbose)
        )
        # each turn draws other random numbers, far from those of any other seed a user gives
        seed = (self.sampling.seed + self._turns * 2**64) % 2**128
        self._turns += 1

        def ask(messages: Sequence[Message], rounds: int) -> Iterator[Piece]:
            sampling = replace(self.sampling, seed=(seed + rounds * 2**96) % 2**128)
            messages = with_system(messages, self._options)
            return reply(self._llm, messages, sampling, self._options, self._tools.schemas)

        turns = self._tools.answer(ask, messages)
        stopped = ""
        try:
            terminal.stream(turns, printer.show, self._llm)
            if printer.reason == "context":
                terminal.note("(/clear starts anew)")
        except KeyboardInterrupt:
            printer.finish()
            terminal.note("(stopped)")
            stopped = printer.text
        except ContextError as e:
            terminal.note(f"error: {e}; /clear starts anew")
            return
        except Qwen3Error as e:
            terminal.note(f"error: {e}")
        said = turns.messages
        if stopped:
            said = [*said, {"role": "assistant", "content": stopped}]
        if len(said) > len(messages):
            self.messages = said


def chat(options: argparse.Namespace) -> None:
    """Load the model and talk until the input ends."""
    check_sampling(options)
    options.constraint = read_constraint(options)
    tools = chat_tools(options)
    read = _terminal_reader() if sys.stdin.isatty() and sys.stdout.isatty() else _pipe_reader()
    llm = load_model(options)
    _ = llm.chat_template  # a model without one is refused before the first question
    conversation = Conversation(llm, options, tools)
    if sys.stdin.isatty():
        terminal.note(f"{options.model} on {llm.policy.device}; /help for help, Ctrl-D to leave")
    while (line := read()) is not None:
        if not line.strip():
            continue
        if line.startswith("/") and line.split()[0] not in _FOR_THE_MODEL:
            if not conversation.command(line.strip()):
                return
        else:
            conversation.turn(line)


def _terminal_reader() -> Callable[[], str | None]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(history=InMemoryHistory())

    def read() -> str | None:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:
                continue  # drops the line being typed
            except EOFError:
                return None

    return read


def _pipe_reader() -> Callable[[], str | None]:
    def read() -> str | None:
        line = sys.stdin.buffer.readline()
        try:
            return line.decode("utf-8").rstrip("\r\n") if line else None
        except UnicodeDecodeError as e:
            raise UsageError(
                f"stdin is not valid UTF-8: byte 0x{line[e.start]:02x} in {line[:40]!r}"
            ) from None

    return read
