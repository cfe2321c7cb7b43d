"""What config.json and generation_config.json say, as frozen dataclasses.

Field names are config.json's own. Both the keys of transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and of transformers 5 (`rope_parameters`, `dtype`) are read. A key of config.json
that is not known here, or a value that would change the logits and is not computed, is refused by
name; wishes of generation_config.json that are not computed are told (`not_applied`). Nothing is
dropped in silence.

Knows nothing of weights, devices or tokenizers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_tg.errors import CheckpointError, UnsupportedError

_LARGEST = sys.float_info.max  # JSON holds integers beyond it, and Infinity
# Keys that do not change the logits of a dense Qwen3 text model.
_NO_EFFECT = frozenset(
    """
    architectures auto_map _name_or_path name_or_path transformers_version torch_dtype dtype
    use_cache initializer_range attention_dropout bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id max_window_layers sliding_window tokenizer_class
    return_dict output_attentions output_hidden_states torchscript use_bfloat16 pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention tie_encoder_decoder
    cross_attention_hidden_size finetuning_task task_specific_params problem_type id2label label2id
    tf_legacy_loss prefix _attn_implementation_autoset _attn_implementation unsloth_version
    unsloth_fixed max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
# Keys of generation_config.json that change the text, with the value at which they do not.
_NOT_APPLIED = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "num_beams": 1,
    "penalty_alpha": None,
    "guidance_scale": 1,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
}
# Keys that are understood at one value only: (key, the value, what else it would mean).
_ONE_VALUE: tuple[tuple[str, Any, str], ...] = (
    ("hidden_act", "silu", "another activation"),
    ("attention_bias", False, "biases in the attention projections"),
    ("use_sliding_window", False, "sliding-window attention"),
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a dense Qwen3 model. Lengths are tokens."""

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
        """Read config.json's fields; refuse by name what would change the result.

        Raises UnsupportedError for a model this version does not compute, CheckpointError for a
        missing or impossible value."""
        _refuse_other_models(raw, where)
        rope_theta = _read_rope(raw, where)
        known = set(ModelConfig.__dataclass_fields__) | _NO_EFFECT
        known |= {"model_type", "layer_types", "rope_scaling", "rope_parameters"}
        known |= {"quantization_config", "quantization"}
        known |= {key for key, _, _ in _ONE_VALUE}
        if unknown := sorted(set(raw) - known):
            raise UnsupportedError(
                f"{where}: unknown key(s) {', '.join(unknown)}: they may change the result; "
                "remove them from the file if you are sure that they do not"
            )

        def positive(key: str, default: int | None = None) -> int:
            value = raw.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise CheckpointError(f"{where}: {key} must be a positive integer, found {value!r}")
            return value

        # Defaults are those of transformers' Qwen3Config.
        eps, tie = raw.get("rms_norm_eps", 1e-6), raw.get("tie_word_embeddings", False)
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 < eps <= _LARGEST:
            raise CheckpointError(f"{where}: rms_norm_eps must be a positive number, found {eps!r}")
        if not isinstance(tie, bool):
            raise CheckpointError(
                f"{where}: tie_word_embeddings must be true or false, found {tie!r}"
            )
        config = ModelConfig(
            vocab_size=positive("vocab_size"),
            hidden_size=positive("hidden_size"),
            intermediate_size=positive("intermediate_size"),
            num_hidden_layers=positive("num_hidden_layers"),
            num_attention_heads=positive("num_attention_heads"),
            num_key_value_heads=positive("num_key_value_heads"),
            head_dim=positive("head_dim", 128),
            max_position_embeddings=positive("max_position_embeddings", 32768),
            rms_norm_eps=float(eps),
            rope_theta=rope_theta,
            tie_word_embeddings=tie,
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads {config.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim must be even, found {config.head_dim}")
        return config

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint by its name there, with its shape; (O, I) for matrices."""
        D, F, Hd = self.hidden_size, self.intermediate_size, self.head_dim
        H, K = self.num_attention_heads, self.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, D)}
        for i in range(self.num_hidden_layers):
            layer: dict[str, tuple[int, ...]] = {
                "input_layernorm": (D,),
                "self_attn.q_proj": (H * Hd, D),
                "self_attn.k_proj": (K * Hd, D),
                "self_attn.v_proj": (K * Hd, D),
                "self_attn.o_proj": (D, H * Hd),
                "self_attn.q_norm": (Hd,),
                "self_attn.k_norm": (Hd,),
                "post_attention_layernorm": (D,),
                "mlp.gate_proj": (F, D),
                "mlp.up_proj": (F, D),
                "mlp.down_proj": (D, F),
            }
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes


