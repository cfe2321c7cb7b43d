"""What config.json says of quantised weights: which method, and the numbers that the tensors do not
tell. Which weights are quantised is seen from the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_tg.errors import CheckpointError, UnsupportedError

_SUPPORTED = "AWQ (gemm), GPTQ, FP8 in blocks, and MLX"


@dataclass(frozen=True)
class Quantization:
    """`method` is "AWQ", "GPTQ", "FP8" or "MLX"; `params` as in StoredWeight; `overrides` are MLX's
    own numbers for single modules, None for one that is not quantised. `act_order`: GPTQ's groups
    are not in the order of the inputs."""

    method: str
    params: Mapping[str, int]
    overrides: Mapping[str, Mapping[str, int] | None] = field(default_factory=dict)
    act_order: bool = False


def read_quantization(raw: Mapping[str, Any], where: str) -> Quantization | None:
    """From config.json's `quantization_config` or `quantization`; None for a float checkpoint.

    Raises UnsupportedError naming the method or setting that is not computed."""
    block = raw.get("quantization_config") or raw.get("quantization")
    if block is None:
        return None
    if not isinstance(block, dict):
        raise CheckpointError(f"{where}: quantization_config must be an object, found {block!r}")
    method = block.get("quant_method", "mlx" if "group_size" in block else None)
    where = f"{where}: quantization_config"
    if method not in _READERS:
        raise UnsupportedError(
            f"{where}: quant_method {method!r} is not supported; supported are {_SUPPORTED}; "
            "use another checkpoint of the same model"
        )
    return _READERS[method](block, where)


def _number(block: Mapping[str, Any], key: str, allowed: tuple[int, ...] | None, where: str) -> int:
    value = block.get(key)
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{where}: {key} must be a positive integer, found {value!r}")
    if allowed and value not in allowed:
        raise UnsupportedError(
            f"{where}: {key} {value} is not supported; supported: {', '.join(map(str, allowed))}"
        )
    return value


def _only(block: Mapping[str, Any], key: str, values: tuple[Any, ...], where: str) -> None:
    """Refuse another value; a missing key is fine."""
    if key in block and block[key] not in values:
        raise UnsupportedError(
            f"{where}: {key} must be {' or '.join(map(repr, values))}, found {block[key]!r}"
        )


def _group_size(block: Mapping[str, Any], where: str) -> int:
    """-1, all inputs in one group, becomes 0."""
    return 0 if block.get("group_size") == -1 else _number(block, "group_size", None, where)


def _awq(block: Mapping[str, Any], where: str) -> Quantization:
    bits = _number(block, "bits", (4,), where)
    for key in ("version", "format"):
        _only(block, key, ("gemm", "GEMM", None), where)
    _only(block, "zero_point", (True,), where)
    return Quantization("AWQ", {"bits": bits, "group_size": _group_size(block, where)})


def _gptq(block: Mapping[str, Any], where: str) -> Quantization:
    bits = _number(block, "bits", (2, 4, 8), where)
    layout = block.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"{where}: checkpoint_format must be 'gptq' or 'gptq_v2', found {layout!r}"
        )
    _only(block, "pack_dtype", ("int32",), where)
    _only(block, "is_marlin_format", (False, None), where)
    # the first version stores zero points less one
    params = {
        "bits": bits,
        "group_size": _group_size(block, where),
        "zero_offset": int(layout == "gptq"),
    }
    return Quantization("GPTQ", params, act_order=bool(block.get("desc_act", False)))


def _fp8(block: Mapping[str, Any], where: str) -> Quantization:
    _only(block, "fmt", ("e4m3",), where)
    _only(block, "activation_scheme", ("dynamic",), where)
    size = block.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or size[0] != size[1]:
        raise UnsupportedError(
            f"{where}: weight_block_size must be two equal numbers such as [128, 128], found "
            f"{size!r} (one scale for a whole tensor is not supported)"
        )
    return Quantization(
        "FP8",
        {"block_size": _number({"weight_block_size": size[0]}, "weight_block_size", None, where)},
    )


def _mlx(block: Mapping[str, Any], where: str) -> Quantization:
    _only(block, "mode", ("affine",), where)

    def numbers(settings: Mapping[str, Any], where: str) -> dict[str, int]:
        _only(settings, "mode", ("affine",), where)
        bits = _number(settings, "bits", (2, 4, 8), where)
        return {"bits": bits, "group_size": _number(settings, "group_size", None, where)}

    overrides: dict[str, Mapping[str, int] | None] = {}
    for module, settings in block.items():
        if settings is False:
            overrides[module] = None
        elif isinstance(settings, dict):
            overrides[module] = numbers(settings, f"{where}: {module}")
    return Quantization("MLX", numbers(block, where), overrides)


_READERS = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "mlx": _mlx}
