"""Which turns of a conversation are left out when it no longer fits. Knows nothing of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen3_tg.chat import Message
from qwen3_tg.errors import ContextError


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What stands before the first question, and the turns: each a user's message with all that
    follows it, so that no call of a tool stays without its result."""
    before: list[Message] = []
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user":
            turns.append([message])
        else:
            (turns[-1] if turns else before).append(message)
    return before, turns


def fit(
    messages: Sequence[Message],
    count: Callable[[Sequence[Message]], int],
    context: int,
    room: int | None = None,
) -> tuple[list[Message], int]:
    """The messages without the oldest turns, and how many those were.

    `count` gives the tokens of a conversation. Nothing is left out while `room` tokens stay free
    for the answer, by default and at most a quarter of the context; if something must be, so much
    that twice the room is free, and the next turns need nothing new. What stands before the first
    question, the system message, and the last turn are kept, with whatever room that leaves. Raises
    ContextError where these alone leave none."""
    room = min(context // 4, context if room is None else room)
    before, turns = split_turns(messages)
    if count(messages) + room <= context:
        return list(messages), 0
    for dropped in range(len(turns)):
        kept = [*before, *(message for turn in turns[dropped:] for message in turn)]
        is_last = dropped == len(turns) - 1
        if (tokens := count(kept)) + 2 * room <= context or (is_last and tokens < context):
            return kept, dropped
    tokens = count([*before, *turns[-1]] if turns else messages)
    raise ContextError(
        f"the system message and the last message have {tokens} tokens, which leave no room for an "
        f"answer in the context of {context}: shorten them or load with a larger context"
    )
