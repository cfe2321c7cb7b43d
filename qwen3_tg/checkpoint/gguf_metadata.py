"""What the metadata of a GGUF file says of the model and of generation, as config.json says it.

The checks of values stay in config.py: this module only says them in config.json's words. Keys are
those of llama.cpp (ggml-org/ggml, docs/gguf.md; src/llama-arch.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qwen3_tg.checkpoint.gguf_header import printable
from qwen3_tg.config import GenerationConfig, ModelConfig
from qwen3_tg.errors import CheckpointError, UnsupportedError

_MODEL_TYPES = {"qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
# Keys after the architecture's name -> config.json's, all of them counts and required.
_COUNTS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_DENSE_COUNTS = {"feed_forward_length": "intermediate_size"}
_MIXTURE_COUNTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Keys with a meaning that is computed at one value only, the one that their absence means too.
_ONE_VALUE: dict[str, Any] = {
    "rope.scale_linear": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_shared_count": 0,
    "expert_shared_feed_forward_length": 0,
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "expert_weights_norm": True,
    "expert_weights_scale": 1,
    "expert_gating_func": 1,  # softmax
    "leading_dense_block_count": 0,
    "logit_scale": 1,
    "tensor_data_layout": "reference",
}
_NO_EFFECT = {"rope.scaling.finetuned", "pooling_type"}
_READ_HERE = set(
    "feed_forward_length vocab_size attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scaling.type "
    "rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor "
    "rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow".split()
)
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_SAMPLING_NOT_APPLIED = ("xtc_probability", "mirostat")  # off at 0
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_architecture(metadata: Mapping[str, Any], where: str) -> str:
    """ "qwen3" or "qwen3moe", with which the model's own keys begin. Raises UnsupportedError."""
    A = metadata.get("general.architecture")
    if not isinstance(A, str) or A not in _MODEL_TYPES:
        raise UnsupportedError(
            f"{where}: general.architecture must be {' or '.join(_MODEL_TYPES)}, found {shown(A)}"
        )
    return A


def read_config(metadata: Mapping[str, Any], rows: int, tied: bool, where: str) -> ModelConfig:
    """The shape of the model. `rows` are those of the embedding, `tied` whether it is the head too:
    both are said by the tensors alone.

    Raises UnsupportedError for another architecture and for keys that may change the result, and
    CheckpointError for missing or impossible values; both name the key."""
    A = read_architecture(metadata, where)
    own = {
        key.removeprefix(f"{A}."): value
        for key, value in metadata.items()
        if key.startswith(f"{A}.")
    }
    where = f"{where}: {A}"
    counts = _COUNTS | (_MIXTURE_COUNTS if A == "qwen3moe" else _DENSE_COUNTS)
    raw: dict[str, Any] = {name: _count(own, key, where) for key, name in counts.items()}
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]  # llama.cpp's default
    if "attention.key_length" in own:
        head_dim = _count(own, "attention.key_length", where)
    one_value = _ONE_VALUE | {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    one_value["vocab_size"] = rows
    for key, value in one_value.items():
        if not equals(own.get(key, value), value):
            raise UnsupportedError(
                f"{where}.{key} must be {value}, found {shown(own[key])}; nothing else is computed"
            )
    known = counts.keys() | one_value.keys() | _NO_EFFECT | _READ_HERE
    if unknown := sorted(own.keys() - known):
        raise UnsupportedError(
            f"{where}.{printable(unknown[0])}: unknown key ({len(unknown)} such keys): it may "
            "change the result and is not computed"
        )
    raw |= {
        "model_type": _MODEL_TYPES[A],
        "vocab_size": rows,
        "head_dim": head_dim,
        "rms_norm_eps": _number(own, "attention.layer_norm_rms_epsilon", None, where),
        "rope_theta": _number(own, "rope.freq_base", 10_000.0, where),
        "rope_scaling": _rope_scaling(own, where),
        "tie_word_embeddings": tied,
    }
    if A == "qwen3moe":  # every layer is a mixture, and llama.cpp always normalises the weights
        raw |= {"norm_topk_prob": True, "intermediate_size": raw["moe_intermediate_size"]}
    return ModelConfig.from_dict(raw, where=f"{where} (in the words of config.json)")


def read_generation(metadata: Mapping[str, Any], where: str) -> GenerationConfig:
    """End tokens, and the sampling defaults that newer converters write."""
    settings = {
        name: metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in metadata
    }
    stops = [metadata[f"tokenizer.ggml.{key}"] for key in _STOP_KEYS if has_id(metadata, key)]
    found = GenerationConfig.from_dicts(settings | {"eos_token_id": stops}, {}, where)
    others = tuple(
        f"{key} {shown(metadata[f'general.sampling.{key}'])}"
        for key in _SAMPLING_NOT_APPLIED
        if not equals(metadata.get(f"general.sampling.{key}", 0), 0)
    )
    return replace(found, not_applied=found.not_applied + others)


def _rope_scaling(own: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """YaRN in the words of config.json. llama.cpp multiplies its attention factors with the one of
    the paper; a factor without a type is linear there."""
    factor = _number(own, "rope.scaling.factor", 0.0, where)
    attention = _number(own, "rope.scaling.attn_factor", 1.0, where)
    attention *= _number(own, "rope.scaling.yarn_attn_factor", 1.0, where)
    kind = own.get("rope.scaling.type", "linear")
    if equals(kind, "none") or (equals(kind, "linear") and factor in (0, 1)):
        if attention != 1:
            raise UnsupportedError(
                f"{where}.rope.scaling: attention factors are computed with YaRN only"
            )
        return None
    if not equals(kind, "yarn"):
        raise UnsupportedError(
            f"{where}.rope.scaling.type must be 'none' or 'yarn', found {shown(kind)} with factor "
            f"{factor:g}"
        )
    if not factor >= 1:
        raise CheckpointError(f"{where}.rope.scaling.factor must be at least 1, found {factor:g}")
    original = own.get("rope.scaling.original_context_length", 0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": attention * (0.1 * math.log(factor) + 1),
        "original_max_position_embeddings": _count(
            own, "rope.scaling.original_context_length", where
        )
        if not equals(original, 0)
        else own["context_length"],
        "beta_fast": _number(own, "rope.scaling.yarn_beta_fast", 32.0, where),
        "beta_slow": _number(own, "rope.scaling.yarn_beta_slow", 1.0, where),
    }


def _count(own: Mapping[str, Any], key: str, where: str) -> int:
    value = own.get(key)
    if type(value) is not int or value < 1:
        found = (
            "is missing" if value is None else f"must be a positive integer, found {shown(value)}"
        )
        raise CheckpointError(f"{where}.{key} {found}")
    return value


def _number(own: Mapping[str, Any], key: str, default: float | None, where: str) -> float:
    value = own.get(key, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        found = "is missing" if value is None else f"must be a number, found {shown(value)}"
        raise CheckpointError(f"{where}.{key} {found}")
    return float(value)


def has_id(metadata: Mapping[str, Any], key: str) -> bool:
    """Whether tokenizer.ggml has an id of this name."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    return type(value) is int and 0 <= value < 2**32 - 1  # the highest stands for none


def equals(found: Any, value: Any) -> bool:
    """Equality that is also right for arrays, which are never what one value should be."""
    return not isinstance(found, np.ndarray | list) and bool(found == value)


def shown(value: Any) -> str:
    """A value from the file, fit for one line of an error."""
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
