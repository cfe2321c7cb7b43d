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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3_tg.errors import CheckpointError, UnsupportedError
from qwen3_tg.yarn import Yarn, for_context, longest_context, read_rope

_LARGEST = sys.float_info.max  # JSON holds integers beyond it, and Infinity
# Keys that do not change the logits of a Qwen3 text model.
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
# Keys that only a mixture of experts has; the last two do not change its logits.
_OF_A_MIXTURE = frozenset(
    """
    num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step
    mlp_only_layers num_local_experts output_router_logits router_aux_loss_coef
    """.split()
)
# Keys of generation_config.json that change the text, with the value at which they do not.
_NOT_APPLIED = {
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
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# Keys that are understood at one value only: (key, the value, what else it would mean).
_ONE_VALUE: tuple[tuple[str, Any, str], ...] = (
    ("hidden_act", "silu", "another activation"),
    ("attention_bias", False, "biases in the attention projections"),
    ("use_sliding_window", False, "sliding-window attention"),
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Qwen3 model. Lengths are tokens. `num_experts` is 0 in a dense one, where the
    other fields of a mixture mean nothing."""

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
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    yarn: Yarn | None = None

    @staticmethod
    def from_dict(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read config.json's fields; refuse by name what would change the result.

        Raises UnsupportedError for a model this version does not compute, CheckpointError for a
        missing or impossible value."""
        _refuse_other_models(raw, where)
        rope_theta, yarn = read_rope(raw, where)
        known = set(ModelConfig.__dataclass_fields__) - {"yarn"} - _OF_A_MIXTURE | _NO_EFFECT
        known |= _OF_A_MIXTURE if raw["model_type"] == "qwen3_moe" else set()
        known |= {"model_type", "layer_types", "rope_scaling", "rope_parameters"}
        known |= {"quantization_config", "quantization"}  # for the readers of weights
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
            head_dim=positive("head_dim", _default_head_dim(raw)),
            max_position_embeddings=positive("max_position_embeddings", 32768),
            rms_norm_eps=float(eps),
            rope_theta=rope_theta,
            tie_word_embeddings=tie,
            yarn=yarn,
            **(_read_mixture(raw, where) if raw["model_type"] == "qwen3_moe" else {}),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads {config.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim must be even, found {config.head_dim}")
        return config

    def with_context(self, context: int | None) -> tuple[ModelConfig, int, str]:
        """For a wished context, or None: the configuration with the YaRN it needs, the context,
        and a remark for the user ("" for none). Raises UsageError with the reason."""
        found, yarn, remark = for_context(self.max_position_embeddings, self.yarn, context)
        return replace(self, yarn=yarn), found, remark

    @property
    def longest_context(self) -> int:
        """The most that with_context takes."""
        return longest_context(self.max_position_embeddings, self.yarn)

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer has experts in place of its MLP."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by its name in the checkpoint, with its shape; (O, I) for
        matrices. Those of all experts of a layer are one, (E, O, I), named mlp.experts.gate_proj
        and so on."""
        D, Hd, E = self.hidden_size, self.head_dim, self.num_experts
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
            }
            experts: tuple[int, ...]
            if self.is_mixture(i):
                F, mlp, experts = self.moe_intermediate_size, "mlp.experts", (E,)
                layer["mlp.gate"] = (E, D)
            else:
                F, mlp, experts = self.intermediate_size, "mlp", ()
            layer[f"{mlp}.gate_proj"] = (*experts, F, D)
            layer[f"{mlp}.up_proj"] = (*experts, F, D)
            layer[f"{mlp}.down_proj"] = (*experts, D, F)
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes


# Qwen's advice for the hybrid models (their model cards, "Best Practices"): what they have in
# generation_config.json is for thinking; without it they are to be sampled so.
NOT_THINKING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}


@dataclass(frozen=True)
class GenerationConfig:
    """The checkpoint's own wishes for generation: its end tokens and its sampling defaults."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.6  # these four are Qwen's advice for the hybrid models, thinking
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    not_applied: tuple[str, ...] = ()  # settings that would change the text and are not computed

    def without_thinking(self) -> GenerationConfig:
        """For a hybrid model that is not to think; wishes other than Qwen's are kept."""
        thinking = GenerationConfig()
        if any(getattr(self, name) != getattr(thinking, name) for name in NOT_THINKING):
            return self
        return replace(self, **NOT_THINKING)  # type: ignore[arg-type]

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
        penalty = number("repetition_penalty", default.repetition_penalty)
        if penalty == 0:
            raise CheckpointError(f"{where}: repetition_penalty must be above 0")
        return GenerationConfig(
            eos_token_ids=tuple(eos),
            temperature=0.0 if sample is False else float(temperature),
            top_p=float(top_p),
            top_k=int(top_k),
            min_p=float(number("min_p", default.min_p, most=1)),
            repetition_penalty=float(penalty),
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
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: model_type must be {' or '.join(map(repr, _ARCHITECTURES))}, "
            f"found {model_type!r}"
        )
    expected = [_ARCHITECTURES[model_type]]
    if (raw.get("architectures") or expected) != expected:
        raise UnsupportedError(
            f"{where}: architectures must be {expected}, found {raw['architectures']!r}"
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


def _default_head_dim(raw: Mapping[str, Any]) -> int | None:
    """transformers has 128 for dense models, and for mixtures hidden_size / heads."""
    if raw["model_type"] == "qwen3":
        return 128
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    return hidden // heads if type(hidden) is type(heads) is int and heads > 0 else None


def _read_mixture(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a mixture of experts; defaults are those of transformers' Qwen3MoeConfig."""
    raw = {"num_experts": raw.get("num_local_experts", 128)} | dict(raw)
    defaults = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    found: dict[str, Any] = {}
    for key, default in (defaults | {"decoder_sparse_step": 1}).items():
        value = raw.get(key, default)
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{where}: {key} must be a positive integer, found {value!r}")
        found[key] = value
    if found["num_experts_per_tok"] > found["num_experts"]:
        raise CheckpointError(
            f"{where}: num_experts_per_tok {found['num_experts_per_tok']} is more than "
            f"num_experts {found['num_experts']}"
        )
    norm = raw.get("norm_topk_prob", False)
    if not isinstance(norm, bool):
        raise CheckpointError(f"{where}: norm_topk_prob must be true or false, found {norm!r}")
    layers = raw.get("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise CheckpointError(f"{where}: mlp_only_layers must list layers, found {layers!r}")
    return found | {"norm_topk_prob": norm, "mlp_only_layers": tuple(layers)}
