"""Reader of Hugging Face directories: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_tg.checkpoint.assemble import assemble
from qwen3_tg.checkpoint.complete import refuse_misfits
from qwen3_tg.checkpoint.quantization import read_quantization
from qwen3_tg.checkpoint.safetensors_file import RawTensor, read_safetensors
from qwen3_tg.checkpoint.types import Checkpoint, StoredWeight
from qwen3_tg.config import GenerationConfig, ModelConfig, read_json
from qwen3_tg.errors import CheckpointError

_MANY_LAYERS = 1000  # so many more than there are tensors are no incomplete download
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".npz")


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
    raw = _with_quantize_config(raw, path)
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    tokenizer_file = path / "tokenizer.json"
    texts_path = path / "tokenizer_config.json"
    texts = read_json(texts_path) if texts_path.is_file() else {}
    return Checkpoint(
        path=path,
        config=config,
        generation=GenerationConfig.from_dicts(generation, raw, where=str(generation_path)),
        weights=fit_weights(_read_tensors(path), config, raw, str(path)),
        tokenizer=tokenizer_file if tokenizer_file.is_file() else None,
        chat_template=_read_chat_template(path, texts),
        special_tokens=_read_special_tokens(texts),
    )


def fit_weights(
    tensors: Mapping[str, RawTensor], config: ModelConfig, raw: Mapping[str, Any], where: str
) -> dict[str, StoredWeight]:
    """The weights the model has, in its order; everything that does not fit, in one error. `raw`
    is config.json."""
    quantization = read_quantization(raw, f"{where}/config.json")
    if config.num_hidden_layers > _MANY_LAYERS + len(tensors):  # before a list of all is made
        raise CheckpointError(
            f"{where}: config.json announces {config.num_hidden_layers} layers, but there are only "
            f"{len(tensors)} tensors; is the download complete?"
        )
    made = assemble(tensors, config.weight_shapes(), quantization)
    problems = made.problems + [
        f"unexpected {name}"
        for name in made.unused
        # stored all the same by some: it equals the embedding
        if not (config.tie_word_embeddings and name.startswith("lm_head."))
    ]
    refuse_misfits(problems, where)
    return made.weights


def _with_quantize_config(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Old GPTQ checkpoints keep their settings in a file of their own."""
    file = path / "quantize_config.json"
    if "quantization_config" in raw or not file.is_file():
        return raw
    return raw | {"quantization_config": {"quant_method": "gptq"} | read_json(file)}


def _read_tensors(path: Path) -> dict[str, RawTensor]:
    index_path = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return read_safetensors(path / "model.safetensors")
    if not index_path.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in _OTHER_FORMATS)
        raise CheckpointError(
            f"{path}: no weights: neither model.safetensors nor model.safetensors.index.json; "
            + (f"{others[0]}: not supported" if others else "is the download complete?")
        )
    weight_map = read_json(index_path).get("weight_map")
    shards = shard_names(weight_map, str(index_path))
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''}; is the download complete?"
        )
    tensors: dict[str, RawTensor] = {}
    for name in shards:
        found = read_safetensors(path / name)
        if twice := sorted(set(tensors) & set(found)):
            raise CheckpointError(f"{path / name}: {twice[0]} is in another shard too")
        tensors |= found
    if lost := sorted(set(weight_map or ()) - set(tensors)):
        raise CheckpointError(f"{index_path}: {lost[0]} is in no shard ({len(lost)} such tensors)")
    return tensors


def shard_names(weight_map: Any, where: str) -> list[str]:
    """The files that an index names, each beside it. Raises CheckpointError."""
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where}: no weight_map in it")
    if wrong := [name for name in weight_map.values() if not _is_file_name(name)]:
        raise CheckpointError(f"{where}: weight_map must name files beside it: {wrong[0]!r}")
    return sorted(set(weight_map.values()))


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and not set(name) & set("/\\")


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
