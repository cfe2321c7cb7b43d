"""The header of a GGUF file: metadata and a list of tensors, each number checked before it is used.

Needs only a binary file to read and its length, so that a header can be read from elsewhere too.
The `gguf` library's reader makes two arrays for each string and trusts every count. Knows nothing
of models: what the keys mean is in gguf_metadata.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np

from qwen3_tg.checkpoint.types import BLOCKS, TABLE_BLOCKS
from qwen3_tg.errors import CheckpointError, UnsupportedError

# Layout and numbers: ggml-org/ggml, docs/gguf.md, and enum ggml_type in include/ggml.h.
_VERSIONS = (2, 3)
_TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    30: "BF16",
}
# type -> (values in a block, bytes of a block); a float is a block of one
TYPES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)} | BLOCKS | TABLE_BLOCKS
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_LEAST_KEY_BYTES, _LEAST_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_MAX_HEADER_BYTES = 100_000_000  # that of a Qwen3 model has 6 million, most of it the vocabulary
_CHUNK_BYTES = 1 << 20
_SHOWN_BYTES = 60  # of a name in an error


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `shape` is outermost first, `type` a key of TYPES, `offset` counts from
    the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """`metadata`: strings, ints, floats and bools; lists of strings; numpy arrays of numbers.
    `data_start` counts from the start of the file."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    data_start: int


