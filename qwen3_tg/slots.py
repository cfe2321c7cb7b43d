"""Many sequences side by side: a step computes the next position of each, and reads every weight
once for all of them.

A prompt is read by the engine, as always, so that what many prompts begin with is computed once;
then its keys and values are copied to a slot. Slots are independent: of any length, started and
ended at any time. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen3_tg.errors import DeviceError, check_count
from qwen3_tg.generate import ONE_AT_A_TIME, Engine
from qwen3_tg.kv_cache import KVCache
from qwen3_tg.step_graph import BatchGraph


class Slots:
    """Room for `size` sequences of up to `context` ids each."""

    def __init__(self, engine: Engine, size: int):
        check_count("size", size, least=1)
        self._engine, self.size, self.context = engine, size, engine.context
        self._caches: list[KVCache] = []
        self._free = list(range(size))[::-1]
        self._lengths: dict[int, int] = {}  # positions that the cache of each slot in use holds
        self._graph: BatchGraph | None = None

    @property
    def free(self) -> int:
        """How many more sequences there is room for."""
        return len(self._free)

    def start(self, ids: Sequence[int]) -> tuple[int, np.ndarray]:
        """Read a prompt; its slot, and the logits after it, (V,) float32.

        Raises ContextError, UsageError and DeviceError as Engine.next_logits does."""
        with ONE_AT_A_TIME:
            self._allocate()
            logits, rows = self._engine.read_for_batch(ids)
            slot = self._free[-1]
            self._reserve(slot, len(ids) + 1)
            self._caches[slot].put(rows)
            self._free.pop()
            self._lengths[slot] = len(ids)
        return slot, logits

    def step(self, new: Mapping[int, int]) -> Mapping[int, np.ndarray | DeviceError]:
        """One more id for some slots, all at once: the logits after each, (V,) float32, or the
        error where they are no numbers."""
        with ONE_AT_A_TIME:
            for slot in new:
                self._reserve(slot, self._lengths[slot] + 1)
            places = {slot: (id, self._lengths[slot]) for slot, id in new.items()}
            if self._graph is None:
                self._graph = self._engine.batch_graph(self._caches)
                with self._engine.capturing():
                    found = self._graph(places)
            else:
                found = self._graph(places)
            for slot in new:
                self._lengths[slot] += 1
        return {slot: self._engine.problem(logits) or logits for slot, logits in found.items()}

    def end(self, slot: int) -> None:
        """Give a slot back."""
        del self._lengths[slot]
        self._free.append(slot)

    def _allocate(self) -> None:
        if not self._caches:
            self._caches = self._engine.new_caches(self.size)

    def _reserve(self, slot: int, positions: int) -> None:
        if positions > self._caches[slot].capacity:
            self._graph = None  # first, as it writes to the old buffers
            self._caches[slot].grow(positions)
