"""How far rounding alone may lead a computation away: what a device's error is held against.

A number that is kept in p bits is off by up to 2^-p of itself, and a sum of n products, each
rounded to 24 bits, by about sqrt(n) times that. So every value of the reference gets a random error
of this size, and what comes of it in the next step says how large an honest error is. This follows
every formula (a softmax, a norm, a choice of experts) without a bound of its own for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy

# Half of a unit in the last place, of 1: 2^-p.
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Errors are spread evenly between none and a whole unit, of numbers between 1 and 2.
_TYPICAL = 0.5
# Of an int8, by the greatest number of its head: errors are spread evenly over a step of 1/127.
_INT8_TYPICAL = 1 / (127 * 12**0.5)
_FEW = 4.0  # operations one after the other in float32, such as those of exp
_IN_FLOAT32 = ("scores", "probs", "topk_weights", "lm_head")
_BLOCK = 32  # activations that share a scale in the CPU's fast kernels
_BLOCK_UNIT = 2.0**-16  # of the largest of them


@dataclass(frozen=True)
class Rounding:
    """Of one model on one device. `packed`: its matrices are integers with scales."""

    policy: Policy
    config: ModelConfig
    packed: bool
    unpacked_as: str | None = None  # the type that matrices without a kernel are kept in

    def kept(self, name: str, value: np.ndarray) -> np.ndarray:
        """Typical error of a step's value by being kept, for each of its numbers."""
        dtype = "float32" if name in _IN_FLOAT32 else self.policy.dtype
        if name == "k_rope" and self.policy.kernels != "generic":  # kept in the cache alone
            if self.policy.kv_dtype == "int8":
                return self._cached(value)
            dtype = self.policy.kv_dtype
        unit = max(UNIT[dtype], _FEW * UNIT["float32"])
        return np.asarray(np.abs(value) * np.float32(_TYPICAL * unit))

    def used(self, name: str, value: np.ndarray, start_pos: int) -> np.ndarray:
        """Typical error of a step's value as the next step uses it: kept, summed over, multiplied
        by rounded weights, turned by rounded angles. `name` is without its layer."""
        config, policy = self.config, self.policy
        sums = {
            "input_layernorm": config.hidden_size,
            "post_attention_layernorm": config.hidden_size,
            "norm": config.hidden_size,
            "mix": config.num_attention_heads * config.head_dim,
            "act": max(config.intermediate_size, config.moe_intermediate_size),
            "q_rope": config.head_dim,
            "k_rope": config.head_dim,
            "probs": value.shape[-1],
        }
        units = [UNIT["float32"] * sums.get(name, 1) ** 0.5]
        if name not in _IN_FLOAT32:
            units.append(UNIT[policy.dtype])
        feeds_matrix = sums.get(name, 0) and name not in ("q_rope", "k_rope", "probs")
        if feeds_matrix and policy.dtype != "float32":
            units.append(UNIT[policy.dtype])  # of weights, in the activations' type
        if self.unpacked_as and (feeds_matrix or name == "embed_tokens"):
            units.append(UNIT[self.unpacked_as])
        relative = np.sqrt(np.sum(np.square(units)))
        error = np.abs(value) * np.float32(_TYPICAL * relative)
        if name in ("k_rope", "v_proj"):
            error = np.hypot(error, self._cached(value))
        if name in ("q_norm", "k_norm"):
            angle = UNIT["float32"] * (start_pos + np.arange(len(value), dtype=np.float32))
            error = error + np.abs(value) * angle.reshape(-1, *[1] * (value.ndim - 1))
        if feeds_matrix and self.packed and policy.kernels == "fast":
            blocks = np.abs(value.reshape(*value.shape[:-1], -1, _BLOCK)).max(-1, keepdims=True)
            spread = np.broadcast_to(blocks * np.float32(_BLOCK_UNIT), (*blocks.shape[:-1], _BLOCK))
            error = error + _TYPICAL * spread.reshape(value.shape)
        return np.asarray(error, dtype=np.float32)

    def _cached(self, value: np.ndarray) -> np.ndarray:
        """Typical error of keys or values by being kept in the cache. value: (S, K, Hd), or (S,
        K*Hd)"""
        if self.policy.kv_dtype != "int8":
            return np.asarray(np.abs(value) * np.float32(_TYPICAL * UNIT[self.policy.kv_dtype]))
        heads = np.abs(value).reshape(len(value), -1, self.config.head_dim)
        error = heads.max(axis=-1, keepdims=True) * np.float32(_INT8_TYPICAL)
        return np.broadcast_to(error, heads.shape).reshape(value.shape)


def by_position(name: str, value: np.ndarray) -> np.ndarray:
    """(S, numbers) of a step's value; scores and probabilities are (H, S, T)."""
    rows = value.transpose(1, 0, 2) if name in ("scores", "probs") else value
    return rows.reshape(len(rows), -1)


def size(name: str, value: np.ndarray) -> np.ndarray:
    """Root mean square at each position. (S,)"""
    rows = by_position(name, value).astype(np.float64)
    return np.asarray(np.sqrt(np.mean(rows * rows, axis=-1)))
