"""Which model this is, in 16 characters, without reading all of it."""

from __future__ import annotations

import hashlib

from qwen3_tg.checkpoint.types import Checkpoint, StackedWeight

_SAMPLE = 16  # numbers at either end of an array


def fingerprint(checkpoint: Checkpoint) -> str:
    """Changes with the config, and with name, format, shape, settings, first and last numbers of
    any weight; not with the place or the name of the files."""
    found = hashlib.sha256(repr(checkpoint.config).encode())
    for name, weight in sorted(checkpoint.weights.items()):
        found.update(
            f"{name} {weight.format} {weight.shape} {sorted(weight.params.items())}".encode()
        )
        experts = weight.experts if isinstance(weight, StackedWeight) else (weight,)
        for one in (experts[0], experts[-1]):
            for array in one.arrays.values():
                flat = array.reshape(-1)
                found.update(flat[:_SAMPLE].tobytes() + flat[-_SAMPLE:].tobytes())
    return found.hexdigest()[:16]
