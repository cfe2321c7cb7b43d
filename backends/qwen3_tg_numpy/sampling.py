"""From the logits of one position to a token, in float64.

The steps come in a fixed order: logit_bias, repetition_penalty, presence_penalty and
frequency_penalty, temperature, top_k, top_p, min_p. The random number of step n is a pure function
of (seed, n), so a token depends on its logits, the tokens before it, the settings and n alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token; top_p 1, top_k 0 (or None) and min_p 0 are off, as
    are a repetition_penalty of 1 and other penalties of 0. logit_bias is by token id."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature must be 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 or more, found {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, found {self.min_p}")
        if not 0 <= self.seed < 2**128:
            raise ValueError(f"seed must be from 0 to 2**128 - 1, found {self.seed}")
        if not 0 < self.repetition_penalty < np.inf:
            raise ValueError(f"repetition_penalty must be above 0, found {self.repetition_penalty}")


GREEDY = Sampling()


def penalised(
    logits: np.ndarray, sampling: Sampling, prompt: Sequence[int] = (), answer: Sequence[int] = ()
) -> np.ndarray:
    """The logits after biases and penalties, given the tokens before: (V,) -> (V,) float64."""
    exact = logits.astype(np.float64)
    for id, bias in sampling.logit_bias.items():
        exact[id] += bias
    for id in {*prompt, *answer}:  # a token that was there: a likely one less, an unlikely one too
        if exact[id] > 0:
            exact[id] /= sampling.repetition_penalty
        else:
            exact[id] *= sampling.repetition_penalty
    for id in set(answer):
        exact[id] -= sampling.presence_penalty
        exact[id] -= sampling.frequency_penalty * list(answer).count(id)
    return exact


def candidates(
    logits: np.ndarray, sampling: Sampling, prompt: Sequence[int] = (), answer: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens left to choose from, most likely first, with probabilities that sum to one.

    logits: (V,) -> ids: (N,), probabilities: (N,) float64. Needs a temperature above 0."""
    # 1. Temperature; then sort, stably and negated, so that the lower id comes first on a tie.
    exact = penalised(logits, sampling, prompt, answer)
    with np.errstate(over="ignore"):  # -inf from a tiny temperature: its exp is the right 0
        scaled = (exact - exact.max()) / sampling.temperature
    ids = np.argsort(-scaled, kind="stable")
    ids = ids[exact[ids] > -np.inf]  # what is forbidden is no candidate
    # 2. top_k: the k most likely; then softmax over what is left.
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    p = np.exp(scaled[ids])  # the largest is 0
    p = p / p.sum()
    # 3. top_p: stop after the first token at which the running sum reaches it. It always does for
    #    the last token, though rounding may leave the sum a hair short of it.
    if sampling.top_p < 1:
        reached = np.cumsum(p) >= sampling.top_p
        n = int(reached.argmax()) + 1 if reached.any() else len(p)
        ids, p = ids[:n], p[:n]
    # 4. min_p: drop what is less likely than this share of the most likely token.
    enough = p >= sampling.min_p * p[0]
    ids, p = ids[enough], p[enough]
    # 5. Probabilities again.
    return ids, p / p.sum()


def uniform(seed: int, n: int) -> float:
    """The random number in [0, 1) for step n, by the counter-based Philox generator (Salmon et al.
    2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=n)).random())


def sample(
    logits: np.ndarray,
    sampling: Sampling,
    n: int,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
) -> int:
    """The token of step n, where n tokens were generated before it in this call. logits: (V,)"""
    if sampling.temperature == 0:
        # the lowest id on a tie
        return int(penalised(logits, sampling, prompt, answer).argmax())
    ids, p = candidates(logits, sampling, prompt, answer)
    above = np.cumsum(p) > uniform(sampling.seed, n)
    above[-1] = True  # rounding may leave the sum a hair short of one
    return int(ids[above.argmax()])
