"""The metadata of a GGUF file, as the config.json that says the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwen3_tg_numpy.config import CheckpointError

SIZES = {  # after the name of the architecture: required
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",  # not embedding_length / head_count
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
MIXTURE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
ONLY_VALUE = {  # what else there may be, at the value that its absence means
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scale_linear": 1,
    "attention.causal": True,
    "expert_shared_feed_forward_length": 0,
    "expert_shared_count": 0,
    "expert_weights_norm": True,
    "expert_weights_scale": 1,
    "expert_gating_func": 1,  # softmax
    "leading_dense_block_count": 0,
}
READ_APART = frozenset(
    "feed_forward_length attention.value_length rope.freq_base rope.dimension_count vocab_size "
    "rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.finetuned rope.scaling.attn_factor rope.scaling.yarn_attn_factor "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow".split()
)


def config_json(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All but vocab_size and tie_word_embeddings, which the tensors say. Raises CheckpointError
    that names the key for a model that is not computed here, and for an unknown key of it."""
    A = metadata.get("general.architecture")
    if A not in ("qwen3", "qwen3moe"):
        raise CheckpointError(
            f"{where}: general.architecture must be qwen3 or qwen3moe, found {A!r}"
        )
    sizes = SIZES | (MIXTURE if A == "qwen3moe" else {"feed_forward_length": "intermediate_size"})
    own = {key.removeprefix(f"{A}."): v for key, v in metadata.items() if key.startswith(f"{A}.")}
    if missing := [f"{A}.{key}" for key in sizes if key not in own]:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}")
    if unknown := sorted(
        f"{A}.{key}" for key in own.keys() - sizes.keys() - ONLY_VALUE.keys() - READ_APART
    ):
        raise CheckpointError(
            f"{where}: unknown {', '.join(unknown)}: this may change the result and is not "
            "computed here"
        )
    head_dim = own["attention.key_length"]
    only = ONLY_VALUE | {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    for key, value in only.items():
        if own.get(key, value) != value:
            raise CheckpointError(f"{where}: {A}.{key} must be {value}, found {own[key]!r}")
    raw = {name: own[key] for key, name in sizes.items()}
    if "rope.freq_base" in own:
        raw["rope_theta"] = own["rope.freq_base"]
    raw["rope_scaling"] = _rope_scaling(own, f"{where}: {A}")
    if A == "qwen3moe":  # every layer is a mixture, and llama.cpp always normalises the weights
        unused = own.get("feed_forward_length", 0) or own["expert_feed_forward_length"]
        return raw | {
            "model_type": "qwen3_moe",
            "norm_topk_prob": True,
            "intermediate_size": unused,
        }
    return raw | {"model_type": "qwen3"}


def _rope_scaling(own: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """YaRN as in config.json. llama.cpp multiplies its attention factors with that of the paper."""
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise CheckpointError(f"{where}.rope.scaling.type must be none or yarn, found {kind!r}")
    factor = own.get("rope.scaling.factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise CheckpointError(f"{where}.rope.scaling.factor must be at least 1, found {factor!r}")
    extra = own.get("rope.scaling.attn_factor", 1.0)
    extra *= own.get("rope.scaling.yarn_attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": own.get("rope.scaling.original_context_length"),
        "attention_factor": extra * (0.1 * math.log(factor) + 1),
        "beta_fast": own.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": own.get("rope.scaling.yarn_beta_slow"),
    }
