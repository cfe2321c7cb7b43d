"""Tensors on one device or on several, whole or each with a part (shards.py).

Touches tinygrad's internals: `UOp.mstack` and `UOp.unshard`, which make one tensor of parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tinygrad import Tensor
from tinygrad.dtype import DType

from qwen3_tg.device import takes_read_only


def place(array: np.ndarray, devices: Sequence[str], axis: int | None = None) -> Tensor:
    """Copy an array to devices: to each its part along an axis, or all of it. Realised."""
    count = len(devices)
    parts = [array] * count if axis is None or count == 1 else np.split(array, count, axis)
    first, *others = (_copy(part, device).uop for part, device in zip(parts, devices, strict=True))
    whole = first.mstack(*others)
    return Tensor(whole if axis is None or count == 1 else whole.unshard(axis % array.ndim))


def empty(
    shape: Sequence[int], dtype: DType, devices: Sequence[str], axis: int | None = None
) -> Tensor:
    """Memory for a tensor of this shape, split along an axis or whole on each device. Realised."""
    if len(devices) == 1:
        return Tensor.empty(*shape, dtype=dtype, device=devices[0]).realize()
    part = [n // len(devices) if i == axis else n for i, n in enumerate(shape)]
    made = Tensor.empty(*part, dtype=dtype, device=tuple(devices)).realize()
    return made if axis is None else Tensor(made.uop.unshard(axis))


def _copy(array: np.ndarray, device: str) -> Tensor:
    host = np.ascontiguousarray(array)
    if not host.flags.writeable and not takes_read_only(device):
        host = host.copy()
    return Tensor(host, device=device).realize()
