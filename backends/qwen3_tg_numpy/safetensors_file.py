"""safetensors to numpy: the tensors of a model directory, mapped.

A safetensors file is eight bytes (the header's length N, little-endian), N bytes of JSON (name ->
dtype, shape, data_offsets into the rest), and the data. numpy has no bfloat16 and no 8-bit floats,
so such tensors stay arrays of their bits; no stored integer of a Qwen3 is uint16 or uint8, so the
dtype tells.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_tg_numpy.config import CheckpointError, read_json

STORED = {  # safetensors' name: how it is mapped
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "|u1",
    "I32": "<i4",
    "U32": "<u4",
}


def dtype_name(array: np.ndarray) -> str:
    """safetensors' name of a mapped tensor's dtype."""
    return {mapped: name for name, mapped in STORED.items()}[array.dtype.str]


def read_directory(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The stored tensors of a model directory, as read-only views of the mapped files, and what is
    wrong with their names. Raises CheckpointError for a damaged file."""
    stored: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for file in _weight_files(path):
        tensors = read_safetensors(file)
        problems += [f"{name} is in {file.name} and before" for name in tensors if name in stored]
        stored |= tensors
    return stored, problems


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Name -> stored tensor of one file. Reads the header only; raises CheckpointError if it does
    not describe exactly the bytes that follow it."""
    size = file.stat().st_size
    if size < 8:
        raise CheckpointError(
            f"{file}: {size} bytes are no safetensors file; is it fully downloaded?"
        )
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    data_start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    if data_start > size:
        raise CheckpointError(
            f"{file}: header ends at byte {data_start} of {size}; is it fully downloaded?"
        )
    try:
        header = json.loads(mapped[8:data_start].tobytes())
    except (ValueError, RecursionError) as e:  # JSON and UTF-8 errors are both ValueErrors
        raise CheckpointError(f"{file}: header is not JSON ({e})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header must be an object, found {type(header).__name__}")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, info) for name, info in header.items()}
    expected_start = 0  # the format allows no holes and no overlaps
    for name, (dtype, shape, start, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        expected_end = expected_start + math.prod(shape) * np.dtype(dtype).itemsize
        if (start, end) != (expected_start, expected_end):
            raise CheckpointError(
                f"{file}: {name}: expected at bytes {expected_start} to {expected_end} "
                f"of the data, found at {start} to {end}"
            )
        expected_start = end
    if data_start + expected_start != size:
        raise CheckpointError(
            f"{file}: expected {data_start + expected_start} bytes, found {size}; "
            "is it fully downloaded?"
        )
    data = np.asarray(mapped[data_start:])
    return {
        name: data[start:end].view(dtype).reshape(shape)
        for name, (dtype, shape, start, end) in entries.items()
    }


def _entry(file: Path, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    """The mapped dtype, shape, start and end of one header entry."""
    try:
        stored, shape = info["dtype"], tuple(info["shape"])
        start, end = info["data_offsets"]
        if not all(type(i) is int and i >= 0 for i in (*shape, start, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: {name}: not a header entry: {info!r}") from None
    if not isinstance(stored, str) or stored not in STORED:
        raise CheckpointError(
            f"{file}: {name}: dtype must be {', '.join(STORED)}, found {stored!r}"
        )
    return STORED[stored], shape, start, end


def _weight_files(path: Path) -> list[Path]:
    """The one file, or the shards that the index names. Raises CheckpointError for missing ones."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{path}: expected {single.name} or {index.name}, found neither")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to files")
    if outside := [v for v in weight_map.values() if v in ("", "..") or Path(v).name != v]:
        raise CheckpointError(f"{index}: weight_map must name files beside it: {outside[0]!r}")
    files = [path / name for name in sorted(set(weight_map.values()))]
    if lost := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{index}: shards not there: {', '.join(lost)}; is it fully downloaded?"
        )
    return files
