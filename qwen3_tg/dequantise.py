"""What packed weights mean, as tinygrad expressions: bytes of the file in, float32 values out.

Nothing is computed here: the expression becomes part of the kernel that uses the values. Shifts are
constants and not `arange`s, which tinygrad turns into loops inside the kernel. Leading
axes (experts, chosen rows) are written `...`. Axes: O outputs, I inputs, N blocks in a row.

Sources: llama.cpp's ggml-quants.c (the block types), AutoAWQ's packing_utils.py, AutoGPTQ's
qlinear_cuda.py, transformers' finegrained_fp8.py, and mlx's quantized.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tinygrad import Tensor, dtypes

Arrays = Mapping[str, Tensor]
Params = Mapping[str, int]

# The values that four bits stand for in IQ4_NL and IQ4_XS.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# AWQ interleaves eight outputs in a word: output j is the nibble at bit _AWQ[j].
_AWQ = (0, 16, 4, 20, 8, 24, 12, 28)


def float_values(data: Tensor) -> Tensor:
    """Stored floats as floats, raw bits by their type: uint16 is bfloat16, int16 is float16. Same
    shape."""
    if data.dtype == dtypes.uint16:
        return from_bfloat16(data)
    return from_float16(data.bitcast(dtypes.uint16)) if data.dtype == dtypes.int16 else data


def from_bfloat16(bits: Tensor) -> Tensor:
    """uint16 -> float32, exactly, on devices without bfloat16 too."""
    return bits.cast(dtypes.uint32).lshift(16).bitcast(dtypes.float32)


def from_float16(bits: Tensor) -> Tensor:
    """uint16 -> float32, exactly but for infinities and NaN, on devices without float16 too."""
    wide = bits.cast(dtypes.uint32)
    rest = wide.bitwise_and(0x7FFF)  # exponent of bias 15, which becomes 127, and ten bits
    normal = (rest.lshift(13) + (112 << 23)).bitcast(dtypes.float32)
    value = (rest < 1024).where(rest.float() * 2.0**-24, normal)
    return (wide == rest).where(value, -value)


def block_values(blocks: Tensor, block_bytes: int, values: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows of GGUF blocks. blocks: (..., O, N * block_bytes) uint8 -> (..., O, I) float32"""
    *rows, row_bytes = blocks.shape
    one = values(blocks.reshape(*rows, row_bytes // block_bytes, block_bytes))
    return one.reshape(*rows, -1)


# The functions below take blocks (..., N, bytes of a block) and give (..., N, groups, values of a
# group) or (..., N, values).


def q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[..., 2:]).float() - 8) * _half(b, 0)


def q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[..., 4:]).float() * _half(b, 0) + _half(b, 2)


def q5_0(b: Tensor) -> Tensor:
    return (_fives(b[..., 2:6], b[..., 6:]).float() - 16) * _half(b, 0)


def q5_1(b: Tensor) -> Tensor:
    return _fives(b[..., 4:8], b[..., 8:]).float() * _half(b, 0) + _half(b, 2)


def q8_0(b: Tensor) -> Tensor:
    return b[..., 2:].bitcast(dtypes.int8).float() * _half(b, 0)


def iq4_nl(b: Tensor) -> Tensor:
    return _iq4(_nibbles(b[..., 2:])) * _half(b, 0)


def iq4_xs(b: Tensor) -> Tensor:
    *lead, _ = b.shape
    low = _split(b[..., 4:8].unsqueeze(-1), (0, 4), 15).reshape(*lead, 8)
    high = _split(_uint16(b, 2).unsqueeze(-1), range(0, 16, 2), 3).reshape(*lead, 8)
    scale = low.float() + high.float() * 16 - 32
    q = _nibbles(b[..., 8:].reshape(*lead, 8, 16))
    return _iq4(q) * (scale * _half(b, 0)).unsqueeze(-1)


def q2_k(b: Tensor) -> Tensor:
    *lead, _ = b.shape
    scale, minimum = b[..., :16].bitwise_and(15), b[..., :16].rshift(4)
    q = _split(b[..., 16:80].reshape(*lead, 2, 1, 32), (0, 2, 4, 6), 3).reshape(*lead, 16, 16)
    scaled = q.float() * (scale.float() * _half(b, 80)).unsqueeze(-1)
    return scaled - (minimum.float() * _half(b, 82)).unsqueeze(-1)


