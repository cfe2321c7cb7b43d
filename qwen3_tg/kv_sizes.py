"""How large the cache of keys and values is and in which steps it grows: the arithmetic of
kv_cache.py, without tinygrad, so that planning says the same. Lengths are positions."""

from __future__ import annotations

from qwen3_tg.checkpoint.types import FLOATS
from qwen3_tg.config import ModelConfig

FIRST_STEP = 2048
GROWTH = 2  # how many times as large each later step is
# A limit so near is the next step itself: to take twice and soon the rest again would have two
# almost full caches in memory.
_NEAR = 3
_SCALE_BYTES = 4  # of int8: a float32


def cache_bytes(config: ModelConfig, capacity: int, kv_dtype: str) -> int:
    """Bytes of keys and values of all layers: two times (capacity, K, Hd) each, and of int8 a scale
    for each head."""
    if kv_dtype == "int8":
        head = config.head_dim + _SCALE_BYTES
    else:
        head = config.head_dim * FLOATS[kv_dtype]
    return 2 * config.num_hidden_layers * capacity * config.num_key_value_heads * head


def first_capacity(limit: int) -> int:
    """Room at the start; `limit` is the most there may ever be."""
    return min(limit, FIRST_STEP)


def grown_capacity(capacity: int, positions: int, limit: int) -> int:
    """The room after `capacity` has grown in steps to at least `positions`."""
    while capacity < positions:
        capacity = limit if limit <= capacity * _NEAR else capacity * GROWTH
    return capacity


def last_growth(limit: int) -> tuple[int, int] | None:
    """The room before and after the last step to `limit`; None where it never grows."""
    capacity = first_capacity(limit)
    while capacity < limit:
        before, capacity = capacity, grown_capacity(capacity, capacity + 1, limit)
    return (before, limit) if limit > FIRST_STEP else None
