"""Logits to a token, in numpy on the host, in float64: the same on every device.

What changes the logits comes first, then what takes tokens away, in this fixed order:

    allowed               tokens that a grammar forbids are gone
    logit_bias            is added
    repetition_penalty    divides a positive logit and multiplies a negative one, of every token of
                          prompt and answer (Keskar et al. 2019, arXiv:1909.05858; transformers)
    presence_penalty      is taken from every token of the answer, and
    frequency_penalty     as many times as it is there (OpenAI's API)
    temperature           divides
    top_k                 keeps the likeliest
    top_p                 keeps the fewest that sum up to it
    min_p                 keeps what is at least so likely, as a share of the likeliest

The draw is counter-based: the n-th token of a call depends on (seed, n), the logits and the tokens
before, not on how many draws came before.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real

import numpy as np

from qwen3_tg.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 and
    the other penalties 0 are off. `logit_bias` is by token id; -inf forbids a token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in ("top_k", "seed"):
                kind, right = "an integer", isinstance(value, Integral)
            elif setting.name == "logit_bias":
                kind, right = "a dict of numbers by token id", isinstance(value, Mapping)
            else:
                kind, right = "a number", isinstance(value, Real)
            if not right:
                raise UsageError(f"{setting.name} must be {kind}, found {value!r:.80}")
        penalties = self.presence_penalty, self.frequency_penalty
        checks = (
            (
                "temperature",
                self.temperature,
                self.temperature >= 0 and _is_finite(self.temperature),
                "at least 0",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed, 0 <= self.seed < 2**128, "from 0 to 2**128 - 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0 and _is_finite(self.repetition_penalty),
                "above 0",
            ),
            ("presence_penalty", penalties[0], _is_finite(penalties[0]), "a number"),
            ("frequency_penalty", penalties[1], _is_finite(penalties[1]), "a number"),
        )
        for name, value, right, expected in checks:
            if not right:
                raise UsageError(f"{name} must be {expected}, found {value!s:.80}")
        for id, bias in self.logit_bias.items():
            if not isinstance(id, Integral) or id < 0:
                raise UsageError(f"logit_bias must be by token id, found {id!r}")
            if not isinstance(bias, Real) or not (bias == -math.inf or _is_finite(bias)):
                raise UsageError(f"logit_bias of {id} must be a number or -inf, found {bias!r:.80}")

    def __hash__(self) -> int:
        numbers = (getattr(self, setting.name) for setting in fields(self)[:-1])
        return hash((*numbers, frozenset(self.logit_bias.items())))

    def another(self, number: int) -> Sampling:
        """For the number-th of several answers with one seed, from 0 on: the same with a seed of
        its own, which JSON's numbers hold exactly in every program."""
        return replace(self, seed=self._other_seed("answer", number))

    def next_turn(self, number: int) -> Sampling:
        """The same for the number-th turn of one answer that calls tools."""
        return replace(self, seed=self._other_seed("turn", number))

    def _other_seed(self, kind: str, number: int) -> int:
        """Of 53 bits, as any other by chance; the seed itself for number 0."""
        if number == 0:
            return self.seed
        text = f"{self.seed} {kind} {number}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 11


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


class Seen:
    """The tokens before the next one: those of the prompt, and how often each is in the answer."""

    def __init__(self, prompt: Iterable[int] = (), answer: Iterable[int] = ()):
        self.prompt, self.answer = set(prompt), Counter(answer)


NOTHING_SEEN = Seen()


@dataclass(frozen=True)
class Candidates:
    """What is left after a step: `ids` (N,), the likeliest first, with their probabilities (N,),
    float64 with sum 1. `step` is a name of the order above, with the setting, "" for the start."""

    step: str
    ids: np.ndarray
    p: np.ndarray


