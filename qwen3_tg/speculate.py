"""Speculative decoding: guess the next tokens and let the model look at all of them at once.

A step that computes few positions reads every weight once, as a step for one does, so it costs less
than so many steps. The model's own logits decide, as always: each position's token is drawn from
them with the number of that token, and a guess is right as long as it equals what was drawn. So it
changes the time, never a token, where the logits of a position do not depend on how many others are
computed with it. (Leviathan et al. 2023, arXiv:2211.17192, accept guesses by their probabilities.
Here a draw depends on the seed, the token's number and the logits alone, and can just be made.)

Guesses come from what was said before (Lookup; Saxena 2023, "Prompt Lookup Decoding") or from a
smaller model (Draft). Knows nothing of graphs, caches and text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qwen3_tg.errors import UsageError
from qwen3_tg.pace import Pace
from qwen3_tg.tokenizer import Tokenizer

# The token that a generation would take from these logits, (V,), after so many more tokens.
Choose = Callable[[np.ndarray, Sequence[int]], int]


class Model(Protocol):
    """What is needed of an Engine. `captures` counts the graphs it has made."""

    context: int
    captures: int

    def missing(self, ids: Sequence[int]) -> int: ...
    def next_logits(self, ids: Sequence[int], guess: Sequence[int] = ()) -> np.ndarray: ...


class Guesser(Protocol):
    """Guesses what follows ids that only grow from call to call."""

    @property
    def captures(self) -> int:
        """Graphs made so far, which take time once."""

    def prepare(self, ids: Sequence[int]) -> None:
        """What is to be done for a text but not for each guess."""

    def guess(self, ids: Sequence[int], most: int, choose: Choose) -> list[int]:
        """At most so many ids; none where it has no idea."""


class Lookup:
    """What followed the last time that the last tokens stood in the text."""

    _LENGTHS = (4, 3, 2)  # of what has to be equal; the longest first, as it is the best hint
    captures = 0

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # where the last such tokens end
        self._done = 1  # ends up to here are in it

    def prepare(self, ids: Sequence[int]) -> None:
        """Remember every end of some tokens but the last, which nothing follows yet."""
        for end in range(self._done, len(ids)):
            for n in self._LENGTHS:
                if n <= end:
                    self._after[tuple(ids[end - n : end])] = end
        self._done = max(self._done, len(ids))

    def guess(self, ids: Sequence[int], most: int, choose: Choose) -> list[int]:
        for n in self._LENGTHS:
            at = self._after.get(tuple(ids[-n:]))
            if at is not None:
                again = ids[at:]  # should it be too short, it repeats itself
                return [again[i % len(again)] for i in range(most)]
        return []


class Draft:
    """What a smaller model would say, drawn as the large one draws: with the same random number
    two that are alike take the same token."""

    def __init__(self, model: Model):
        self._model = model

    @property
    def captures(self) -> int:
        return self._model.captures

    def prepare(self, ids: Sequence[int]) -> None:
        if len(ids) <= self._model.context and self._model.missing(ids) > 2:
            self._model.next_logits(ids[:-1])

    def guess(self, ids: Sequence[int], most: int, choose: Choose) -> list[int]:
        most = min(most, self._model.context - len(ids) + 1)
        if most > 0 and self._model.missing(ids) > 1:
            self._model.next_logits(ids[:-1])  # two single steps: many positions cost more
        guessed: list[int] = []
        while len(guessed) < most:
            logits = self._model.next_logits([*ids, *guessed])
            guessed.append(choose(logits, guessed))
        return guessed


class Speculation:
    """One generation's guesses. `guessed` and `right` count tokens."""

    def __init__(self, guesser: Guesser, clock: Callable[[], float] = time.perf_counter):
        self._guesser, self._clock, self._pace = guesser, clock, Pace()
        self.guessed = self.right = 0
        self._left: list[int] = []  # guesses that may still turn out right
        self._round: tuple[int, int, float | None] | None = None  # guesses, right before, seconds
        self._tokens, self._seconds = 0, 0.0  # of all steps that were measured

    @property
    def gain(self) -> float | None:
        """How many times as fast it was as one by one, by the times measured on the way, graphs
        that had to be made apart; None where no single step was measured."""
        if not self._pace.single_s or not self._seconds:
            return None
        return self._pace.single_s * self._tokens / self._seconds

    def next_logits(
        self, model: Model, ids: Sequence[int], room: int, choose: Choose
    ) -> np.ndarray:
        """The model's logits after `ids`, (V,), with which it may look at up to `room` guesses of
        what follows them."""
        missing = model.missing(ids)
        if missing != 1:  # known from the last guess, or a text to read
            if missing:
                self.drop()
            return model.next_logits(ids)
        self.drop()
        made, began = self._captures(model), self._clock()
        guess: list[int] = []
        if (most := min(self._pace.length, room)) > 0:
            self._guesser.prepare(ids)
            self._seconds += self._clock() - began
            made, began = self._captures(model), self._clock()
            guess = self._guesser.guess(ids, most, choose)
        logits = model.next_logits(ids, guess)
        seconds = self._clock() - began if self._captures(model) == made else None
        if guess:
            self._round, self._left = (len(guess), self.right, seconds), list(guess)
            self.guessed += len(guess)
        elif seconds is not None:
            self._pace.single(seconds)
            self._tokens, self._seconds = self._tokens + 1, self._seconds + seconds
        return logits

    def took(self, id: int) -> None:
        """The token that was drawn from the last logits."""
        if self._left and self._left[0] == id:
            self.right += 1
            del self._left[0]
        else:
            self._left = []

    def drop(self) -> None:
        """What comes next was not guessed: what became of the last guess is certain."""
        self._left = []
        if self._round is None:
            return
        guessed, before, seconds = self._round
        self._pace.round(guessed, self.right - before, seconds)
        if seconds is not None:
            self._tokens += self.right - before + 1
            self._seconds += seconds
        self._round = None

    def _captures(self, model: Model) -> int:
        return model.captures + self._guesser.captures


def check_vocabulary(
    name: str, sizes: tuple[int, int], tokenizers: tuple[Tokenizer | None, Tokenizer | None]
) -> None:
    """Refuse a draft model, called `name`, whose ids mean other tokens. Model first, then draft:
    how many ids each has, and what they mean where that is known. Raises UsageError."""
    todo = "a draft needs the tokenizer of the model it guesses for: take a smaller one of its kind"
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the draft model {name} has a vocabulary of {sizes[1]} ids, the model one of "
            f"{sizes[0]}; {todo}"
        )
    model, draft = tokenizers
    if model and draft and (id := model.first_difference(draft)) is not None:
        raise UsageError(
            f"the draft model {name} has {draft.token_bytes(id)!r} for id {id}, the model "
            f"{model.token_bytes(id)!r}; {todo}"
        )
