"""AWQ, GPTQ, block-wise FP8 and MLX: safetensors directories with packed Linear layers.

W is (O, I): output rows, input columns. q are the stored unsigned integers, z their zero points.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from format_writers.model import (
    DTYPES,
    Config,
    Weights,
    is_linear,
    rounded,
    save_json,
    write_safetensors,
)

# Of eight neighbours, which one each nibble of a word holds, lowest first (AutoAWQ's "gemm").
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST_E4M3 = 448.0


def pack_bits(q: np.ndarray, bits: int) -> np.ndarray:
    """One bit stream a row, from the lowest bit of the first word on: (..., n) -> (..., n*bits/32)
    uint32."""
    stream = (q[..., None] >> np.arange(bits)) & 1  # (..., n, bits)
    words = stream.reshape(*q.shape[:-1], -1, 32).astype(np.uint64)
    return (words << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)


def write_awq(
    path: Path,
    config: Config,
    weights: Weights,
    group_size: int = 128,
    skip: Collection[str] | None = None,
    dtype: str = "float16",
    shards: int = 1,
    **quantization: Any,
) -> Weights:
    """4 bits, "gemm" layout. Linears whose name holds a part of `skip` stay float; `dtype` is that
    of scales and of what is not quantised; `quantization` replaces keys of the config's block, None
    takes a key away."""
    stored, oracle = {}, {}
    for name, W in weights.items():
        module = name.removesuffix(".weight")
        if not is_linear(name) or any(part in name for part in skip or ()):
            stored[name], oracle[name] = W.astype(DTYPES[dtype]), rounded(W, dtype)
            continue
        size = W.shape[1] if group_size == -1 else group_size
        grouped = W.reshape(W.shape[0], -1, size)  # (O, G, group)
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)  # (O, G)
        scale = rounded((high - low) / 15, dtype)
        z = np.clip(np.round(-low / scale), 0, 15)
        q = np.clip(np.round(grouped / scale[..., None]) + z[..., None], 0, 15)
        oracle[name] = ((q - z[..., None]) * scale[..., None]).reshape(W.shape)
        q = q.reshape(W.shape)
        stored[f"{module}.qweight"] = _pack_awq(q.T)
        stored[f"{module}.qzeros"] = _pack_awq(z.T)
        stored[f"{module}.scales"] = scale.T.astype(DTYPES[dtype])
    block = {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": None if skip is None else list(skip),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    block |= quantization
    for key in (key for key, value in quantization.items() if value is None):
        del block[key]
    config = config | {"torch_dtype": dtype, "quantization_config": block}
    write_safetensors(path, config, stored, shards)
    return oracle


def _pack_awq(q: np.ndarray) -> np.ndarray:
    """(rows, O) -> (rows, O/8) int32"""
    eights = q.astype(np.int64).reshape(len(q), -1, 8)[..., AWQ_ORDER]
    return pack_bits(eights.reshape(q.shape), 4).view(np.int32)


def write_gptq(
    path: Path,
    config: Config,
    weights: Weights,
    bits: int = 4,
    group_size: int = 128,
    act_order: bool = False,
    sym: bool = True,
    v2: bool = False,
    dynamic: Mapping[str, Mapping[str, Any]] | None = None,
    lm_head: bool = False,
    with_g_idx: bool = True,
    separate_config: bool = False,
    dtype: str = "float16",
    shards: int = 1,
    seed: int = 0,
    **quantization: Any,
) -> Weights:
    """2, 3, 4 or 8 bits. `dynamic` maps patterns of module names to settings (bits, group_size,
    sym), or with "-:" before the pattern leaves what matches float. `separate_config` writes
    quantize_config.json and no block into config.json. `quantization` replaces keys of the block;
    None takes a key away."""
    rng = np.random.default_rng(seed)
    stored, oracle = {}, {}
    for name, W in weights.items():
        module = name.removesuffix(".weight")
        settings = _dynamic_settings(dynamic or {}, module)
        wanted = is_linear(name) or (lm_head and name == "lm_head.weight")
        if not wanted or settings is None:
            stored[name], oracle[name] = W.astype(DTYPES[dtype]), rounded(W, dtype)
            continue
        settings = {"bits": bits, "group_size": group_size, "sym": sym} | settings
        size = W.shape[1] if settings["group_size"] == -1 else settings["group_size"]
        order = rng.permutation(W.shape[1]) if act_order else np.arange(W.shape[1])
        g_idx = np.empty(W.shape[1], dtype=np.int32)
        g_idx[order] = np.arange(W.shape[1]) // size
        q, z, scale = _quantise_gptq(W, g_idx, settings["bits"], settings["sym"], v2, dtype)
        oracle[name] = (q - z[:, g_idx]).astype(np.float32) * scale[:, g_idx]
        b = settings["bits"]
        # v1 stores the zero point minus one
        stored[f"{module}.qweight"] = pack_bits(q, b).T.view(np.int32)
        stored[f"{module}.qzeros"] = pack_bits(z.T if v2 else z.T - 1, b).view(np.int32)
        stored[f"{module}.scales"] = scale.T.astype(DTYPES[dtype])
        if with_g_idx:
            stored[f"{module}.g_idx"] = g_idx
    block = {
        "bits": bits,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "desc_act": act_order,
        "group_size": group_size,
        "hyb_act": False,
        "lm_head": lm_head,
        "meta": {"quantizer": ["gptqmodel:2.2.0"], "damp_percent": 0.01, "true_sequential": True},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": sym,
    }
    if dynamic is not None:
        block["dynamic"] = {pattern: dict(value) for pattern, value in dynamic.items()}
    block = {k: v for k, v in (block | quantization).items() if v is not None}
    config = config | {"torch_dtype": dtype}
    if not separate_config:
        config["quantization_config"] = block
    write_safetensors(path, config, stored, shards)
    if separate_config:
        save_json(path / "quantize_config.json", block)
    return oracle


def _dynamic_settings(
    dynamic: Mapping[str, Mapping[str, Any]], module: str
) -> Mapping[str, Any] | None:
    """What is special about this module; None if it stays float."""
    for pattern, settings in dynamic.items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            return None if pattern.startswith("-:") else settings
    return {}


def _quantise_gptq(
    W: np.ndarray, g_idx: np.ndarray, bits: int, sym: bool, v2: bool, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q (O, I), z (O, G) and scale (O, G). z has the range that can be stored: v1 stores it less
    one."""
    top = 2**bits - 1
    first = 0 if v2 else 1
    groups = [W[:, g_idx == g] for g in range(g_idx.max() + 1)]
    low = np.stack([group.min(1) for group in groups], axis=1)  # (O, G)
    high = np.stack([group.max(1) for group in groups], axis=1)
    if sym:
        scale = rounded(2 * np.maximum(np.abs(low), np.abs(high)) / top, dtype)
        z = np.full(scale.shape, 2 ** (bits - 1), dtype=np.int64)
    else:
        scale = rounded((high - low) / top, dtype)
        z = np.clip(np.round(-low / scale), first, first + top).astype(np.int64)
    q = np.clip(np.round(W / scale[:, g_idx]) + z[:, g_idx], 0, top).astype(np.int64)
    return q, z, scale


