"""Notices a model that repeats itself without end, and says what to do about it, step by step.

A loop is an exact cycle of ids that has gone on for a while: at least LEAST_REPEATS times and over
LEAST_TOKENS tokens. Tables, lists and code repeat their form, but not for so long without a
difference. The first answer is to make the cycle's tokens unlikely for a moment; the second is to
close the thinking; the last is to stop. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwen3_tg.generate import Generation

LEAST_TOKENS, LEAST_REPEATS = 256, 4
LONGEST = 512  # cycles, in tokens
# So far down do all tokens of the cycle go, and for so many tokens. In a loop the next token leads
# by five to ten.
PENALTY, PENALISED = 12.0, 16

CLOSE, STOP = "close", "stop"
OnNotice = Callable[[str], None]


class Cycles:
    """Finds a cycle at the end of what was pushed."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        # by period, counted from 1: how many of the last ids equal the one a period before them
        self._run = np.zeros(LONGEST, dtype=np.int64)

    def push(self, id: int) -> list[int]:
        """The ids of the shortest cycle that has gone on for long enough, or none."""
        before = np.array(self._ids[-LONGEST:][::-1], dtype=np.int64)
        same = np.zeros(LONGEST, dtype=bool)
        same[: len(before)] = before == id
        self._run = np.where(same, self._run + 1, 0)
        self._ids.append(id)
        periods = np.arange(1, LONGEST + 1)
        enough = self._run + periods >= np.maximum(LEAST_TOKENS, LEAST_REPEATS * periods)
        return self._ids[-int(enough.argmax()) - 1 :] if enough.any() else []


class LoopGuard:
    """Watches one generation. `on_notice` is told what was done, and why."""

    def __init__(self, generation: Generation, on_notice: OnNotice | None = None):
        self._generation, self._on_notice = generation, on_notice or (lambda text: None)
        self._cycles, self._wished = Cycles(), generation.sampling
        self._penalised = 0  # tokens for which the penalty still holds
        self._warned: set[bool] = set()  # where it was penalised before: in thinking, in the answer

    def push(self, id: int, thinking: bool) -> str:
        """What to do after this id: CLOSE the thinking, STOP, or go on, ""."""
        if self._penalised:
            self._penalised -= 1
            if not self._penalised:
                self._generation.sampling = self._wished
        cycle = self._cycles.push(id)
        if not cycle:
            return ""
        self._cycles = Cycles()
        tokens = f"{len(cycle)} tokens repeat" if len(cycle) > 1 else "1 token repeats"
        what = f"{tokens} in the {'thinking' if thinking else 'answer'}"
        if thinking not in self._warned:
            self._warned.add(thinking)
            self._on_notice(f"{what}: they are made unlikely for {PENALISED} tokens")
            self._penalise(cycle)
            return ""
        if thinking:
            self._on_notice(f"{what} again: the thinking is closed")
            return CLOSE
        self._on_notice(f"{what} again: stopped")
        return STOP

    def _penalise(self, cycle: list[int]) -> None:
        bias = dict(self._wished.logit_bias)
        for id in set(cycle):
            bias[id] = bias.get(id, 0.0) - PENALTY
        self._generation.sampling = replace(self._wished, logit_bias=bias)
        self._penalised = PENALISED
