"""config.json of a Qwen3, dense or a mixture of experts, as a frozen dataclass.

Field names are config.json's own. transformers 4 writes `rope_theta`, `rope_scaling` and
`torch_dtype`; transformers 5 writes `rope_parameters` and `dtype`. Both are read. Every key is
either used, or listed below as one that cannot change the logits, or refused by name. Knows nothing
of weights.
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
READ_APART = frozenset(  # by from_dict, _read_rope, and the last two by quantisation.read_scheme
    "model_type architectures layer_types rope_parameters rope_scaling rope_theta "
    "quantization_config quantization".split()
)
SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings".split()
)
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
YARN_KEYS = frozenset(
    "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale "
    "mscale_all_dim truncate".split()
)
# Keys of qwen3_moe alone. transformers 5 writes num_experts as num_local_experts. The last two are
# for training.
MIXTURE_KEYS = frozenset(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob "
    "decoder_sparse_step mlp_only_layers router_aux_loss_coef output_router_logits".split()
)


class CheckpointError(ValueError):
    """The files are no whole model, or one that is not computed here; says which file and what."""


@dataclass(frozen=True)
class Yarn:
    """A rotation stretched for texts beyond the original length; see rope.frequencies."""

    factor: float  # how much longer
    original_max_position_embeddings: int
    attention_factor: float  # for cosine and sine, so its square for scores
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """What fixes the computation. Lengths are tokens. num_experts 0 is a dense model."""

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
    yarn: Yarn | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @property
    def max_positions(self) -> int:
        """max_position_embeddings, or what YaRN stretches the original length to, if that is more:
        the released config.json says 40960, and users add a rope_scaling of 4 * 32768."""
        if self.yarn is None:
            return self.max_position_embeddings
        stretched = self.yarn.factor * self.yarn.original_max_position_embeddings
        return max(self.max_position_embeddings, int(stretched))

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts instead of one MLP."""
        every = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and every and layer not in self.mlp_only_layers

    @staticmethod
    def from_dict(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read config.json's object. Raises CheckpointError that names the key for a model that is
        not computed here, an unknown key, and a missing or impossible value."""
        # 1. Is it this model at all?
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"{where}: model_type must be {' or '.join(ARCHITECTURES)}, found {model_type!r}"
            )
        architecture = ARCHITECTURES[model_type]
        if raw.get("architectures") not in (None, [], [architecture]):
            found = raw["architectures"]
            raise CheckpointError(
                f"{where}: architectures must be {[architecture]}, found {found!r}"
            )
        # 2. Does it ask for something that model.py does not do?
        for key, value in ONLY_VALUE.items():
            if raw.get(key, value) != value:
                raise CheckpointError(f"{where}: {key} must be {value!r}, found {raw[key]!r}")
        if set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise CheckpointError(
                f"{where}: layer_types must all be 'full_attention', found {raw['layer_types']!r}"
            )
        known = READ_APART | SIZES | set(NO_EFFECT.split()) | set(ONLY_VALUE)
        if model_type == "qwen3_moe":
            known |= MIXTURE_KEYS
        if unknown := sorted(set(raw) - known):
            raise CheckpointError(
                f"{where}: unknown {', '.join(unknown)}: this may change the result and is not "
                f"computed here; expected only keys of {model_type}"
            )

        # 3. The numbers. Where a key may be absent, the default is that of transformers.
        H = _count(raw, "num_attention_heads", where)
        hidden_size = _count(raw, "hidden_size", where)
        max_position_embeddings = _count(raw, "max_position_embeddings", where, 32768)
        rope_theta, yarn = _read_rope(raw, max_position_embeddings, where)
        config = ModelConfig(
            vocab_size=_count(raw, "vocab_size", where),
            hidden_size=hidden_size,
            intermediate_size=_count(raw, "intermediate_size", where),
            num_hidden_layers=_count(raw, "num_hidden_layers", where),
            num_attention_heads=H,
            num_key_value_heads=_count(raw, "num_key_value_heads", where),
            # Chosen freely, not hidden_size / heads, but where a mixture does not say it
            head_dim=_count(
                raw, "head_dim", where, 128 if model_type == "qwen3" else hidden_size // H
            ),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=_positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            rope_theta=rope_theta,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", where),
            yarn=yarn,
            **(_read_mixture(raw, where) if model_type == "qwen3_moe" else {}),
        )
        K = config.num_key_value_heads
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
            mlps = {f"{layer}.mlp": F}
            if self.is_mixture(i):
                shapes[f"{layer}.mlp.gate.weight"] = (self.num_experts, D)
                experts = range(self.num_experts)
                mlps = {f"{layer}.mlp.experts.{e}": self.moe_intermediate_size for e in experts}
            for mlp, inner in mlps.items():
                shapes[f"{mlp}.gate_proj.weight"] = (inner, D)
                shapes[f"{mlp}.up_proj.weight"] = (inner, D)
                shapes[f"{mlp}.down_proj.weight"] = (D, inner)
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
        if (end := start_pos + len(array)) > self.max_positions:
            if self.yarn is None:
                limit = f"max_position_embeddings is {self.max_position_embeddings}"
            else:
                limit = f"{self.max_positions} positions are the limit with YaRN"
            raise ValueError(f"{end} tokens do not fit: {limit}")
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


def _read_mixture(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """ModelConfig's fields of a mixture of experts, defaults as in transformers."""
    key = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    num_experts = _count(raw, key, where, 128, least=0)
    if raw.get("num_experts", num_experts) != num_experts:
        raise CheckpointError(
            f"{where}: num_experts must be num_local_experts {num_experts}, or not there, "
            f"found {raw['num_experts']!r}"
        )
    per_token = _count(raw, "num_experts_per_tok", where, 8)
    if 0 < num_experts < per_token:
        raise CheckpointError(
            f"{where}: num_experts_per_tok must be at most {key} {num_experts}, found {per_token}"
        )
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise CheckpointError(f"{where}: mlp_only_layers must list layers, found {dense!r}")
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": _count(raw, "moe_intermediate_size", where, 768),
        "norm_topk_prob": _flag(raw, "norm_topk_prob", where),
        "decoder_sparse_step": _count(raw, "decoder_sparse_step", where, 1),
        "mlp_only_layers": tuple(dense),
    }


