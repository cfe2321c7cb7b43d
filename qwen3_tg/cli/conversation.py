"""What has been said, and how it goes on: ask, answer again, change the question, take back.

Knows nothing of commands, files and keys.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen3_tg.chat import encode_chat
from qwen3_tg.cli import terminal
from qwen3_tg.cli.generate import sampling_of, with_system
from qwen3_tg.cli.tools import NO_TOOLS, ChatTools, ToolPrinter
from qwen3_tg.cli.turn import Message, content_of, perform
from qwen3_tg.errors import ChatError, ContextError
from qwen3_tg.llm import LLM
from qwen3_tg.overflow import split_turns
from qwen3_tg.reply import End


@dataclass(frozen=True)
class Question:
    """What the user asked last: the texts of files and what was typed, and what was said before.
    It may have no answer yet."""

    before: list[Message]
    files: dict[str, str]
    text: str

    @property
    def content(self) -> str:
        return "\n\n".join([*self.files.values(), self.text])


class Conversation:
    """`messages` are without the system message, which is in `options`, with all that can be
    changed on the way. `printer` makes what shows a reply, given the seed."""

    def __init__(
        self,
        llm: LLM,
        options: argparse.Namespace,
        printer: Callable[[int], terminal.ReplyPrinter],
        tools: ChatTools = NO_TOOLS,
    ):
        self._tools = tools
        self.llm, self.options, self._printer = llm, argparse.Namespace(**vars(options)), printer
        self.messages: list[Message] = []
        self.files: dict[str, str] = {}  # texts of files, by name, that go into the next message
        self.draws = 0  # answers so far with this seed, also those that were taken back
        self.ends: list[End] = []  # of all whole answers
        self.thinking = ""  # of the last answer
        self.stopped = False  # the last answer, with Ctrl-C
        self.problems = 0  # errors that were told
        self._random_seed = secrets.randbits(32)
        self._question: Question | None = None
        # by clear() or load(), for undo(), with what else is to be put back
        self._dropped: tuple[list[Message], int, Callable[[], None] | None] | None = None
        self._left_out = 0  # turns at the beginning that are no longer sent

    @property
    def tools(self) -> list[Mapping[str, Any]]:
        """The schemas of those that the model may call."""
        return self._tools.schemas or []

    @property
    def seed(self) -> int:
        given: int | None = self.options.seed
        return self._random_seed if given is None else given

    @property
    def thinks(self) -> bool:
        return bool(self.options.thinking != "off")

    def tell(self, problem: str) -> None:
        """Note what went wrong, and that something did."""
        self.problems += 1
        terminal.note(problem)

    def ask(self, text: str) -> bool:
        """Answer a message. Stopped with Ctrl-C, what was answered so far is kept; after an error
        or with no answer at all, the message is as if never sent, but can be asked again."""
        answered = self._answer(Question(self.messages, self.files, text))
        if answered:
            self.files = {}
        return answered

    def question(self) -> Question | None:
        """The last one, answered or not."""
        if self._question is None:
            last = _last_question(self.messages)
            if last is not None:
                text = content_of(self.messages[last])
                self._question = Question(self.messages[:last], {}, text)
        return self._question

    def ask_again(self, text: str | None = None) -> bool:
        """Another answer to the last question, or to this text in its place; the files that went
        with it stay. Without a new answer the old one is kept."""
        question = self.question()
        if question is None:
            return False
        return self._answer(question if text is None else replace(question, text=text))

    def undo(self) -> str | None:
        """Take the last turn back, or clear() or load() where they were the last; what it was."""
        if self._dropped is not None:
            self.messages, self._left_out, restore = self._dropped
            self._dropped = self._question = None
            if restore:
                restore()
            return f"{count(self.messages)} are back"
        last = _last_question(self.messages)
        if last is None:
            return None
        self.messages, self._question = self.messages[:last], None
        return f"the last turn is taken back; {count(self.messages)} left"

    def clear(self) -> None:
        """Forget what was said."""
        self.replace_messages([])
        self.files = {}

    def replace_messages(
        self, messages: list[Message], restore: Callable[[], None] | None = None
    ) -> None:
        """Go on from these; undo() calls `restore`, too."""
        before, left_out = self.messages, self._left_out
        if not before and self._dropped:
            before, left_out, _ = self._dropped
        if before or restore:
            self._dropped = before, left_out, restore
        self.messages, self._left_out, self._question = messages, 0, None

    def used_tokens(self) -> int:
        """Tokens that the conversation takes in the context, as the next turn finds it."""
        return len(self._ids(self._sent()))

    def next_ids(self) -> list[int]:
        """Its tokens as the next turn sends them, up to a question of one letter: without former
        thinking, and without turns that no longer fit."""
        return self._ids([*self._sent(), {"role": "user", "content": "?"}])

    def _sent(self) -> list[Message]:
        """Without turns that no longer fit."""
        _, turns = split_turns(self.messages)
        return [dict(message) for turn in turns[self._left_out :] for message in turn]

    def _ids(self, messages: list[Message]) -> list[int]:
        whole = with_system(messages, self.options)
        if not whole or self.llm.tokenizer is None:
            return []
        schemas = self._tools.schemas
        return encode_chat(self.llm.render, self.llm.tokenizer, whole, schemas)[1]

    def _answer(self, question: Question) -> bool:
        self._question = question
        whole = [*question.before, {"role": "user", "content": question.content}]
        try:
            messages = self._fitting(whole) if self.options.overflow == "shift" else whole
        except ContextError as e:
            self.tell(f"error: {e}")
            return False
        sampling = replace(sampling_of(self.options, self.llm), seed=self.seed).another(self.draws)
        printer = ToolPrinter(lambda turn: self._printer(sampling.next_turn(turn).seed))
        self.draws += 1
        turn = perform(self.llm, messages, sampling, self.options, printer, self._tools)
        self.problems, self.stopped = self.problems + turn.has_failed, turn.is_stopped
        said = turn.messages
        self.thinking = printer.thinking
        self.ends += printer.ends
        if len(said) == len(messages):
            return False
        self.messages, self._dropped = [*whole, *said[len(messages) :]], None
        return True

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """Without the oldest turns where they no longer fit, which is told. What was left out once
        stays so: each change at the beginning has all that follows computed again."""
        _, turns = split_turns(messages)
        if self._left_out >= len(turns):
            self._left_out = 0  # another conversation
        rest = [message for turn in turns[self._left_out :] for message in turn]
        limits = self.options.thinking_budget, self.options.max_new_tokens
        room = None if None in limits else sum(limits)
        sent = with_system(rest, self.options)
        kept, dropped = self.llm.fit(sent, self._tools.schemas, self.thinks, room)
        if dropped:
            self._left_out += dropped
            out = self._left_out
            what = "the oldest turn is" if out == 1 else f"the oldest {out} turns are"
            terminal.note(f"(the context is full: {what} no longer sent)")
        return [dict(message) for message in kept if message["role"] != "system"]


def count(messages: list[Message]) -> str:
    return f"{len(messages)} message{'s' * (len(messages) != 1)}"


def _last_question(messages: list[Message]) -> int | None:
    places = [n for n, message in enumerate(messages) if message["role"] == "user"]
    return places[-1] if places else None


def system_fits(llm: LLM, system: str) -> None:
    """Raises ChatError where the template takes no system message."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    if system.strip() not in llm.render(messages):
        raise ChatError("this model's chat template takes no system message")
