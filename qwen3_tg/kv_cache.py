"""The keys and values of every position computed so far, layer by layer.

Layout: k and v of a layer are (B, capacity, K, Hd) each; of several devices each has its heads.
Position comes before head so that a row's address does not depend on the capacity. A cache starts
small and grows in steps, so that a model with room for 40,960 tokens does not take the memory of
40,960 tokens for a short chat; while it grows, the old and the new one exist side by side. How
large it is: kv_sizes.py.

Touches tinygrad's internals: `UOp.store` and `UOp.after`, the write that may stand in a `function`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tinygrad import Tensor, UOp
from tinygrad.dtype import DType

from qwen3_tg.buffers import part_bytes, read_first, write_first
from qwen3_tg.config import ModelConfig
from qwen3_tg.device import free_unused
from qwen3_tg.device.names import each
from qwen3_tg.kv_sizes import first_capacity, grown_capacity
from qwen3_tg.placement import empty


class LayerCache:
    """Keys and values of one layer; see the module for the layout."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: DType, device: str):
        shape = (1, capacity, config.num_key_value_heads, config.head_dim)
        # never read before they are written, so nothing needs to be put there first
        self.k = empty(shape, dtype, each(device), axis=2)
        self.v = empty(shape, dtype, each(device), axis=2)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there is of each position, (1, capacity, ...) each."""
        return self.k, self.v

    def update(self, k: Tensor, v: Tensor, start_pos: UOp) -> tuple[Tensor, Tensor]:
        """Write S new positions and return all T = start_pos + S of them.

        k, v: (B, S, K, Hd) -> (B, T, K, Hd)"""
        S = k.shape[1]

        def write(cache: Tensor, new: Tensor) -> Tensor:
            rows = cache[:, start_pos : start_pos + S].uop
            written = Tensor(cache.uop.after(rows.store(new.cast(cache.dtype).uop)))
            return written[:, : start_pos + S]

        return write(self.k, k), write(self.v, v)


class KVCache:
    """One LayerCache a layer, all with the same capacity, which never passes `limit` positions."""

    def __init__(self, config: ModelConfig, limit: int, dtype: DType, device: str):
        self._config, self._dtype, self._device = config, dtype, device
        self.limit = limit
        self.layers = self._allocate(first_capacity(limit))

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return int(self.layers[0].k.shape[1])

    def grow(self, positions: int) -> None:
        """Take new buffers with room for at least `positions`, keeping what is there: all of them
        or, where it breaks off, none. Graphs captured on the old buffers must not run again."""
        assert self.capacity < positions <= self.limit, "the caller checks the context"
        used = self.capacity
        free_unused(self._device)  # what those graphs used
        layers = self._allocate(grown_capacity(used, positions, self.limit))
        for before, now in zip(self.layers, layers, strict=True):
            now.k[:, :used].assign(before.k).realize()
            now.v[:, :used].assign(before.v).realize()
        self.layers = layers
        del before
        free_unused(self._device)  # no later buffer has the size of an old one

    @property
    def row_bytes(self) -> list[int]:
        """Bytes of one position in each array of `rows`."""
        return [part // self.capacity for tensor in self._tensors for part in part_bytes(tensor)]

    def rows(self, n: int) -> list[np.ndarray]:
        """A copy of the first n positions in the host's memory, byte by byte: for each tensor of
        each layer what each device has of it, (n, bytes of a position) uint8."""
        assert 0 < n <= self.capacity
        parts = [
            part
            for tensor in self._tensors
            for part in read_first(tensor, n * (part_bytes(tensor)[0] // self.capacity))
        ]
        return [part.reshape(n, -1) for part in parts]

    def put(self, rows: Sequence[np.ndarray]) -> None:
        """Write back what `rows` gave, to where it was: all positions from 0 on."""
        left = iter(rows)
        for tensor in self._tensors:
            write_first(tensor, [next(left) for _ in part_bytes(tensor)])

    @property
    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def _allocate(self, capacity: int) -> list[LayerCache]:
        one = (self._config, capacity, self._dtype, self._device)
        return [LayerCache(*one) for _ in range(self._config.num_hidden_layers)]