@dataclass(frozen=True)
class GenerationConfig:
    """The checkpoint's own wishes for generation: its end tokens and its sampling defaults."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.6  # these four are Qwen's advice for the hybrid models, thinking
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0
    not_applied: tuple[str, ...] = ()  # settings that would change the text and are not computed

    @staticmethod
    def from_dicts(
        generation: Mapping[str, Any], config: Mapping[str, Any], where: str
    ) -> GenerationConfig:
        """`generation` is generation_config.json ({} where there is none), `config` config.json,
        which supplies the end token where the former names none. do_sample false means
        temperature 0, as transformers reads it."""
        eos = generation.get("eos_token_id")
        eos = config.get("eos_token_id") if eos is None else eos
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(type(i) is int and i >= 0 for i in eos):
            raise CheckpointError(f"{where}: eos_token_id must hold token ids, found {eos!r}")
        sample = generation.get("do_sample")
        if not isinstance(sample, bool | None):
            raise CheckpointError(f"{where}: do_sample must be true or false, found {sample!r}")

        def number(key: str, default: float, most: float = _LARGEST) -> float:
            value = generation.get(key)
            value = default if value is None else value
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not right or not 0 <= value <= most:
                limit = "" if most == _LARGEST else f" and at most {most:g}"
                raise CheckpointError(
                    f"{where}: {key} must be a number of at least 0{limit}, found {value!r}"
                )
            return value

        default = GenerationConfig()
        temperature = number("temperature", default.temperature)
        top_p, top_k = number("top_p", default.top_p, most=1), number("top_k", default.top_k)
        if top_k != int(top_k):
            raise CheckpointError(f"{where}: top_k must be an integer, found {top_k!r}")
        if top_p == 0:
            raise CheckpointError(f"{where}: top_p must be above 0")
        return GenerationConfig(
            eos_token_ids=tuple(eos),
            temperature=0.0 if sample is False else float(temperature),
            top_p=float(top_p),
            top_k=int(top_k),
            min_p=float(number("min_p", default.min_p, most=1)),
            not_applied=tuple(
                f"{key} {generation[key]!r}"
                for key, off in _NOT_APPLIED.items()
                if generation.get(key, off) not in (off, None, [])
            ),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; it is needed to load the model") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _refuse_other_models(raw: Mapping[str, Any], where: str) -> None:
    model_type = raw.get("model_type")
    if model_type == "qwen3_moe":
        raise UnsupportedError(
            f"{where}: model_type 'qwen3_moe' (mixture of experts) is not supported yet; "
            "use a dense Qwen3: 0.6B, 1.7B, 4B, 8B, 14B or 32B"
        )
    if model_type != "qwen3":
        raise UnsupportedError(f"{where}: model_type must be 'qwen3', found {model_type!r}")
    architectures = raw.get("architectures") or ["Qwen3ForCausalLM"]
    if architectures != ["Qwen3ForCausalLM"]:
        raise UnsupportedError(
            f"{where}: architectures must be ['Qwen3ForCausalLM'], found {architectures!r}"
        )
    if (quantization := raw.get("quantization_config") or raw.get("quantization")) is not None:
        method = quantization.get("quant_method", "mlx") if isinstance(quantization, dict) else "?"
        raise UnsupportedError(
            f"{where}: quantised weights (quantization_config: {method}) are not supported yet; "
            "use the float checkpoint of the same model"
        )
    for key, value, meaning in _ONE_VALUE:
        if raw.get(key, value) != value:
            raise UnsupportedError(
                f"{where}: {key} must be {value!r}, found {raw[key]!r} ({meaning}, not computed)"
            )
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise UnsupportedError(
            f"{where}: layer_types must all be 'full_attention', found {layer_types!r}"
        )


def _read_rope(raw: Mapping[str, Any], where: str) -> float:
    """rope_theta from the keys of transformers 5 or 4; any other rotation than RoPE is refused."""
    theta = raw.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {key} must be an object or null, found {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UnsupportedError(
                f"{where}: {key}: rope_type must be 'default', found {kind!r} "
                "(longer contexts are not supported yet; set the key to null for the native one)"
            )
        if extra := sorted(set(rope) - {"rope_type", "type", "rope_theta"}):
            raise UnsupportedError(f"{where}: {key}: unknown key(s) {', '.join(extra)}")
        if "rope_theta" in rope:
            theta = rope["rope_theta"]
    theta = 10_000.0 if theta is None else theta  # the default of transformers' Qwen3Config
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta <= _LARGEST:
        raise CheckpointError(f"{where}: rope_theta must be a positive number, found {theta!r}")
    return float(theta)
