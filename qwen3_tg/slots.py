"""Many sequences side by side: a step computes the next position of each, and reads every weight
once for all of them.

A prompt is read by the engine, as always, so that what prompts in a row begin with is computed
once; then its keys and values are copied to a slot. Slots are independent: of any length, started
and ended at any time. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen3_tg.errors import ContextError, DeviceError, UsageError, check_count
from qwen3_tg.generate import Engine
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

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, of those that are there, on each device."""
        return sum(self._engine.cache_bytes(cache) for cache in self._caches)

    def allocate(self) -> None:
        """Take the memory for the caches, if that is not done yet. Raises DeviceError."""
        with self._engine.turn:
            if not self._caches:
                self._caches = self._engine.new_caches(self.size)

    def start(self, ids: Sequence[int]) -> tuple[int, np.ndarray]:
        """Read a prompt; its slot, and the logits after it, (V,) float32.

        Raises ContextError, UsageError and DeviceError as Engine.next_logits does."""
        if not self._free:
            raise UsageError(f"all {self.size} slots are taken; end() gives one back")
        with self._engine.turn:
            self.allocate()
            logits, rows = self._engine.read_for_batch(ids)
            slot = self._free[-1]
            self._reserve(slot, len(ids) + 1)
            self._caches[slot].put(rows)
            self._free.pop()
            self._lengths[slot] = len(ids)
        return slot, logits

    def step(self, new: Mapping[int, int]) -> dict[int, np.ndarray | DeviceError]:
        """One more id for some slots, all at once: the logits after each, (V,) float32; or the
        error where they are no numbers, or memory has no room for more of this sequence.

        Raises UsageError and ContextError where an id, or one more, cannot be."""
        for slot, id in new.items():
            length = self._length(slot)
            self._engine.check_ids([id])
            if length >= self.context:
                raise ContextError(f"slot {slot}: the context of {self.context} is full")
        with self._engine.turn:
            found: dict[int, np.ndarray | DeviceError] = {}
            for slot in new:
                try:
                    self._reserve(slot, self._lengths[slot] + 2)  # this one, and where to wait
                except (MemoryError, DeviceError) as e:
                    found[slot] = DeviceError(
                        f"no memory for more than {self._caches[slot].capacity} tokens of each of "
                        f"{self.size} sequences: take a smaller batch ({e})"
                    )
            places = {s: (id, self._lengths[s]) for s, id in new.items() if s not in found}
            if places:
                for slot, logits in self._run(places).items():
                    self._lengths[slot] += 1
                    found[slot] = self._engine.problem(logits) or logits
        return found

    def end(self, slot: int) -> None:
        """Give a slot back. Raises UsageError where it is not in use."""
        self._length(slot)
        del self._lengths[slot]
        self._free.append(slot)

    def _length(self, slot: int) -> int:
        """Positions of a slot. Raises UsageError where it is not in use."""
        if slot not in self._lengths:
            raise UsageError(f"slot {slot!r} is not in use; start() gives those that are")
        return self._lengths[slot]

    def _run(self, places: Mapping[int, tuple[int, int]]) -> Mapping[int, np.ndarray]:
        if self._graph is not None:
            return self._graph(places, self._lengths)
        graph = self._engine.batch_graph(self._caches)
        with self._engine.capturing():
            found = graph(places, self._lengths)
        self._graph = graph
        return found

    def _reserve(self, slot: int, positions: int) -> None:
        cache = self._caches[slot]
        if positions > cache.capacity:
            self._graph = None  # first, as it writes to the old buffers
            self._engine.check_growth(cache, positions)
            cache.grow(positions)
