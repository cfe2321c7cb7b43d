"""The commands of a conversation: lines that begin with `/`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen3_tg.cli import settings, terminal, text_file
from qwen3_tg.cli.conversation import Conversation, count, system_fits
from qwen3_tg.cli.generate import choose_sampling, sampling_of
from qwen3_tg.cli.keep import Keeper
from qwen3_tg.errors import Qwen3Error, UsageError

# A path such as /usr/bin is no command, but something to speak of.
_COMMAND = re.compile(r"/[A-Za-z_]+$")
_SOFT_SWITCHES = ("/think", "/no_think")  # with text after them they are the model's own


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Command:
    """`takes` says what completes its argument: words, or "file"."""

    usage: str
    what: str
    run: Callable[[Commands, str], None]
    takes: tuple[str, ...] | str = ()


class Commands:
    """Obeys commands. `edit` lets the user change a text, and is None where there is no terminal
    to do so; it gives None where the user thinks better of it."""

    def __init__(
        self,
        conversation: Conversation,
        keeper: Keeper,
        edit: Callable[[str], str | None] | None,
    ):
        self._talk, self._keeper, self._edit_text = conversation, keeper, edit

    def obey(self, line: str) -> bool:
        """Do what a command says and tell of errors; False if the line is for the model.

        Raises Leave."""
        if not (found := parse(line)):
            return False
        word, argument = found
        command = COMMANDS.get(word)
        if command is None:
            self._talk.tell(
                f"unknown command {word!r}; /help lists them; with a space before it, it is sent"
            )
            return True
        try:
            if argument and " " not in command.usage:
                raise UsageError(f"{word} stands alone, found {argument!r} after it")
            command.run(self, argument)
        except (Qwen3Error, OSError, RuntimeError) as e:  # the conversation is worth more
            self._talk.tell(f"error: {e}")
        return True

    def _help(self, argument: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        lines = [f"{c.usage:<{width}}  {c.what}" for c in COMMANDS.values() if c.what]
        terminal.note("\n".join([*lines, _KEYS]))

    def _system(self, argument: str) -> None:
        options = self._talk.options
        if argument == "none":
            options.system = None
        elif argument:
            system_fits(self._talk.llm, argument)
            options.system = argument
        terminal.note(f"(system message: {options.system or 'none'})")

    def _tools(self, argument: str) -> None:
        for tool in self._talk.tools:
            name, what = tool["function"]["name"], tool["function"].get("description", "")
            terminal.note(f"{name}: {what}" if what else name)
        if not self._talk.tools:
            terminal.note("(no tools)")

    def _think(self, argument: str) -> None:
        self._thinking("on")

    def _no_think(self, argument: str) -> None:
        self._thinking("off")

    def _thinking(self, argument: str) -> None:
        options = self._talk.options
        if argument in ("full", "fold"):
            options.full_thinking = argument == "full"
            terminal.note(f"(thinking is {'shown in full' if argument == 'full' else 'folded'})")
            return
        if argument == "show":
            terminal.note(terminal.harmless(self._talk.thinking) or "(there was no thinking)")
            return
        if argument not in ("", "on", "off"):
            raise UsageError(f"/thinking takes on, off, show, full or fold, found {argument!r}")
        llm = self._talk.llm
        if argument and not llm.can_choose_to_think and (argument == "on") != llm.can_think:
            raise UsageError("this model has no switch for thinking: its template knows of none")
        options.thinking = argument or options.thinking
        terminal.note(f"(thinking is {options.thinking or 'on'})")

    def _set(self, argument: str) -> None:
        talk = self._talk
        name, _, value = argument.partition(" ")
        if not name:
            terminal.note(settings.table(talk.options, talk.llm, talk.seed))
            return
        if not value.strip():
            raise UsageError(f"/set {name} needs a value, or {settings.DEFAULT}; /set lists all")
        settings.change(talk.options, name, value.strip())
        if name == "seed":
            talk.draws = 0  # so that the same seed gives the same answers
        terminal.note(f"({name} is {value.strip()})")
        if name == "temperature":
            choose_sampling(talk.options, talk.llm)  # warns of what should be known

    def _regen(self, argument: str) -> None:
        if self._talk.question() is None:
            raise UsageError("nothing was asked yet that could be answered again")
        if sampling_of(self._talk.options, self._talk.llm).temperature == 0:
            terminal.note("(at temperature 0 every draw is the same; /set temperature changes it)")
        self._ask_again()

    def _edit(self, argument: str) -> None:
        question = self._talk.question()
        if question is None:
            raise UsageError("nothing was asked yet that could be changed")
        if self._edit_text is None:
            raise UsageError("/edit needs a terminal for the line editor")
        text = self._edit_text(question.text)
        if text is None or not text.strip():
            terminal.note("(nothing was changed)")
        else:
            self._ask_again(text)

    def _ask_again(self, text: str | None = None) -> None:
        if not self._talk.ask_again(text):
            terminal.note("(no new answer: what was said before stays)")

    def _undo(self, argument: str) -> None:
        terminal.note(f"({self._talk.undo() or 'there is nothing to take back'})")

    def _clear(self, argument: str) -> None:
        if not self._talk.messages and not self._talk.files:
            terminal.note("(there is nothing to forget)")
            return
        self._talk.clear()
        kept = self._keeper.kept_in
        there = f" in {kept}, too" if kept else ""
        terminal.note(f"(forgotten{there}; /undo brings it back)")

    def _save(self, argument: str) -> None:
        force, _, name = argument.partition(" ")
        force, name = (force, name) if force == "--force" else ("", argument)
        path, tokens = self._keeper.save(name.strip(), force=bool(force))
        computed = f", what is computed of {tokens:,} tokens beside it" if tokens else ""
        terminal.note(f"({count(self._talk.messages)} in {path}{computed})")

    def _load(self, argument: str) -> None:
        if not argument:
            raise UsageError("/load takes a file that /save or --session wrote")
        self._keeper.load(argument)

    def _read(self, argument: str) -> None:
        talk = self._talk
        if not argument:
            waiting = ", ".join(talk.files) or "no file"
            terminal.note(f"({waiting} goes into the next message; /read FILE adds one)")
            return
        path = Path(argument).expanduser()
        text = text_file.read(path, talk.llm.context)
        tokens = len(talk.llm.tokenizer.encode(text, plain=True)) if talk.llm.tokenizer else 0
        left = talk.llm.context - talk.used_tokens()
        if tokens >= left:
            raise UsageError(f"{path}: {tokens:,} tokens; the context has room for {left:,} more")
        talk.files = talk.files | {str(path): f"{path.name}:\n\n{text.rstrip()}"}
        terminal.note(
            f"({path}: {path.stat().st_size:,} bytes, {tokens:,} tokens, go into the next message)"
        )

    def _stats(self, argument: str) -> None:
        talk = self._talk
        used, context = talk.used_tokens(), talk.llm.context
        terminal.note(
            f"context: {used:,} of {context:,} tokens used as the next turn finds it, "
            f"{context - used:,} left"
        )
        if (kept := talk.llm.kept)[0]:
            terminal.note(terminal.kept(*kept))
        questions = sum(message["role"] == "user" for message in talk.messages)
        terminal.note(f"conversation: {count(talk.messages)}, {questions} of you")
        if talk.ends:
            terminal.note(f"last answer: {terminal.counts(talk.ends[-1])}")
            made = sum(end.thinking_tokens + end.answer_tokens for end in talk.ends)
            answers = f"{len(talk.ends)} answer{'s' * (len(talk.ends) != 1)}"
            terminal.note(f"since the start: {answers}, {made:,} tokens")

    def _exit(self, argument: str) -> None:
        raise Leave


def parse(line: str) -> tuple[str, str] | None:
    """The command and its argument; None for a line that is for the model."""
    word, *rest = line.split(maxsplit=1) or [""]
    if line[:1] != "/" or not _COMMAND.match(word):
        return None
    argument = rest[0].strip() if rest else ""
    return None if word in _SOFT_SWITCHES and argument else (word.lower(), argument)


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command("/help", "this text", Commands._help),
        Command("/system TEXT", "set the system message; none takes it away", Commands._system),
        Command("/tools", "the tools that the model may call", Commands._tools),
        Command("/think", "think before answering, from now on", Commands._think),
        Command("/no_think", "answer at once, from now on", Commands._no_think),
        Command(
            "/thinking WORD",
            "on, off; show the last one; full, fold: how it looks",
            Commands._thinking,
            ("on", "off", "show", "full", "fold"),
        ),
        Command(
            "/set NAME VALUE",
            "change how answers are chosen; alone it lists all",
            Commands._set,
            tuple(settings.RANGES),
        ),
        Command("/regen", "another answer to the last message", Commands._regen),
        Command("/edit", "change the last message and answer it anew", Commands._edit),
        Command("/undo", "take the last turn back, or /clear, or /load", Commands._undo),
        Command("/read FILE", "put a text file into the next message", Commands._read, "file"),
        Command(
            "/save FILE",
            "keep the conversation and its cache; --force writes over",
            Commands._save,
            "file",
        ),
        Command("/load FILE", "go on with a conversation", Commands._load, "file"),
        Command("/stats", "tokens of the context, counts and speed", Commands._stats),
        Command("/clear", "forget the conversation", Commands._clear),
        Command("/exit", "leave (also Ctrl-D)", Commands._exit),
        Command("/quit", "", Commands._exit),
        Command("/bye", "", Commands._exit),
    )
}
_KEYS = '''\
Enter sends; for more lines: Alt-Enter, a \\ at the end, or """ before and after.
Up: what was sent before; Tab completes; Ctrl-X Ctrl-E opens your $EDITOR.
Ctrl-C stops an answer, and what came of it is kept.
A line for the model that starts with a command needs a space before it.'''
