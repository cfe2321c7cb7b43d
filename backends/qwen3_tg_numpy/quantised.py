"""Packed matrices: AWQ, GPTQ, block-wise FP8 and MLX, each a layout of tensors and a formula.

W is the (O, I) matrix of a Linear: output rows, input columns. q are stored unsigned integers. A
group is a run of inputs that share a scale. Everything is decoded by rows of W, when it is used.
Knows nothing of files and names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

Array = np.ndarray
Shape = tuple[int, ...]
Parts = Mapping[str, Array]  # the tensors of one module by the ends of their names
Layout = dict[str, tuple[tuple[str, ...], Shape]]  # end of a name -> dtypes, shape

WORDS = ("I32", "U32")
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Packed:
    """A matrix that is decoded as it is read: packed[rows], rows being a slice or row numbers, is
    an array of float32 (rows, I)."""

    shape: Shape
    decode: Callable[[Array], Array]  # row numbers (n,) -> (n, I)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Array) -> Array:
        return self.decode(np.arange(len(self))[rows])


def to_float32(stored: Array | Packed) -> Array:
    """The values of a stored tensor (or of rows of it), exactly: every bfloat16, kept as its uint16
    bits, is the upper half of a float32, every float16 is a float32. Same shape."""
    if isinstance(stored, Packed):
        return stored[:]
    if stored.dtype == np.uint16:
        bits: Array = np.left_shift(stored, 16, dtype=np.uint32)
        return bits.view(np.float32)
    return stored.astype(np.float32, copy=False)


def unpack(words: Array, bits: int) -> Array:
    """One stream of bits a row, from the lowest bit of the first 32-bit word on, cut into integers.
    words: (n, W) -> (n, W * 32 / bits) uint8"""
    octets = np.ascontiguousarray(words).view(np.uint8)  # words are mapped as little-endian
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        values = octets[..., None] >> shifts & np.uint8(2**bits - 1)
    else:
        stream = np.unpackbits(octets, axis=-1, bitorder="little")
        values = np.packbits(stream.reshape(len(words), -1, bits), axis=-1, bitorder="little")
    return values.reshape(len(words), -1)


class Scheme(Protocol):
    """How a checkpoint packs its matrices."""

    marker: ClassVar[str]  # the end of a tensor's name that says: this module is packed

    def of(self, module: str) -> Scheme | None:
        """The scheme of this module, where modules differ; None if it is not packed."""
        ...

    def layout(self, shape: Shape) -> Layout:
        """The tensors that hold a matrix of this shape."""
        ...

    def decode(self, parts: Parts, shape: Shape, rows: Array) -> Array:
        """Rows of the matrix. rows: (n,) -> (n, I) float32"""
        ...


@dataclass(frozen=True)
class Awq:
    """AutoAWQ's "gemm": W[o, i] = (q[i, o] - z[i // group, o]) * scale[i // group, o], with 4 bits.

    Words run along the outputs and hold eight of them, the even ones first."""

    marker: ClassVar[str] = "qweight"
    SHIFT: ClassVar[Array] = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)  # of output o % 8
    group_size: int

    def of(self, module: str) -> Awq:
        return self

    def layout(self, shape: Shape) -> Layout:
        O, I = shape
        groups = ceil(I, self.group_size)
        return {
            "qweight": (WORDS, (I, ceil(O, 8))),
            "qzeros": (WORDS, (groups, ceil(O, 8))),
            "scales": (FLOATS, (groups, O)),
        }

    def decode(self, parts: Parts, shape: Shape, rows: Array) -> Array:
        def nibbles(words: Array) -> Array:
            values: Array = words.view("<u4").take(rows // 8, 1) >> self.SHIFT[rows % 8] & 15
            return values.astype(np.float32)

        group = groups_of(shape[1], self.group_size)
        q, z = nibbles(parts["qweight"]), nibbles(parts["qzeros"])  # (I, n) and (G, n)
        scale = to_float32(parts["scales"].take(rows, 1))
        values: Array = (q - z.take(group, 0)) * scale.take(group, 0)
        return values.T


@dataclass(frozen=True)
class Gptq:
    """W[o, i] = (q[i, o] - z[g[i], o]) * scale[g[i], o], where g[i] is the group of input i: g_idx
    if it is stored (inputs were taken in the order of their importance), else i // group_size.

    Words run along the inputs in qweight, along the outputs in qzeros. What qzeros holds is z, or
    z - 1 in the first version of the format; that is not wrapped, so that 15 + 1 is 16."""

    marker: ClassVar[str] = "qweight"
    bits: int
    group_size: int
    added_to_zero: int
    dynamic: tuple[tuple[str, int, int], ...] = ()  # patterns of modules, bits and group size there

    def of(self, module: str) -> Gptq:
        """The first pattern that matches the start of the module's name counts, as in GPTQModel."""
        for pattern, bits, group_size in self.dynamic:
            if re.match(pattern, module):
                return replace(self, bits=bits, group_size=group_size)
        return self

    def layout(self, shape: Shape) -> Layout:
        O, I = shape
        groups = ceil(I, self.group_size)
        return {
            "qweight": (WORDS, (ceil(I * self.bits, 32), O)),
            "qzeros": (WORDS, (groups, ceil(O * self.bits, 32))),
            "scales": (FLOATS, (groups, O)),
            "g_idx": (("I32",), (I,)),
        }

    def decode(self, parts: Parts, shape: Shape, rows: Array) -> Array:
        group = parts.get("g_idx", groups_of(shape[1], self.group_size))
        q = unpack(parts["qweight"].take(rows, 1).T, self.bits)[:, : shape[1]]  # (n, I)
        z = unpack(parts["qzeros"], self.bits).take(rows, 1).T.astype(np.float32)
        z += self.added_to_zero  # (n, G)
        scale = to_float32(parts["scales"].take(rows, 1)).T
        values: Array = (q - z.take(group, 1)) * scale.take(group, 1)
        return values


