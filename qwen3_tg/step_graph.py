"""A captured graph: one step of the model, whose ids and position are written where it reads them.

The only owner of TinyJit. What changes from step to step lies in two buffers that the graph was
captured with: handing new tensors to a graph costs milliseconds of scheduling each time.

Touches tinygrad's internals: `TinyJit.cnt`, as TinyJit runs a function twice before it captures,
to see what a changing first call would do. Ours never changes, and each such run costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes

from qwen3_tg.buffers import read, write
from qwen3_tg.device import as_default
from qwen3_tg.device.names import each
from qwen3_tg.forward import Forward, Place
from qwen3_tg.kv_cache import KVCache
from qwen3_tg.placement import empty


class StepGraph:
    """S new positions at once; logits after the last one that is there, or after `every` one."""

    def __init__(self, forward: Forward, cache: KVCache, device: str, S: int, every: bool):
        self._forward, self._S, self._every, self._capacity = forward, S, every, cache.capacity
        self._device = device
        ids = empty((1, S), dtypes.int32, each(device))
        at = empty((2,), dtypes.int32, each(device))

        # without `self`, so that a graph that is dropped gives its memory back at once
        def step(*symbols: Any) -> Tensor:
            logits = forward.logits(ids, at, cache, every, *symbols)
            return logits.to(each(device)[0]).realize()

        self._ids, self._at, self._step = ids, at, capture_at_once(step)

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


class BatchGraph:
    """One new position of each of some sequences, whose caches these are."""

    def __init__(self, forward: Forward, caches: Sequence[KVCache], device: str):
        self._forward, self._caches, self._device = forward, caches, device
        B = len(caches)
        ids = empty((1, B), dtypes.int32, each(device))
        at = empty((2 + 2 * B,), dtypes.int32, each(device))

        def step(*symbols: Any) -> Tensor:
            logits = forward.batch_logits(ids, at, caches, *symbols)
            return logits.to(each(device)[0]).realize()

        self._ids, self._at, self._step = ids, at, capture_at_once(step)

    def __call__(
        self, new: Mapping[int, Place], lengths: Mapping[int, int]
    ) -> dict[int, np.ndarray]:
        """The logits, (V,) float32, after the id and position given for each of some slots.
        `lengths` are those of all slots in use."""
        waiting = [lengths.get(slot, 0) for slot in range(len(self._caches))]
        rows = self._forward.batch_rows(new, waiting)
        ids = np.zeros(len(self._caches), dtype=np.int32)
        ids[: len(rows)] = [id for id, _ in rows.values()]
        at = np.zeros((1 + len(ids), 2), dtype=np.int32)
        at[0, 1] = len(rows)
        at[1 : 1 + len(rows)] = [(position, slot) for slot, (_, position) in rows.items()]
        write(self._ids, ids)
        write(self._at, at)
        with as_default(self._device):
            logits = read(self._step(*self._forward.batch_symbols(rows, self._caches)))
        return {slot: logits[n].copy() for n, slot in enumerate(rows) if slot in new}


def capture_at_once(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A graph of this function, which from its first call on always does the same."""
    jit = TinyJit(step)
    jit.cnt = 1
    return jit
