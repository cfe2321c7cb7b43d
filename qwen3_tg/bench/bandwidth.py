"""How fast this machine's, or this device's, memory was just now: what decoding is held against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qwen3_tg.device import Policy

_BYTES = 256 * 2**20  # far more than caches hold
_TRIES = 6


def read_bandwidth(policy: Policy) -> float:
    """Bytes per second, the best of some tries: on a CPU numpy sums an array on as many threads as
    compute, which only reads; elsewhere tinygrad copies a buffer, which reads and writes, on each
    device in turn, and all are added up."""
    if policy.device.startswith("CPU"):
        return _by_numpy(policy.threads or 1)
    return sum(map(_by_tinygrad, policy.devices))


def _by_numpy(threads: int) -> float:
    parts = np.array_split(np.ones(_BYTES // 8, dtype=np.int64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_TRIES):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, _BYTES / (time.perf_counter() - began))
    return best


def _by_tinygrad(device: str) -> float:
    from tinygrad import Tensor, TinyJit
    from tinygrad.device import Device

    opened: Any = Device[device]
    source = Tensor.zeros(_BYTES // 4, device=device).contiguous().realize()
    copy = TinyJit(lambda x: (x + 1).realize())
    best = 0.0
    for _ in range(_TRIES):
        opened.synchronize()
        began = time.perf_counter()
        copy(source)
        opened.synchronize()
        best = max(best, 2 * _BYTES / (time.perf_counter() - began))
    return best
