"""GGUF, llama.cpp's format: one file, or parts, with the config as metadata.

The library gguf finds keys and tensors and decodes blocks; here is what they mean in a Qwen3. Rows
of q_proj and k_proj are in the order of Hugging Face.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from qwen3_tg_numpy.checkpoint import Stored, fit
from qwen3_tg_numpy.config import CheckpointError, ModelConfig
from qwen3_tg_numpy.gguf_config import config_json
from qwen3_tg_numpy.quantised import Packed

Type = GGMLQuantizationType

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Stored], tuple[int, ...]]:
    """Config, weights and end tokens of a .gguf file, or of all parts where it is one of several.
    Nothing is decoded. Raises CheckpointError."""
    parts = _open_parts(path)
    metadata = _metadata(parts[0])
    stored: dict[str, Stored] = {}
    problems: list[str] = []
    for reader in parts:
        for tensor in reader.tensors:
            try:
                weights = _weights(tensor)
            except NotImplementedError:
                problems.append(
                    f"{tensor.name}: type {tensor.tensor_type.name} is not decoded here"
                )
                continue
            problems += [f"{name} is in two parts" for name in weights if name in stored]
            stored |= weights
    embedding = stored.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: missing token_embd.weight, a matrix")
    raw = config_json(metadata, str(path)) | {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in stored,
    }
    config = ModelConfig.from_dict(raw, where=str(path))
    shapes = config.weight_shapes()
    problems += [f"unexpected {name}" for name in stored if name not in shapes]
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return config, fit(stored, shapes, problems, str(path)), () if eos is None else (eos,)


def _weights(tensor: ReaderTensor) -> dict[str, Stored]:
    """A tensor by its Hugging Face name, a stack of experts (E, O, I) by E names. Raises
    NotImplementedError for a type that gguf does not decode."""
    name = tensor.name
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
        if match[2] in LAYER:
            name = f"model.layers.{match[1]}.{LAYER[match[2]]}.weight"
    elif (top := tensor.name.removesuffix(".weight")) in TOP and top != tensor.name:
        name = f"{TOP[top]}.weight"
    if "{}" not in name:
        return {name: weight_of(tensor.tensor_type, tensor.data)}
    if tensor.data.ndim != 3:
        return {tensor.name: weight_of(tensor.tensor_type, tensor.data)}  # not a stack: unexpected
    kind = tensor.tensor_type
    return {name.format(e): weight_of(kind, expert) for e, expert in enumerate(tensor.data)}


def weight_of(kind: Type, data: np.ndarray) -> Stored:
    """A tensor of this type. data: (..., I) floats, or (..., bytes of a row)

    Raises NotImplementedError where gguf has no decoder."""
    if kind in (Type.F32, Type.F16):
        return data
    if kind == Type.BF16:
        return data.view("<u2")
    dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)  # is there a decoder?
    if data.ndim != 2:
        decoded: np.ndarray = dequantize(data, kind)
        return decoded
    block, size = GGML_QUANT_SIZES[kind]
    return Packed((len(data), data.shape[1] // size * block), partial(_decode, kind, data))


def _decode(kind: Type, data: np.ndarray, rows: np.ndarray) -> np.ndarray:
    values: np.ndarray = dequantize(data[rows], kind)
    return values


def _open_parts(path: Path) -> list[GGUFReader]:
    """The readers of all parts, in order, given any of them."""
    reader = _open(path)
    count = _metadata(reader).get("split.count", 1)
    if type(count) is not int:
        raise CheckpointError(f"{path}: split.count must be a number, found {count!r:.60}")
    if count in (0, 1):
        return [reader]
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: one of {count} parts: expected a name like NAME-00001-of-{count:05d}.gguf"
        )
    files = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf") for i in range(count)]
    if lost := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path}: parts not there: {', '.join(lost)}")
    readers = [reader if file == path else _open(file) for file in files]
    for i, (file, part) in enumerate(zip(files, readers, strict=True)):
        found = _metadata(part).get("split.no")
        if found != i:
            raise CheckpointError(f"{file}: split.no must be {i}, found {found!r}")
    total = sum(len(part.tensors) for part in readers)
    expected = _metadata(readers[0]).get("split.tensors.count", total)
    if total != expected:
        raise CheckpointError(
            f"{files[0]}: split.tensors.count says {expected} tensors, the parts have {total}"
        )
    return readers


def _open(path: Path) -> GGUFReader:
    try:
        reader = GGUFReader(path)
    except OSError as e:
        raise CheckpointError(f"{path}: expected a GGUF file, found: {e}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as e:
        raise CheckpointError(
            f"{path}: not a whole GGUF file ({e}); is it fully downloaded?"
        ) from None
    if reader.endianess != GGUFEndian.LITTLE:
        raise CheckpointError(f"{path}: expected a little-endian GGUF file, found a big-endian one")
    return reader


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """Every key but the long lists of the tokenizer."""
    skipped = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
    return {key: f.contents() for key, f in reader.fields.items() if key not in skipped}
