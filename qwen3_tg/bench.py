"""How fast a loaded model reads a prompt and writes tokens, and how many bytes each token takes.

A token takes every weight once, but of the embedding one row (unless it is the output head too) and
of a mixture's experts those that were chosen; and all cached keys and values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qwen3_tg.checkpoint import StoredWeight
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import UsageError, check_count
from qwen3_tg.kv_sizes import cache_bytes
from qwen3_tg.llm import LLM

_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Speed:
    """Tokens per second of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Measured:
    """`prefill` and `decode` speeds; `token_bytes` what one decoded token reads of the weights,
    `all_bytes` all weights, `cache_bytes` what it reads of the cache at half of the decoding."""

    prompt_tokens: int
    new_tokens: int
    prefill: Speed
    decode: Speed
    token_bytes: int
    all_bytes: int
    cache_bytes: int

    @property
    def bytes_per_s(self) -> float:
        """Weights and cache read while decoding."""
        return (self.token_bytes + self.cache_bytes) * self.decode.median


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


def measure(llm: LLM, prompt_tokens: int, new_tokens: int, rounds: int) -> Measured:
    """Random ids, `rounds` times after one that is not counted. Raises UsageError."""
    for name, count in (("-p", prompt_tokens), ("-n", new_tokens), ("-r", rounds)):
        check_count(name, count, least=1)
    if prompt_tokens + new_tokens >= llm.context:
        raise UsageError(
            f"-p {prompt_tokens} and -n {new_tokens} do not fit in the context of {llm.context}"
        )
    random = np.random.default_rng(0)
    prefill, decode = [], []
    for _ in range(rounds + 1):
        ids = random.integers(0, llm.config.vocab_size, prompt_tokens).tolist()
        began = time.perf_counter()
        # one more than asked for: the first comes out of the prompt, the others are decoded
        generation = llm.generate_ids(ids, new_tokens + 1, stop_ids=())
        next(generation)
        read = time.perf_counter()
        for _ in generation:
            pass
        prefill.append(prompt_tokens / (read - began))
        decode.append((generation.new_tokens - 1) / (time.perf_counter() - read))
    itemsize = 4 if llm.policy.kv_dtype == "float32" else 2
    return Measured(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill=Speed(tuple(prefill[1:])),
        decode=Speed(tuple(decode[1:])),
        token_bytes=token_bytes(llm.config, llm.checkpoint.weights),
        all_bytes=sum(weight.device_bytes for weight in llm.checkpoint.weights.values()),
        cache_bytes=cache_bytes(llm.config, prompt_tokens + new_tokens // 2, itemsize),
    )
