"""A random model, and plain safetensors directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Config = dict[str, Any]
Weights = dict[str, np.ndarray]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Keys that Qwen3Config and Qwen3MoeConfig share, as in the released files. The sizes suit every
# format: rows of 256 and 512 are whole K-quant blocks; H*Hd is not hidden_size, H is not K.
_SHARED: Config = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 192,
}
_DENSE: Config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_MOE: Config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def random_model(
    moe: bool = False, tied: bool = False, seed: int = 0, **sizes: Any
) -> tuple[Config, Weights]:
    """config.json and every tensor (float32) by its name; `sizes` replace keys of the config.

    Norm weights lie away from one, some are negative, q_norm's differ from k_norm's. The logits
    have a standard deviation of about one. In the first 128 inputs of each Linear, output 0 has
    negative weights only and output 1 positive ones only: zero points at and beyond their ends.

    Raises KeyError for a key that the config does not have."""
    config = _SHARED | (_MOE if moe else _DENSE) | {"tie_word_embeddings": tied}
    config |= {
        "bos_token_id": config["vocab_size"] - 2,
        "eos_token_id": config["vocab_size"] - 1,
    }
    if unknown := set(sizes) - set(config):
        raise KeyError(f"not in the config: {sorted(unknown)}")
    config |= sizes
    V, D, Hd = config["vocab_size"], config["hidden_size"], config["head_dim"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    F = config["moe_intermediate_size" if moe else "intermediate_size"]
    rng = np.random.default_rng(seed)
    w: Weights = {}

    def matrix(name: str, outputs: int, inputs: int, gain: float = 1.0) -> None:
        w[f"{name}.weight"] = rng.normal(0, gain * inputs**-0.5, (outputs, inputs))
        if name.startswith("model.layers"):
            first = w[f"{name}.weight"][:2, :128]
            first[:] = (np.abs(first) + 0.4 * inputs**-0.5) * [[-1], [1]]

    def norm(name: str, size: int, gain: float = 1.0) -> None:
        sign = np.where(rng.random(size) < 0.15, -1, 1)
        w[f"{name}.weight"] = rng.uniform(0.4, 1.8, size) * sign * gain

    def mlp(name: str) -> None:
        matrix(f"{name}.gate_proj", F, D)
        matrix(f"{name}.up_proj", F, D)
        matrix(f"{name}.down_proj", D, F, gain=2)

    matrix("model.embed_tokens", V, D)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", D)
        matrix(f"{layer}.self_attn.q_proj", H * Hd, D)
        matrix(f"{layer}.self_attn.k_proj", K * Hd, D)
        matrix(f"{layer}.self_attn.v_proj", K * Hd, D)
        matrix(f"{layer}.self_attn.o_proj", D, H * Hd)
        norm(f"{layer}.self_attn.q_norm", Hd, gain=1.5)  # sharpens attention
        norm(f"{layer}.self_attn.k_norm", Hd)
        norm(f"{layer}.post_attention_layernorm", D)
        if moe:
            matrix(f"{layer}.mlp.gate", config["num_experts"], D)
            for e in range(config["num_experts"]):
                mlp(f"{layer}.mlp.experts.{e}")
        else:
            mlp(f"{layer}.mlp")
    norm("model.norm", D)
    # |norm(x)| is about sqrt(D) times the norm's size, rows of the head have length one
    w["model.norm.weight"] /= np.sqrt(np.mean(w["model.norm.weight"] ** 2))
    if not tied:
        matrix("lm_head", V, D)
    return config, {name: value.astype(np.float32) for name, value in w.items()}


def is_linear(name: str) -> bool:
    """Whether this is the weight of one of the seven projections of a block or an expert: what
    every format quantises."""
    return name.endswith("_proj.weight")


def rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values that are left after storing in `dtype`."""
    return value.astype(DTYPES[dtype]).astype(np.float32)


def write_float(
    path: Path,
    config: Config,
    weights: Weights,
    dtype: str = "float32",
    shards: int = 1,
) -> Weights:
    """A directory as released: config.json, generation_config.json, model.safetensors or shards.

    `dtype` is "float32", "float16" or "bfloat16". Whatever is in `weights` is stored, so also a
    lm_head.weight beside tied embeddings."""
    stored = {name: value.astype(DTYPES[dtype]) for name, value in weights.items()}
    write_safetensors(path, config | {"torch_dtype": dtype}, stored, shards)
    return {name: rounded(value, dtype) for name, value in weights.items()}


def write_safetensors(
    path: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, np.ndarray],
    shards: int = 1,
    format: str = "pt",
) -> None:
    """A directory with these tensors as they are. Shards take them in turn, so that those of one
    Linear lie in different files, as may happen."""
    path.mkdir(parents=True, exist_ok=True)
    save_json(path / "config.json", config)
    ends = [config["eos_token_id"], config["bos_token_id"]]
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    save_json(
        path / "generation_config.json",
        {"bos_token_id": ends[1], "eos_token_id": ends, "pad_token_id": ends[1]} | sampling,
    )
    tensors = {name: np.ascontiguousarray(value) for name, value in stored.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": format})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        weight_map |= dict.fromkeys(part, file)
        save_file(part, path / file, {"format": format})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    save_json(path / "model.safetensors.index.json", index)


def save_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
