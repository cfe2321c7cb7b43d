"""The loop of one reply: ids as they are drawn become text and pieces, until the model, a limit, a
stop string or the loop guard ends it. Knows no templates and no devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
class ReplyLoop:
    """What a reply is made of: the ids, how they read, and what may end it. `allowed` is set where
    it must have a form."""

    generation: Generation
    tokenizer: Tokenizer
    strings: StopStrings
    guard: LoopGuard | None = None
    allowed: Allowed | None = None

    def text(self) -> Iterator[str]:
        """Plain text, whole characters."""
        decoder = self.tokenizer.stream()
        for id in self.generation:
            if text := self.strings.push(decoder.push(id)):
                yield text
            if self.strings.found:
                return
            if self.guard and self.guard.push(id, thinking=False) == "stop":
                self.generation.stop_reason = "loop"
        if text := self.strings.push(decoder.flush()) + self.strings.flush():
            yield text

    def pieces(
        self, parser: ReplyParser, thinking_budget: int | None, max_new_tokens: int | None
    ) -> Iterator[Piece]:
        """The pieces of a turn of a chat, End at last. Raises UnfinishedError after it where the
        form that the answer must have was not reached."""
        generation, decoder = self.generation, self.tokenizer.stream()
        thought = 0  # tokens of thinking; its tags are not among them
        not_answer = 0  # tokens before the answer
        while True:
            if parser.thinking and thinking_budget is not None and thought >= thinking_budget:
                ids = generation.insert(self.tokenizer.encode(BUDGET_SPENT))
                yield from self._cut(parser.push("".join(map(decoder.push, ids))))
                not_answer = generation.new_tokens
            generation.max_new_tokens = (
                None if parser.thinking or max_new_tokens is None else not_answer + max_new_tokens
            )
            was_thinking = parser.thinking
            id = next(generation, None)
            if id is None:
                break
            if self.allowed and self.allowed.answering:
                parser.take_text()
            yield from self._cut(parser.push(decoder.push(id)))
            if parser.thinking or was_thinking:
                thought += was_thinking and parser.thinking
                not_answer = generation.new_tokens
            if self.strings.found:
                break
            advice = self.guard.push(id, parser.thinking) if self.guard else ""
            if advice == "close":
                thinking_budget = thought
            elif advice == "stop":
                generation.stop_reason = "loop"
        if not self.strings.found:
            yield from self._cut(parser.push(decoder.flush()) + parser.finish())
            if held := self.strings.flush():
                yield Text(held)
        yield self.end(thought, not_answer)
        self.check_form()

    def _cut(self, pieces: list[Piece]) -> Iterator[Piece]:
        """Stop strings end the answer; they mean nothing in thinking and tool calls."""
        for piece in pieces:
            if not isinstance(piece, Text):
                if held := self.strings.flush():
                    yield Text(held)
                yield piece
            elif text := self.strings.push(piece.text):
                yield Text(text)
            if self.strings.found:
                return

    def end(self, thinking_tokens: int = 0, not_answer: int = 0) -> End:
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

    def check_form(self) -> None:
        """Raises UnfinishedError where the reply must have a form and has not."""
        if self.allowed:
            self.allowed.finish(self.generation.new_ids, self.generation.stop_reason or "")
