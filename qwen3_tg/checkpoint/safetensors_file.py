"""safetensors files to raw tensors: the header, checked, and views of the mapped data.

The `safetensors` library checks local files too; the values are numpy views of the mapped file,
because the library's numpy side knows no bfloat16 and copies.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from safetensors import SafetensorError, safe_open

from qwen3_tg.errors import CheckpointError

# safetensors' name of a type -> numpy's: bfloat16 and float8 as raw bits, words as unsigned
DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I32": "<u4",
    "U32": "<u4",
    "U8": "u1",
    "F8_E4M3": "u1",
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class RawTensor:
    """A tensor as it lies in a file: `dtype` is safetensors' name, `array` the mapped view; of a
    file that is not on this machine, an array of zeros that takes no memory."""

    def __init__(self, file: str, dtype: str, array: np.ndarray):
        self.file, self.dtype, self.array = file, dtype, array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """Map a file; its tensors by name. Reads the header only.

    Raises CheckpointError naming the file, and the tensor that is at fault."""
    if not os.access(path, os.R_OK):  # the library would say that it does not exist
        raise CheckpointError(f"{path}: not readable: permission denied")
    try:
        with safe_open(path, framework="numpy"):  # the library's check of header and file length
            pass
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({e}); download it again"
        ) from None
    size = path.stat().st_size
    with path.open("rb") as file:
        header, data_start = read_header(file, size, str(path))
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    return {
        name: RawTensor(
            path.name, dtype, mapped[data_start:][start:end].view(DTYPES[dtype]).reshape(shape)
        )
        for name, (dtype, shape, start, end) in header.items()
    }


def absent_tensors(file: BinaryIO, size: int, where: str) -> dict[str, RawTensor]:
    """As read_safetensors, from the header alone of a file whose data cannot be reached."""
    header, _ = read_header(file, size, where)
    return {
        name: RawTensor(
            where.rpartition("/")[2],
            dtype,
            np.broadcast_to(np.zeros((), dtype=DTYPES[dtype]), shape),
        )
        for name, (dtype, shape, _, _) in header.items()
    }


Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, start and end in the data


def read_header(file: BinaryIO, size: int, where: str) -> tuple[dict[str, Entry], int]:
    """The entries of a header, checked, and where the data starts. `size` is the whole file's."""
    start = file.read(8)
    header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if 8 + header_bytes > size or header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: its header of {header_bytes} bytes does not fit in {size}; download it again"
        )
    try:
        header = json.loads(file.read(header_bytes))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{where}: its header is not JSON: {e}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: its header must be an object, not {type(header).__name__}")
    header.pop("__metadata__", None)
    entries = {name: _entry(info, f"{where}: {name}") for name, info in header.items()}
    reached = 0  # the format allows no holes and no overlaps
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise CheckpointError(
                f"{where}: {name} begins at byte {begin} of the data, expected {reached}"
            )
        reached = end
    if 8 + header_bytes + reached != size:
        raise CheckpointError(
            f"{where}: expected {8 + header_bytes + reached} bytes, found {size}; download it again"
        )
    return entries, 8 + header_bytes


def _entry(info: Any, where: str) -> Entry:
    if not isinstance(info, Mapping):
        raise CheckpointError(f"{where}: expected an object in the header, found {info!r}")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype}; expected {', '.join(DTYPES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape or data_offsets are not lists of counts: {info!r}")
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} takes {needed} bytes, "
            f"found {offsets[1] - offsets[0]}"
        )
    return str(dtype), tuple(shape), offsets[0], offsets[1]


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
