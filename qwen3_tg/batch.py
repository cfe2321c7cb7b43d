"""Many conversations or texts answered at once: whenever one ends, the next takes its place.

Each is one reply as always (reply_loop.py), with limits, stop strings, guards and draws of its own;
the logits of all come from one step (slots.py), which reads every weight once. So an answer is what
it would be alone, but for the last bits of a prompt's logits, which depend on how much of it was
computed before, as they do without a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_tg.chat import Message
from qwen3_tg.errors import DeviceError, Qwen3Error, UsageError
from qwen3_tg.reply import End, Piece, Text, Thinking, ToolCall
from qwen3_tg.reply_loop import ReplyLoop
from qwen3_tg.sampling import Sampling

if TYPE_CHECKING:
    from qwen3_tg.generate import Generation
    from qwen3_tg.slots import Slots


# Begins the reply to a conversation or text, with these options, whose logits come from a row.
Start = Callable[[Sequence[Message] | str, "_Row", dict[str, Any]], ReplyLoop]


@dataclass(frozen=True)
class Request:
    """A conversation to answer, or a text to continue. `options` are those of LLM.chat or, for a
    text, of LLM.generate but `on_end`; they go before those that all have."""

    what: Sequence[Message] | str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What became of the request of this number, counted from 0. `end` is None where nothing was
    generated; `error` says what went wrong, in which case the rest is what there was before."""

    number: int
    thinking: str = ""
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    end: End | None = None
    error: Qwen3Error | None = None


class Batch:
    """Answers requests, as many at once as there are slots. `steps` counts the steps so far and
    `new_tokens` the tokens that they were for."""

    def __init__(
        self,
        slots: Slots,
        start: Start,
        choose_sampling: Callable[[Sampling | None, bool], Sampling],
    ):
        self._slots, self._begin, self._choose_sampling = slots, start, choose_sampling
        self._is_busy = False
        self.steps = self.new_tokens = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes on each device that the caches of all slots take."""
        return self._slots.nbytes

    def answers(
        self, requests: Iterable[Request | Sequence[Message] | str], **options: Any
    ) -> Iterator[Answer]:
        """One for each request, in the order in which they end; what goes wrong with one is in its
        answer. `options` are those of all, as in Request. Each draws random numbers of its own,
        which depend on the seed and on how many requests came before.

        A request is taken when a slot is free, and all wait while `requests` makes it: a generator
        that blocks holds back answers that are done. What it raises is raised here, after the
        answers under way have been given.

        Raises DeviceError where there is no memory for the slots."""
        if isinstance(requests, str):
            raise UsageError("answers() takes a list of texts or conversations, found one text")
        if self._is_busy:
            raise UsageError("a batch answers one call of answers() at a time")
        rows: list[_Row] = []
        self._is_busy = True
        try:
            self._slots.allocate()
            yield from self._answers(enumerate(requests), options, rows)
        finally:  # also where the caller takes no more, or something broke off
            for row in rows:
                self._slots.end(row.slot)
            self._is_busy = False

    def _answers(
        self,
        waiting: Iterator[tuple[int, Request | Sequence[Message] | str]],
        options: Mapping[str, Any],
        rows: list[_Row],
    ) -> Iterator[Answer]:
        more, failure = True, None
        while more or rows:
            while more and self._slots.free:
                following = None
                try:
                    following = next(waiting, None)
                except Exception as e:  # the caller's own, and raised below
                    failure = e
                if following is None:
                    more = False
                elif isinstance(begun := self._start(*following, options), Answer):
                    yield begun
                else:
                    rows.append(begun)
            yield from self._go_on(rows)
        if failure is not None:
            raise failure

    def _start(
        self,
        number: int,
        request: Request | Sequence[Message] | str,
        options: Mapping[str, Any],
    ) -> _Row | Answer:
        """Read a prompt and take a slot; or say why not."""
        began, row = time.perf_counter(), _Row(self._slots.context)
        try:
            loop = self._loop(number, request, options, row)
            slot, row.logits = self._slots.start(loop.generation.ids)
        except Qwen3Error as e:
            return Answer(number, error=e)
        row.begin(number, slot, loop)
        loop.generation.waited(time.perf_counter() - began)
        return row

    def _loop(
        self,
        number: int,
        request: Request | Sequence[Message] | str,
        common: Mapping[str, Any],
        row: _Row,
    ) -> ReplyLoop:
        if not isinstance(request, Request):
            request = Request(request)
        is_list = isinstance(request.what, Sequence)
        if not is_list or not isinstance(request.options, Mapping):
            raise UsageError(
                "a request is a list of messages, a text, or a Request of one with options as a "
                f"dict; found {str(request)[:80]}"
            )
        what, options = request.what, {**common, **request.options}
        if "sampling" not in request.options:
            thinking = isinstance(what, str) or options.get("thinking", True)
            sampling = self._choose_sampling(options.get("sampling"), thinking)
            options["sampling"] = sampling.another(number)
        return self._begin(what, row, options)

    def _go_on(self, rows: list[_Row]) -> Iterator[Answer]:
        """Draw a token of each row whose logits are there, then compute the next of all."""
        for row in list(rows):
            if row.ready and row.draw():
                rows.remove(row)
                self._slots.end(row.slot)
                yield row.answer()
        if not rows:
            return
        began = time.perf_counter()
        new = {row.slot: row.next_id for row in rows}
        found = self._slots.step(new)
        seconds = time.perf_counter() - began
        self.steps, self.new_tokens = self.steps + 1, self.new_tokens + len(new)
        for row in rows:
            row.take(found[row.slot], seconds)


class _Row:
    """One reply of a batch, and the model that it asks: its logits were computed before."""

    captures = 0

    def __init__(self, context: int):
        self.context = context
        self.logits: np.ndarray | DeviceError | None = None
        self._pieces: list[Piece] = []
        self._error: Qwen3Error | None = None

    def begin(self, number: int, slot: int, loop: ReplyLoop) -> None:
        self.number, self.slot = number, slot
        self._generation: Generation = loop.generation
        self._steps = loop.steps()
        self._computed = len(loop.generation.ids)

    @property
    def ready(self) -> bool:
        """Whether all its ids have been computed."""
        return self._computed == len(self._generation.ids)

    @property
    def next_id(self) -> int:
        """The first that has not."""
        return self._generation.ids[self._computed]

    def draw(self) -> bool:
        """Go on until another id is there to be computed; whether it ended before."""
        try:
            while self.ready:
                self._pieces += next(self._steps)
        except StopIteration:
            return True
        except Qwen3Error as e:
            self._error = e
            return True
        return False

    def take(self, logits: np.ndarray | DeviceError, seconds: float) -> None:
        """What was computed for its next id."""
        self._computed, self.logits = self._computed + 1, logits
        self._generation.waited(seconds)

    def missing(self, ids: Sequence[int]) -> int:
        return len(ids) - self._computed

    def next_logits(self, ids: Sequence[int], guess: Sequence[int] = ()) -> np.ndarray:
        """For its own ids alone, once they are computed."""
        assert self.missing(ids) == 0 and self.logits is not None
        if isinstance(self.logits, DeviceError):
            raise self.logits
        return self.logits

    def answer(self) -> Answer:
        """All of it."""

        def joined(kind: type[Text] | type[Thinking]) -> str:
            return "".join(piece.text for piece in self._pieces if isinstance(piece, kind))

        calls = tuple(piece for piece in self._pieces if isinstance(piece, ToolCall))
        end = next((piece for piece in self._pieces if isinstance(piece, End)), None)
        return Answer(self.number, joined(Thinking), joined(Text), calls, end, self._error)