def read_header(file: BinaryIO, size: int, where: str) -> Header:
    """Read the header of a file of `size` bytes, and no further (but for a rest of its last
    chunk).

    Raises UnsupportedError for a version, byte order or tensor type that is not read, and
    CheckpointError naming the key or tensor for everything else."""
    reader = _Reader(file, size, where)
    tensor_count, key_count = _read_start(reader)
    metadata = _read_metadata(reader, key_count)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{where}: general.alignment must be a power of two, found {alignment!r}"
        )
    reader.count_fits("tensors", tensor_count, _LEAST_TENSOR_BYTES)
    tensors = [_read_tensor(reader, alignment) for _ in range(tensor_count)]
    data_start = -(-reader.position // alignment) * alignment
    _check_places(tensors, data_start, size, where)
    return Header(metadata, tensors, data_start)


class _Reader:
    """Takes values off the front of a file, never more bytes than it has."""

    def __init__(self, file: BinaryIO, size: int, where: str):
        self._file, self._size, self.where = file, size, where
        self._buffer, self._at = b"", 0
        self._fetched = 0

    @property
    def position(self) -> int:
        """Bytes taken so far."""
        return self._fetched - len(self._buffer) + self._at

    def take(self, nbytes: int, what: str) -> bytes:
        self._fill(nbytes, what)
        self._at += nbytes
        return self._buffer[self._at - nbytes : self._at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings in a row: one loop over the buffer, because a vocabulary has 300,000."""
        self.count_fits(what, count, 8)
        found = []
        length_at = struct.Struct("<Q").unpack_from
        buffer, at = self._buffer, self._at
        try:
            for _ in range(count):
                if at + 8 > len(buffer):
                    self._at = at
                    self._fill(8, what)
                    buffer, at = self._buffer, self._at
                end = at + 8 + length_at(buffer, at)[0]
                if end > len(buffer):
                    self._at = at
                    self._fill(end - at, what)
                    end += self._at - at
                    buffer, at = self._buffer, self._at
                found.append(buffer[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self.where}: {what} is not UTF-8: {e}") from None
        self._at = at
        return found

    def count_fits(self, what: str, count: int, least_bytes: int) -> None:
        """Raises unless `count` things of at least so many bytes can follow."""
        left = self._size - self.position
        if count > left // least_bytes:
            raise CheckpointError(
                f"{self.where}: {what}: {count} announced, but only {left} bytes follow; it is "
                "damaged or truncated: download it again"
            )

    def _fill(self, nbytes: int, what: str) -> None:
        """Have so many bytes in the buffer."""
        missing = self._at + nbytes - len(self._buffer)
        if missing <= 0:
            return
        end = self.position + nbytes
        if end > min(self._size, _MAX_HEADER_BYTES):
            limit = "are allowed in a header" if end <= self._size else "are there"
            raise CheckpointError(
                f"{self.where}: {what} reaches to byte {end}, but only "
                f"{min(self._size, _MAX_HEADER_BYTES)} {limit}; it is damaged or truncated: "
                "download it again"
            )
        wanted = min(max(missing, _CHUNK_BYTES), self._size - self._fetched)
        more = self._file.read(wanted)
        self._fetched += len(more)
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        if len(self._buffer) < nbytes:
            raise CheckpointError(
                f"{self.where}: expected {self._size} bytes, but it ends at {self._fetched}"
            )


def _read_start(reader: _Reader) -> tuple[int, int]:
    """Magic and version; gives the counts of tensors and of keys."""
    magic = reader.take(4, "the header")
    if magic != b"GGUF":
        raise CheckpointError(
            f"{reader.where}: not a GGUF file, it begins with {magic!r}; give a GGUF file, or the "
            "folder of a Hugging Face checkpoint"
        )
    version = reader.number("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = f"version {version}"
        if swapped in (1, *_VERSIONS):
            found = f"big-endian numbers (version {swapped})"
        raise UnsupportedError(
            f"{reader.where}: GGUF with {found} is not supported, only little-endian ones with "
            "version 2 or 3; use a newer or converted file of the same model"
        )
    return reader.number("Q", "the tensor count"), reader.number("Q", "the key count")


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    reader.count_fits("keys", count, _LEAST_KEY_BYTES)
    metadata: dict[str, Any] = {}
    for n in range(count):
        key = reader.string(f"key {n}")
        if key in metadata:
            raise CheckpointError(f"{reader.where}: the key {printable(key)} is there twice")
        metadata[key] = _read_value(reader, printable(key))
    return metadata


def _read_value(reader: _Reader, key: str) -> Any:
    kind = reader.number("I", key)
    if kind == _STRING:
        return reader.string(key)
    if kind != _ARRAY:
        value = reader.number(_number_code(reader, kind, key), key)
        # the shortest number that is this float32: 1e-06, not 9.999999974752427e-07
        return float(str(np.float32(value))) if kind == _FLOAT32 else value
    kind, count = reader.number("I", key), reader.number("Q", key)
    if kind == _STRING:
        return reader.strings(count, key)
    if kind == _ARRAY:
        raise UnsupportedError(f"{reader.where}: {key} is an array of arrays, which is not read")
    code = _number_code(reader, kind, key)
    dtype = np.dtype(f"<{code}" if code != "?" else "?")
    reader.count_fits(key, count, dtype.itemsize)
    return np.frombuffer(reader.take(count * dtype.itemsize, key), dtype=dtype)


def _number_code(reader: _Reader, kind: int, key: str) -> str:
    if kind not in _NUMBERS:
        raise CheckpointError(f"{reader.where}: {key} has the unknown value type {kind}")
    return _NUMBERS[kind]


def _read_tensor(reader: _Reader, alignment: int) -> TensorInfo:
    name = reader.string("a tensor's name")
    where = f"{reader.where}: {printable(name)}"
    dims = reader.number("I", name)
    if not 1 <= dims <= _MAX_DIMS:
        raise CheckpointError(f"{where} has {dims} dimensions, expected 1 to {_MAX_DIMS}")
    sizes = struct.unpack(f"<{dims}Q", reader.take(8 * dims, name))
    kind, offset = reader.number("I", name), reader.number("Q", name)
    shape, values = sizes[::-1], math.prod(sizes)
    if not 0 < values < 2**63:
        raise CheckpointError(f"{where} has the impossible shape {shape}")
    if kind not in _TYPE_NAMES:
        raise UnsupportedError(
            f"{where} has type {_foreign_type(kind)}, which is not supported; supported are "
            f"{', '.join(TYPES)}"
        )
    block, block_bytes = TYPES[_TYPE_NAMES[kind]]
    if sizes[0] % block:
        raise CheckpointError(
            f"{where} has shape {shape}: rows of {_TYPE_NAMES[kind]} are whole blocks of {block}"
        )
    if offset % alignment:
        raise CheckpointError(f"{where} begins at byte {offset}, not a multiple of {alignment}")
    return TensorInfo(name, shape, _TYPE_NAMES[kind], offset, values // block * block_bytes)


def _foreign_type(kind: int) -> str:
    import gguf  # takes 50 ms, for a name in an error

    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:
        return str(kind)


def _check_places(tensors: Sequence[TensorInfo], data_start: int, size: int, where: str) -> None:
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        twice = next(name for name in names if sum(t.name == name for t in tensors) > 1)
        raise CheckpointError(f"{where}: {printable(twice)} is there twice")
    needed = data_start + max((t.offset + t.nbytes for t in tensors), default=-data_start)
    if needed > size:
        raise CheckpointError(
            f"{where}: truncated: expected {needed} bytes, found {size}; download it again"
        )
    for before, after in pairwise(sorted(tensors, key=lambda tensor: tensor.offset)):
        end = before.offset + before.nbytes
        if after.offset < end:
            raise CheckpointError(
                f"{where}: {printable(after.name)} begins at byte {after.offset} of the data, "
                f"within {printable(before.name)}, which ends at {end}"
            )


def printable(name: str) -> str:
    """A name from the file, fit for one line of an error."""
    shown = name if name.isprintable() and name else repr(name)
    return shown if len(shown) <= _SHOWN_BYTES else f"{shown[:_SHOWN_BYTES]}..."
