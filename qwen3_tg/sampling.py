"""Logits to a token, in numpy on the host, in float64: the same on every device.

The order of the filters is fixed: temperature, top_k, top_p, min_p. The draw is counter-based: the
n-th token of a call depends on (seed, n) and the logits alone, not on how many draws came before.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np

from qwen3_tg.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise UsageError(f"{name} must be an integer, found {getattr(self, name)!r}")
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed, 0 <= self.seed < 2**128, "from 0 to 2**128 - 1"),
        )
        for name, value, right, expected in checks:
            if not right:
                raise UsageError(f"{name} must be {expected}, found {value}")


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that survive every filter, most likely first, and their probabilities.

    logits: (V,) -> ids: (N,), probabilities: (N,) float64 with sum 1. Needs temperature > 0."""
    exact = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature may give -inf, whose exp is the right 0
        scaled = (exact - exact.max()) / sampling.temperature
    keep = min(sampling.top_k, len(scaled)) or len(scaled)
    ids = np.argsort(-scaled, kind="stable")[:keep]  # on a tie the lower id comes first
    p = np.exp(scaled[ids])  # the largest is 0, so that nothing overflows
    p /= p.sum()
    if sampling.top_p < 1:  # the shortest head whose sum reaches top_p
        ids = ids[: int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1]
        p = p[: len(ids)]
    likely = p >= sampling.min_p * p[0]
    ids, p = ids[likely], p[likely]
    return ids, p / p.sum()


def uniform(seed: int, n: int) -> float:
    """The n-th number in [0, 1) of a seed, by the counter-based Philox generator (Salmon et al.
    2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=n)).random())


def sample(logits: np.ndarray, sampling: Sampling, n: int) -> int:
    """The token for step n (0 for the first new token) from logits: (V,)."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    ids, p = candidates(logits, sampling)
    chosen = int(np.searchsorted(np.cumsum(p), uniform(sampling.seed, n), side="right"))
    return int(ids[min(chosen, len(ids) - 1)])  # the sum may round to just below 1
