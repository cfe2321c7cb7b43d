"""What a GGUF file says besides its tensors: the model's shape and its tokenizer.

Keys and their meaning: ggml-org/ggml, docs/gguf.md, and what llama.cpp's converter writes for
Qwen3 (conversion/qwen.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter

from qwen3_tg.checkpoint.types import Checkpoint
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import CheckpointError, UnsupportedError

QUANTIZATION_VERSION = 2  # of ggml's blocks
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
# The split pattern that llama.cpp calls qwen2, which no GGUF file spells out.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def architecture(config: ModelConfig) -> str:
    """The value of general.architecture. Raises UnsupportedError for what GGUF cannot say."""

    def refuse(what: str) -> None:
        raise UnsupportedError(
            f"a GGUF file cannot say {what}: this model cannot be written as one"
        )

    if config.yarn and not config.yarn.truncate:
        refuse("that YaRN does not truncate (truncate false)")
    if not config.num_experts:
        return "qwen3"
    if not config.norm_topk_prob:
        refuse("norm_topk_prob false (llama.cpp always normalises the weights of the experts)")
    dense = [i for i in range(config.num_hidden_layers) if not config.is_mixture(i)]
    if dense:
        refuse(f"which layers have no experts, and layer {dense[0]} has none (mlp_only_layers)")
    return "qwen3moe"


def add_model(writer: GGUFWriter, checkpoint: Checkpoint, name: str, file_type: int) -> None:
    """The keys of the model, and the checkpoint's advice for sampling."""
    config, advice = checkpoint.config, checkpoint.generation
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    yarn = config.yarn
    longest = max(config.max_position_embeddings, yarn.longest if yarn else 0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(longest)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if yarn:
        _add_yarn(writer, config)
    writer.add_sampling_temp(advice.temperature)
    writer.add_sampling_top_p(advice.top_p)
    writer.add_sampling_top_k(advice.top_k)
    writer.add_sampling_min_p(advice.min_p)


def _add_yarn(writer: GGUFWriter, config: ModelConfig) -> None:
    yarn, prefix = config.yarn, f"{writer.arch}.rope.scaling"
    assert yarn
    writer.add_string(f"{prefix}.type", "yarn")
    writer.add_float32(f"{prefix}.factor", yarn.factor)
    writer.add_uint32(f"{prefix}.original_context_length", yarn.original_max_position_embeddings)
    # llama.cpp multiplies the paper's factor by this one
    usual = 0.1 * math.log(yarn.factor) + 1
    if not math.isclose(yarn.attention_factor, usual, rel_tol=1e-7):
        writer.add_float32(f"{prefix}.attn_factor", yarn.attention_factor / usual)
    for key, value, default in (
        ("yarn_beta_fast", yarn.beta_fast, 32.0),
        ("yarn_beta_slow", yarn.beta_slow, 1.0),
    ):
        if value != default:
            writer.add_float32(f"{prefix}.{key}", value)


def add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> list[str]:
    """The vocabulary, merges and chat template; gives what the user should know.

    Raises CheckpointError for a tokenizer that is not this model's or not a Qwen one."""
    if checkpoint.tokenizer is None:
        return ["the checkpoint has no tokenizer.json: the file has none, and llama.cpp needs one"]
    raw, where = _read(checkpoint)
    tokens, types = _tokens(raw, checkpoint.config.vocab_size, where)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ids = {token: id for id, token in enumerate(tokens) if types[id] != _UNUSED}
    end_of_text = ids.get("<|endoftext|>")
    eos = ids.get(checkpoint.special_tokens.get("eos_token", ""))
    ends = checkpoint.generation.eos_token_ids
    eos = eos if eos is not None else ends[0] if ends else end_of_text
    padding = ids.get(checkpoint.special_tokens.get("pad_token", ""), end_of_text)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if padding is not None:
        writer.add_pad_token_id(padding)
    if end_of_text is not None:
        writer.add_bos_token_id(end_of_text)
    writer.add_add_bos_token(False)
    if checkpoint.chat_template:
        writer.add_chat_template(checkpoint.chat_template)
    if QWEN2_PATTERN not in _patterns(raw.get("pre_tokenizer")):
        return ["its tokenizer splits words in another way than Qwen's: llama.cpp will not know it"]
    return []


def _read(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """tokenizer.json, parsed and known to have a byte-pair vocabulary; where it is from."""
    source = checkpoint.tokenizer
    assert source is not None
    where = f"{checkpoint.path}: its tokenizer" if isinstance(source, str) else str(source)
    try:
        raw = json.loads(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
        model = raw["model"]
        if model.get("type", "BPE") == "BPE" and model["vocab"] and model["merges"]:
            return raw, where
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{where}: not a readable tokenizer.json: {e}") from None
    raise CheckpointError(f"{where}: not a byte-pair vocabulary, which every Qwen3 has")


def _tokens(raw: Mapping[str, Any], size: int, where: str) -> tuple[list[str], list[int]]:
    """All tokens by id, and their types; ids without a token get a name."""
    found = {id: (token, _NORMAL) for token, id in raw["model"]["vocab"].items()}
    for token in raw.get("added_tokens") or []:
        kind = _CONTROL if token.get("special") else _USER_DEFINED
        found[token["id"]] = (token["content"], kind)
    if (most := max(found) + 1) > size:
        raise CheckpointError(
            f"{where}: it has {most} tokens, but the model only {size}: it is the tokenizer of "
            "another model"
        )
    filled = [found.get(id, (f"[PAD{id}]", _UNUSED)) for id in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _patterns(pre_tokenizer: Any) -> list[str]:
    """The regular expressions of the splits in a pre_tokenizer."""
    if not isinstance(pre_tokenizer, Mapping):
        return []
    pattern = pre_tokenizer.get("pattern")
    own = [pattern["Regex"]] if isinstance(pattern, Mapping) and "Regex" in pattern else []
    return own + [p for part in pre_tokenizer.get("pretokenizers") or [] for p in _patterns(part)]
