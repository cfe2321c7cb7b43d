"""Weights on the device as the file stores them, and `x @ W.T` with them.

Every format stays packed on every device, so memory is the file's bytes, and no number passes
through a type that the device lacks. A new storage format is its meaning in dequantise.py, its
layout in checkpoint/types.py, and a line in `Weight.values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from qwen3_tg import dequantise
from qwen3_tg.checkpoint import StoredWeight, unpack
from qwen3_tg.checkpoint.types import BLOCKS, FLOATS, TABLE_BLOCKS
from qwen3_tg.device.names import each
from qwen3_tg.placement import place
from qwen3_tg.shards import array_axes

DTYPES: dict[str, DType] = {
    "float32": dtypes.float32,
    "float16": dtypes.float16,
    "bfloat16": dtypes.bfloat16,
}


@dataclass(frozen=True)
class Weight:
    """A stored weight on a device. Fields as in StoredWeight; arrays of uint16 are bfloat16, and
    those of int16 are float16 on a device that does not have it."""

    format: str
    shape: tuple[int, ...]
    arrays: Mapping[str, Tensor]
    params: Mapping[str, int]
    shared: tuple[np.ndarray, ...] = ()  # memory that must stay as long as the arrays are used

    def values(self) -> Tensor:
        """What it stands for, as an expression: float32, or float16 where the device has it."""
        if self.format in FLOATS:
            return dequantise.float_values(self.arrays["data"])
        if self.format in BLOCKS:
            decode, (_, block_bytes) = dequantise.BLOCK_VALUES[self.format], BLOCKS[self.format]
            return dequantise.block_values(self.arrays["blocks"], block_bytes, decode)
        return dequantise.PACKED_VALUES[self.format](self.arrays, self.params)

    def __getitem__(self, ids: Tensor) -> Weight:
        """Rows of an embedding, or experts, still packed: only their bytes are read."""
        assert isinstance(ids.shape, tuple)
        arrays = {name: array[ids] for name, array in self.arrays.items()}
        return Weight(self.format, (*map(int, ids.shape), *self.shape[1:]), arrays, self.params)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(int(array.nbytes()) for array in self.arrays.values())


def to_device(
    stored: StoredWeight,
    device: str,
    native: frozenset[str],
    shared: bool = False,
    axis: int | None = None,
) -> Weight:
    """Copy a weight to the device, and let go of the file's pages. `native` are the float formats
    that the device computes with; `axis` is that of shards.py where there are several. Realised.

    `shared`: the device reads the host's memory at any address, so weights are used where they
    are, in a mapped file that is read when it is first needed."""
    packed = unpack(stored) if stored.format in TABLE_BLOCKS else stored
    arrays, kept, axes = {}, [], array_axes(packed, axis)
    for name, array in packed.arrays.items():
        lacks_half = array.dtype == np.float16 and "float16" not in native
        host = array.view(np.int16) if lacks_half else array
        if shared:
            host = np.ascontiguousarray(host)
            dtype = getattr(dtypes, host.dtype.name)
            arrays[name] = Tensor.from_blob(
                host.ctypes.data, host.shape, dtype=dtype, device=device
            )
            kept.append(host)
        else:
            arrays[name] = place(host, each(device), axes[name])
    if not shared:
        stored.release()
    return Weight(packed.format, packed.shape, arrays, packed.params, tuple(kept))


class Linear:
    """A matrix without bias: `weight` is (O, I). Sums are float32.

    Products too where one position is computed, which waits for memory and not for arithmetic.
    Where there are many, products in half precision are what a GPU's matrix units take, and a
    packed weight is dequantised once for all of them: two to five times as fast (measured on a
    CPU) as inside each product."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, S, I) -> (B, S, O)"""
        values = self.weight.values()
        if x.shape[1] == 1:
            return x.float().dot(values.float().transpose()).cast(x.dtype)
        values = values.cast(x.dtype)
        if self.weight.format not in FLOATS:
            x = x.contiguous()
            first = x[0, 0]  # (I,), on each device that with its part of the inputs
            # True of all numbers, but not of NaN, so tinygrad keeps it: without a need for x, all
            # matrices of the model would be dequantised first, and be in memory together.
            values = (first == first).where(values, 0).contiguous()
        return x.dot(values.transpose(), dtype=dtypes.float32).cast(x.dtype)


class ExpertLinear:
    """The matrices of all experts: `weight` is (E, O, I). Each position uses k of them."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x: (B, S, k or 1, I), chosen: (B, S, k) numbers of experts -> (B, S, k, O)"""
        if self._packed_first(x.shape[1] == 1):
            matrices = self.weight[chosen].values()  # (B, S, k, O, I), never in memory
        else:
            matrices = self.weight.values()[chosen]
        return (matrices.float() * x.float().unsqueeze(-2)).sum(-1).cast(x.dtype)

    def _packed_first(self, one_position: bool) -> bool:
        """Whether to choose packed bytes, which copies those of the chosen experts, or values,
        which makes one kernel that reads just those bytes. The copy is for GPTQ with an order of
        its own, whose look-ups would be made for all experts, and for AWQ where it is small:
        the words of a copy are read in order, four times as fast (measured on a CPU)."""
        return "g_idx" in self.weight.arrays or (one_position and self.weight.format == "AWQ")


class Embedding:
    """Rows of a matrix by token id: ids: (B, S) -> (B, S, D). `weight` is (V, D)."""

    def __init__(self, weight: Weight):
        self.weight = weight

    def __call__(self, ids: Tensor, dtype: DType) -> Tensor:
        return self.weight[ids].values().cast(dtype)

    def as_linear(self) -> Linear:
        """The same matrix as an output head, for checkpoints with tied embeddings."""
        return Linear(self.weight)
