"""What the model writes in a chat, taken apart while it streams: thinking, text and tool calls.

Works on text, so that it does not matter how a tag is cut into tokens. Nothing the model writes is
lost but white space around a tag: a tool call that is not valid JSON comes out as text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qwen3_tg.stop_strings import unfinished

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Thinking:
    """A part of the thinking, without its tags."""

    text: str


@dataclass(frozen=True)
class Text:
    """A part of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call: the function's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class End:
    """The last piece. `reason`: "stop" (the model ended its turn), "stop_string", "length" (the
    answer reached max_new_tokens), "context" (nothing more fits) or "loop" (it repeated itself
    without end). Counts are tokens;
    `answer_tokens` is all that is not thinking; `first_token_s` is the time to the first token and
    `later_tokens_s` the time all later ones took. Where tokens were guessed ahead, how many, how
    many of those were right, and how many times as fast it was as without (None: not measured)."""

    reason: str
    prompt_tokens: int
    thinking_tokens: int
    answer_tokens: int
    first_token_s: float
    later_tokens_s: float
    guessed_tokens: int = 0
    right_guesses: int = 0
    gain: float | None = None


Piece = Thinking | Text | ToolCall | End


class ReplyParser:
    """Feed text with `push`, end with `finish`; both give the pieces that became certain.

    `in_thinking`: the prompt already opened a thinking block. `tools`: look for tool calls."""

    def __init__(self, in_thinking: bool, tools: bool):
        self._state = "thinking" if in_thinking else "start"
        self._tools = tools
        self._buffer = ""
        self._trim = in_thinking  # drop line breaks that come next: they belong to the tag before

    @property
    def thinking(self) -> bool:
        return self._state == "thinking"

    def take_text(self) -> None:
        """All that is still to come is the answer as it is, and nothing in it a tag."""
        self._state, self._tools, self._trim = "text", False, False

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back: an unfinished tag or tool call comes out as it is."""
        rest, self._buffer = self._buffer, ""
        if self._state == "call":
            return [Text(CALL + rest)]
        if self._trim:
            rest = rest.lstrip("\n")
        if self.thinking:
            rest = rest.rstrip("\n")
        return [] if not rest else [Thinking(rest) if self.thinking else Text(rest)]

    def _step(self, pieces: list[Piece]) -> bool:
        """Take one thing from the buffer; False when it needs more text."""
        if self._state == "start":
            return self._start()
        if self._state == "call":
            return self._call(pieces)
        if self._trim:
            self._buffer = self._buffer.lstrip("\n")
            self._trim = not self._buffer
        if self.thinking:
            return self._until(END_THINK, "text", Thinking, pieces)
        if self._tools:
            return self._until(CALL, "call", Text, pieces)
        if self._buffer:
            pieces.append(Text(self._buffer))
        self._buffer = ""
        return False

    def _start(self) -> bool:
        """A reply opens with <think>, or it is text from the beginning."""
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer, self._state, self._trim = text[len(THINK) :], "thinking", True
            return True
        if THINK.startswith(text):  # also the empty text: nothing but white space so far
            return False
        self._state = "text"
        return True

    def _until(
        self, tag: str, next_state: str, kind: type[Thinking] | type[Text], pieces: list[Piece]
    ) -> bool:
        """Give what comes before the tag; line breaks just before it belong to it."""
        before, found, after = self._buffer.partition(tag)
        if found:
            before = before.rstrip("\n")
            self._buffer, self._state, self._trim = after, next_state, True
        else:
            held = unfinished(before, (tag,))
            certain = before[: len(before) - held].rstrip("\n")
            before, self._buffer = certain, before[len(certain) :]
        if before:
            pieces.append(kind(before))
        return bool(found)

    def _call(self, pieces: list[Piece]) -> bool:
        end = self._buffer.find(END_CALL)
        while end >= 0 and _ends_inside_a_string(self._buffer[:end]):
            end = self._buffer.find(END_CALL, end + 1)  # that tag is part of an argument
        if end < 0:
            return False
        inside, after = self._buffer[:end], self._buffer[end + len(END_CALL) :]
        pieces.append(_parse_call(inside) or Text(CALL + inside + END_CALL))
        self._buffer, self._state, self._trim = after, "text", True
        return True


def _ends_inside_a_string(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError as e:
        return e.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False
    return False


def _parse_call(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        json.dumps(call, ensure_ascii=False).encode("utf-8")  # JSON can name half a character
    except (ValueError, RecursionError):  # also a number of too many digits, too deep a nesting
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return ToolCall(call["name"], arguments) if isinstance(arguments, dict) else None
