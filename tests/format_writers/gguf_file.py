"""GGUF files as llama.cpp's converter and quantiser write them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from format_writers.gguf_blocks import dequantise, quantise
from format_writers.model import Config, Weights

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def gguf_name(name: str) -> str:
    """A Hugging Face tensor name -> its GGUF name. Experts have one tensor together."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    assert match, name
    layer, module = match.groups()
    return f"blk.{layer}.{_IN_LAYER[re.sub(r'experts.[0-9]+', 'experts', module)]}.weight"


def gguf_parts(path: Path) -> list[Path]:
    """The files that `write_gguf(path, ...)` wrote: `path`, or its parts in order."""
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def write_gguf(
    path: Path,
    config: Config,
    weights: Weights,
    type_of: Callable[[str], str] | str = "F32",
    version: int = 3,
    split: int = 1,
    empty_first_part: bool = False,
    tied_output: bool = False,
    tokenizer: Path | None = None,
    chat_template: str | None = None,
    alignment: int | None = None,
    extra_keys: dict[str, Any] | None = None,
) -> Weights:
    """The file `path`, or with `split` parts NAME-00001-of-0000N.gguf beside it (`gguf_parts`).

    `type_of` gives the type of a tensor by its GGUF name ("Q4_K", ...); norms and the router are
    F32 whatever it says. Tied embeddings are without output.weight, unless `tied_output`: then the
    result has lm_head.weight, which may have another type and so other values. A split file may
    have a first part without tensors. `extra_keys` are strings, ints, floats and bools."""
    assert path.suffix == ".gguf", path
    weights = dict(weights)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
        if tied_output:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    names: dict[str, list[str]] = {}  # GGUF name -> one name, or those of all experts
    for name in weights:
        names.setdefault(gguf_name(name), []).append(name)
    holding = split - 1 if empty_first_part else split
    writer = GGUFWriter(
        path,
        "qwen3moe" if config["model_type"] == "qwen3_moe" else "qwen3",
        split_max_tensors=-(-len(names) // holding) if split > 1 else 0,
        small_first_shard=empty_first_part,
    )
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    _add_model_keys(writer, config)
    if tokenizer is not None:
        _add_tokenizer_keys(writer, config, tokenizer, chat_template)
    for key, value in (extra_keys or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_float32)(key, value)
    oracle: Weights = {}
    for name, sources in names.items():
        stacked = "_exps" in name
        W = np.stack([weights[s] for s in sources]) if stacked else weights[sources[0]]
        float32 = W.ndim == 1 or "ffn_gate_inp" in name
        kind = "F32" if float32 else type_of if isinstance(type_of, str) else type_of(name)
        stored = quantise(W, kind)
        writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType[kind])
        values = dequantise(stored, kind)
        assert values.shape == W.shape, f"{name}: {values.shape}, expected {W.shape}"
        oracle |= dict(zip(sources, values if stacked else [values], strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = gguf_parts(path)
    assert len(parts) == split, f"{len(parts)} parts, expected {split}"
    for part in parts:
        _set_version(part, version)
    return {name: oracle[name] for name in weights}


def _set_version(path: Path, version: int) -> None:
    with path.open("r+b") as file:
        file.seek(4)
        file.write(version.to_bytes(4, "little"))


def _add_model_keys(writer: GGUFWriter, config: Config) -> None:
    arch = writer.arch
    integers = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
    }
    if arch == "qwen3moe":
        integers |= {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        }
    writer.add_string("general.type", "model")
    writer.add_string("general.name", "Random Qwen3")
    for key, ours in integers.items():
        writer.add_uint32(f"{arch}.{key}", config[ours])
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{arch}.rope.freq_base", float(config["rope_theta"]))
    if scaling := config["rope_scaling"]:
        writer.add_string(f"{arch}.rope.scaling.type", scaling["rope_type"])
        writer.add_float32(f"{arch}.rope.scaling.factor", scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            length = scaling["original_max_position_embeddings"]
            writer.add_uint32(f"{arch}.rope.scaling.original_context_length", length)
    writer.add_uint32("general.file_type", 15)  # any number occurs: a reader goes by the tensors
    writer.add_uint32("general.quantization_version", 2)


def _add_tokenizer_keys(
    writer: GGUFWriter, config: Config, tokenizer: Path, chat_template: str | None
) -> None:
    """The vocabulary of a tokenizer.json, with names for the ids up to vocab_size."""
    raw = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokens = {id: (token, NORMAL) for token, id in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]] = (token["content"], kind)
    assert max(tokens) < config["vocab_size"], "the model is too small for this tokenizer"
    for id in range(config["vocab_size"]):
        tokens.setdefault(id, (f"[PAD{id}]", UNUSED))
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.add_array("tokenizer.ggml.tokens", [tokens[id][0] for id in sorted(tokens)])
    writer.add_array("tokenizer.ggml.token_type", [tokens[id][1] for id in sorted(tokens)])
    writer.add_array("tokenizer.ggml.merges", merges)
    by_name = {token: id for id, (token, _) in tokens.items()}
    end_of_text = by_name["<|endoftext|>"]
    writer.add_uint32("tokenizer.ggml.eos_token_id", by_name["<|im_end|>"])
    writer.add_uint32("tokenizer.ggml.padding_token_id", end_of_text)
    writer.add_uint32("tokenizer.ggml.bos_token_id", end_of_text)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    if chat_template is not None:
        writer.add_string("tokenizer.chat_template", chat_template)
