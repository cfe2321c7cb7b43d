"""Reader of Hugging Face directories: config.json and safetensors, in one file or in shards.

The `safetensors` library checks each file's header; the values are then numpy views of the mapped
file, because the library's numpy side knows no bfloat16 and copies.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qwen3_tg.checkpoint.types import Checkpoint, StoredWeight
from qwen3_tg.config import GenerationConfig, ModelConfig, read_json
from qwen3_tg.errors import CheckpointError

_FORMATS = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
_OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".npz")
_MAX_LISTED = 8  # problems named in one error


def open_hf_directory(path: Path) -> Checkpoint:
    """Open a directory with config.json, model.safetensors (or shards with their index), and
    optionally generation_config.json, tokenizer.json and a chat template.

    Reads headers only. Raises CheckpointError, one for all tensors that do not fit."""
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config.json in it; expected a Hugging Face model directory"
        )
    raw = read_json(path / "config.json")
    config = ModelConfig.from_dict(raw, where=str(path / "config.json"))
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    tokenizer_file = path / "tokenizer.json"
    texts_path = path / "tokenizer_config.json"
    texts = read_json(texts_path) if texts_path.is_file() else {}
    return Checkpoint(
        path=path,
        config=config,
        generation=GenerationConfig.from_dicts(generation, raw, where=str(generation_path)),
        weights=_check(_read_weights(path), config, path),
        tokenizer_file=tokenizer_file if tokenizer_file.is_file() else None,
        chat_template=_read_chat_template(path, texts),
        special_tokens=_read_special_tokens(texts),
    )


def _read_weights(path: Path) -> dict[str, StoredWeight]:
    index_path = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return _read_safetensors(path / "model.safetensors")
    if not index_path.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in _OTHER_FORMATS)
        raise CheckpointError(
            f"{path}: no weights: neither model.safetensors nor model.safetensors.index.json; "
            + (f"{others[0]}: not supported yet" if others else "is the download complete?")
        )
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path}: no weight_map in it")
    if wrong := [name for name in weight_map.values() if not _is_file_name(name)]:
        raise CheckpointError(f"{index_path}: weight_map must name files beside it: {wrong[0]!r}")
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''}; is the download complete?"
        )
    weights: dict[str, StoredWeight] = {}
    for name in shards:
        tensors = _read_safetensors(path / name)
        if twice := sorted(set(weights) & set(tensors)):
            raise CheckpointError(f"{path / name}: {twice[0]} is in another shard too")
        weights |= tensors
    if lost := sorted(set(weight_map) - set(weights)):
        raise CheckpointError(f"{index_path}: {lost[0]} is in no shard ({len(lost)} such tensors)")
    return weights


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and not set(name) & set("/\\")


def _read_safetensors(path: Path) -> dict[str, StoredWeight]:
    if not os.access(path, os.R_OK):  # the library would say that it does not exist
        raise CheckpointError(f"{path}: not readable: permission denied")
    try:
        with safe_open(path, framework="numpy"):  # the library's check of header and file length
            pass
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({e}); download it again"
        ) from None
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + header_bytes)
    weights: dict[str, StoredWeight] = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in _FORMATS:
            raise CheckpointError(
                f"{path}: {name} has dtype {info['dtype']}; expected F32, F16 or BF16"
            )
        format, dtype = _FORMATS[info["dtype"]]
        start, end = info["data_offsets"]
        weights[name] = StoredWeight(
            format, mapped[start:end].view(dtype).reshape(tuple(info["shape"]))
        )
    return weights


def _check(
    weights: dict[str, StoredWeight], config: ModelConfig, path: Path
) -> dict[str, StoredWeight]:
    """The weights the model has, in its order; everything that does not fit, in one error."""
    expected = config.weight_shapes()
    if config.tie_word_embeddings:  # stored all the same by some: it equals the embedding
        weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {weights[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        more = len(problems) - _MAX_LISTED
        raise CheckpointError(
            f"{path}: the weights do not fit config.json: {'; '.join(problems[:_MAX_LISTED])}"
            f"{f'; and {more} more' if more > 0 else ''}"
        )
    return {name: weights[name] for name in expected}


def _read_chat_template(path: Path, texts: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or else what tokenizer_config.json, `texts`, has: a string, or a list of
    named ones, of which `default` is taken."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{file}: not readable: {e}") from None
    template = texts.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: chat_template must be a string, "
            f"found {type(template).__name__}"
        )
    return template


def _read_special_tokens(texts: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = texts.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[key] = token
    return found
