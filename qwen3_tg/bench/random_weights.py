"""A model of random weights in any format: to learn how fast a model would be before it is
downloaded. Each is made when it is asked for, one at a time, so memory is that of the model.

Blocks are those of gaussian numbers, or random codes with a small scale: logits stay finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen3_tg.checkpoint import Checkpoint, StoredWeight
from qwen3_tg.config import GenerationConfig, ModelConfig
from qwen3_tg.errors import UsageError
from qwen3_tg.plan.forms import check_form, stored_as
from qwen3_tg.plan.released import CONFIGS, find_released

_SAMPLE_ROWS, _SAMPLE_WIDTH = 61, 2048  # repeated to fill a weight
_STD = 0.02
_IQ4_XS_BYTES = 136


@dataclass(frozen=True)
class RandomWeight(StoredWeight):
    """As StoredWeight; its arrays are made, whole, each time they are asked for."""

    @property
    def nbytes(self) -> int:
        assert isinstance(self.arrays, _Random)
        return sum(array.nbytes for array in self.arrays.absent.values())

    def release(self) -> None:
        pass


class _Random(Mapping[str, np.ndarray]):
    def __init__(self, format: str, absent: Mapping[str, np.ndarray]):
        self._format, self.absent = format, absent

    def __getitem__(self, name: str) -> np.ndarray:
        absent = self.absent[name]
        sample = _sample(self._format, name, absent)
        return np.resize(sample, absent.size).reshape(absent.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.absent)

    def __contains__(self, name: object) -> bool:
        return name in self.absent

    def __len__(self) -> int:
        return len(self.absent)


def random_checkpoint(shape: str, form: str) -> Checkpoint:
    """A released model's shape ("Qwen3-8B") in a form of `qwen3 plan` ("q4_0").

    Raises UsageError for one that is not known."""
    released = find_released(shape)
    if released is None:
        raise UsageError(f"unknown shape {shape!r}; known: {', '.join(CONFIGS)}")
    return checkpoint_of_config(released.config, check_form(form), released.name)


def checkpoint_of_config(config: ModelConfig, form: str, name: str) -> Checkpoint:
    """Random weights for a config, in a form of plan/forms.py."""
    return Checkpoint(
        path=Path(f"{name} of random weights in {form}"),
        config=config,
        generation=GenerationConfig(),
        weights=with_random_values(stored_as(config, form)),
        tokenizer=None,
        chat_template=None,
        special_tokens={},
    )


def with_random_values(weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """For weights of which only the shapes are known."""
    return {
        name: RandomWeight(w.format, w.shape, _Random(w.format, w.arrays), w.params)
        for name, w in weights.items()
    }


def _sample(format: str, name: str, absent: np.ndarray) -> np.ndarray:
    """Some numbers of an array, to be repeated; of its dtype."""
    random = np.random.default_rng(0)
    gaussian = random.normal(0, _STD, (_SAMPLE_ROWS, _SAMPLE_WIDTH)).astype(np.float32)
    if name == "data":
        values = np.ones(1, dtype=np.float32) if absent.ndim == 1 else gaussian.ravel()
        return _bfloat16(values) if absent.dtype == np.uint16 else values.astype(absent.dtype)
    if name == "blocks":
        return _blocks(format, gaussian, random).ravel()
    if absent.dtype == np.uint8:  # FP8: no exponent of 15, which has the NaN
        return random.integers(0, 256, gaussian.size).astype(np.uint8) & np.uint8(0xB7)
    if absent.dtype == np.uint32:  # codes, and zero points in the middle of their range
        if name == "qzeros":
            return np.full(1, 0x77777777, dtype=np.uint32)
        return random.integers(0, 2**32, gaussian.size, dtype=np.uint32)
    # Scales, and MLX's biases, which move codes to about zero
    scale = np.full(1, -_STD if name == "biases" else _STD / 8, dtype=np.float32)
    return _bfloat16(scale) if absent.dtype == np.uint16 else scale.astype(absent.dtype)


def _blocks(format: str, gaussian: np.ndarray, random: np.random.Generator) -> np.ndarray:
    from qwen3_tg.quantize.blocks import quantise

    if format != "IQ4_XS":
        return quantise(gaussian, format)
    blocks = random.integers(0, 256, (gaussian.size // 256, _IQ4_XS_BYTES)).astype(np.uint8)
    blocks[:, :2] = np.array([_STD / 2048], dtype=np.float16).view(np.uint8)
    return blocks


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
