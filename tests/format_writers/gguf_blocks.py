"""Blocks of every GGUF type. The gguf library makes some of them; here are the others, quantised
plainly (no search for better scales), or, for the types with tables, drawn at random: every index,
sign and scale occurs, and the block's own factor keeps the size of the weights.

What the bytes mean is always the library's word (`dequantise`).
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType

IQ4_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)


def quantise(W: np.ndarray, type: str) -> np.ndarray:
    """(..., I) float32 -> what is stored: float32, float16, or uint8 bytes (..., bytes a row).

    Raises ValueError if a row is no whole number of blocks."""
    kind = GGMLQuantizationType[type]
    if type not in _WRITERS:
        return gguf.quants.quantize(np.ascontiguousarray(W), kind)
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    if W.shape[-1] % size:
        raise ValueError(f"{type}: rows of {W.shape[-1]} are no whole blocks of {size}")
    blocks = _WRITERS[type](W.reshape(-1, size).astype(np.float32))
    return blocks.reshape(*W.shape[:-1], -1)


def dequantise(stored: np.ndarray, type: str) -> np.ndarray:
    """What is stored -> float32."""
    values = gguf.quants.dequantize(stored, GGMLQuantizationType[type])
    return np.array(values, dtype=np.float32)


def _half(x: np.ndarray) -> np.ndarray:
    """(n,) -> (n, 2) bytes of float16"""
    return x.astype("<f2").reshape(-1, 1).view(np.uint8)


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def _divided(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    return x / np.where(by == 0, 1, by)


def _extreme(x: np.ndarray) -> np.ndarray:
    """The value furthest from zero, with its sign, of the last axis."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]