def _read_rope(
    raw: Mapping[str, Any], max_position_embeddings: int, where: str
) -> tuple[float, Yarn | None]:
    """The base of the rotary angles, and how they are stretched; any rotation but the plain one and
    YaRN is refused. As in transformers, a rope_scaling that is not empty takes the place of
    rope_parameters, and a base beside the type wins over one at the top level."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    where_rope = f"{where}: {key}"
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where_rope} must be an object or null, found {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"{where_rope}: rope_type must be default or yarn, found {kind!r}")
    known = {"rope_type", "type", "rope_theta"} | (YARN_KEYS if kind == "yarn" else set())
    if unknown := sorted(set(rope) - known):
        raise CheckpointError(f"{where_rope}: unknown {', '.join(unknown)} of rope_type {kind!r}")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))  # not the base of any Qwen3
    yarn = _read_yarn(rope, max_position_embeddings, where_rope) if kind == "yarn" else None
    return _positive(theta, "rope_theta", where), yarn


def _read_yarn(rope: Mapping[str, Any], max_position_embeddings: int, where: str) -> Yarn:
    """YaRN's numbers. The attention factor, where it is not given, is 0.1 ln(factor) + 1 (section
    3.4 of the paper, there the root of 1 / temperature), and with mscale and
    mscale_all_dim the ratio of two such, as in transformers."""
    given = {key: value for key, value in rope.items() if value is not None}
    length = _count(given, "original_max_position_embeddings", where, max_position_embeddings)
    if "factor" not in rope:
        raise CheckpointError(f"{where}: factor must be a number, found none")
    factor = _positive(given.get("factor", max_position_embeddings / length), "factor", where)
    if factor < 1:
        raise CheckpointError(f"{where}: factor must be at least 1, found {factor}")
    attention_factor = 0.1 * math.log(factor) + 1
    if "mscale" in given and "mscale_all_dim" in given:
        a, b = (_positive(given[key], key, where) for key in ("mscale", "mscale_all_dim"))
        attention_factor = (0.1 * a * math.log(factor) + 1) / (0.1 * b * math.log(factor) + 1)
    attention_factor = given.get("attention_factor", attention_factor)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=length,
        attention_factor=_positive(attention_factor, "attention_factor", where),
        beta_fast=_positive(given.get("beta_fast", 32), "beta_fast", where),
        beta_slow=_positive(given.get("beta_slow", 1), "beta_slow", where),
        truncate=_flag(rope, "truncate", where, True),
    )


def _count(
    raw: Mapping[str, Any], key: str, where: str, default: int | None = None, least: int = 1
) -> int:
    value = raw.get(key, default)
    if type(value) is not int or value < least:
        kind = "a positive integer" if least else "an integer from 0"
        raise CheckpointError(f"{where}: {key} must be {kind}, found {value!r}")
    return value


def _flag(raw: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    value = raw.get(key, default)
    if type(value) is not bool:
        raise CheckpointError(f"{where}: {key} must be true or false, found {value!r}")
    return value


def _positive(value: Any, key: str, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)
