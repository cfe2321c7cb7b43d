"""`qwen3 chat`: a conversation. On a terminal with line editing and history; from a pipe, each line
is a message."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from qwen3_tg.cli import session, terminal
from qwen3_tg.cli.commands import Commands, Leave
from qwen3_tg.cli.conversation import Conversation
from qwen3_tg.cli.generate import check_sampling, choose_sampling, load_model
from qwen3_tg.cli.keep import Keeper
from qwen3_tg.cli.structured import read_constraint
from qwen3_tg.cli.tools import chat_tools
from qwen3_tg.errors import UsageError
from qwen3_tg.llm import LLM
from qwen3_tg.reply import END_THINK
from qwen3_tg.reply_loop import BUDGET_SPENT


def chat(options: argparse.Namespace) -> int:
    """Load the model and talk until the input ends. 1 where an error was told in a pipe."""
    check_sampling(options)
    options.constraint = read_constraint(options)
    tools = chat_tools(options)
    if options.session and Path(options.session).expanduser().exists():
        session.read(Path(options.session).expanduser())  # refused before the model is loaded
    llm = load_model(options)
    _ = llm.chat_template  # a model without one is refused before the first question
    choose_sampling(options, llm)  # warns of what should be known
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def printer(seed: int) -> terminal.ReplyPrinter:
        now = conversation.options
        if not on_terminal or now.plain or not terminal.obeys_codes():
            return terminal.ReplyPrinter(seed, now.verbose, speed=on_terminal)
        from qwen3_tg.cli.screen import ScreenPrinter

        return ScreenPrinter(seed, now.verbose, _counter(llm), now.full_thinking)

    conversation = Conversation(llm, options, printer, tools)
    keeper = Keeper(conversation, options.model)
    if sys.stdin.isatty():
        terminal.note(f"{options.model} on {llm.policy.device}; /help for help, Ctrl-D to leave")
    if options.session:
        keeper.start(options.session)
    try:
        with contextlib.suppress(Leave):
            if on_terminal:
                _talk(conversation, keeper, options.history)
            else:
                _read_lines(conversation, keeper)
    finally:
        keeper.leave()
    return 1 if conversation.problems and not sys.stdin.isatty() else 0


def _talk(conversation: Conversation, keeper: Keeper, keep_history: bool) -> None:
    from qwen3_tg.cli import keyboard
    from qwen3_tg.cli.history import open_history

    keys = keyboard.Keyboard(open_history(keep_history))
    commands = Commands(conversation, keeper, keys.edit)
    while (typed := keys.read()) is not None:
        text = keyboard.message(typed)
        try:
            with keyboard.keys_not_shown():
                is_message = keyboard.is_quoted(typed) or not commands.obey(text)
                if is_message and text.strip() and not conversation.ask(text):
                    terminal.note("(not kept; /regen asks it again, /edit changes it)")
                _keep(conversation, keeper)
        except KeyboardInterrupt:  # outside of an answer, such as while a file is read
            terminal.note("(stopped)")


def _read_lines(conversation: Conversation, keeper: Keeper) -> None:
    commands, read = Commands(conversation, keeper, None), _pipe_reader()
    while (line := read()) is not None:
        if not commands.obey(line) and line.strip():
            conversation.ask(line)
        _keep(conversation, keeper)
        if conversation.stopped and not sys.stdin.isatty():  # nobody is there to go on with it
            raise KeyboardInterrupt


def _keep(conversation: Conversation, keeper: Keeper) -> None:
    try:
        keeper.after_a_turn()
    except UsageError as e:
        conversation.tell(f"error: {e}; /save FILE keeps it elsewhere")


def _counter(llm: LLM) -> Callable[[str], int]:
    """Tokens of a thinking, whose tags have lines of their own; the sentence that ends it where
    its budget is spent is none of the model's."""
    sentence = BUDGET_SPENT.partition(END_THINK)[0].rstrip("\n")

    def count(thinking: str) -> int:
        own = thinking.removesuffix(sentence)
        text = f"\n{own}\n" if own == thinking else f"\n{own}"
        return len(llm.tokenizer.encode(text, plain=True)) if llm.tokenizer else 0

    return count


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
