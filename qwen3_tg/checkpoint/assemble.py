"""From the raw tensors of safetensors files to the model's weights by name.

A weight may be one float tensor or several packed ones; experts may lie stacked (MLX) or one by one
(all others). Everything that does not fit is collected and reported in one error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from qwen3_tg.checkpoint.quantization import Quantization
from qwen3_tg.checkpoint.safetensors_file import RawTensor
from qwen3_tg.checkpoint.types import StackedWeight, StoredWeight

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EXPERTS = ".mlp.experts."
Shape = tuple[int, ...]


class _Misfit(Exception):
    """One weight that does not fit; the text says how."""


@dataclass
class Assembled:
    """The weights that fit, the problems, and the raw tensors that belong to no weight."""

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def assemble(
    tensors: Mapping[str, RawTensor],
    shapes: Mapping[str, Shape],
    quantization: Quantization | None,
) -> Assembled:
    """The weights of `shapes` (`ModelConfig.weight_shapes`) out of raw tensors. Copies nothing."""
    maker = _Maker(tensors, quantization)
    result = Assembled()
    for name, shape in shapes.items():
        try:
            result.weights[name] = maker.weight(name.removesuffix(".weight"), shape)
        except _Misfit as e:
            result.problems.append(str(e))
    result.unused = [name for name in tensors if name not in maker.used]
    return result


class _Maker:
    def __init__(self, tensors: Mapping[str, RawTensor], quantization: Quantization | None):
        self._tensors, self._quantization = tensors, quantization
        self.used: set[str] = set()

    def weight(self, module: str, shape: Shape) -> StoredWeight:
        if _EXPERTS not in module:
            return self._module(module, shape)
        stacked = module.replace(_EXPERTS, ".mlp.switch_mlp.")
        if any(self._parts_of(stacked)):
            return self._module(stacked, shape)
        before, after = module.split(_EXPERTS)
        experts = [
            self._module(f"{before}{_EXPERTS}{e}.{after}", shape[1:]) for e in range(shape[0])
        ]
        kinds = {(expert.format, tuple(expert.params.items())) for expert in experts}
        if len(kinds) > 1:
            raise _Misfit(f"{module}: all experts must be stored alike, found {sorted(kinds)}")
        return StackedWeight.of(experts)

    def _parts_of(self, module: str) -> Iterator[str]:
        parts = ("weight", "qweight", "qzeros", "scales", "g_idx", "biases", "weight_scale_inv")
        return (part for part in parts if f"{module}.{part}" in self._tensors)

    def _module(self, module: str, shape: Shape) -> StoredWeight:
        """The weight of one module, quantised if its packed tensors are there."""
        parts = set(self._parts_of(module))
        self.used |= {f"{module}.{part}" for part in parts}
        kinds = {"qweight": ("AWQ", "GPTQ"), "weight_scale_inv": ("FP8",), "scales": ("MLX",)}
        for part, methods in kinds.items():
            if part in parts:
                found = self._quantization.method if self._quantization else None
                if found not in methods:
                    raise _Misfit(
                        f"{module}.{part} is there, which is {' or '.join(methods)}, but "
                        f"config.json says {found or 'that nothing is quantised'}"
                    )
                make = {"AWQ": self._awq, "GPTQ": self._gptq, "FP8": self._fp8, "MLX": self._mlx}
                return make[found](module, shape)
        return self._float(module, shape)

    def _float(self, module: str, shape: Shape) -> StoredWeight:
        raw = self._tensor(f"{module}.weight", tuple(_FLOATS), shape)
        return StoredWeight(_FLOATS[raw.dtype], shape, {"data": raw.array})

    def _awq(self, module: str, shape: Shape) -> StoredWeight:
        (O, I), groups = shape, self._groups(module, shape[-1])
        arrays = {
            "qweight": self._array(module, "qweight", ("I32", "U32"), (I, O // 8)),
            "qzeros": self._array(module, "qzeros", ("I32", "U32"), (groups, O // 8)),
            "scales": self._array(module, "scales", tuple(_FLOATS), (groups, O)),
        }
        _whole(module, O, 8)
        _whole(module, I, groups)
        return StoredWeight("AWQ", shape, arrays, {"bits": 4, "group_size": I // groups})

    def _gptq(self, module: str, shape: Shape) -> StoredWeight:
        assert self._quantization
        (O, I), groups = shape, self._groups(module, shape[-1])
        words = self._tensor(f"{module}.qweight", ("I32", "U32"))
        # config.json's "dynamic" gives single modules other bits and groups; the shapes tell
        bits = words.shape[0] * 32 // I if len(words.shape) == 2 else 0
        if bits not in (2, 4, 8):
            raise _Misfit(f"{module}.qweight has shape {words.shape}, which is no 2, 4 or 8 bits")
        per_word = 32 // bits
        _whole(module, I, per_word)
        _whole(module, O, per_word)
        arrays = {
            "qweight": self._array(module, "qweight", ("I32", "U32"), (I // per_word, O)),
            "qzeros": self._array(module, "qzeros", ("I32", "U32"), (groups, O // per_word)),
            "scales": self._array(module, "scales", tuple(_FLOATS), (groups, O)),
        }
        size = -(-I // groups)
        if f"{module}.g_idx" in self._tensors:
            group = self._array(module, "g_idx", ("I32",), (I,))
            if self._has_own_order(group, size):
                if int(group.max()) >= groups:
                    raise _Misfit(f"{module}.g_idx names group {group.max()} of {groups}")
                arrays["g_idx"] = group
        if "g_idx" not in arrays:
            _whole(module, I, size)
        params = {"bits": bits, "group_size": size}
        return StoredWeight("GPTQ", shape, arrays, {**self._quantization.params, **params})

    def _has_own_order(self, group: np.ndarray, size: int) -> bool:
        assert self._quantization
        if group.size and group.strides == (0,):  # not on this machine: config.json's word
            return self._quantization.act_order
        return not np.array_equal(group, np.arange(len(group)) // size)

    def _fp8(self, module: str, shape: Shape) -> StoredWeight:
        assert self._quantization
        n = self._quantization.params["block_size"]
        if f"{module}.input_scale" in self._tensors:
            raise _Misfit(f"{module}.input_scale: static activation scales are not supported")
        (O, I) = shape
        scale_shape = (-(-O // n), -(-I // n))
        arrays = {
            "weight": self._array(module, "weight", ("F8_E4M3",), shape),
            "weight_scale_inv": self._array(
                module, "weight_scale_inv", tuple(_FLOATS), scale_shape
            ),
        }
        return StoredWeight("FP8", shape, arrays, {"block_size": n})

    def _mlx(self, module: str, shape: Shape) -> StoredWeight:
        assert self._quantization
        params = self._quantization.overrides.get(module, self._quantization.params)
        if params is None:
            raise _Misfit(f"{module}.scales is there, but config.json says it is not quantised")
        bits, size = params["bits"], params["group_size"]
        *rows, I = shape
        _whole(module, I, size)
        _whole(module, size, 32 // bits)
        grouped = (*rows, I // size)
        arrays = {
            "weight": self._array(module, "weight", ("U32", "I32"), (*rows, I * bits // 32)),
            "scales": self._array(module, "scales", tuple(_FLOATS), grouped),
            "biases": self._array(module, "biases", tuple(_FLOATS), grouped),
        }
        return StoredWeight("MLX", shape, arrays, params)

    def _groups(self, module: str, inputs: int) -> int:
        """Groups along the inputs: the rows of the scales."""
        shape = self._tensor(f"{module}.scales", tuple(_FLOATS)).shape
        if not shape or not 0 < shape[0] <= inputs:
            raise _Misfit(f"{module}.scales has shape {shape}, expected (groups, outputs)")
        return shape[0]

    def _array(self, module: str, part: str, dtypes: tuple[str, ...], shape: Shape) -> np.ndarray:
        return self._tensor(f"{module}.{part}", dtypes, shape).array

    def _tensor(self, name: str, dtypes: tuple[str, ...], shape: Shape | None = None) -> RawTensor:
        raw = self._tensors.get(name)
        if raw is None:
            raise _Misfit(f"missing {name}")
        if raw.dtype not in dtypes:
            raise _Misfit(
                f"{raw.file}: {name} has dtype {raw.dtype}, expected {' or '.join(dtypes)}"
            )
        if shape is not None and raw.shape != shape:
            raise _Misfit(f"{name} has shape {raw.shape}, expected {shape}")
        return raw


def _whole(module: str, count: int, of: int) -> None:
    if count % of:
        raise _Misfit(f"{module}: {count} is not a multiple of {of}")
