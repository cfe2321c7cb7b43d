"""Weights as GGUF's blocks, in numpy: (rows, I) float32 -> (rows, bytes) uint8.

The `gguf` library makes the simple types; the K-quants and IQ4_NL are made here: search.py finds
the numbers, this file packs their bits. What the bits mean is ggml's word (ggml-quants.c,
dequantize_row_*), and the library decodes them (`dequantise`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from qwen3_tg.quantize.search import Blocks, Floats, Halves, fit_signed, fit_table, fit_with_mins

IQ4_NL_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
Bytes = NDArray[np.uint8]
Codes = NDArray[np.integer[Any]]  # uint8 everywhere; numpy types a shifted one wider
FLOATS = ("F32", "F16", "BF16")
TYPES = (
    *(*FLOATS, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)


def block_size(type: str) -> int:
    """Values in a block; 1 for a float."""
    return 1 if type in FLOATS else int(gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type]][0])


def row_bytes(inputs: int, type: str) -> int:
    """Bytes of a row of so many values."""
    block, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    return int(inputs // block * nbytes)


def quantise(x: Floats, type: str) -> Bytes:
    """x: (rows, I) float32, finite, I whole blocks -> (rows, bytes of a row) uint8."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        if type in _MAKERS:
            blocks = _MAKERS[type](x.reshape(-1, block_size(type)))
            return blocks.reshape(len(x), -1)
        stored = gguf.quants.quantize(np.ascontiguousarray(x), GGMLQuantizationType[type])
        return np.ascontiguousarray(stored).view(np.uint8)


def dequantise(stored: Bytes, type: str) -> Floats:
    """(rows, bytes of a row) uint8 -> (rows, I) float32. A value that the type cannot hold shows as
    an infinity or NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(
            gguf.quants.dequantize(stored, GGMLQuantizationType[type]), dtype=np.float32
        )


def _q2_k(x: Floats) -> Bytes:
    found = fit_with_mins(x, groups=16, top=3, top_scale=15)
    scales = _codes(found.scales) | _codes(found.mins) << 4
    return _joined(scales, _two_bits(_codes(found.q)), _bytes(found.d), _bytes(found.dmin))


def _q3_k(x: Floats) -> Bytes:
    found = fit_signed(x, groups=16, lowest=-4, lowest_scale=-32)
    q, scales = _codes(found.q + 4), _codes(found.scales + 32)
    high = _bits((q >> 2).reshape(-1, 8, 32))
    nibbles = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    tops = _two_bits_of_four((scales >> 4).reshape(-1, 4, 4))
    return _joined(high, _two_bits(q & 3), nibbles, tops, _bytes(found.d))


def _q4_k(x: Floats) -> Bytes:
    found = fit_with_mins(x, groups=8, top=15, top_scale=63)
    return _joined(*_head_of_45(found), _nibbles(_codes(found.q)))


def _q5_k(x: Floats) -> Bytes:
    found = fit_with_mins(x, groups=8, top=31, top_scale=63)
    q = _codes(found.q)
    return _joined(*_head_of_45(found), _bits((q >> 4).reshape(-1, 8, 32)), _nibbles(q & 15))


def _q6_k(x: Floats) -> Bytes:
    found = fit_signed(x, groups=16, lowest=-32, lowest_scale=-128)
    q = _codes(found.q + 32).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4  # (N, 2, 2, 32)
    high = _two_bits_of_four(q >> 4)
    scales = found.scales.astype(np.int8).view(np.uint8)
    return _joined(low, high, scales, _bytes(found.d))


def _iq4_nl(x: Floats) -> Bytes:
    found = fit_table(x, IQ4_NL_TABLE)
    q = _codes(found.q)
    return _joined(_bytes(found.d), q[:, :16] | q[:, 16:] << 4)


_MAKERS: dict[str, Callable[[Floats], Bytes]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
}


def _head_of_45(found: Blocks) -> tuple[Codes, ...]:
    """What Q4_K and Q5_K begin with: the factors, and 8 scales and 8 mins of 6 bits in 12 bytes."""
    s, m = _codes(found.scales), _codes(found.mins)
    return (
        _bytes(found.d),
        _bytes(found.dmin),
        s[:, :4] | (s[:, 4:] >> 4) << 6,
        m[:, :4] | (m[:, 4:] >> 4) << 6,
        (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
    )


def _nibbles(q: Codes) -> Codes:
    """(N, 256) -> (N, 4, 32): two groups of 32 in a byte each."""
    q = q.reshape(-1, 4, 2, 32)
    return q[:, :, 0] | q[:, :, 1] << 4


def _two_bits(q: Codes) -> Codes:
    """(N, 256) -> (N, 2, 32): the four groups of 32 of each half in a byte."""
    return _two_bits_of_four(q.reshape(-1, 2, 4, 32))


def _two_bits_of_four(q: Codes) -> Codes:
    """(..., 4, n) -> (..., n), the first lowest"""
    return q[..., 0, :] | q[..., 1, :] << 2 | q[..., 2, :] << 4 | q[..., 3, :] << 6


def _bits(bits: Codes) -> Codes:
    """(N, 8, n) -> (N, n), the first lowest"""
    return np.packbits(bits, axis=1, bitorder="little")[:, 0]


def _codes(x: Floats) -> Codes:
    return x.astype(np.uint8)


def _bytes(d: Halves) -> Codes:
    """(N,) float16 -> (N, 2)"""
    return np.ascontiguousarray(d, dtype="<f2").view(np.uint8).reshape(-1, 2)


def _joined(*parts: Codes) -> Bytes:
    """(N, ...) each -> (N, bytes of a block)"""
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1, dtype=np.uint8)