@dataclass(frozen=True)
class Fp8:
    """W[o, i] = e4m3(byte[o, i]) * scale[o // rows, i // columns of a block]: multiplied, although
    the scales are called inverse."""

    marker: ClassVar[str] = "weight_scale_inv"
    block: tuple[int, int]

    def of(self, module: str) -> Fp8:
        return self

    def layout(self, shape: Shape) -> Layout:
        grid = (ceil(shape[0], self.block[0]), ceil(shape[1], self.block[1]))
        return {"weight": (("F8_E4M3",), shape), "weight_scale_inv": (FLOATS, grid)}

    def decode(self, parts: Parts, shape: Shape, rows: Array) -> Array:
        scale = to_float32(parts["weight_scale_inv"][rows // self.block[0]])
        column = groups_of(shape[1], self.block[1])
        values: Array = E4M3.take(parts["weight"][rows]) * scale.take(column, 1)
        return values


def _e4m3() -> Array:
    """All 256 values: a sign, four bits of exponent (bias 7), three of mantissa, no infinity
    (Micikevicius et al. 2022, arXiv:2209.05433, table 1)."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    value[(byte & 127) == 127] = np.nan
    return np.where(byte < 128, value, -value).astype(np.float32)


E4M3 = _e4m3()


@dataclass(frozen=True)
class Mlx:
    """W[o, i] = q[o, i] * scale[o, i // group] + bias[o, i // group]; scales may be negative. A row
    is one stream of bits. The embedding is packed, too."""

    marker: ClassVar[str] = "scales"
    bits: int
    group_size: int
    overrides: Mapping[str, Mapping[str, Any] | bool]  # by module; false: not packed

    def of(self, module: str) -> Mlx | None:
        """Experts are stacked in one module, which an override names."""
        name = re.sub(r"\.experts\.\d+\.", ".switch_mlp.", module)
        other = self.overrides.get(name, {})
        if not isinstance(other, Mapping):
            return self if other else None
        bits, group_size = other.get("bits", self.bits), other.get("group_size", self.group_size)
        return replace(self, bits=bits, group_size=group_size)

    def layout(self, shape: Shape) -> Layout:
        O, I = shape
        grouped = (O, ceil(I, self.group_size))
        return {
            "weight": (("U32",), (O, ceil(I * self.bits, 32))),
            "scales": (FLOATS, grouped),
            "biases": (FLOATS, grouped),
        }

    def decode(self, parts: Parts, shape: Shape, rows: Array) -> Array:
        q = unpack(parts["weight"][rows], self.bits)[:, : shape[1]]
        group = groups_of(shape[1], self.group_size)
        scale, bias = (
            to_float32(parts[name][rows]).take(group, 1) for name in ("scales", "biases")
        )
        values: Array = q * scale + bias
        return values


def ceil(a: int, b: int) -> int:
    """a / b rounded up; 1 for a size of -1, which means all."""
    return 1 if b == -1 else -(-a // b)


def groups_of(inputs: int, size: int) -> Array:
    """The group of each input. -> (inputs,)"""
    return np.arange(inputs) // (inputs if size == -1 else size)
