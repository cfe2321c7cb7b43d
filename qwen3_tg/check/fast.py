"""One layer on the CPU by its own kernels: all steps in one go, as generation runs them, and one by
one. Some of their steps are several of the model's: those have the last one's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes

from qwen3_tg.buffers import write
from qwen3_tg.check.lowered import Judge
from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy
from qwen3_tg.forward import attention_weights, mlp_weights
from qwen3_tg.kv_cache import KV_DTYPES, LayerCache, dequantise, quantise
from qwen3_tg.linear import Weight
from qwen3_tg.model import Block, MoE

# Steps of the model that are inside of one of these kernels.
INNER = frozenset(
    {
        "q_norm",
        "k_norm",
        "scores",
        "probs",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "experts",
    }
)


class FastLayer:
    """As LoweredLayer. `kernels` are those of qwen3_tg_cpu."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        layer: int,
        rope: Tensor,
        policy: Policy,
        capacity: int,
        kernels: Any,
    ):
        self._kernels, self._rope, self._eps = kernels, rope, config.rms_norm_eps
        self._chunk = policy.prefill_chunk
        self._block = Block(config, weights, layer)
        self._attention = attention_weights(kernels, self._block)
        self._mlp = mlp_weights(kernels, self._block)
        kv_dtype = KV_DTYPES[policy.kv_dtype]
        self._cache = LayerCache(config, capacity, kv_dtype, policy.device)
        self._own_cache = LayerCache(config, capacity, kv_dtype, policy.device)
        self._H, self._K, self._Hd = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )

    def run(self, x: np.ndarray, start_pos: int) -> np.ndarray:
        """As generation does it. x: (S, D) -> (S, D)"""
        steps, _ = self._list(len(x), start_pos, self._cache)
        self._write("x", x)
        steps.part().realize()
        return self._read("x", x.shape)

    def each_step(self, x: np.ndarray, start_pos: int, judge: Judge) -> None:
        """Every step alone, in order, from right inputs: what `judge` says goes on to the next."""
        S, (H, K, Hd) = len(x), (self._H, self._K, self._Hd)
        steps, attention_end = self._list(S, start_pos, self._own_cache)
        at = 0

        def next_step(count: int = 1) -> None:
            nonlocal at
            steps.part(at, at + count).realize()
            at += count

        def seen(name: str, room: str, shape: tuple[int, ...]) -> np.ndarray:
            right = judge(name, self._read(room, shape))
            self._write(room, right)
            return right

        self._write("x", x)
        if S > 1:
            next_step()
            seen("input_layernorm", "normed", x.shape)
        next_step()
        qkv = self._read("qkv", (S, (H + 2 * K) * Hd))
        ends = np.cumsum([H * Hd, K * Hd])
        names = "q_proj", "k_proj", "v_proj"
        parts = zip(names, np.split(qkv, ends, axis=1), strict=True)
        self._write("qkv", np.concatenate([judge(name, part) for name, part in parts], axis=1))
        next_step()
        q, k, v = np.split(self._read("qkv", (S, (H + 2 * K) * Hd)), ends, axis=1)
        # These kernels scale queries, not scores, and keep keys in the cache alone.
        q = judge("q_rope", q.reshape(S, H, Hd) * np.float32(Hd**0.5)) * np.float32(Hd**-0.5)
        self._write("qkv", np.concatenate([q.reshape(S, H * Hd), k, v], axis=1))
        rows = slice(start_pos, start_pos + S)
        self._keep_keys(rows, judge("k_rope", self._keys()[rows]))
        next_step()
        seen("mix", "mixed", (S, H * Hd))
        next_step()
        seen("residual", "middle", x.shape)
        assert at == attention_end
        self._mlp_steps(S, x.shape[1], len(steps), attention_end, next_step, seen)

    def _mlp_steps(
        self,
        S: int,
        D: int,
        count: int,
        attention_end: int,
        next_step: Callable[..., None],
        seen: Callable[[str, str, tuple[int, ...]], np.ndarray],
    ) -> None:
        block = self._block
        if isinstance(block.mlp, MoE):
            next_step()
            seen("post_attention_layernorm", "normed", (S, D))
            next_step()
            seen("gate", "router", (S, block.mlp.num_experts))
            next_step()
            seen("topk_ids", "chosen", (S, block.mlp.k))
            seen("topk_weights", "probabilities", (S, block.mlp.k))
            next_step(count - attention_end - 3)
        else:
            if S > 1:
                next_step()
                seen("post_attention_layernorm", "normed", (S, D))
            next_step()
            seen("act", "inner", (S, block.mlp.gate_proj.weight.shape[0]))
            next_step()
        seen("out", "x", (S, D))

    def _list(self, S: int, start_pos: int, cache: LayerCache) -> tuple[Any, int]:
        """The list of a whole block, and how many of its steps are the attention's."""
        padded = 1 if S == 1 else self._chunk
        ids = Tensor(np.zeros((1, padded), dtype=np.int32), device="CPU").realize()
        at = Tensor(np.array([start_pos, S], dtype=np.int32), device="CPU").realize()
        steps = self._kernels.steps(ids, at, self._eps)
        x = self._kernels.room("x", padded * self._attention.q_proj.shape[1] * 4)
        middle = steps.attention(x, self._attention, self._rope, [cache.tensors])
        attention_end = len(steps)
        add = steps.experts if self._mlp.router else steps.mlp
        add(middle, self._mlp)
        return steps, attention_end

    def _keys(self) -> np.ndarray:
        """All that are cached. (capacity, K, Hd)"""
        k, scale = self._own_cache.k, self._own_cache.k_scale
        found: np.ndarray = (k if scale is None else dequantise(k, scale))[0].float().numpy()
        return found

    def _keep_keys(self, rows: slice, keys: np.ndarray) -> None:
        """Where they are: the kernels know the address. keys: (S, K, Hd)"""
        k, scale = self._own_cache.k, self._own_cache.k_scale
        given = Tensor(keys, device="CPU")
        if scale is None:
            _put(k, rows, given.cast(k.dtype))
            return
        for tensor, part in zip((k, scale), quantise(given), strict=True):
            _put(tensor, rows, part)

    def _write(self, room: str, values: np.ndarray) -> None:
        """Integers by their bits: the choice of experts."""
        flat = np.ascontiguousarray(values).reshape(-1)
        bits = flat.astype(np.int32).view(np.float32) if flat.dtype.kind == "i" else flat
        self._kernels.scratch(room)[: values.size] = bits

    def _read(self, room: str, shape: tuple[int, ...]) -> np.ndarray:
        values = self._kernels.scratch(room)[: int(np.prod(shape))].reshape(shape)
        return np.array(values.view(np.int32) if room == "chosen" else values)