def write_fp8(
    path: Path,
    config: Config,
    weights: Weights,
    scale_dtype: str = "bfloat16",
    block_size: int = 128,
    skip: Collection[str] = (),
    skip_key: str = "modules_to_not_convert",
    dtype: str = "bfloat16",
    shards: int = 1,
) -> Weights:
    """e4m3 with a scale a block. Dimensions need not be multiples of the block. Modules named in
    `skip` stay float, and the config's `skip_key` says so, with the names that mixtures add."""
    stored, oracle = {}, {}
    for name, W in weights.items():
        module = name.removesuffix(".weight")
        if not is_linear(name) or module in skip:
            stored[name], oracle[name] = W.astype(DTYPES[dtype]), rounded(W, dtype)
            continue
        O, I = W.shape
        rows, columns = np.arange(O) // block_size, np.arange(I) // block_size
        largest = np.zeros((rows[-1] + 1, columns[-1] + 1), dtype=np.float32)
        np.maximum.at(largest, (rows[:, None], columns[None]), np.abs(W))
        scale = rounded(largest / LARGEST_E4M3, scale_dtype)
        spread = scale[rows][:, columns]  # (O, I)
        q = np.clip(W / spread, -LARGEST_E4M3, LARGEST_E4M3).astype(E4M3)
        oracle[name] = q.astype(np.float32) * spread
        stored[name] = q
        stored[f"{module}.weight_scale_inv"] = scale.astype(DTYPES[scale_dtype])
    block: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block_size, block_size],
    }
    if config["model_type"] == "qwen3_moe":
        kept = ["lm_head"]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            kept += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
            kept += [f"{layer}.mlp.gate"]
        block[skip_key] = [*kept, *skip]
    elif skip:
        block[skip_key] = list(skip)
    config = config | {"torch_dtype": dtype, "quantization_config": block}
    write_safetensors(path, config, stored, shards)
    return oracle


