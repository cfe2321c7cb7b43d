"""How config.json says that matrices are packed. Which matrices are, the tensors say.

Keys that no formula needs are ignored here, since writers add their own; values of the keys that
matter are checked, and layouts that are not computed are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_tg_numpy.config import CheckpointError, read_json
from qwen3_tg_numpy.quantised import Awq, Fp8, Gptq, Mlx, Scheme


def find_scheme(path: Path, raw: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a model directory with this config.json, or None where matrices are as they
    are. Older GPTQ files say it in quantize_config.json alone. Raises CheckpointError."""
    for key in ("quantization", "quantization_config"):  # MLX writes both; the first one is its own
        if raw.get(key) is not None:
            return read_scheme(raw[key], f"{path / 'config.json'}: {key}")
    file = path / "quantize_config.json"
    if file.is_file():
        return read_scheme({"quant_method": "gptq"} | read_json(file), str(file))
    return None


def read_scheme(block: Any, where: str) -> Scheme:
    """The scheme of a quantization_config, of MLX's "quantization", or of a quantize_config.json.

    Raises CheckpointError that names the key for a scheme that is not computed here."""
    if not isinstance(block, Mapping):
        raise CheckpointError(f"{where} must be an object or null, found {block!r}")
    readers = {"awq": _read_awq, "gptq": _read_gptq, "fp8": _read_fp8, None: _read_mlx}
    method = block.get("quant_method")
    if method is None and "bits" not in block:
        raise CheckpointError(
            f"{where}: expected quant_method, or MLX's bits and group_size, found "
            f"{', '.join(sorted(block)) or 'nothing'}"
        )
    if method not in readers:
        raise CheckpointError(
            f"{where}: quant_method must be awq, gptq, fp8, or not there (MLX), found {method!r}"
        )
    return readers[method](block, where)


def _read_awq(block: Mapping[str, Any], where: str) -> Scheme:
    _one_of(block, "bits", [4], where)
    _one_of(block, "zero_point", [True], where, True)
    for key in ("version", "format"):
        _one_of(block, key, ["gemm", "GEMM"], where, "gemm")
    return Awq(group_size=_size(block, where))


def _read_gptq(block: Mapping[str, Any], where: str) -> Scheme:
    bits = _one_of(block, "bits", GPTQ_BITS, where)
    for key, harmless in {"pack_dtype": "int32", "hyb_act": False}.items():
        _one_of(block, key, [harmless], where, harmless)
    _one_of(block, "is_marlin_format", [False], where, False)
    for key in ("format", "checkpoint_format"):  # the second is the older and more frequent name
        if key in block:
            _one_of(block, key, ["gptq", "gptq_v2"], where)
    layout = block.get("checkpoint_format", block.get("format", "gptq"))
    dynamic = []
    if not isinstance(patterns := block.get("dynamic") or {}, Mapping):
        raise CheckpointError(f"{where}: dynamic must be an object, found {patterns!r}")
    for pattern, other in patterns.items():
        where_other = f"{where}: dynamic: {pattern}"
        changes = {"bits": bits, "group_size": _size(block, where)}
        if not pattern.startswith("-:"):  # that is: not packed, and then its tensors are not there
            changes |= other
        start = re.sub(r"^[-+]:", "", pattern)
        try:
            re.compile(start)
        except re.error as e:
            raise CheckpointError(f"{where_other}: not a pattern ({e})") from None
        bits_there = _one_of(changes, "bits", GPTQ_BITS, where_other)
        dynamic.append((start, bits_there, _size(changes, where_other)))
    return Gptq(
        bits=bits,
        group_size=_size(block, where),
        added_to_zero=1 if layout == "gptq" else 0,
        dynamic=tuple(dynamic),
    )


GPTQ_BITS = [2, 3, 4, 8]


def _read_fp8(block: Mapping[str, Any], where: str) -> Scheme:
    _one_of(block, "fmt", ["e4m3"], where, "e4m3")
    # Dynamic is about the inputs of a kernel; nothing is stored for it, and nothing rounded here.
    _one_of(block, "activation_scheme", ["dynamic"], where, "dynamic")
    size = block.get("weight_block_size")
    if size is None:
        raise CheckpointError(
            f"{where}: weight_block_size must be two sizes, found none: fp8 with one scale a "
            "tensor or row is not computed here"
        )
    if not isinstance(size, list) or [type(n) is int and n > 0 for n in size] != [True, True]:
        raise CheckpointError(f"{where}: weight_block_size must be two sizes, found {size!r}")
    return Fp8(block=(size[0], size[1]))


def _read_mlx(block: Mapping[str, Any], where: str) -> Scheme:
    overrides = {k: v for k, v in block.items() if isinstance(v, Mapping) or type(v) is bool}
    for name, settings in {"": block, **overrides}.items():
        if isinstance(settings, Mapping):
            where_settings = f"{where}: {name}" if name else where
            _one_of(settings, "mode", ["affine"], where_settings, "affine")
            _one_of(settings, "bits", [2, 3, 4, 5, 6, 8], where_settings, block["bits"])
            _size({"group_size": block.get("group_size")} | dict(settings), where_settings, least=1)
    return Mlx(bits=block["bits"], group_size=block["group_size"], overrides=overrides)


def _one_of(
    block: Mapping[str, Any], key: str, values: list[Any], where: str, default: Any = None
) -> Any:
    """The value of a key, if it is one of these, of the same type."""
    value = block.get(key, default)
    if not any(type(value) is type(known) and value == known for known in values):
        known = " or ".join(repr(value) for value in values)
        raise CheckpointError(f"{where}: {key} must be {known}, found {value!r}")
    return value


def _size(block: Mapping[str, Any], where: str, least: int = -1) -> int:
    value = block.get("group_size")
    if type(value) is not int or value < least or value == 0:
        kind = "a positive integer" if least > 0 else "a positive integer or -1"
        raise CheckpointError(f"{where}: group_size must be {kind}, found {value!r}")
    return value
