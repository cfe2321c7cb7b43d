"""What a model would be in a format: its weights with arrays of the right shapes that take no
memory. Which tensor a GGUF file has in which type is said by quantize/types.py, for it writes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qwen3_tg.checkpoint.types import BLOCKS, StoredWeight
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import UsageError

_FLOATS = {
    "bf16": ("bfloat16", "<u2"),
    "f16": ("float16", "<f2"),
    "f32": ("float32", "<f4"),
}
_GGUF_FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
# As the released files are: AWQ and GPTQ in groups of 128, FP8 in blocks of 128, MLX in groups of
# 64 with a router of 8 bits.
_GROUP, _MLX_GROUP, _MLX_ROUTER_BITS = 128, 64, 8
_PACKED = {"fp8": "FP8", "awq": "AWQ", "gptq-int8": "GPTQ", "gptq-int4": "GPTQ"}
_MLX_BITS = {"mlx-8bit": 8, "mlx-4bit": 4}
# iq4_xs has q4_k's types, with IQ4_XS in place of Q4_K
_GGUF = "q8_0 q6_k q5_k_m q5_k q5_1 q5_0 q4_k_m q4_k q4_1 q4_0 iq4_nl iq4_xs q3_k q2_k".split()
FORMS: tuple[str, ...] = (*_FLOATS, *_PACKED, *_MLX_BITS, *_GGUF)


def check_form(typed: str) -> str:
    """The key of FORMS that is meant. Raises UsageError."""
    if form := form_of_name(typed):
        return form
    raise UsageError(f"unknown quantisation {typed!r}; known: {', '.join(FORMS)}")


def form_of_name(text: str) -> str | None:
    """A key of FORMS, as names of models and files say it; None for anything else."""
    form = text.strip().lower()
    others = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "fp16": "f16", "fp32": "f32"}
    form = others.get(form, form)
    form = form if form in FORMS else form.replace("_", "-")
    return form if form in FORMS else None


def stored_as(config: ModelConfig, form: str) -> dict[str, StoredWeight]:
    """Every weight of the model in a form of FORMS."""
    shapes = config.weight_shapes()
    if form in _FLOATS:
        return {name: _float(shape, form) for name, shape in shapes.items()}
    if form in _PACKED:
        rest = "bf16" if form == "fp8" else "f16"
        make = {"fp8": _fp8, "awq": _awq, "gptq-int4": _gptq4, "gptq-int8": _gptq8}[form]
        return {
            name: (make(shape) if name.endswith("_proj.weight") else None) or _float(shape, rest)
            for name, shape in shapes.items()
        }
    if form in _MLX_BITS:
        return {name: _mlx(name, shape, _MLX_BITS[form]) for name, shape in shapes.items()}
    return _gguf({name: _float(shape, "f32") for name, shape in shapes.items()}, config, form)


def _gguf(
    weights: Mapping[str, StoredWeight], config: ModelConfig, form: str
) -> dict[str, StoredWeight]:
    from qwen3_tg.quantize.types import choose_types

    choice = "q4_k" if form == "iq4_xs" else form
    tensors, _ = choose_types(weights, choice, None, config.num_hidden_layers)
    made = {}
    for tensor in tensors:
        type = "IQ4_XS" if form == "iq4_xs" and tensor.type == "Q4_K" else tensor.type
        made[tensor.name] = _blocks(tensor.stored.shape, type)
    return made


def _blocks(shape: tuple[int, ...], type: str) -> StoredWeight:
    if type in _GGUF_FLOATS:
        return _float(shape, _GGUF_FLOATS[type])
    values, nbytes = BLOCKS[type]
    row = shape[-1] // values * nbytes
    return StoredWeight(type, shape, {"blocks": _absent("u1", *shape[:-1], row)})


def _float(shape: tuple[int, ...], form: str) -> StoredWeight:
    format, dtype = _FLOATS[form]
    return StoredWeight(format, shape, {"data": _absent(dtype, *shape)})


# The four below give None for a shape that the format cannot have; such a weight stays float.


def _fp8(shape: tuple[int, ...]) -> StoredWeight | None:
    *lead, O, I = shape
    scales = _absent("<u2", *lead, -(-O // _GROUP), -(-I // _GROUP))
    arrays = {"weight": _absent("u1", *shape), "weight_scale_inv": scales}
    return StoredWeight("FP8", shape, arrays, {"block_size": _GROUP})


def _awq(shape: tuple[int, ...]) -> StoredWeight | None:
    return _grouped("AWQ", shape, 4, pack_inputs=False)


def _gptq4(shape: tuple[int, ...]) -> StoredWeight | None:
    return _grouped("GPTQ", shape, 4, pack_inputs=True)


def _gptq8(shape: tuple[int, ...]) -> StoredWeight | None:
    return _grouped("GPTQ", shape, 8, pack_inputs=True)


def _grouped(
    format: str, shape: tuple[int, ...], bits: int, pack_inputs: bool
) -> StoredWeight | None:
    *lead, O, I = shape
    per_word = 32 // bits
    if O % per_word or I % _GROUP:
        return None
    words = (I // per_word, O) if pack_inputs else (I, O // per_word)
    arrays = {
        "qweight": _absent("<u4", *lead, *words),
        "qzeros": _absent("<u4", *lead, I // _GROUP, O // per_word),
        "scales": _absent("<f2", *lead, I // _GROUP, O),
    }
    params = {"bits": bits, "group_size": _GROUP}
    return StoredWeight(format, shape, arrays, params)


def _mlx(name: str, shape: tuple[int, ...], bits: int) -> StoredWeight:
    if len(shape) == 1 or shape[-1] % _MLX_GROUP:
        return _float(shape, "bf16")
    bits = _MLX_ROUTER_BITS if name.endswith("mlp.gate.weight") else bits
    *rows, I = shape
    arrays = {
        "weight": _absent("<u4", *rows, I * bits // 32),
        "scales": _absent("<u2", *rows, I // _MLX_GROUP),
        "biases": _absent("<u2", *rows, I // _MLX_GROUP),
    }
    return StoredWeight("MLX", shape, arrays, {"bits": bits, "group_size": _MLX_GROUP})


def _absent(dtype: str, *shape: int) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype=dtype), shape)
