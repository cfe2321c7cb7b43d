"""The plain data that every reader gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen3_tg.config import GenerationConfig, ModelConfig


@dataclass(frozen=True)
class StoredWeight:
    """One tensor as the file holds it.

    `format` is "float32", "float16" or "bfloat16"; `data` is a read-only view of the mapped file
    with the tensor's shape, bfloat16 as its raw uint16 bits (numpy has no bfloat16)."""

    format: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def to_numpy(self, dtype: type[np.floating]) -> np.ndarray:
        """The values as numpy floats; bfloat16 is the upper half of a float32."""
        if self.format != "bfloat16":
            return self.data.astype(dtype)
        return (self.data.astype(np.uint32) << 16).view(np.float32).astype(dtype, copy=False)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: what it is, where its text side lies, and its weights by name.

    `special_tokens` are those of tokenizer_config.json by their key there (eos_token, ...), which
    some chat templates name."""

    path: Path
    config: ModelConfig
    generation: GenerationConfig
    weights: Mapping[str, StoredWeight]
    tokenizer_file: Path | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
