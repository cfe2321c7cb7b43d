"""Turns of a model that calls tools: it calls, we run, it goes on with what that gave.

Knows no model: a turn is asked for by a function that takes messages and gives pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from qwen3_tg.chat import Message
from qwen3_tg.errors import ChatError, check_count
from qwen3_tg.one_reader import OneReader
from qwen3_tg.reply import CALL, END_CALL, End, Piece, Text, Thinking, ToolCall
from qwen3_tg.tools import Toolbox, ToolResult, unreadable

# The next turn of the model: of these messages, and how many rounds of calls came before it.
Ask = Callable[[Sequence[Message], int], Iterator[Piece]]


class ToolLoop(Iterator[Piece | ToolResult]):
    """The pieces of all turns as they come. Each turn ends with its End; then come the results of
    its calls and the next turn, and the last thing is the End of a turn without calls.

    `messages` is the conversation so far, as the chat template takes it: at first those given, and
    after each turn with its message and the results of its calls. A turn that is cut, by
    max_new_tokens, a full context or the loop guard, is the last, and its calls are not run.
    It has one reader at a time, as one reply has."""

    def __init__(self, ask: Ask, messages: Sequence[Message], tools: Toolbox, max_rounds: int = 10):
        check_count("max_rounds", max_rounds, least=1)
        self.messages: list[Message] = list(messages)
        self._ask, self._tools, self._max_rounds = ask, tools, max_rounds
        self._pieces = OneReader(self._turns(), "a conversation with tools")

    def __next__(self) -> Piece | ToolResult:
        return next(self._pieces)

    def close(self) -> None:
        """End it here; a turn that is not complete is as if never made."""
        self._pieces.close()

    def _turns(self) -> Generator[Piece | ToolResult, None, None]:
        for rounds in range(self._max_rounds + 1):
            turn = _Turn(bool(self._tools.schemas))
            for piece in self._ask(self.messages, rounds):
                turn.add(piece)
                yield piece
            if turn.reason in ("length", "context", "loop") or not turn.has_calls:
                if turn.text:
                    self.messages.append({"role": "assistant", "content": turn.text})
                return
            if rounds == self._max_rounds:
                raise ChatError(
                    f"the model has called tools in {rounds} rounds and wants to go on: "
                    "allow more rounds, or ask for less at once"
                )
            results = []
            for result in turn.results(self._tools):
                results.append(result)
                yield result
            # only now: a turn that the user stops between two results is as if never made
            self.messages += [turn.message(), *map(_result_message, results)]


class _Turn:
    """What the model said in one turn. Without tools nothing in it is a call."""

    def __init__(self, has_tools: bool) -> None:
        self._has_tools = has_tools
        self.text = self.thinking = self.reason = ""
        self._calls: list[ToolCall] = []
        self._unreadable: list[str] = []

    def add(self, piece: Piece) -> None:
        if isinstance(piece, ToolCall):
            self._calls.append(piece)
        elif isinstance(piece, Thinking):
            self.thinking += piece.text
        elif isinstance(piece, End):
            self.reason = piece.reason
        elif isinstance(piece, Text):
            self.text += piece.text
            if (
                self._has_tools and CALL in piece.text
            ):  # the parser lets the tag through only where it is no call
                self._unreadable.append(piece.text)

    @property
    def has_calls(self) -> bool:
        return bool(self._calls or self._unreadable)

    def results(self, tools: Toolbox) -> Iterator[ToolResult]:
        """In the order in which the template shows the calls: those that are text come first."""
        yield from map(unreadable, self._unreadable)
        yield from map(tools.run, self._calls)

    def message(self) -> dict[str, Any]:
        # A call without its end tag gets one, so that what follows is not taken for a part of it.
        closed = self.text + (
            "" if self.text.count(CALL) <= self.text.count(END_CALL) else END_CALL
        )
        message: dict[str, Any] = {"role": "assistant", "content": closed}
        if self.thinking:  # the template keeps it until the user's next message
            message["reasoning_content"] = self.thinking
        if self._calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self._calls
            ]
        return message


def _result_message(result: ToolResult) -> dict[str, Any]:
    name = {} if result.call is None else {"name": result.call.name}
    return {"role": "tool", **name, "content": result.content}