def _scale_and_min(
    x: np.ndarray, top: int, scale_top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For w = d*scale*q - dmin*min: x (n, groups, size) -> d, dmin (n,), scale, min (n, groups),
    q like x."""
    low = np.maximum(-x.min(-1), 0)
    step = (x.max(-1) + low) / top
    d, dmin = _rounded(step.max(-1) / scale_top), _rounded(low.max(-1) / scale_top)
    scale = np.clip(np.round(step / d[:, None]), 0, scale_top)
    min = np.clip(np.round(_divided(low, dmin[:, None])), 0, scale_top)
    shifted = x + (dmin[:, None] * min)[..., None]
    q = np.clip(np.round(_divided(shifted, (d[:, None] * scale)[..., None])), 0, top)
    return d, dmin, scale.astype(np.uint8), min.astype(np.uint8), q.astype(np.uint8)


def _signed_scale(
    x: np.ndarray, end: int, scale_end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For w = d*scale*q with q from `end`, negative, and scale from `scale_end`: x (n, groups,
    size) -> d (n,), scale (n, groups), q like x."""
    step = _extreme(x) / end
    d = _rounded(_extreme(step) / scale_end)
    scale = np.clip(np.round(step / d[:, None]), scale_end, -scale_end - 1)
    q = np.clip(np.round(_divided(x, (d[:, None] * scale)[..., None])), end, -end - 1)
    return d, scale.astype(np.int16), q.astype(np.int16)


def _q2_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, min, q = _scale_and_min(x.reshape(-1, 16, 16), 3, 15)
    return np.hstack([scale | min << 4, _two_bits(q.reshape(-1, 256)), _half(d), _half(dmin)])


def _q3_k(x: np.ndarray) -> np.ndarray:
    d, scale, q = _signed_scale(x.reshape(-1, 16, 16), -4, -32)
    q = (q + 4).astype(np.uint8).reshape(-1, 256)
    high = np.packbits((q >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    s = (scale + 32).astype(np.uint8)  # (n, 16), 6 bits each
    low_nibbles = (s[:, :8] & 15) | (s[:, 8:] & 15) << 4
    tops = (s >> 4).reshape(-1, 4, 4) << np.array([[0], [2], [4], [6]], dtype=np.uint8)
    return np.hstack(
        [high, _two_bits(q & 3), low_nibbles, np.bitwise_or.reduce(tops, axis=1), _half(d)]
    )


def _two_bits(q: np.ndarray) -> np.ndarray:
    """(n, 256) -> (n, 64): two halves of 128, each four layers of 32."""
    layers = q.reshape(-1, 2, 4, 32) << np.array([[0], [2], [4], [6]], dtype=np.uint8)
    return np.bitwise_or.reduce(layers, axis=2).reshape(-1, 64)


def _q4_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, min, q = _scale_and_min(x.reshape(-1, 8, 32), 15, 63)
    return np.hstack([_half(d), _half(dmin), _six_bit_pairs(scale, min), _nibbles(q)])


def _q5_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, min, q = _scale_and_min(x.reshape(-1, 8, 32), 31, 63)
    high = np.packbits(q >> 4, axis=1, bitorder="little")[:, 0]  # (n, 32)
    return np.hstack([_half(d), _half(dmin), _six_bit_pairs(scale, min), high, _nibbles(q & 15)])


def _six_bit_pairs(scale: np.ndarray, min: np.ndarray) -> np.ndarray:
    """Two times (n, 8) of 6 bits -> (n, 12)"""
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = min[:, :4] | min[:, 4:] >> 4 << 6
    third = (scale[:, 4:] & 15) | (min[:, 4:] & 15) << 4
    return np.hstack([first, second, third])


def _nibbles(q: np.ndarray) -> np.ndarray:
    """(n, 8, 32) -> (n, 128): groups 2j and 2j + 1 share bytes"""
    return (q[:, ::2] | q[:, 1::2] << 4).reshape(len(q), -1)


def _q6_k(x: np.ndarray) -> np.ndarray:
    d, scale, q = _signed_scale(x.reshape(-1, 16, 16), -32, -128)
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # halves, quarters of them
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4  # (n, 2, 2, 32)
    high = (q >> 4) << np.array([[0], [2], [4], [6]], dtype=np.uint8)
    return np.hstack(
        [
            low.reshape(-1, 128),
            np.bitwise_or.reduce(high, axis=2).reshape(-1, 64),
            scale.astype(np.int8).view(np.uint8),
            _half(d),
        ]
    )


def _nearest(x: np.ndarray) -> np.ndarray:
    return np.abs(x[..., None] - IQ4_TABLE).argmin(-1).astype(np.uint8)


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    d = _rounded(_extreme(x) / IQ4_TABLE[0])
    q = _nearest(_divided(x, d[:, None]))
    return np.hstack([_half(d), q[:, :16] | q[:, 16:] << 4])


def _iq4_xs(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 8, 32)
    step = _extreme(x) / IQ4_TABLE[0]
    d = _rounded(_extreme(step) / -32)
    scale = np.clip(np.round(step / d[:, None]), -32, 31)
    q = _nearest(_divided(x, (d[:, None] * scale)[..., None]))  # (n, 8, 32)
    s = (scale + 32).astype(np.uint16)
    high = np.bitwise_or.reduce(s >> 4 << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    low = ((s[:, ::2] & 15) | (s[:, 1::2] & 15) << 4).astype(np.uint8)
    packed = (q[..., :16] | q[..., 16:] << 4).reshape(len(q), -1)
    return np.hstack([_half(d), high.astype("<u2").reshape(-1, 1).view(np.uint8), low, packed])


def _random_blocks(type: str) -> Callable[[np.ndarray], np.ndarray]:
    """Blocks of random bytes whose factor d, the first two bytes (spread over the scales in IQ1_M),
    gives them the root mean square of x."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type]]

    def with_factor(blocks: np.ndarray, d: np.ndarray) -> np.ndarray:
        blocks = blocks.copy()
        if type != "IQ1_M":
            blocks[:, :2] = _half(d)
            return blocks
        bits = d.astype("<f2").view(np.uint16)  # its nibbles, lowest first, top those of 4 words
        for i in range(4):
            nibble = (bits >> 4 * i & 15).astype(np.uint8)
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | nibble << 4
        return blocks

    def blocks_like(x: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(x.view(np.uint32).sum())  # other blocks for each tensor
        blocks = rng.integers(0, 256, (len(x), block_bytes), dtype=np.uint8)
        # 1/64: with scales of 15 and values of 62, one would not overflow, but be coarse
        unit = dequantise(with_factor(blocks, np.full(len(x), 1 / 64)), type)
        size = np.sqrt((x**2).mean(1) / (unit**2).mean(1)) / 64
        return with_factor(blocks, size)

    return blocks_like


TABLE_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_WRITERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
} | {type: _random_blocks(type) for type in TABLE_TYPES}
# Every type that Qwen3 files have, but F32, F16 and BF16.
BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *_WRITERS)
