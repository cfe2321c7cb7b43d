"""Weights on the device, and `x @ W.T` with them. The one place that knows how a weight is stored.

A new storage format (8-bit, 4-bit, ...) is a new kind of weight here: how it is put on the device,
and its values in the type that the model computes in, dequantised inside the kernel that uses them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from qwen3_tg.checkpoint import StoredWeight

DTYPES: dict[str, DType] = {
    "float32": dtypes.float32,
    "float16": dtypes.float16,
    "bfloat16": dtypes.bfloat16,
}


def to_device(stored: StoredWeight, device: str, native: Collection[str], dtype: str) -> Tensor:
    """The weight in its stored format if the device has that type natively, and otherwise decoded
    on the host into `dtype`, the type that the model computes in. Realised; same shape."""
    if stored.format not in native:
        host = stored.to_numpy(np.float16 if dtype == "float16" else np.float32)
        return Tensor(host, device=device).cast(DTYPES[dtype]).realize()
    tensor = Tensor(np.ascontiguousarray(stored.data), device=device).realize()
    return tensor.bitcast(dtypes.bfloat16) if stored.format == "bfloat16" else tensor


class Linear:
    """A matrix without bias. `weight` is (O, I), in its stored format. Sums are float32.

    Products too where one position is computed, which waits for memory and not for arithmetic;
    where there are many, products in half precision are what a GPU's matrix units take."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, S, I) -> (B, S, O)"""
        if x.shape[1] == 1:
            return x.float().dot(self.weight.float().transpose()).cast(x.dtype)
        return x.dot(self.weight.cast(x.dtype).transpose(), dtype=dtypes.float32).cast(x.dtype)


class Embedding:
    """Rows of a matrix by token id: ids: (B, S) -> (B, S, D). `weight` is (V, D)."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, ids: Tensor, dtype: DType) -> Tensor:
        return self.weight[ids].cast(dtype)

    def as_linear(self) -> Linear:
        """The same matrix as an output head, for checkpoints with tied embeddings."""
        return Linear(self.weight)
