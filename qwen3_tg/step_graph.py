"""A captured graph: one step of the model, whose ids and position are written where it reads them.

The only owner of TinyJit. What changes from step to step lies in two buffers that the graph was
captured with: handing new tensors to a graph costs milliseconds of scheduling each time.

Touches tinygrad's internals: `TinyJit.cnt`, as TinyJit runs a function twice before it captures,
to see what a changing first call would do. Ours never changes, and each such run costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes

from qwen3_tg.buffers import read, write
from qwen3_tg.device import as_default
from qwen3_tg.device.names import each
from qwen3_tg.forward import Forward
from qwen3_tg.kv_cache import KVCache
from qwen3_tg.placement import empty


class StepGraph:
    """S new positions at once; logits after the last one that is there, or after `every` one."""

    def __init__(self, forward: Forward, cache: KVCache, device: str, S: int, every: bool):
        self._forward, self._S, self._every, self._capacity = forward, S, every, cache.capacity
        self._device = device
        self._ids = empty((1, S), dtypes.int32, each(device))
        self._at = empty((2,), dtypes.int32, each(device))

        def step(*symbols: Any) -> Tensor:
            logits = forward.logits(self._ids, self._at, cache, every, *symbols)
            return logits.to(each(device)[0]).realize()

        self._step: Callable[..., Tensor] = capture_at_once(step)

    def __call__(self, new: Sequence[int], start: int) -> np.ndarray:
        """Up to S ids at positions start, start + 1, ...: (V,), or (ids, V), float32"""
        ids = np.zeros(self._S, dtype=np.int32)
        ids[: len(new)] = new
        write(self._ids, ids)
        write(self._at, np.array([start, len(new)], dtype=np.int32))
        symbols = self._forward.symbols(start, len(new), self._S, self._capacity)
        with as_default(self._device):
            logits = self._step(*symbols)
        found = read(logits)  # where the next step writes to
        return found[: len(new)].copy() if self._every else found.copy()


def capture_at_once(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A graph of this function, which from its first call on always does the same."""
    jit = TinyJit(step)
    jit.cnt = 1
    return jit
