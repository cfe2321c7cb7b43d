"""How fast a loaded model reads a prompt and writes tokens, and how many bytes each token takes.

A token takes every weight once, but of the embedding one row (unless it is the output head too) and
of a mixture's experts those that were chosen; and all cached keys and values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwen3_tg.checkpoint import StoredWeight
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import UsageError, check_count
from qwen3_tg.kv_sizes import cache_bytes
from qwen3_tg.llm import LLM

_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Measured:
    """One test. `tokens` were read as a prompt ("prefill") or decoded one by one ("decode"), with
    `depth` others in the cache before, by each of `batch` sequences at once; `rounds` are tokens
    per second of all of them, one a round; `bytes_per_token` what each decoded token read of
    weights and cache. `gains`, for several at once: how many times as many tokens as one at a time,
    measured just before, round by round. Of experts it is as if no two chose the same."""

    kind: str
    tokens: int
    depth: int
    rounds: tuple[float, ...]
    bytes_per_token: int
    batch: int = 1
    gains: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """As llama-bench calls it: pp512, tg128 @ d4096; of several at once, tg128 x 8."""
        short = {"prefill": "pp", "decode": "tg"}[self.kind]
        many = f" x {self.batch}" if self.batch > 1 else ""
        return f"{short}{self.tokens}{many}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def median(self) -> float:
        """Tokens per second."""
        return statistics.median(self.rounds)

    @property
    def bytes_per_s(self) -> float:
        """Weights and cache read, for decoding."""
        return self.bytes_per_token * self.median


def token_bytes(config: ModelConfig, weights: Mapping[str, StoredWeight]) -> int:
    """Bytes of weights, as stored on the device, that one decoded token reads."""
    total = 0
    for name, weight in weights.items():
        if _EXPERTS in name:
            total += weight.device_bytes * config.num_experts_per_tok // config.num_experts
        elif name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
            total += weight.device_bytes // config.vocab_size
        else:
            total += weight.device_bytes
    return total


def check_counts(
    prompts: Sequence[int],
    news: Sequence[int],
    depths: Sequence[int],
    rounds: int,
    batches: Sequence[int] = (),
) -> int:
    """The longest context that is needed. Raises UsageError for impossible counts."""
    check_count("-r", rounds, least=1)
    for name, counts in (("-p", prompts), ("-n", news), ("-d", depths)):
        for count in counts:
            check_count(name, count, least=0)
    for count in batches:
        check_count("-b", count, least=1)
    if any(count > 1 for count in batches) and not any(news):
        raise UsageError("-b decodes several at once: -n says how many tokens, and is 0")
    if not any(prompts) and not any(news):
        raise UsageError("nothing to measure: -p and -n are both 0")
    return max(depths, default=0) + max(*prompts, *news, 0) + 2


def measure(
    llm: LLM,
    prompts: Sequence[int],
    news: Sequence[int],
    depths: Sequence[int],
    rounds: int,
    on_progress: Callable[[str], None] = lambda what: None,
    batches: Sequence[int] = (),
) -> list[Measured]:
    """Random ids: every prompt length and every number of new tokens at every depth, the latter for
    each number of `batches` at once, too; `rounds` times after one that is not counted. Lengths of
    0 are left away. Raises UsageError."""
    needed = check_counts(prompts, news, depths, rounds, batches)
    if needed > llm.context:
        raise UsageError(f"{needed} tokens do not fit in the context of {llm.context}; --context")
    weights = token_bytes(llm.config, llm.checkpoint.weights)
    random = np.random.default_rng(0)
    found = []
    for depth in depths:
        before = random.integers(0, llm.config.vocab_size, depth).tolist()
        tests = [("prefill", count, _prefill) for count in prompts if count]
        tests += [("decode", count, _decode) for count in news if count]
        for kind, count, run in tests:
            per_s = []
            for n in range(rounds + 1):
                name = Measured(kind, count, depth, (), 0).name
                on_progress(f"{name}, round {n} of {rounds}" if n else f"{name}, warming up")
                per_s.append(count / run(llm, random, before, count))
            cache = cache_bytes(llm.config, depth + count // 2, llm.policy.kv_dtype)
            found.append(Measured(kind, count, depth, tuple(per_s[1:]), weights + cache))
        pairs = [(batch, count) for batch in batches if batch > 1 for count in news if count]
        found += [_batch(llm, random, depth, *pair, rounds, on_progress) for pair in pairs]
    return found


def _batch(
    llm: LLM,
    random: np.random.Generator,
    depth: int,
    batch: int,
    count: int,
    rounds: int,
    on_progress: Callable[[str], None],
) -> Measured:
    """`batch` sequences at once, and before each round one alone."""
    vocabulary = llm.config.vocab_size
    slots, per_s, alone = llm.slots(batch), [], []
    prompt = random.integers(0, vocabulary, max(depth, 1)).tolist()
    for n in range(rounds + 1):
        name = Measured("decode", count, depth, (), 0, batch).name
        on_progress(f"{name}, round {n} of {rounds}" if n else f"{name}, warming up")
        alone.append(count / _decode(llm, random, prompt, count))
        started = [slots.start(prompt)[0] for _ in range(batch)]
        began = time.perf_counter()
        for _ in range(count):
            ids = random.integers(0, vocabulary, batch).tolist()
            slots.step(dict(zip(started, ids, strict=True)))
        per_s.append(batch * count / (time.perf_counter() - began))
        for slot in started:
            slots.end(slot)
    gains = tuple(many / one for many, one in zip(per_s[1:], alone[1:], strict=True))
    every = token_bytes(llm.config, llm.checkpoint.weights)
    experts = token_bytes(llm.config, _experts(llm.checkpoint.weights))  # each chooses its own
    cache = cache_bytes(llm.config, depth + count // 2, llm.policy.kv_dtype)
    read = (every - experts) // batch + experts + cache
    return Measured("decode", count, depth, tuple(per_s[1:]), read, batch, gains)


def _experts(weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    return {name: weight for name, weight in weights.items() if _EXPERTS in name}


def _prefill(llm: LLM, random: np.random.Generator, before: list[int], count: int) -> float:
    """Seconds to read `count` new tokens after those `before`, which the cache holds."""
    if before:
        next(llm.generate_ids(before, 1, stop_ids=()))
    ids = before + random.integers(0, llm.config.vocab_size, count).tolist()
    began = time.perf_counter()
    next(llm.generate_ids(ids, 1, stop_ids=()))
    return time.perf_counter() - began


def _decode(llm: LLM, random: np.random.Generator, before: list[int], count: int) -> float:
    """Seconds to write `count` tokens after the first one."""
    ids = before or random.integers(0, llm.config.vocab_size, 1).tolist()
    generation = llm.generate_ids(ids, count + 1, stop_ids=())
    next(generation)
    began = time.perf_counter()
    for _ in generation:
        pass
    return time.perf_counter() - began