def _put(tensor: Tensor, rows: slice, values: Tensor) -> None:
    """Some rows of a cache, bit by bit."""
    bits = getattr(dtypes, f"uint{8 * tensor.dtype.itemsize}")
    kept = np.array(tensor.bitcast(bits).numpy())
    kept[0, rows] = values.bitcast(bits).numpy()
    write(tensor, kept)


def embed(weight: Weight, ids: np.ndarray, kernels: Any) -> np.ndarray:
    """ids: (S,) -> (S, D)"""
    given = Tensor(ids[None].astype(np.int32), device="CPU").realize()
    at = Tensor(np.array([0, len(ids)], dtype=np.int32), device="CPU").realize()
    steps = kernels.steps(given, at, 0.0)
    steps.embed(weight)
    steps.part().realize()
    shape = len(ids), weight.shape[1]
    return np.array(kernels.scratch("x")[: shape[0] * shape[1]].reshape(shape))


def head(norm: Weight, weight: Weight, eps: float, x: np.ndarray, kernels: Any) -> np.ndarray:
    """Norm and head. x: (S, D) -> (S, V), one position at a time, as in generation."""
    vector, rows = kernels.vector(norm), []
    ids = Tensor.zeros(1, 1, dtype=dtypes.int32, device="CPU").contiguous().realize()
    at = Tensor(np.array([0, 1], dtype=np.int32), device="CPU").realize()
    for row in x:
        steps = kernels.steps(ids, at, eps)
        address = kernels.room("x", row.nbytes)
        kernels.scratch("x")[: len(row)] = row
        rows.append(steps.head(address, vector, weight, every=False).numpy())
    return np.stack(rows)