def adjusted(
    logits: np.ndarray,
    sampling: Sampling,
    seen: Seen = NOTHING_SEEN,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """The logits with biases and penalties: (V,) -> (V,) float64. `allowed`: (V,) bool.

    Raises UsageError for a bias that is not of a token, or where nothing is left."""
    *_, (_, exact) = _adjustments(logits, sampling, seen, allowed)
    if exact.max() == -math.inf:
        raise UsageError("every token is forbidden: there is nothing to choose from")
    return exact


def _adjustments(
    logits: np.ndarray, sampling: Sampling, seen: Seen, allowed: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The logits after each step that changes them, in the same array."""
    exact = logits.astype(np.float64)
    yield "", exact
    if allowed is not None:
        exact[~allowed] = -math.inf
        yield "allowed", exact
    if bias := sampling.logit_bias:
        if max(bias) >= len(exact):
            raise UsageError(f"logit_bias is of token {max(bias)}; the last is {len(exact) - 1}")
        exact[list(bias)] += list(bias.values())
        yield f"logit_bias of {len(bias)}", exact
    if (penalty := sampling.repetition_penalty) != 1:
        ids = np.array(sorted(seen.prompt | set(seen.answer)), dtype=np.intp)
        now = exact[ids]
        exact[ids] = np.where(now < 0, now * penalty, now / penalty)
        yield f"repetition_penalty {penalty:g}", exact
    counts = np.array(list(seen.answer.values()), dtype=np.float64)
    ids = np.array(list(seen.answer), dtype=np.intp)
    if penalty := sampling.presence_penalty:
        exact[ids] -= penalty
        yield f"presence_penalty {penalty:g}", exact
    if penalty := sampling.frequency_penalty:
        exact[ids] -= penalty * counts
        yield f"frequency_penalty {penalty:g}", exact


def candidates(
    logits: np.ndarray,
    sampling: Sampling,
    seen: Seen = NOTHING_SEEN,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that survive every step, most likely first, and their probabilities.

    logits: (V,) -> ids: (N,), probabilities: (N,) float64 with sum 1. Needs temperature > 0."""
    *_, last = _filters(adjusted(logits, sampling, seen, allowed), sampling)
    return last.ids, last.p


def _filters(exact: np.ndarray, sampling: Sampling) -> Iterator[Candidates]:
    """After temperature and top_k, then after each other filter that is on."""
    with np.errstate(over="ignore"):  # a tiny temperature may give -inf, whose exp is the right 0
        scaled = (exact - exact.max()) / sampling.temperature
    ids = _largest(scaled, sampling.top_k)
    ids = ids[exact[ids] > -math.inf]  # what is forbidden is no candidate
    p = np.exp(scaled[ids])  # the largest is 0, so that nothing overflows
    p /= p.sum()
    yield Candidates(f"top_k {sampling.top_k}" if sampling.top_k else "", ids, p)
    if sampling.top_p < 1:  # the shortest head whose sum reaches top_p
        ids = ids[: int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1]
        p = p[: len(ids)]
        yield Candidates(f"top_p {sampling.top_p:g}", ids, p / p.sum())
    likely = p >= sampling.min_p * p[0]
    ids, p = ids[likely], p[likely]
    yield Candidates(f"min_p {sampling.min_p:g}" if sampling.min_p else "", ids, p / p.sum())


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of so many of the largest, or of all for 0, in order; of equals the lower first."""
    if not 0 < count < len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    some = np.flatnonzero(values >= least)  # with all that equal the last one
    return some[np.argsort(-values[some], kind="stable")][:count]


def explain(
    logits: np.ndarray,
    sampling: Sampling,
    seen: Seen = NOTHING_SEEN,
    allowed: np.ndarray | None = None,
) -> list[Candidates]:
    """The candidates at the start and after each step that is on, the last being those of the draw.
    At temperature 0 one is left."""

    def unfiltered(step: str, exact: np.ndarray, temperature: float = 1.0) -> Candidates:
        *_, last = _filters(exact, Sampling(temperature))
        return replace(last, step=step)

    found = [unfiltered(*step) for step in _adjustments(logits, sampling, seen, allowed)]
    exact, temperature = adjusted(logits, sampling, seen, allowed), sampling.temperature
    if temperature == 0:
        return [*found, Candidates("temperature 0", np.array([exact.argmax()]), np.ones(1))]
    if temperature != 1:
        found.append(unfiltered(f"temperature {temperature:g}", exact, temperature))
    return found + [step for step in _filters(exact, sampling) if step.step]


def uniform(seed: int, n: int) -> float:
    """The n-th number in [0, 1) of a seed, by the counter-based Philox generator (Salmon et al.
    2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=n)).random())


def sample(
    logits: np.ndarray,
    sampling: Sampling,
    n: int,
    seen: Seen = NOTHING_SEEN,
    allowed: np.ndarray | None = None,
) -> int:
    """The token for step n (0 for the first new token) from logits: (V,). `allowed`: (V,) bool."""
    if sampling.temperature == 0:
        return int(np.argmax(adjusted(logits, sampling, seen, allowed)))
    ids, p = candidates(logits, sampling, seen, allowed)
    chosen = int(np.searchsorted(np.cumsum(p), uniform(sampling.seed, n), side="right"))
    return int(ids[min(chosen, len(ids) - 1)])  # the sum may round to just below 1
