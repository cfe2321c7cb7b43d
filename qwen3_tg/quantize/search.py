"""Scales for blocks of weights: the search that makes K-quants better than plain rounding.

A block is split into groups that share a scale. For each group, several roundings to the grid are
tried; each has a best scale (and offset) in the least-squares sense, in closed form; the one with
the least error wins. Then the scales of a block are rounded to the few bits they have, and the
block's own factors are fitted once more. Errors are weighted by the size of a weight and of its
group, so that the large ones, which count more in a product, are kept better.

Arrays are (L, G): L weights of a group, G groups; numpy then works on long rows. Blocks are scaled
by a power of two first, so that no square overflows; this changes no digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]

_LEAST_WEIGHT = 1e-20  # of an error, so that groups of zeros divide by something
_SINGULAR = 1e-6  # of the largest that a determinant can be
_FITS_AGAIN = 2  # rounding with the best scale so far, and fitting again
# Where the grids of the tries end, against the extremes of a group. Steps of 0.3 give errors within
# 0.5 % of those with steps of 0.1, in a third of the time (gaussian weights, all types).
_OFFSETS = np.arange(-1.0, 1.01, 0.33)
_SIGNED_OFFSETS = np.arange(-0.7, 0.81, 0.3)
_TABLE_ENDS = np.array([1.06, 1, 0.94, 0.88])


@dataclass(frozen=True)
class Blocks:
    """N blocks of `groups` groups each: the factors `d` and `dmin` (N,) float16, the scales and
    mins (N, groups), the codes `q` (N, values of a block). A grid without mins has zeros there."""

    d: Halves
    dmin: Halves
    scales: Floats
    mins: Floats
    q: Floats


def fit_with_mins(x: Floats, groups: int, top: int, top_scale: int) -> Blocks:
    """w = d * scale * q - dmin * min, with q in 0..top and scale and min in 0..top_scale.

    x: (N, values of a block) float32."""
    block = _Grouped(x, groups)
    scale, offset = _search_with_min(block.x, block.weight, top)
    scales, mins = block.by_block(scale), block.by_block(offset)
    d = block.half(scales.max(1) / top_scale)
    dmin = block.half(mins.max(1) / top_scale)
    scales = _rounded(scales, d[:, None], 0, top_scale)
    mins = _rounded(mins, dmin[:, None], 0, top_scale)

    def decode(d: Floats, dmin: Floats) -> tuple[Floats, Floats]:
        scale, offset = (d[:, None] * scales).ravel(), (dmin[:, None] * mins).ravel()
        q = _rounded(block.x + offset, scale, 0, top)
        return q, scale * q - offset

    # the factors that suit these codes best: two unknowns in each block
    q, y = decode(d, dmin)
    a, b = scales.ravel() * q, np.broadcast_to(-mins.ravel(), q.shape)
    wa, wb = block.weight * a, block.weight * b
    aa, ab, bb = block.sum(wa * a), block.sum(wa * b), block.sum(wb * b)
    ax, bx = block.sum(wa * block.x), block.sum(wb * block.x)
    determinant = aa * bb - ab * ab
    solvable = determinant > _SINGULAR * aa * bb
    inverse = _inverse(np.where(solvable, determinant, 0))
    d2 = block.half(np.where(solvable, (ax * bb - bx * ab) * inverse, d))
    dmin2 = block.half(np.where(solvable, (bx * aa - ax * ab) * inverse, dmin))
    better = (block.error(decode(d2, dmin2)[1]) < block.error(y)) & (d2 > 0) & (dmin2 >= 0)
    d, dmin = np.where(better, d2, d), np.where(better, dmin2, dmin)
    q, _ = decode(d, dmin)
    return Blocks(block.unscaled(d), block.unscaled(dmin), scales, mins, block.values(q))


def fit_signed(x: Floats, groups: int, lowest: int, lowest_scale: int) -> Blocks:
    """w = d * scale * q, with q from `lowest` (below 0) to -lowest - 1 and scale likewise.

    x: (N, values of a block) float32."""
    block = _Grouped(x, groups)

    def codes(inverse: Floats) -> Floats:
        q = block.x * inverse
        np.rint(q, out=q)
        np.clip(q, lowest, -lowest - 1, out=q)
        return q

    ends = np.concatenate([lowest + _SIGNED_OFFSETS, -lowest - _SIGNED_OFFSETS])
    scales = block.by_block(_search_signed(block.x, block.weight, ends, codes))
    d = block.half(_extreme(scales.T) * np.float32(1 / lowest_scale))
    scales = _rounded(scales, d[:, None], lowest_scale, -lowest_scale - 1)

    def decode(d: Floats) -> tuple[Floats, Floats]:
        scale = (d[:, None] * scales).ravel()
        q = codes(_inverse(scale))
        return q, scale * q

    q, y = decode(d)
    a = scales.ravel() * q
    wa = block.weight * a
    d2 = block.half(block.sum(wa * block.x) * _inverse(block.sum(wa * a)))
    better = (block.error(decode(d2)[1]) < block.error(y)) & (d2 != 0)
    d = np.where(better, d2, d)
    q, _ = decode(d)
    return Blocks(
        block.unscaled(d),
        np.zeros_like(d, np.float16),
        scales,
        np.zeros_like(scales),
        block.values(q),
    )


def fit_table(x: Floats, table: Floats) -> Blocks:
    """w = d * table[q], one scale a block. `table` is ascending and of integers in -128..127.

    x: (N, values of a block) float32."""
    block = _Grouped(x, 1)
    # entry nearest to y, for y in steps of a half: exact, as no border between entries lies within
    middles = (table[1:] + table[:-1]) / 2
    nearest = np.searchsorted(middles, np.arange(-256, 256) / 2 + 0.25).astype(np.uint8)
    values = table[nearest]

    def step(inverse: Floats) -> Floats:
        y = block.x * (2 * inverse)
        np.floor(y, out=y)
        np.clip(y, -256, 255, out=y)
        y += 256
        return y.astype(np.int16)

    ends = np.outer(table[[0, -1]], _TABLE_ENDS).ravel()
    scale = _search_signed(block.x, block.weight, ends, lambda inverse: values[step(inverse)])
    d = block.half(scale)
    q = nearest[step(_inverse(d))]
    none = np.zeros((len(x), 1), dtype=np.float32)
    return Blocks(block.unscaled(d), np.zeros_like(d, np.float16), none, none, block.values(q))


class _Grouped:
    """Blocks (N, values) as (L, G), scaled by a power of two so that each has its largest value in
    0.5..1. `weight` (L, G) is what an error counts."""

    def __init__(self, x: Floats, groups: int):
        self._blocks, self._groups = len(x), groups
        self._exponent = np.frexp(np.abs(x).max(1))[1]
        scaled = np.ldexp(x, -self._exponent[:, None])
        self.x = np.ascontiguousarray(scaled.reshape(len(x) * groups, -1).T)
        mean_square = np.einsum("lg,lg->g", self.x, self.x) / len(self.x)
        self.weight = np.abs(self.x)
        self.weight += np.sqrt(mean_square) + np.float32(_LEAST_WEIGHT)

    def by_block(self, x: Floats) -> Floats:
        """(G,) -> (N, groups)"""
        return x.reshape(self._blocks, self._groups)

    def sum(self, x: Floats) -> Floats:
        """(L, G) -> (N,): over each block."""
        total: Floats = self.by_block(x.sum(0)).sum(1)
        return total

    def error(self, y: Floats) -> Floats:
        """(L, G) -> (N,): the weighted squared error of each block."""
        difference = y - self.x
        return self.sum(self.weight * difference * difference)

    def values(self, q: Floats) -> Floats:
        """(L, G) -> (N, values of a block)"""
        return np.ascontiguousarray(q.T).reshape(self._blocks, -1)

    def half(self, d: Floats) -> Floats:
        """(N,) -> (N,): what is left of a factor when it is stored as float16; infinite where it is
        beyond that."""
        kept: Floats = np.ldexp(self.unscaled(d).astype(np.float32), -self._exponent)
        return kept

    def unscaled(self, d: Floats) -> Halves:
        """(N,) -> (N,) float16, of the weights as they were."""
        return np.ldexp(d, self._exponent).astype(np.float16)


def _search_with_min(x: Floats, weight: Floats, top: int) -> tuple[Floats, Floats]:
    """The scale and the min (G,), none negative, of x = scale * q - min."""
    low = np.minimum(x.min(0), 0)
    from_low, span = x - low, _inverse(x.max(0) - low)
    w, wx = weight.sum(0), np.einsum("lg,lg->g", weight, x)
    best = np.full(x.shape[1], np.inf, dtype=np.float32)
    scale, offset = np.zeros_like(best), -low

    def consider(q: Floats) -> None:
        nonlocal best, scale, offset
        wq = weight * q
        a, b = wq.sum(0), np.einsum("lg,lg->g", wq, q)
        c = np.einsum("lg,lg->g", wq, x)
        determinant = w * b - a * a
        solvable = determinant > _SINGULAR * w * b
        s = (w * c - a * wx) * _inverse(np.where(solvable, determinant, 0))
        m = (s * a - wx) / w
        s = np.where(m < 0, c * _inverse(b), s)
        m = np.maximum(m, 0)
        error = s * (s * b - 2 * m * a - 2 * c) + m * (m * w + 2 * wx)  # but for the sum of wxx
        better = error < best
        best = np.where(better, error, best)
        scale, offset = np.where(better, s, scale), np.where(better, m, offset)

    for more in _OFFSETS:
        consider(_rounded(from_low * (span * np.float32(top + more)), None, 0, top))
    for _ in range(_FITS_AGAIN):
        consider(_rounded(x + offset, scale, 0, top))
    return scale, offset


def _search_signed(
    x: Floats,
    weight: Floats,
    ends: Floats,
    codes: Callable[[Floats], Floats],
) -> Floats:
    """The scale (G,), of either sign, of x = scale * grid. `codes` gives the values of the grid
    (L, G) for an inverse scale (G,); `ends` are where on the grid the extreme of x may lie."""
    to_extreme = _inverse(_extreme(x))
    best = np.full(x.shape[1], -1, dtype=np.float32)
    scale = np.zeros_like(best)

    def consider(values: Floats) -> None:
        nonlocal best, scale
        wq = weight * values
        c, b = np.einsum("lg,lg->g", wq, x), np.einsum("lg,lg->g", wq, values)
        s = c * _inverse(b)
        gain = c * s  # what is left of the sum of wxx
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, s, scale)

    for end in ends:
        consider(codes(to_extreme * np.float32(end)))
    for _ in range(_FITS_AGAIN):
        consider(codes(_inverse(scale)))
    return scale


def _extreme(x: Floats) -> Floats:
    """(L, G) -> (G,): the value furthest from zero, with its sign."""
    low, high = x.min(0), x.max(0)
    extreme: Floats = np.where(-low > high, low, high)
    return extreme


def _inverse(x: Floats) -> Floats:
    """1 / x, and 0 where x is 0 or its inverse is beyond float32."""
    usable = np.abs(x) > np.float32(1e-37)
    return np.where(usable, 1 / np.where(usable, x, np.float32(1)), np.float32(0))


def _rounded(x: Floats, scale: Floats | None, least: int, most: int) -> Floats:
    """x / scale as integers in a range; zero where the scale is zero."""
    q = x if scale is None else x * _inverse(scale)
    q = np.rint(q)
    return np.clip(q, least, most, out=q)
