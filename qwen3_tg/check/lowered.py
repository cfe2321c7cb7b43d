"""One layer on a device by tinygrad's lowering: captured in a graph, as generation runs it, and
step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from qwen3_tg.buffers import write
from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy
from qwen3_tg.kv_cache import KV_DTYPES, LayerCache
from qwen3_tg.linear import DTYPES, Embedding, Linear, Weight
from qwen3_tg.model import Block, RMSNorm
from qwen3_tg.placement import empty, place
from qwen3_tg.step_graph import capture_at_once
from qwen3_tg.tuning import for_policy

Judge = Callable[[str, np.ndarray], np.ndarray]
"""Told a step's name and the device's value in the reference's shape; gives the right one."""


class _Found(Exception):
    def __init__(self, value: Tensor):
        self.value = value


class LoweredLayer:
    """Layer number `layer` with its weights. `rope` is the table on the device; the cache has room
    for `capacity` positions."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        layer: int,
        rope: Tensor,
        policy: Policy,
        capacity: int,
    ):
        self._block, self._rope, self._policy = Block(config, weights, layer), rope, policy
        self._capacity = capacity
        kv_dtype = KV_DTYPES[policy.kv_dtype]
        self._cache = LayerCache(config, capacity, kv_dtype, policy.device)
        self._own_cache = LayerCache(config, capacity, kv_dtype, policy.device)
        self._graphs: dict[int, tuple[Tensor, Callable[[UOp], Tensor]]] = {}

    def run(self, x: np.ndarray, start_pos: int) -> np.ndarray:
        """As generation does it. x: (S, D) -> (S, D)"""
        S = self._padded(len(x))
        if S not in self._graphs:
            self._graphs[S] = self._captured(S, x.shape[1])
        given, graph = self._graphs[S]
        write(given, _pad(x, (S, x.shape[1])))
        at = UOp.variable("start_pos", 0, self._capacity - S).bind(start_pos)
        with for_policy(self._policy).applied():
            return _numpy(graph(at))[0, ::-1][: len(x)]

    def _captured(self, S: int, D: int) -> tuple[Tensor, Callable[[UOp], Tensor]]:
        """Where the graph reads its input, and the graph."""
        dtype = DTYPES[self._policy.dtype]
        given = empty((1, S, D), dtypes.float32, self._policy.devices)

        def step(start_pos: UOp) -> Tensor:
            out = self._block(given.cast(dtype), self._rope, [self._cache], [start_pos])
            # Something must follow, as more blocks do in generation: a graph of one precompiled
            # function alone keeps the position it was captured with (tinygrad 0.14.0).
            return out.flip(1).contiguous().realize()

        return given, capture_at_once(step)

    def each_step(self, x: np.ndarray, start_pos: int, judge: Judge) -> None:
        """Every step alone, in order, from right inputs: what `judge` says goes on to the next."""

        def see(name: str, value: Tensor) -> Tensor:
            right = judge(name, _as_reference(name, _numpy(value), len(x), start_pos))
            return self._as_device(name, right, value)

        see("out", self._steps(x, start_pos, see))

    def up_to(self, name: str, x: np.ndarray, start_pos: int) -> np.ndarray:
        """The value of one step, with all before it in the same kernels where tinygrad joins them,
        as in generation."""

        def see(seen: str, value: Tensor) -> Tensor:
            if seen == name:
                raise _Found(value)
            return value

        try:
            value = self._steps(x, start_pos, see)
        except _Found as found:
            value = found.value
        return _as_reference(name, _numpy(value), len(x), start_pos)

    def _steps(self, x: np.ndarray, start_pos: int, see: Callable[[str, Tensor], Tensor]) -> Tensor:
        given = self._tensor(_pad(x, (self._padded(len(x)), x.shape[1]))[None])
        position: Any = start_pos  # a number does where nothing is captured
        return self._block.steps(given, self._rope, [self._own_cache], [position], see)

    def _padded(self, rows: int) -> int:
        return 1 if rows == 1 else self._policy.prefill_chunk

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = place(values, self._policy.devices)
        return tensor.cast(DTYPES[self._policy.dtype]).contiguous().realize()

    def _as_device(self, name: str, right: np.ndarray, like: Tensor) -> Tensor:
        assert all(isinstance(n, int) for n in like.shape)
        shape = tuple(int(n) for n in like.shape)
        if name in ("scores", "probs"):  # (H, S, T) -> (1, K, G, S, T)
            flat = _pad(right, (right.shape[0], shape[-2], shape[-1]))
        else:
            flat = _pad(right, (shape[1], *right.shape[1:]))
        tensor = place(flat.reshape(shape), self._policy.devices, like.uop.axis)
        return tensor.cast(like.dtype).contiguous().realize()


def embed(weight: Weight, ids: np.ndarray, policy: Policy) -> np.ndarray:
    """ids: (S,) -> (S, D)"""
    given = place(ids[None].astype(np.int32), policy.devices)
    return np.asarray(_numpy(Embedding(weight)(given, DTYPES[policy.dtype]))[0])


def norm(weight: Weight, eps: float, x: np.ndarray, policy: Policy) -> np.ndarray:
    """x: (S, D) -> (S, D)"""
    given = place(x[None], policy.devices).cast(DTYPES[policy.dtype])
    return np.asarray(_numpy(RMSNorm(weight, eps)(given))[0])


def head(weight: Weight, x: np.ndarray, policy: Policy) -> np.ndarray:
    """x: (S, D) -> (S, V), one position at a time, as it is computed in generation."""
    rows = []
    for row in x:
        given = place(row[None, None], policy.devices).cast(DTYPES[policy.dtype])
        rows.append(_numpy(Linear(weight)(given))[0, 0])
    return np.stack(rows)


def _numpy(value: Tensor) -> np.ndarray:
    exact = value if value.dtype.name == "int" else value.float()
    return np.asarray(exact.realize().numpy())


def _pad(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    padding = [(0, to - now) for now, to in zip(values.shape, shape, strict=True)]
    return np.asarray(np.pad(values, padding))


def _as_reference(name: str, value: np.ndarray, S: int, start_pos: int) -> np.ndarray:
    """Without the batch and the padding."""
    if name not in ("scores", "probs"):
        return value[0, :S]
    _, K, G, padded, T = value.shape
    return value.reshape(K * G, padded, T)[:, :S, : start_pos + S]
