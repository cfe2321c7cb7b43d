"""The keys and values of every position computed so far, layer by layer.

Layout: k and v of a layer are (B, capacity, K, Hd) each; of several devices each has its heads.
Position comes before head so that a row's address does not depend on the capacity. A cache starts
small and grows in steps, so that a model with room for 40,960 tokens does not take the memory of
40,960 tokens for a short chat; while it grows, the old and the new one exist side by side. How
large it is: kv_sizes.py.

In int8 each head of each position has a scale of its own: the rows of one position say all of it,
whatever comes later.

Touches tinygrad's internals: `UOp.store` and `UOp.after`, the write that may stand in a `function`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType

from qwen3_tg.buffers import part_bytes, read_first, write_first
from qwen3_tg.config import ModelConfig
from qwen3_tg.device import free_unused
from qwen3_tg.device.names import each
from qwen3_tg.kv_sizes import first_capacity, grown_capacity
from qwen3_tg.linear import DTYPES
from qwen3_tg.placement import empty

KV_DTYPES: dict[str, DType] = {**DTYPES, "int8": dtypes.int8}
_GREATEST = 127  # of the integers; -128 is not used, so that x and -x are kept alike
# Scales below are denormal numbers, which some devices take for 0.
_SMALLEST = 2.0**-126


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers with a scale for each head: x is about q * scale, off by half a scale at most.

    x: (..., Hd) -> (..., Hd) int8, (...) float32. What is not a finite number makes its head's
    scale infinite and its integers 0, which together are not a number when they are read."""
    x = x.float()
    most = x.isnan().where(float("inf"), x.abs()).max(axis=-1)
    scale = most * (1 / _GREATEST)
    usable = (scale >= _SMALLEST) & (scale < float("inf"))
    q = usable.unsqueeze(-1).where(x / scale.unsqueeze(-1), 0).round()
    return q.cast(dtypes.int8), scale


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """q: (..., Hd) int8, scale: (...) float32 -> (..., Hd) float32"""
    return q.float() * scale.unsqueeze(-1)


class LayerCache:
    """Keys and values of one layer; see the module for the layout. `k_scale` and `v_scale` are
    (B, capacity, K) float32 where k and v are int8, and None where they are floats."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: DType, device: str):
        heads = (1, capacity, config.num_key_value_heads)
        shape = (*heads, config.head_dim)
        # never read before they are written, so nothing needs to be put there first
        self.k = empty(shape, dtype, each(device), axis=2)
        self.v = empty(shape, dtype, each(device), axis=2)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if dtype == dtypes.int8:
            self.k_scale = empty(heads, dtypes.float32, each(device), axis=2)
            self.v_scale = empty(heads, dtypes.float32, each(device), axis=2)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept: k, v and, where there are, their scales."""
        return tuple(t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None)

    def update(self, k: Tensor, v: Tensor, start_pos: UOp) -> tuple[Tensor, Tensor]:
        """Write S new positions and return all T = start_pos + S of them, in the type they are kept
        in, or float32 for int8.

        k, v: (B, S, K, Hd) -> (B, T, K, Hd)"""
        S = k.shape[1]

        def write(cache: Tensor, new: Tensor) -> Tensor:
            rows = cache[:, start_pos : start_pos + S].uop
            written = Tensor(cache.uop.after(rows.store(new.cast(cache.dtype).uop)))
            return written[:, : start_pos + S]

        def keep(cache: Tensor, scales: Tensor | None, new: Tensor) -> Tensor:
            if scales is None:
                return write(cache, new)
            q, scale = quantise(new)
            return dequantise(write(cache, q), write(scales, scale))

        return keep(self.k, self.k_scale, k), keep(self.v, self.v_scale, v)


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
            for new, old in zip(now.tensors, before.tensors, strict=True):
                new[:, :used].assign(old).realize()
        self.layers = layers
        del before, old
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