def q3_k(b: Tensor) -> Tensor:
    *lead, _ = b.shape
    # 16 scales of 6 bits: four in s[0:8] (low nibbles, then high ones), two more in s[8:12]
    low = _split(b[..., 96:104].unsqueeze(-2), (0, 4), 15).reshape(*lead, 16)
    high = _split(b[..., 104:108].unsqueeze(-2), (0, 2, 4, 6), 3).reshape(*lead, 16)
    scale = (low.float() + high.float() * 16 - 32) * _half(b, 108)
    q = _split(b[..., 32:96].reshape(*lead, 2, 1, 32), (0, 2, 4, 6), 3).reshape(*lead, 16, 16)
    mask = _split(b[..., :32].unsqueeze(-2), range(8), 1).reshape(*lead, 16, 16)
    return (q.float() + mask.float() * 4 - 4) * scale.unsqueeze(-1)


def q4_k(b: Tensor) -> Tensor:
    *lead, _ = b.shape
    q = _split(b[..., 16:].reshape(*lead, 4, 1, 32), (0, 4), 15).reshape(*lead, 8, 32)
    return _k_values(b, q)


def q5_k(b: Tensor) -> Tensor:
    *lead, _ = b.shape
    low = _split(b[..., 48:].reshape(*lead, 4, 1, 32), (0, 4), 15).reshape(*lead, 8, 32)
    high = _split(b[..., 16:48].unsqueeze(-2), range(8), 1)
    return _k_values(b, low.bitwise_or(high.lshift(4)))


def q6_k(b: Tensor) -> Tensor:
    *lead, _ = b.shape
    low = _split(b[..., :128].reshape(*lead, 2, 1, 64), (0, 4), 15).reshape(*lead, 2, 4, 32)
    high = _split(b[..., 128:192].reshape(*lead, 2, 1, 32), (0, 2, 4, 6), 3)
    q = low.bitwise_or(high.lshift(4)).reshape(*lead, 16, 16)
    scale = b[..., 192:208].bitcast(dtypes.int8).float() * _half(b, 208)
    return (q.float() - 32) * scale.unsqueeze(-1)


BLOCK_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}


def awq(arrays: Arrays, params: Params) -> Tensor:
    """qweight: (..., I, O/8), qzeros: (..., G, O/8), scales: (..., G, O) -> (..., O, I)"""

    def outputs(words: Tensor) -> Tensor:  # (..., R, O/8) -> (..., R, O)
        split = _split(words.unsqueeze(-1), _AWQ, 15)
        return split.reshape(*words.shape[:-1], -1).float()

    q, zero, scale = outputs(arrays["qweight"]), outputs(arrays["qzeros"]), arrays["scales"]
    *lead, I, O = q.shape
    grouped = q.reshape(*lead, -1, params["group_size"], O) - zero.unsqueeze(-2)
    return (grouped * float_values(scale).unsqueeze(-2)).reshape(*lead, I, O).transpose(-1, -2)


def gptq(arrays: Arrays, params: Params) -> Tensor:
    """qweight: (..., I*bits/32, O), qzeros: (..., G, O*bits/32), scales: (..., G, O), and where the
    group of an input is not its number over the group size, g_idx: (..., I) -> (..., O, I)"""
    bits, mask = params["bits"], 2 ** params["bits"] - 1
    shifts = range(0, 32, bits)
    words = arrays["qweight"]
    *lead, R, O = words.shape
    I = R * 32 // bits
    q = _split(words.unsqueeze(-2), shifts, mask).reshape(*lead, I, O).float()
    zero = _split(arrays["qzeros"].unsqueeze(-1), shifts, mask)
    scale = float_values(arrays["scales"])
    zero = zero.reshape(*scale.shape).float() + params["zero_offset"]
    if "g_idx" not in arrays:
        grouped = q.reshape(*lead, -1, params["group_size"], O) - zero.unsqueeze(-2)
        return (grouped * scale.unsqueeze(-2)).reshape(*lead, I, O).transpose(-1, -2)
    group = arrays["g_idx"].unsqueeze(-1).expand(*lead, I, O)
    return ((q - zero.gather(-2, group)) * scale.gather(-2, group)).transpose(-1, -2)


