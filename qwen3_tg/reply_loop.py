"""The loop of one reply: ids as they are drawn become text and pieces, until the model, a limit, a
stop string or the loop guard ends it. Knows no templates and no devices."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3_tg.one_reader import OneReader
from qwen3_tg.reply import END_THINK, End, Piece, ReplyParser, Text
from qwen3_tg.stop_strings import StopStrings
from qwen3_tg.structured import Allowed
from qwen3_tg.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen3_tg.generate import Generation
    from qwen3_tg.loop_guard import LoopGuard

# What Qwen advises to close the thinking with when its budget is spent (Qwen3 documentation,
# "Thinking Budget").
BUDGET_SPENT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    f"thinking directly now.\n{END_THINK}\n\n"
)


@dataclass
class ReplyLoop(Iterator[Piece]):
    """The pieces of a reply, End at last. Raises UnfinishedError after it where the form that the
    answer must have was not reached.

    It is made of ids, how they read, and what may end it: `thinking_budget` and `max_new_tokens`
    are tokens of thinking and of the answer; `allowed` is set where it must have a form. Thinking
    is also closed where the context has room for the answer alone.

    It has one reader at a time: UsageError for another thread that asks meanwhile."""

    generation: Generation
    tokenizer: Tokenizer
    parser: ReplyParser
    strings: StopStrings
    guard: LoopGuard | None = None
    allowed: Allowed | None = None
    thinking_budget: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        self._closing = self.tokenizer.encode(BUDGET_SPENT)
        self._room = self.generation.room
        self._pieces = OneReader(self._flat(), "a reply")

    def _flat(self) -> Generator[Piece, None, None]:
        for pieces in self.steps():
            yield from pieces

    @property
    def _kept_room(self) -> int:
        """Tokens of the context that thinking leaves to what closes it and to the answer, which has
        a quarter of what the prompt left, or all that it may have; 0 where the context is so short
        that this is most of it."""
        quarter = self._room // 4
        answer = quarter if self.max_new_tokens is None else min(self.max_new_tokens, quarter)
        kept = answer + len(self._closing)
        return kept if kept <= self._room // 2 else 0

    def plan(self, thinks: bool) -> str:
        """In words, how many tokens there may be of each."""
        most = self._room - self._kept_room
        if self.thinking_budget is not None:
            most = min(most, self.thinking_budget)
        answer = self._room if self.max_new_tokens is None else min(self.max_new_tokens, self._room)
        thinking = f"thinking at most {most:,}, " if thinks else ""
        prompt = self.generation.prompt_tokens
        return (
            f"plan: prompt {prompt:,} tokens, {thinking}answer at most {answer:,}; "
            f"the context has {prompt + self._room:,}"
        )

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End it here, without End. Another thread may do it: who reads gets one more piece."""
        self._pieces.close()

    def steps(self) -> Iterator[list[Piece]]:
        """The same, as they become certain token by token: each `next` draws one at most, and none
        where ids are put in instead. For one who does not take the pieces themselves."""
        generation, parser, decoder = self.generation, self.parser, self.tokenizer.stream()
        budget, kept_room = self.thinking_budget, self._kept_room
        thought = 0  # tokens of thinking; its tags are not among them
        not_answer = 0  # tokens before the answer
        while True:
            is_spent = budget is not None and thought >= budget
            if parser.thinking and (is_spent or generation.room <= kept_room):
                ids = generation.insert(self._closing)
                yield self._cut(parser.push("".join(map(decoder.push, ids))))
                not_answer = generation.new_tokens
            generation.max_new_tokens = (
                None
                if parser.thinking or self.max_new_tokens is None
                else not_answer + self.max_new_tokens
            )
            was_thinking = parser.thinking
            id = next(generation, None)
            if id is None:
                break
            if self.allowed and self.allowed.answering:
                parser.take_text()
            yield self._cut(parser.push(decoder.push(id)))
            if parser.thinking or was_thinking:
                thought += was_thinking and parser.thinking
                not_answer = generation.new_tokens
            if self.strings.found:
                break
            advice = self.guard.push(id, parser.thinking) if self.guard else ""
            if advice == "close":
                budget = thought
            elif advice == "stop":
                generation.stop_reason = "loop"
        if not self.strings.found:
            yield self._cut(parser.push(decoder.flush()) + parser.finish())
            if held := self.strings.flush():
                yield [Text(held)]
        yield [self._end(thought, not_answer)]
        if self.allowed:
            self.allowed.finish(generation.new_ids, generation.stop_reason or "")

    def _cut(self, pieces: list[Piece]) -> list[Piece]:
        """Stop strings end the answer; they mean nothing in thinking and tool calls."""
        kept: list[Piece] = []
        for piece in pieces:
            if not isinstance(piece, Text):
                if held := self.strings.flush():
                    kept.append(Text(held))
                kept.append(piece)
            elif text := self.strings.push(piece.text):
                kept.append(Text(text))
            if self.strings.found:
                break
        return kept

    def _end(self, thinking_tokens: int, not_answer: int) -> End:
        """How it ended, with counts and times."""
        generation, speculation = self.generation, self.generation.speculation
        return End(
            reason="stop_string" if self.strings.found else generation.stop_reason or "stop",
            prompt_tokens=generation.prompt_tokens,
            thinking_tokens=thinking_tokens,
            answer_tokens=generation.new_tokens - not_answer,
            first_token_s=generation.first_token_s,
            later_tokens_s=generation.later_tokens_s,
            guessed_tokens=speculation.guessed if speculation else 0,
            right_guesses=speculation.right if speculation else 0,
            gain=speculation.gain if speculation else None,
        )
