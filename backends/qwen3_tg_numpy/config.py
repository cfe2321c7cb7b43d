"""config.json of a dense Qwen3, as a frozen dataclass with config.json's own field names.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 writes
`rope_parameters` and `dtype`. Both are read. Every key is either used, or listed below as one that
cannot change the logits, or refused by name. Knows nothing of weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Keys that mean something here at one value only, which is also what their absence means.
ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}
# Keys that may have any value: training, bookkeeping, token ids, and generation defaults that
# transformers 4 used to keep here. The window keys are dead while use_sliding_window is false.
NO_EFFECT = """
    transformers_version torch_dtype dtype _name_or_path name_or_path auto_map tokenizer_class
    _attn_implementation _attn_implementation_autoset unsloth_fixed unsloth_version
    initializer_range attention_dropout use_cache sliding_window max_window_layers
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 problem_type
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder chunk_size_feed_forward pruned_heads finetuning_task
    task_specific_params id2label label2id prefix tf_legacy_loss
    do_sample temperature top_k top_p typical_p max_length min_length num_beams
    num_beam_groups diversity_penalty length_penalty early_stopping repetition_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
"""
READ_APART = frozenset(  # by from_dict and _read_rope_theta
    ("model_type", "architectures", "layer_types", "rope_parameters", "rope_scaling")
)


class CheckpointError(ValueError):
    """The files are no whole model, or one that is not computed here; says which file and what."""


@dataclass(frozen=True)
class ModelConfig:
    """What fixes the computation. Lengths are tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @staticmethod
    def from_dict(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read config.json's object. Raises CheckpointError that names the key for a model that is
        not computed here, an unknown key, and a missing or impossible value."""
        # 1. Is it this model at all?
        if raw.get("model_type") != "qwen3":
            found = raw.get("model_type")
            raise CheckpointError(
                f"{where}: model_type must be 'qwen3' (dense Qwen3), found {found!r}"
            )
        if raw.get("architectures") not in (None, [], ["Qwen3ForCausalLM"]):
            found = raw["architectures"]
            raise CheckpointError(
                f"{where}: architectures must be ['Qwen3ForCausalLM'], found {found!r}"
            )
        # 2. Does it ask for something that model.py does not do?
        for key, value in ONLY_VALUE.items():
            if raw.get(key, value) != value:
                raise CheckpointError(f"{where}: {key} must be {value!r}, found {raw[key]!r}")
        if set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise CheckpointError(
                f"{where}: layer_types must all be 'full_attention', found {raw['layer_types']!r}"
            )
        known = (
            READ_APART
            | set(NO_EFFECT.split())
            | set(ONLY_VALUE)
            | set(ModelConfig.__dataclass_fields__)
        )
        if unknown := sorted(set(raw) - known):
            raise CheckpointError(
                f"{where}: unknown {', '.join(unknown)}: this may change the result and is not "
                "computed here; expected only keys of a dense Qwen3"
            )

        # 3. The numbers. Where a key may be absent, the default is that of transformers.
        def count(key: str, default: int | None = None) -> int:
            value = raw.get(key, default)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{where}: {key} must be a positive integer, found {value!r}")
            return value

        tie = raw.get("tie_word_embeddings", False)
        if type(tie) is not bool:
            raise CheckpointError(
                f"{where}: tie_word_embeddings must be true or false, found {tie!r}"
            )
        config = ModelConfig(
            vocab_size=count("vocab_size"),
            hidden_size=count("hidden_size"),
            intermediate_size=count("intermediate_size"),
            num_hidden_layers=count("num_hidden_layers"),
            num_attention_heads=count("num_attention_heads"),
            num_key_value_heads=count("num_key_value_heads"),
            head_dim=count("head_dim", 128),  # not hidden_size / heads: Qwen3 chooses it freely
            max_position_embeddings=count("max_position_embeddings", 32768),
            rms_norm_eps=_positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            rope_theta=_read_rope_theta(raw, where),
            tie_word_embeddings=tie,
        )
        H, K = config.num_attention_heads, config.num_key_value_heads
        if H % K:
            raise CheckpointError(
                f"{where}: num_attention_heads {H} must be a multiple of num_key_value_heads {K}"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim must be even, found {config.head_dim}")
        return config

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor in the checkpoint; a matrix is (outputs, inputs)."""
        V, D, F, Hd = self.vocab_size, self.hidden_size, self.intermediate_size, self.head_dim
        H, K = self.num_attention_heads, self.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            shapes[f"{layer}.input_layernorm.weight"] = (D,)
            shapes[f"{layer}.self_attn.q_proj.weight"] = (H * Hd, D)
            shapes[f"{layer}.self_attn.k_proj.weight"] = (K * Hd, D)
            shapes[f"{layer}.self_attn.v_proj.weight"] = (K * Hd, D)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (D, H * Hd)
            shapes[f"{layer}.self_attn.q_norm.weight"] = (Hd,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (Hd,)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
            shapes[f"{layer}.mlp.gate_proj.weight"] = (F, D)
            shapes[f"{layer}.mlp.up_proj.weight"] = (F, D)
            shapes[f"{layer}.mlp.down_proj.weight"] = (D, F)
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (V, D)
        return shapes

    def check_ids(self, ids: Sequence[int] | np.ndarray, start_pos: int) -> np.ndarray:
        """ids as an array, if they can be the tokens at start_pos and on; else ValueError.

        ids: (S,) -> (S,) int"""
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"ids must be one sequence of at least one id, found {array.shape}")
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"ids must be integers, found {array.dtype}")
        if (wrong := array[(array < 0) | (array >= self.vocab_size)]).size:
            raise ValueError(
                f"ids must be 0 to {self.vocab_size - 1} (vocab_size), found {wrong[0]}"
            )
        if (end := start_pos + len(array)) > self.max_position_embeddings:
            limit = self.max_position_embeddings
            raise ValueError(f"{end} tokens do not fit: max_position_embeddings is {limit}")
        return array


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: expected a JSON file, found: {e}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_eos_token_ids(path: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens of a model directory: those of generation_config.json, and where that file or
    its eos_token_id is not there, those of config.json, `raw`. Raises CheckpointError."""
    file, found = path / "generation_config.json", None
    if file.is_file():
        found = read_json(file).get("eos_token_id")
    if found is None:
        file, found = path / "config.json", raw.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{file}: eos_token_id must be a token id or a list, found {found!r}")
    return tuple(ids)


def _read_rope_theta(raw: Mapping[str, Any], where: str) -> float:
    """The base of the rotary angles; any rotation but the plain one is refused. A base beside the
    type wins over one at the top level, as in transformers."""
    theta = raw.get("rope_theta", 10_000.0)  # the default of transformers, not of any Qwen3
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {key} must be an object or null, found {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{where}: {key}: rope_type must be 'default', found {kind!r}")
        if unknown := sorted(set(rope) - {"rope_type", "type", "rope_theta"}):
            raise CheckpointError(f"{where}: {key}: unknown {', '.join(unknown)}")
        theta = rope.get("rope_theta", theta)
    return _positive(theta, "rope_theta", where)


def _positive(value: Any, key: str, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)
