"""`--explain`: for each token, the candidates at first and after each step of sampling, and what it
took away. To stderr."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from qwen3_tg.cli import terminal
from qwen3_tg.sampling import Candidates, explain
from qwen3_tg.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen3_tg.generate import Step

_SHOWN = 4  # candidates of each step, and of those it took


class Explainer:
    """To be told each step. Without a tokenizer, tokens are shown by their ids."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def __call__(self, step: Step) -> None:
        found = explain(step.logits, step.sampling, step.seen, step.allowed)
        at = np.flatnonzero(found[-1].ids == step.id)
        chance = 100 * found[-1].p[at[0]]
        lines = [f"token {step.n}: {self._token(step.id)}, drawn at {chance:.3g} %"]
        lines += [f"  {'at first':<25} {len(found[0].ids):>7}  {self._likeliest(found[0])}"]
        for before, now in pairwise(found):
            lines += [f"  {now.step:<25} {len(now.ids):>7}  {self._likeliest(now)}"]
            gone = ~np.isin(before.ids, now.ids)
            if gone.any():
                taken = Candidates("", before.ids[gone], before.p[gone])
                lines += [f"  {'took':>25} {int(gone.sum()):>7}  {self._likeliest(taken)}"]
        terminal.note("\n" + "\n".join(lines))  # the answer before it has ended no line

    def _likeliest(self, some: Candidates) -> str:
        pairs = zip(some.ids[:_SHOWN].tolist(), some.p[:_SHOWN].tolist(), strict=True)
        words = [f"{self._token(id)} {100 * p:.3g} %" for id, p in pairs]
        return ", ".join(words) + (" ..." if len(some.ids) > _SHOWN else "")

    def _token(self, id: int) -> str:
        return repr(self._tokenizer.decode([id])) if self._tokenizer else str(id)
