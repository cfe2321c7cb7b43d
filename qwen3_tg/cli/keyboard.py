"""The line editor of a conversation on a terminal: several lines, history, completion."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    PathCompleter,
    get_common_complete_suffix,
)
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from qwen3_tg.cli import terminal
from qwen3_tg.cli.commands import COMMANDS, parse

QUOTES = '"""'


class Keyboard:
    """Reads messages and commands from a person."""

    def __init__(self, history: History):
        self._session: PromptSession[str] = PromptSession(
            history=history,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=_Completer(),
            complete_while_typing=Condition(_is_a_command),
            enable_open_in_editor=True,
            enable_suspend=True,
        )

    def read(self) -> str | None:
        """What was typed and sent; None at the end (Ctrl-D)."""
        while True:
            try:
                return _text(self._session.prompt("> "))
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    terminal.note("(Ctrl-D or /exit leaves)")
            except EOFError:
                return None

    def edit(self, text: str) -> str | None:
        """A text after the user changed it; None after Ctrl-C or Ctrl-D."""
        try:
            return _text(self._session.prompt("edit> ", default=text))
        except (KeyboardInterrupt, EOFError):
            return None


def is_whole(text: str) -> bool:
    """Whether Enter sends it, or is a line break in it."""
    if is_quoted(text):
        rest = text.lstrip()[len(QUOTES) :]
        return rest.rstrip().endswith(QUOTES)
    return not text.endswith("\\")


def is_quoted(text: str) -> bool:
    """Whether it begins with three quotes: then it is as it is, and no command."""
    return text.lstrip().startswith(QUOTES)


def message(text: str) -> str:
    """What was meant by what was typed: without the quotes around it, and without the backslashes
    that continued lines."""
    if is_quoted(text):
        return text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n")


def _text(typed: str) -> str:
    """A terminal may send bytes that are no UTF-8."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def keys_not_shown() -> Iterator[None]:
    """While an answer is printed, keys that are pressed do not mix with it; they are read later."""
    try:
        import termios

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, termios.error):  # not on this system or terminal
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def _is_a_command() -> bool:
    text = get_app().current_buffer.text
    return text.startswith("/") and "\n" not in text


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.newline(copy_margin=False)

    @keys.add("escape", "enter")
    def _line_break(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("tab")
    def _complete(event: KeyPressEvent) -> None:
        """prompt_toolkit's own forgets the key while it still looks for what fits."""
        buffer, document = event.current_buffer, event.current_buffer.document
        if buffer.complete_state and buffer.complete_state.completions:
            buffer.complete_next()
            return
        wish = CompleteEvent(completion_requested=True)
        found = list(buffer.completer.get_completions(document, wish))
        if common := get_common_complete_suffix(document, found):
            buffer.insert_text(common)
        elif len(found) == 1:
            buffer.apply_completion(found[0])
        if len(found) > 1:
            buffer.start_completion()

    @keys.add("c-c")
    def _drop(event: KeyPressEvent) -> None:
        event.current_buffer.append_to_history()  # Up brings it back
        event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


class _Completer(Completer):
    """Commands, their words, and the names of files where they take one."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        word, space, argument = before.partition(" ")
        if not before.startswith("/") or "\n" in before:
            return
        if not space:
            for name, command in COMMANDS.items():
                if name.startswith(word.lower()) and command.what:
                    end = " " if command.takes or " " in command.usage else ""
                    yield Completion(
                        name + end, -len(word), display=command.usage, display_meta=command.what
                    )
            return
        known = parse(f"{word} x")
        takes = COMMANDS[known[0]].takes if known and known[0] in COMMANDS else ()
        if takes == "file":
            argument = argument.removeprefix("--force ").lstrip()
            yield from self._files.get_completions(Document(argument), event)
        elif " " not in argument:
            for choice in takes:
                if choice.startswith(argument):
                    yield Completion(choice, -len(argument))
