"""The model that is meant: on this machine, on the hub, or in the table of released ones.

Only headers are read, so a model of any size costs a few requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_tg.checkpoint import StoredWeight, locate, open_checkpoint
from qwen3_tg.checkpoint.gguf import Part, checkpoint_of
from qwen3_tg.checkpoint.gguf_header import read_header
from qwen3_tg.checkpoint.gguf_names import choose_gguf, gguf_models
from qwen3_tg.checkpoint.hf_directory import fit_weights, shard_names
from qwen3_tg.checkpoint.remote import open_remote, remote_files
from qwen3_tg.checkpoint.safetensors_file import RawTensor, absent_tensors
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import CheckpointError
from qwen3_tg.plan.forms import stored_as
from qwen3_tg.plan.released import Released, find_released

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Source:
    """A model to plan for. `where` says where it was found. `form` is a key of FORMS, or None where
    the weights are those of a file; `is_open` says that the user left the format open: a bare name,
    for which every format is of interest. `is_here`: the weights can be read."""

    name: str
    where: str
    config: ModelConfig
    weights: Mapping[str, StoredWeight]
    form: str | None
    is_open: bool = False
    notes: tuple[str, ...] = ()
    is_here: bool = False


def find_source(model: str, form_is_given: bool, note: Callable[[str], None]) -> Source:
    """The model of a path, a name in the hub's cache or on the hub, or of a released model.

    A released model of which only the shape is asked for, as a bare name does or one together with
    a format, is answered without the network. `note` is told what the user waits for. Raises
    CheckpointError, one line."""
    released = find_released(model)
    try:
        path = locate(model)
    except CheckpointError as e:
        if released and ("/" not in model or form_is_given):
            return _from_table(released)
        if released is None and not _is_hub_name(model):
            raise
        note(f"reading the headers of {model} on the hub")
        try:
            return _open_remote_model(model)
        except CheckpointError as remote:
            if released is None:
                raise CheckpointError(f"{e}; and the hub: {remote}") from None
            return _from_table(released, f"{remote}; taken from the built-in table instead")
    checkpoint = open_checkpoint(model)
    return Source(
        model,
        str(path),
        checkpoint.config,
        checkpoint.weights,
        None,
        notes=checkpoint.notes,
        is_here=True,
    )


def _from_table(released: Released, *notes: str) -> Source:
    form = released.form or "bf16"
    return Source(
        released.name,
        "the built-in table of released models",
        released.config,
        stored_as(released.config, form),
        form,
        is_open=released.form is None,
        notes=notes,
    )


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and model[-1] != "/"


def _open_remote_model(typed: str) -> Source:
    name, _, kind = typed.partition(":")
    files = remote_files(name)
    models = gguf_models(files)
    if kind or (models and not any(file.endswith(".safetensors") for file in files)):
        return _open_remote_gguf(name, kind, models, list(files))
    for needed in ("config.json", _SINGLE if _SINGLE in files else _INDEX):
        if needed not in files:
            raise CheckpointError(
                f"{name}: no {needed} in it on the hub; not a model in safetensors"
            )
    raw = _remote_json(name, "config.json")
    if "quantization_config" not in raw and "quantize_config.json" in files:
        old = {"quant_method": "gptq"} | _remote_json(name, "quantize_config.json")
        raw |= {"quantization_config": old}
    config = ModelConfig.from_dict(raw, where=f"{name}/config.json")
    shards = [_SINGLE]
    if _SINGLE not in files:
        shards = shard_names(_remote_json(name, _INDEX).get("weight_map"), f"{name}/{_INDEX}")
    tensors: dict[str, RawTensor] = {}
    for shard in shards:
        if shard not in files:
            raise CheckpointError(f"{name}: {shard} is not on the hub, though its index names it")
        with closing(open_remote(name, shard)) as file:
            tensors |= absent_tensors(file, files[shard].size, f"{name}/{shard}")
    return Source(name, "the hub", config, fit_weights(tensors, config, raw, name), None)


def _open_remote_gguf(
    name: str, kind: str, models: Mapping[str, list[str]], files: list[str]
) -> Source:
    if not kind and len(models) > 1:
        raise CheckpointError(
            f"{name} has several models; say which: "
            + " or ".join(f"{name}:{each}" for each in models)
        )
    kind = kind or next(iter(models))
    chosen, sizes = choose_gguf(files, kind, name), remote_files(name)
    parts = []
    for filename in chosen:
        with closing(open_remote(name, filename)) as file:
            header = read_header(file, sizes[filename].size, f"{name}/{filename}")
        parts.append(Part(filename, header))
    found = checkpoint_of(parts, Path(f"{name}/{chosen[0]}"))
    return Source(f"{name}:{kind}", "the hub", found.config, found.weights, None, notes=found.notes)


def _remote_json(name: str, filename: str) -> dict[str, Any]:
    with closing(open_remote(name, filename)) as file:
        data = file.read()
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{name}/{filename}: not readable as JSON: {e}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}/{filename}: expected a JSON object")
    return found