def fp8(arrays: Arrays, params: Params) -> Tensor:
    """weight: (..., O, I) uint8 (e4m3fn), weight_scale_inv: (..., ceil(O/n), ceil(I/n)) with n the
    block size; the name notwithstanding it is multiplied -> (..., O, I)"""
    byte, scale = arrays["weight"].cast(dtypes.uint32), float_values(arrays["weight_scale_inv"])
    exponent, rest = byte.rshift(3).bitwise_and(15), byte.bitwise_and(127)
    # bias 7 becomes float32's 127; exponent 0 has no leading one; 127 is the only NaN
    normal = (rest.lshift(20) + (120 << 23)).bitcast(dtypes.float32)
    small = rest.float() * 2.0**-9
    value = (exponent == 0).where(small, (rest == 127).where(float("nan"), normal))
    value = (byte > 127).where(-value, value)
    n, (*lead, O, I) = params["block_size"], value.shape
    rows, columns = scale.shape[-2:]
    whole = scale.reshape(*lead, rows, 1, columns, 1).expand(*lead, rows, n, columns, n)
    whole = whole.reshape(*lead, rows * n, columns * n)
    keep = tuple(slice(0, size) for size in (*lead, O, I))
    return value * whole[keep]


def mlx(arrays: Arrays, params: Params) -> Tensor:
    """weight: (..., O, I*bits/32), scales and biases: (..., O, I/group) -> (..., O, I)"""
    bits = params["bits"]
    q = _split(arrays["weight"].unsqueeze(-1), range(0, 32, bits), 2**bits - 1)
    scale, bias = float_values(arrays["scales"]), float_values(arrays["biases"])
    q = q.reshape(*scale.shape, params["group_size"]).float()
    return (q * scale.unsqueeze(-1) + bias.unsqueeze(-1)).reshape(*scale.shape[:-1], -1)


PACKED_VALUES: dict[str, Callable[[Arrays, Params], Tensor]] = {
    "AWQ": awq,
    "GPTQ": gptq,
    "FP8": fp8,
    "MLX": mlx,
}


def _k_values(b: Tensor, q: Tensor) -> Tensor:
    """Q4_K and Q5_K: eight groups with six-bit scales and minima, packed in b[4:16]."""
    *lead, _ = b.shape
    s = b[..., 4:12].reshape(*lead, 2, 4)  # four scales, four minima, with the top bits of others
    nibbles = _split(b[..., 12:16].unsqueeze(-2), (0, 4), 15)  # low bits of the other four
    both = s.bitwise_and(63).cat(nibbles.bitwise_or(s.rshift(6).lshift(4)), dim=-1)  # (..., 2, 8)
    scale = both[..., 0, :].float() * _half(b, 0)
    minimum = both[..., 1, :].float() * _half(b, 2)
    return q.float() * scale.unsqueeze(-1) - minimum.unsqueeze(-1)


def _split(packed: Tensor, shifts: range | tuple[int, ...], mask: int) -> Tensor:
    """Fields of `packed`, which has an axis of one: there, one entry a shift."""
    axis = -1 if packed.shape[-1] == 1 else -2
    by = Tensor.const(tuple(shifts), packed.dtype)
    by = by if axis == -1 else by.reshape(-1, 1)
    return packed.rshift(by).bitwise_and(mask)


def _nibbles(packed: Tensor) -> Tensor:
    """All low halves, then all high ones. (..., n) uint8 -> (..., 2n) uint8"""
    return _split(packed.unsqueeze(-2), (0, 4), 15).flatten(-2)


def _fives(top: Tensor, packed: Tensor) -> Tensor:
    """Values of five bits: bit e of the four bytes `top` is the highest of value e."""
    bits = _split(top.unsqueeze(-1), range(8), 1).flatten(-2)
    return _nibbles(packed).bitwise_or(bits.lshift(4))


def _uint16(b: Tensor, at: int) -> Tensor:
    low, high = (b[..., i : i + 1].cast(dtypes.uint16) for i in (at, at + 1))
    return low.bitwise_or(high.lshift(8))


def _half(b: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block. (..., bytes) -> (..., 1) float32"""
    return from_float16(_uint16(b, at))


def _iq4(q: Tensor) -> Tensor:
    """The value in _IQ4 of each four bits, out of the 16 bytes of the table as four constants: a
    table in memory would be a look-up that cannot be part of choosing experts."""
    table = np.array(_IQ4, dtype=np.int8).view("<u4").tolist()
    word = [Tensor.const(bits, dtypes.uint32) for bits in table]
    quarter = (q < 8).where((q < 4).where(word[0], word[1]), (q < 12).where(word[2], word[3]))
    byte = quarter.rshift(q.bitwise_and(3).cast(dtypes.uint32) * 8).bitwise_and(255).float()
    return (byte > 127).where(byte - 256, byte)
