"""The reference: a Qwen3 in plain numpy, to be read first and to judge every device by.

    model = qwen3_tg_numpy.load("path/to/Qwen3-0.6B")
    logits = model.logits([9707, 11, 1879])                        # (3, V), float32
    ids = list(model.generate_ids([9707, 11, 1879], max_new_tokens=16))

It computes what transformers' Qwen3ForCausalLM and Qwen3MoeForCausalLM compute, in float32, from
the weights as stored, and is slow by choice: no kernels, and quantised matrices are decoded at each
use. It imports numpy, and gguf for the blocks of GGUF files; it shares no code with qwen3_tg, so
that the two have no mistake in common by construction.

In the order of reading: config.py, model.py with rope.py, sampling.py, generate.py; then how
weights are found: safetensors_file.py, quantised.py, quantisation.py, checkpoint.py, gguf_config.py
and gguf_file.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np

from qwen3_tg_numpy.checkpoint import read_weights
from qwen3_tg_numpy.config import CheckpointError, ModelConfig, Yarn, read_eos_token_ids, read_json
from qwen3_tg_numpy.generate import generate_ids
from qwen3_tg_numpy.gguf_file import read_gguf
from qwen3_tg_numpy.model import KVCache, Qwen3
from qwen3_tg_numpy.quantisation import find_scheme
from qwen3_tg_numpy.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "CheckpointError",
    "KVCache",
    "ModelConfig",
    "Qwen3",
    "Reference",
    "Sampling",
    "Yarn",
    "load",
]


@dataclass(frozen=True)
class Reference:
    """A loaded model. Ids are a sequence of ints; every method raises ValueError for none at all,
    for ids outside the vocabulary and for more than config.max_positions of them."""

    config: ModelConfig
    model: Qwen3
    eos_token_ids: tuple[int, ...]

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """One row of scores for the next token after each id. ids: (S,) -> (S, V) float32"""
        return self.model.forward(ids)

    def trace(self, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Every intermediate by its name, in the order of computation, as `model.Trace` lists them.

        ids: (S,) -> name: array"""
        seen: dict[str, np.ndarray] = {}

        def keep(name: str, value: np.ndarray) -> np.ndarray:
            seen[name] = value
            return value

        self.model.forward(ids, trace=keep)
        return seen

    def generate_ids(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] | None = None,
    ) -> Iterator[int]:
        """The tokens after `ids`, one at a time, as `generate.generate_ids` makes them.

        `stop_ids`: None is the checkpoint's own end tokens, () is none."""
        stop = self.eos_token_ids if stop_ids is None else stop_ids
        return generate_ids(
            self.model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop
        )


def load(path: str | PathLike[str], yarn: Yarn | None = None) -> Reference:
    """Open a Hugging Face directory: config.json, the safetensors file or its shards, and
    generation_config.json where there is one; or a .gguf file, any part of it where it is split.
    Matrices may be packed as AWQ, GPTQ, block-wise FP8, MLX or GGUF have it. Weights stay mapped
    until they are used. `yarn` takes the place of the checkpoint's own, if any.

    Raises CheckpointError, a ValueError, that names the file and the key or tensors for whatever is
    missing, damaged or not computed here."""
    path = Path(path)
    if path.suffix == ".gguf":
        config, weights, eos_token_ids = read_gguf(path)
        config = replace(config, yarn=yarn or config.yarn)
        return Reference(config, Qwen3(config, weights), eos_token_ids)
    raw = read_json(path / "config.json")
    config = ModelConfig.from_dict(raw, where=str(path / "config.json"))
    config = replace(config, yarn=yarn or config.yarn)
    return Reference(
        config=config,
        model=Qwen3(config, read_weights(path, config.weight_shapes(), find_scheme(path, raw))),
        eos_token_ids=read_eos_token_ids(path, raw),
    )
