"""What lies in a tensor's memory on its devices, read and written by the host.

Touches tinygrad's internals: a tensor's `Buffer`, and what its allocator can: `_as_buffer` (the
host reads and writes there itself), `_offset` (a part of it can be copied by itself), or neither
(OpenCL, WebGPU), where all of it is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tinygrad import Tensor


def write(tensor: Tensor, values: np.ndarray) -> None:
    """Put values of the same type where a tensor's are, on every device that has it."""
    for buffer in _buffers(tensor):
        _put(buffer, memoryview(values.tobytes()))


def read(tensor: Tensor) -> np.ndarray:
    """The float32 values of a tensor on one device: where they are, if the host can read there, and
    so they change with them."""
    (buffer,) = _buffers(tensor)
    values = np.frombuffer(buffer.as_memoryview(allow_zero_copy=True), dtype=np.float32)
    return values.reshape(tensor.shape)


def part_bytes(tensor: Tensor) -> list[int]:
    """How many bytes each device has of a tensor that is split between them."""
    return [int(buffer.nbytes) for buffer in _buffers(tensor)]


def read_first(tensor: Tensor, nbytes: int) -> list[np.ndarray]:
    """A copy of the first bytes of what each device has of a tensor, (nbytes,) uint8 each. `nbytes`
    is some of them, and a multiple of an element's."""
    return [np.frombuffer(_first(b, nbytes), np.uint8).copy() for b in _buffers(tensor)]


def write_first(tensor: Tensor, parts: list[np.ndarray]) -> None:
    """Put back what read_first gave: (nbytes,) uint8 for each device."""
    for buffer, part in zip(_buffers(tensor), parts, strict=True):
        _put(buffer, np.ascontiguousarray(part).reshape(-1).data)


def _first(buffer: Any, nbytes: int) -> Any:
    if _host_can_reach(buffer) or not _has_parts(buffer):
        return buffer.as_memoryview(allow_zero_copy=True)[:nbytes]
    return _part(buffer, nbytes).as_memoryview()


def _put(buffer: Any, data: memoryview) -> None:
    """At the beginning."""
    if _host_can_reach(buffer):
        buffer.as_memoryview(force_zero_copy=True)[: data.nbytes] = data
    elif data.nbytes == buffer.nbytes:
        _copy(buffer, bytearray(data))
    elif _has_parts(buffer):
        _copy(_part(buffer, data.nbytes), bytearray(data))
    else:
        whole = bytearray(buffer.as_memoryview())
        whole[: data.nbytes] = data
        _copy(buffer, whole)


def _copy(buffer: Any, data: bytearray) -> None:
    from tinygrad.device import Buffer

    buffer.copy_from(Buffer("PYTHON", buffer.size, buffer.dtype, opaque=memoryview(data)))


def _part(buffer: Any, nbytes: int) -> Any:
    part = buffer.view(nbytes // buffer.dtype.itemsize, buffer.dtype, 0)
    return part.ensure_allocated()


def _host_can_reach(buffer: Any) -> bool:
    return hasattr(buffer.allocator, "_as_buffer")


def _has_parts(buffer: Any) -> bool:
    from tinygrad.device import Allocator

    return type(buffer.allocator)._offset is not Allocator._offset


def _buffers(tensor: Tensor) -> list[Any]:
    """One on each device."""
    buffer: Any = tensor.uop.base.buffer
    return [one.ensure_allocated() for one in getattr(buffer, "bufs", [buffer])]
