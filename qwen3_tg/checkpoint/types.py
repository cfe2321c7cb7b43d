"""The plain data that every reader gives.

A weight stays as the file stores it: packed words, scales and zero points are views of the mapped
file under the names they have there. What its numbers are is for linear.py to say, on the device.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen3_tg.config import GenerationConfig, ModelConfig

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}
# GGUF's block types: format -> (values in a block, bytes of a block), as in llama.cpp's ggml.
BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
# Block types without a kernel of their own: dequantised once, at load, to UNPACKED_AS.
TABLE_BLOCKS = {
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
}
UNPACKED_AS = "float16"
_ROWS_AT_ONCE = 1024
# Formats of several arrays each: format -> their names in the file, after the module's name.
PACKED = {
    "AWQ": ("qweight", "qzeros", "scales"),
    "GPTQ": ("qweight", "qzeros", "scales", "g_idx"),
    "FP8": ("weight", "weight_scale_inv"),
    "MLX": ("weight", "scales", "biases"),
}


@dataclass(frozen=True)
class StoredWeight:
    """One tensor as the file holds it.

    `format` is a key of FLOATS, BLOCKS, TABLE_BLOCKS or PACKED. `shape` is that of its values:
    (O, I) for a matrix, (E, O, I) for the matrices of all experts, (D,) for a norm.

    `arrays` are read-only views of the mapped file, (E, ...) in front for experts:
    a float is {"data": shape}, bfloat16 as its raw uint16 bits (numpy has no bfloat16);
    blocks are {"blocks": (..., O, bytes of a row) uint8};
    AWQ, GPTQ, FP8 and MLX have the arrays of PACKED, in the shapes that the file gives them, words
    as uint32, FP8 as uint8, bfloat16 scales as uint16.

    `params` are the numbers that the arrays do not tell: "bits" and "group_size" (AWQ, GPTQ, MLX),
    "zero_offset" (GPTQ: what is added to a stored zero point), "block_size" (FP8)."""

    format: str
    shape: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]
    params: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def device_bytes(self) -> int:
        """Bytes on the device, exactly: as in the file, but for formats without a kernel."""
        if self.format in TABLE_BLOCKS:
            return int(np.prod(self.shape, dtype=np.int64)) * FLOATS[UNPACKED_AS]
        return self.nbytes

    def release(self) -> None:
        """Tell the system that the file's pages are not needed for now. They are read again when
        they are; without this they would count as this process's memory."""
        for array in self.arrays.values():
            _drop_pages(array)


@dataclass(frozen=True)
class StackedWeight(StoredWeight):
    """The matrices of all experts of a layer, stored one by one: `experts`, all of one format.

    `arrays` are made when they are asked for, each a copy."""

    experts: Sequence[StoredWeight] = ()

    @staticmethod
    def of(experts: Sequence[StoredWeight]) -> StackedWeight:
        first = experts[0]
        return StackedWeight(
            first.format, (len(experts), *first.shape), _Stacks(experts), first.params, experts
        )

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts)

    def release(self) -> None:
        for expert in self.experts:
            expert.release()


class _Stacks(Mapping[str, np.ndarray]):
    def __init__(self, experts: Sequence[StoredWeight]):
        self._experts = experts

    def __getitem__(self, name: str) -> np.ndarray:
        return np.stack([expert.arrays[name] for expert in self._experts])

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the copy
        return name in self._experts[0].arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts[0].arrays)

    def __len__(self) -> int:
        return len(self._experts[0].arrays)


def _drop_pages(array: np.ndarray) -> None:
    mapped: object = array
    while isinstance(mapped, np.ndarray) and not isinstance(mapped, np.memmap):
        mapped = mapped.base
    pages = getattr(mapped, "_mmap", None)
    if not isinstance(pages, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = array.ctypes.data - np.frombuffer(pages, dtype=np.uint8).ctypes.data
    page = mmap.PAGESIZE
    first = start // page * page
    pages.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: what it is, where its text side lies, and its weights by name.

    `tokenizer` is the text of a tokenizer.json, or the path of that file; None where there is none.
    `weights` has every name of `config.weight_shapes()`. `special_tokens` are those of
    tokenizer_config.json by their key there (eos_token, ...), which some chat templates name.
    `notes` are what a user should be told of what was found."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    weights: Mapping[str, StoredWeight]
    tokenizer: Path | str | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
    notes: tuple[str, ...] = ()


def unpack(stored: StoredWeight) -> StoredWeight:
    """The values of a format without a kernel, as floats of UNPACKED_AS, by the gguf library."""
    import gguf

    kind = gguf.GGMLQuantizationType[stored.format]
    rows = stored.arrays["blocks"].reshape(-1, stored.arrays["blocks"].shape[-1])
    data = np.empty((len(rows), stored.shape[-1]), dtype=UNPACKED_AS)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        data[part] = gguf.dequantize(rows[part], kind)
    return StoredWeight(UNPACKED_AS, stored.shape, {"data": data.reshape(stored.shape)})


def unpacked_at_load(weights: Mapping[str, StoredWeight]) -> tuple[str, ...]:
    """What to tell of weights that do not stay packed; nothing where there are none."""
    found = [weight for weight in weights.values() if weight.format in TABLE_BLOCKS]
    if not found:
        return ()
    before, after = (sum(getattr(w, key) for w in found) for key in ("nbytes", "device_bytes"))
    formats = ", ".join(sorted({weight.format for weight in found}))
    return (
        f"{len(found)} weights in {formats} have no kernel and are dequantised at load to "
        f"{UNPACKED_AS}: {before / 1e9:.2f} GB become {after / 1e9:.2f} GB",
    )
