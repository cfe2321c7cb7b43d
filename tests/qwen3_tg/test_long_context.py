"""Contexts in their full length, on a model of one small layer: what a cache filled over all of it
gives is what numpy gives for single positions, from keys and values that it computed itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import assert_close
from format_writers import random_model, write_float
from qwen3_tg_numpy.model import LayerCache

import qwen3_tg

SMALL = {
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 32,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CHUNK = 256
# Measured: at most 0.0013, with keys and values in float16.
TOLERANCE = 0.01


def keys_and_values(
    model: qwen3_tg_numpy.model.Qwen3, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of every position: those of a first layer depend on its id and its position alone.

    ids: (T,) -> 2 x (T, K, Hd)"""
    found: dict[str, list[np.ndarray]] = {"k_rope": [], "v_proj": []}

    def see(name: str, value: np.ndarray) -> np.ndarray:
        if (step := name.rpartition(".")[2]) in found:
            found[step].append(value)
        return value

    config = model.config
    for start in range(0, len(ids), CHUNK):
        x = qwen3_tg_numpy.quantised.to_float32(model.embed_tokens[ids[start : start + CHUNK]])
        model.layers[0](x, LayerCache(config), start, see)  # attends to its own chunk alone
    k, v = (np.concatenate(parts) for parts in found.values())
    return k, v.reshape(k.shape)


@pytest.mark.long
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (131_072, {"max_position_embeddings": 32_768, "rope_scaling": YARN}),
        (262_144, {"max_position_embeddings": 262_144, "rope_theta": 5_000_000}),
    ],
    ids=["YaRN", "2507"],
)
def test_a_context_of_full_length_is_computed_right(
    length: int, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config, weights = random_model(seed=5, **SMALL, **sizes)
    write_float(tmp_path, config, weights)
    llm = qwen3_tg.load(str(tmp_path), "CPU", context=length)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], length)
    model = qwen3_tg_numpy.load(tmp_path).model
    k, v = keys_and_values(model, ids)
    # a chunk, some lengths between, single positions at the end, and the very last one
    sampled = [9, 4097, length // 2 + 1, length - 5, length - 4, length - 3, length]
    for T in sampled:
        cache = LayerCache(model.config)
        cache.k, cache.v = k[: T - 1], v[: T - 1]
        x = qwen3_tg_numpy.quantised.to_float32(model.embed_tokens[ids[T - 1 : T]])
        right = model.logits(model.layers[0](x, cache, T - 1, lambda name, value: value))[0]
        assert 0.3 < right.std() < 3, "the tolerance is for logits of about one"
        assert_close(llm.next_logits(ids[:T].tolist()), right, TOLERANCE)
    assert llm.cache_capacity >= length
