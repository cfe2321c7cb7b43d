"""Rotary position embedding (RoPE, Su et al. 2021, arXiv:2104.09864, section 3.4).

Attention compares a query with a key by a dot product, which knows nothing of order. RoPE turns
each head vector by angles that grow with its position; the dot product of two turned vectors then
depends on how far apart they are. A head of size Hd is Hd/2 pairs of numbers; pair i turns by

    position * inv_freq[i],    inv_freq[i] = rope_theta ** (-2i / Hd)

so the first pairs turn fast (near words) and the last ones slowly (far words).

Which two numbers make a pair is a convention that no shape shows and that silently ruins a model
when mixed up. The paper interleaves: pair i is (x[2i], x[2i+1]). Hugging Face's checkpoints, and so
Qwen3's, are split-half: pair i is (x[i], x[i + Hd/2]). The two differ by a fixed permutation of
q_proj's and k_proj's rows, which is why converters between them exist. Here: split-half.

YaRN (Peng et al. 2023, arXiv:2309.00071) lets texts be longer than those the model was trained on:
pairs that turn often within the trained length keep their speed, slow ones are slowed down by the
factor, so that no pair ever turns farther than it did in training, and those between get a mix.
"""

from __future__ import annotations

import math

import numpy as np
from tinygrad import Tensor, UOp

from qwen3_tg.config import ModelConfig
from qwen3_tg.yarn import Yarn


def rope_table(config: ModelConfig, positions: int) -> np.ndarray:
    """cos and sin of every angle: (positions, Hd), cosines in the first half of a row, sines in the
    second. The angles are float32 products, as in transformers, so that far positions agree."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = (1.0 / np.power(np.float32(config.rope_theta), half)).astype(np.float32)  # (Hd/2,)
    scale = np.float32(1)
    if config.yarn:
        slowed = slowed_share(config.yarn, config.head_dim, config.rope_theta)
        inv_freq = inv_freq / np.float32(config.yarn.factor) * slowed + inv_freq * (1 - slowed)
        scale = np.float32(config.yarn.attention_factor)
    angles = np.outer(np.arange(positions, dtype=np.float32), inv_freq)  # (positions, Hd/2)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) * scale
    return np.asarray(table, dtype=np.float32)


def slowed_share(yarn: Yarn, head_dim: int, rope_theta: float) -> np.ndarray:
    """How far YaRN slows each pair down: 0 for the fast ones, 1 for the slow ones, and a straight
    line between (the paper's 1 - gamma, equation 18). (Hd/2,) float32"""

    def pair(turns: float) -> float:
        """The pair, counted from 0, that turns so often within the original length."""
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope_theta))

    first, last = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 if first == last else 0
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first)
    share: np.ndarray = np.clip(ramp, 0, 1).astype(np.float32)
    return share


def apply_rope(x: Tensor, table: Tensor, start_pos: UOp) -> Tensor:
    """Turn each head of S tokens at positions start_pos, start_pos + 1, ...

    x: (B, S, heads, Hd) -> (B, S, heads, Hd)"""
    S = x.shape[1]
    cos, sin = table[start_pos : start_pos + S].reshape(1, S, 1, -1).chunk(2, dim=-1)
    x1, x2 = x.float().chunk(2, dim=-1)  # the two numbers of every pair: (B, S, heads, Hd/2)
    return (x1 * cos - x2 * sin).cat(x2 * cos + x1 * sin, dim=-1).cast(x.dtype)
