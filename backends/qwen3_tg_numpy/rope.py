"""Rotary position embedding, plain and stretched by YaRN: positions in, heads turned.

The one lecture: RoPE turns pairs of a head's numbers by an angle that grows with the position, so
that a dot product of a query and a key depends on their distance. The paper's pairs are neighbours
(0, 1), (2, 3), ...; Qwen3's are (i, i + Hd/2), the halves. Either is the other with the rows of
q_proj and k_proj in another order, and checkpoints of Qwen3 (GGUF files, too) have the order of
halves.
"""

from __future__ import annotations

import math

import numpy as np

from qwen3_tg_numpy.config import ModelConfig

Array = np.ndarray


def frequencies(config: ModelConfig) -> tuple[Array, float]:
    """Radians a position for each pair i of a head, and a factor for cosine and sine. -> (Hd/2,)

    Plain: rope_theta ** (-2i / Hd) (Su et al. 2021, arXiv:2104.09864, section 3.4.2) and 1.

    YaRN (Peng et al. 2023, arXiv:2309.00071): a pair that turns often within the original length
    keeps its frequency f, one that turns seldom gets f / factor, as if positions were closer to
    each other, and between the two lies a ramp (section 3.2, "NTK-by-parts").
    The pair that turns n times in the original length L is the i that solves
    L * rope_theta ** (-2i / Hd) = 2 * pi * n, so

        i(n) = Hd * ln(L / (2 * pi * n)) / (2 * ln(rope_theta)).

    The ramp goes from 0 at i(beta_fast) to 1 at i(beta_slow). The paper's ramp is linear in n; this
    one is linear in i, with ends rounded outwards and kept within the head (to Hd - 1, though pairs
    end at Hd/2 - 1), as in the paper's published code and in transformers."""
    Hd, yarn = config.head_dim, config.yarn
    exponent = np.arange(0, Hd, 2, dtype=np.float32) / np.float32(Hd)
    wavelength = np.float32(config.rope_theta) ** exponent  # over 2 pi
    if yarn is None:
        return np.float32(1) / wavelength, 1.0

    def pair_that_turns(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return Hd * math.log(length / (2 * math.pi * times)) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, Hd - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    pairs = np.arange(Hd // 2, dtype=np.float32)
    ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    stretched = np.float32(1) / (np.float32(yarn.factor) * wavelength)
    return stretched * ramp + (1 - ramp) / wavelength, yarn.attention_factor


def rope_table(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of position * frequency, times YaRN's factor. positions: (S,) -> 2 x
    (S, 1, Hd)

    Frequencies and angles are rounded to float32, as in transformers. Near position 40,000 that
    moves an angle by thousandths, and by as much between two libraries' powers."""
    inv_freq, factor = frequencies(config)
    angle = positions.astype(np.float32)[:, None] * inv_freq  # (S, Hd/2)
    angle = np.concatenate([angle, angle], axis=-1)[:, None, :]  # (S, 1, Hd)
    return np.cos(angle) * np.float32(factor), np.sin(angle) * np.float32(factor)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (x[i], x[i + Hd/2]) of every head. x: (S, heads, Hd) -> (S, heads, Hd)"""
    first, second = np.split(x, 2, axis=-1)
    turned: Array = x * cos + np.concatenate([-second, first], axis=-1) * sin
    return turned
