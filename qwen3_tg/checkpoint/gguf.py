"""Reader of GGUF files, whole or in parts, of models of the architectures qwen3 and qwen3moe.

Everything is in the file: config, tokenizer and chat template come from its metadata. A
tokenizer.json beside the file, which is the original, is preferred.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_tg.checkpoint import gguf_metadata as meta
from qwen3_tg.checkpoint.complete import refuse_absent_layers, refuse_misfits
from qwen3_tg.checkpoint.gguf_header import TYPES, Header, TensorInfo, printable, read_header
from qwen3_tg.checkpoint.gguf_names import tensor_name
from qwen3_tg.checkpoint.gguf_tokenizer import (
    read_chat_template,
    read_special_tokens,
    read_tokenizer,
)
from qwen3_tg.checkpoint.types import Checkpoint, StoredWeight
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import CheckpointError

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# type in the file -> (format, numpy's type); everything else is blocks of bytes
_FLOATS = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}


@dataclass(frozen=True)
class Part:
    """One file: its name, its header, and its mapped bytes; None where it is not on this
    machine."""

    name: str
    header: Header
    mapped: np.ndarray | None = None


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or all parts of a model by any one of them. Reads headers only.

    Raises CheckpointError naming the file, and the key or tensor that is at fault."""
    first = _open_part(path)
    paths = part_paths(path, first.header)
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(paths)} parts missing: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''}; is the download complete?"
        )
    parts = [first if part == path else _open_part(part) for part in paths]
    original = path.with_name("tokenizer.json")
    return checkpoint_of(parts, path, original if original.is_file() else None)


def part_paths(path: Path, header: Header) -> list[Path]:
    """The files of the model that a file with this header belongs to, in order.

    Raises CheckpointError if its name is not that of a part."""
    count = header.metadata.get("split.count", 1)
    if type(count) is int and count in (0, 1):
        return [path]
    match = _PART_NAME.fullmatch(path.name)
    if type(count) is not int or not match or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: it says that it is one of {meta.shown(count)} parts (split.count), but its "
            "name does not end in -00001-of-0000N.gguf with that number; give it the name it was "
            "released with"
        )
    return [path.with_name(f"{match[1]}-{n + 1:05}-of-{match[3]}.gguf") for n in range(count)]


def checkpoint_of(parts: Sequence[Part], path: Path, tokenizer: Path | None = None) -> Checkpoint:
    """The model of all its parts in order; `path` is what errors name. A part without mapped bytes
    has arrays of zeros that take no memory."""
    tensors = _join(parts, path)
    metadata, where = parts[0].header.metadata, str(path)
    config = _read_config(metadata, tensors, where)
    return Checkpoint(
        path=path,
        config=config,
        generation=meta.read_generation(metadata, where),
        weights=_fit_weights(tensors, config, where),
        tokenizer=tokenizer or read_tokenizer(metadata, where),
        chat_template=read_chat_template(metadata, where),
        special_tokens=read_special_tokens(metadata),
    )


Tensors = dict[str, tuple[TensorInfo, Part]]


def _open_part(path: Path) -> Part:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path}: not a file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = read_header(file, size, str(path))
        return Part(path.name, header, np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as e:
        raise CheckpointError(f"{path}: not readable: {e.strerror or e}") from None


def _join(parts: Sequence[Part], path: Path) -> Tensors:
    """The tensors of all parts, after checking that the parts belong together."""
    tensors: Tensors = {}
    for n, part in enumerate(parts):
        keys = part.header.metadata
        where = path.with_name(part.name)
        for key, value in (("split.no", n), ("split.count", len(parts))):
            if len(parts) > 1 and (type(keys.get(key)) is not int or keys[key] != value):
                raise CheckpointError(
                    f"{where}: {key} must be {value} in this part, "
                    f"found {meta.shown(keys.get(key))}; it belongs to another file"
                )
        for tensor in part.header.tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name][1].name
                raise CheckpointError(f"{where}: {printable(tensor.name)} is in {other} too")
            tensors[tensor.name] = tensor, part
    announced = parts[0].header.metadata.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and (type(announced) is not int or announced != len(tensors)):
        raise CheckpointError(
            f"{path}: split.tensors.count is {meta.shown(announced)}, but its {len(parts)} parts "
            f"have {len(tensors)} tensors; they belong to different models"
        )
    return tensors


def _read_config(metadata: Mapping[str, Any], tensors: Tensors, where: str) -> ModelConfig:
    meta.read_architecture(metadata, where)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{where}: missing token_embd.weight; is the download complete?")
    rows = tensors["token_embd.weight"][0].shape[0]
    config = meta.read_config(metadata, rows, "output.weight" not in tensors, where)
    refuse_absent_layers(config.num_hidden_layers, len(tensors), where)
    return config


def _fit_weights(tensors: Tensors, config: ModelConfig, where: str) -> dict[str, StoredWeight]:
    """The weights the model has, in its order; everything that does not fit, in one error."""
    weights, problems, left = {}, [], dict(tensors)
    for name, shape in config.weight_shapes().items():
        stored_name = tensor_name(name)
        if (found := left.pop(stored_name, None)) is None:
            problems.append(f"missing {stored_name}")
            continue
        tensor, part = found
        if tensor.shape != shape:
            problems.append(f"{stored_name} has shape {tensor.shape}, expected {shape}")
        elif len(shape) == 1 and tensor.type not in _FLOATS:
            problems.append(f"{stored_name} has type {tensor.type}, expected {', '.join(_FLOATS)}")
        else:
            weights[name] = _stored(tensor, part)
    problems += [f"unexpected {printable(name)}" for name in left]
    refuse_misfits(problems, where, "its metadata")
    return weights


def _stored(tensor: TensorInfo, part: Part) -> StoredWeight:
    format, dtype = _FLOATS.get(tensor.type, (tensor.type, "u1"))
    shape = tensor.shape
    if tensor.type not in _FLOATS:
        block, block_bytes = TYPES[tensor.type]
        shape = (*shape[:-1], shape[-1] // block * block_bytes)
    if part.mapped is None:
        array = np.broadcast_to(np.zeros((), dtype), shape)
    else:
        start = part.header.data_start + tensor.offset
        array = part.mapped[start : start + tensor.nbytes].view(dtype).reshape(shape)
    key = "data" if tensor.type in _FLOATS else "blocks"
    return StoredWeight(format, tensor.shape, {key: array})