def write_mlx(
    path: Path,
    config: Config,
    weights: Weights,
    bits: int = 4,
    group_size: int = 64,
    overrides: Mapping[str, Mapping[str, Any] | bool] | None = None,
    dtype: str = "bfloat16",
    shards: int = 1,
    both_blocks: bool = True,
    **quantization: Any,
) -> Weights:
    """2, 3, 4, 5, 6 or 8 bits; every Linear, the router, the embedding and the head. `overrides`
    maps module paths (experts: ...mlp.switch_mlp.gate_proj) to settings, or to False: not
    quantised. `both_blocks` writes quantization_config as well as quantization."""
    overrides = overrides or {}
    stored, oracle = {}, {}
    for name, W in _stacked(weights).items():
        module = name.removesuffix(".weight")
        settings = overrides.get(module, {})
        if W.ndim == 1 or settings is False:
            stored[name], values = W.astype(DTYPES[dtype]), rounded(W, dtype)
        else:
            settings = {"bits": bits, "group_size": group_size} | dict(settings)
            q, scale, bias, values = _quantise_mlx(
                W, settings["bits"], settings["group_size"], dtype
            )
            stored[name] = pack_bits(q, settings["bits"])
            stored[f"{module}.scales"] = scale.astype(DTYPES[dtype])
            stored[f"{module}.biases"] = bias.astype(DTYPES[dtype])
        if ".switch_mlp." in name:
            for e, value in enumerate(values):
                oracle[name.replace("switch_mlp", f"experts.{e}")] = value
        else:
            oracle[name] = values
    block = {"group_size": group_size, "bits": bits} | quantization | dict(overrides)
    config = config | {"torch_dtype": dtype, "quantization": block}
    if both_blocks:
        config["quantization_config"] = block
    write_safetensors(path, config, stored, shards, format="mlx")
    return oracle


def _stacked(weights: Weights) -> Weights:
    """Experts stacked as mlx-lm names them: (E, O, I)."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, W in weights.items():
        stacks.setdefault(re.sub(r"\.experts\.\d+\.", ".switch_mlp.", name), []).append(W)
    return {name: np.stack(W) if "switch_mlp" in name else W[0] for name, W in stacks.items()}


def _quantise_mlx(
    W: np.ndarray, bits: int, group_size: int, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q (..., O, I), scale and bias (..., O, G), and the values. As in mlx.core.quantize: the end
    of the range that is further from zero is kept exactly, so that scales may be negative."""
    grouped = W.reshape(*W.shape[:-1], -1, group_size)
    low, high = grouped.min(-1), grouped.max(-1)
    top = 2**bits - 1
    step = np.maximum((high - low) / top, 1e-7)
    lower = np.abs(low) > np.abs(high)
    edge, step = np.where(lower, low, high), np.where(lower, step, -step)
    q0 = np.round(edge / step)
    scale = rounded(np.where(q0 == 0, step, edge / np.where(q0 == 0, 1, q0)), dtype)
    bias = rounded(np.where(q0 == 0, 0, edge), dtype)
    q = np.clip(np.round((grouped - bias[..., None]) / scale[..., None]), 0, top)
    values = q.astype(np.float32) * scale[..., None] + bias[..., None]
    return q.reshape(W.shape).astype(np.int64), scale, bias, values.reshape(W.shape)
