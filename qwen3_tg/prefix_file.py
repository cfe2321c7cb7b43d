"""A text's ids with their keys and values as a safetensors file, for a later process.

`ids` is (n,) int32; `rows.0`, `rows.1` ... are kv_cache.py's rows, (n, bytes of a position) uint8.
The header says what has to be the same for them to be used (`facts`), and has a checksum. A file
that is out of date does no harm: what of it is used is told by its ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwen3_tg import __version__
from qwen3_tg.atomic import PRIVATE, replacing
from qwen3_tg.checkpoint import Checkpoint, fingerprint
from qwen3_tg.device import Policy
from qwen3_tg.errors import UsageError
from qwen3_tg.shelf import Kept

_FORMAT, _VERSION = "qwen3_tg computed text", "1"
_MARK = f'"format":"{_FORMAT}"'.encode()
_HEADER_BYTES = 4096  # the mark lies in them


def facts(checkpoint: Checkpoint, policy: Policy) -> dict[str, str]:
    """What keys and values depend on besides the ids. Not the device, only how many there are: what
    one has computed, another goes on with."""
    config = checkpoint.config
    return {
        "model, by its fingerprint": fingerprint(checkpoint),
        "dtype": policy.dtype,
        "kv_dtype": policy.kv_dtype,
        "kernels": policy.kernels,
        "number of devices": str(len(policy.devices)),
        "number of layers": str(config.num_hidden_layers),
        "number of key/value heads": str(config.num_key_value_heads),
        "head_dim": str(config.head_dim),
        "version of qwen3_tg": __version__,
    }


def write(path: Path, text: Kept, facts: Mapping[str, str]) -> None:
    """Whole or not at all, for its owner alone. Raises OSError."""
    ids = np.array(text.ids, dtype=np.int32)
    header = {"format": _FORMAT, "version": _VERSION, "sha256": _checksum(ids, text.rows)}
    tensors = {f"rows.{n}": array for n, array in enumerate(text.rows)}
    with replacing(path, PRIVATE) as part:
        try:
            save_file(tensors | {"ids": ids}, part, {**facts, **header})
        except SafetensorError as e:  # the disk is full
            raise OSError(str(e)) from None


def read(path: Path, facts: Mapping[str, str], row_bytes: Sequence[int]) -> Kept:
    """Raises UsageError with the reason why it is not to be used. `row_bytes` are the bytes of a
    position in each of the rows."""
    try:
        with safe_open(path, framework="numpy") as file:
            found = file.metadata() or {}
            _check(found, facts)
            names = ["ids", *(f"rows.{n}" for n in range(len(row_bytes)))]
            if sorted(file.keys()) != sorted(names):
                raise UsageError("damaged: it has other tensors than this model keeps")
            ids, *rows = (file.get_tensor(name) for name in names)
    except SafetensorError as e:
        raise UsageError(f"damaged, or no file that qwen3_tg wrote: {e}") from None
    except OSError as e:
        raise UsageError(f"not readable: {e.strerror or e}") from None
    kinds = [(array.dtype, array.shape) for array in (ids, *rows)]
    right = [(np.dtype(np.uint8), (ids.size, nbytes)) for nbytes in row_bytes]
    if kinds != [(np.dtype(np.int32), (ids.size,)), *right]:
        raise UsageError("damaged: its tensors have other shapes than this model's")
    if found.get("sha256") != _checksum(ids, rows):
        raise UsageError("damaged: the checksum is another one")
    return Kept(ids.tolist(), rows, len(ids))


def is_one(path: Path) -> bool:
    """Whether it begins as such a file does, or is empty. Raises OSError."""
    with path.open("rb") as file:
        begin = file.read(_HEADER_BYTES)
    return not begin or _MARK in begin


def _check(found: Mapping[str, str], facts: Mapping[str, str]) -> None:
    if found.get("format") != _FORMAT:
        raise UsageError("not a file that qwen3_tg wrote")
    if (version := found.get("version")) != _VERSION:
        raise UsageError(f"of version {version!r}; this qwen3_tg reads {_VERSION!r}")
    for name, here in facts.items():
        if (there := found.get(name)) != here:
            raise UsageError(f"computed with another {name}: {there}; here it is {here}")


def _checksum(ids: np.ndarray, rows: Sequence[np.ndarray]) -> str:
    found = hashlib.sha256(ids.astype("<i4").tobytes())
    for array in rows:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
