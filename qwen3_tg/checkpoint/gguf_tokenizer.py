"""The tokenizer and the chat template in the metadata of a GGUF file.

Byte-level BPE as every Qwen3 has it; the settings that a file only names are those of Qwen's own
tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen3_tg.checkpoint.gguf_metadata import equals, has_id, shown
from qwen3_tg.errors import CheckpointError, UnsupportedError

# tokenizer.ggml.token_type (llama.cpp's enum llama_token_type)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Qwen's pattern of pieces, which a file only names: tokenizer.ggml.pre "qwen2".
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_chat_template(metadata: Mapping[str, Any], where: str) -> str | None:
    """The default template; None where there is none."""
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{where}: tokenizer.chat_template must be a string")
    return template


def read_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of those special tokens that are named, by their key in tokenizer_config.json."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    keys = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    ids = {
        f"{name}_token": metadata[f"tokenizer.ggml.{key}_token_id"]
        for key, name in keys.items()
        if has_id(metadata, f"{key}_token_id")
    }
    if not isinstance(tokens, list):
        return {}
    return {name: tokens[id] for name, id in ids.items() if id < len(tokens)}


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> str | None:
    """The text of a tokenizer.json; None where the file has no tokenizer.

    Byte-level BPE as in Qwen's own tokenizer.json, NFC included, which llama.cpp leaves out.
    Raises UnsupportedError for another kind of tokenizer."""
    model = metadata.get("tokenizer.ggml.model", "none")
    if equals(model, "none") or equals(model, "no_vocab"):
        return None
    for key, value in (("model", "gpt2"), ("pre", "qwen2")):
        if not equals(found := metadata.get(f"tokenizer.ggml.{key}"), value):
            raise UnsupportedError(
                f"{where}: tokenizer.ggml.{key} must be {value!r}, found {shown(found)}; with "
                "Qwen's own tokenizer.json beside the file that is used instead"
            )
    tokens, merges = _strings(metadata, "tokens", where), _strings(metadata, "merges", where)
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.token_type must have a number for each of the {len(tokens)} "
            f"tokens, found {shown(kinds)}"
        )
    allowed = (_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED)
    if not np.isin(kinds, allowed).all():
        id = int(np.argmin(np.isin(kinds, allowed)))
        raise UnsupportedError(
            f"{where}: tokenizer.ggml.token_type of token {id} is {kinds[id]}; known are {allowed}"
        )
    normal = np.flatnonzero(kinds == _NORMAL).tolist()
    vocab = {tokens[id]: id for id in normal}
    if len(vocab) < len(normal):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens has the same token twice")
    added = [
        _added_token(id, tokens[id], special=bool(kinds[id] == _CONTROL))
        for id in np.flatnonzero(np.isin(kinds, (_CONTROL, _USER_DEFINED))).tolist()
    ]
    return _tokenizer_json(vocab, merges, added)


def _tokenizer_json(
    vocab: Mapping[str, int], merges: Sequence[str], added: Iterable[Mapping[str, Any]]
) -> str:
    """Settings as in Qwen's own file."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": _QWEN2_PIECES},
        "behavior": "Isolated",
        "invert": False,
    }
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": bpe,
    }
    return json.dumps(whole, ensure_ascii=False)


def _added_token(id: int, token: str, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": token, **plain, "special": special}


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.{key} must be an array of strings, found {shown(value)}"
        )
    return value
