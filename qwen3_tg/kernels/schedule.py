"""Which kernels the operations of a layer become, in the order they run in.

tinygrad joins operations into kernels as it sees fit, and does not say which went where. A kernel
is known by what it reads and writes: weights, the rotation table, the caches. Where it touches none
of these, the layer is scheduled up to each of its steps: a kernel belongs to the first step whose
value it is needed for. Nothing is compiled for that.

Touches tinygrad's internals: a schedule (`linear_with_vars`), its calls, their kernels and buffers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tinygrad import Tensor, UOp, dtypes

from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy, as_default
from qwen3_tg.kv_cache import KV_DTYPES, LayerCache
from qwen3_tg.kv_sizes import first_capacity
from qwen3_tg.linear import DTYPES, Embedding, Linear, Weight
from qwen3_tg.model import Block, RMSNorm, Trace, no_trace

POSITION = 512  # of the first new token, where there is room: attention reads a cache so long


# What kernels are known by, in the order of computation.
_ORDER = (
    *("input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "rope", "k_cache"),
    *("v_cache", "scores", "mix", "o_proj", "post_attention_layernorm", "gate", "gate_proj"),
    *("up_proj", "down_proj", "norm", "lm_head"),
)


@dataclass(frozen=True)
class Call:
    """A kernel that is to run: the step it belongs to, tinygrad's call of it, and the values of its
    symbolic numbers."""

    step: str
    call: UOp
    var_vals: Mapping[str, int]


def sizes(config: ModelConfig, policy: Policy) -> tuple[int, int]:
    """Positions of the rotation table, and of the cache, when generation begins."""
    limit = config.with_context(None)[1] + policy.prefill_chunk
    return limit, first_capacity(limit)


class _Reached(Exception):
    def __init__(self, value: Tensor):
        self.value = value


class ModelParts:
    """One layer of a model, its embedding and its head, on a policy's device, to be scheduled for S
    new positions. `weights` are those that `names` asks for."""

    @staticmethod
    def names(config: ModelConfig, layer: int) -> list[str]:
        """Of the weights that are needed."""
        prefix = f"model.layers.{layer}."
        rest = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        return [n for n in config.weight_shapes() if n.startswith(prefix) or n in rest]

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Weight], layer: int, policy: Policy
    ):
        self._config, self._policy, self._layer = config, policy, layer
        self._block = Block(config, weights, layer)
        self._embed = Embedding(weights["model.embed_tokens.weight"])
        self._norm = RMSNorm(weights["model.norm.weight"], config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self._head = self._embed.as_linear() if tied else Linear(weights["lm_head.weight"])
        kv_dtype, device = KV_DTYPES[policy.kv_dtype], policy.device
        self._positions, self._capacity = sizes(config, policy)
        self._cache = LayerCache(config, self._capacity, kv_dtype, device)
        shape = self._positions, config.head_dim
        self._rope = Tensor.empty(*shape, dtype=dtypes.float32, device=device).realize()
        cache = self._cache
        named = {
            "rope": [self._rope],
            "k_cache": [cache.k] if cache.k_scale is None else [cache.k, cache.k_scale],
            "v_cache": [cache.v] if cache.v_scale is None else [cache.v, cache.v_scale],
        }
        prefix = f"model.layers.{layer}."
        self._sizes: dict[str, int] = {}
        for name, weight in weights.items():
            if name.startswith(prefix):
                named[name.split(".")[-2]] = list(weight.arrays.values())
                self._sizes[name.split(".")[-2]] = math.prod(weight.shape)
        self._inside = _buffers(named)
        self._around = _buffers(
            {
                "norm": list(self._norm.weight.arrays.values()),
                "lm_head": list(self._head.weight.arrays.values()),
            }
        )

    def calls(self, S: int) -> Iterator[Call]:
        """All kernels, from the embedding to the head."""
        with as_default(self._policy.device):
            for call, var_vals in _schedule(self._embedded(S)):
                yield Call("embed_tokens", call, var_vals)
            yield from self._layer_calls(S)
            for call, var_vals in _schedule(self._norm_and_head()):
                known = self._known(call, self._around)
                yield Call(" + ".join(known) or "norm", call, var_vals)

    def _layer_calls(self, S: int) -> Iterator[Call]:
        steps = self._step_names(S)
        needs = {
            step: Counter(call.src[0].key for call, _ in self._up_to(step, S)) for step in steps
        }
        used: Counter[bytes] = Counter()
        inside = dict(self._inside)
        unnamed: list[tuple[UOp, dict[str, int]]] = []
        for call, var_vals in _schedule(self._run(S, no_trace)):
            key = call.src[0].key
            used[key] += 1
            first = [step for step in steps if needs[step][key] >= used[key]][:1]
            if self._cache.k_scale is not None:  # touching no cache, it makes the scales of one
                first = [{"scores": "k_cache", "mix": "v_cache"}.get(step, step) for step in first]
            known = self._known(call, inside)
            # a matrix that was dequantised for a chunk is known by its size
            written = call.src[1].buf_uop.buffer
            if len(known) == 1 and written.size == self._sizes.get(known[0]):
                inside[id(written)] = known[0]
            known = known or first
            unnamed.append((call, var_vals))
            if known:  # what has no name of its own prepares the next that has
                for number, (each, values) in enumerate(unnamed, start=1):
                    name = " + ".join(known) if number == len(unnamed) else known[0]
                    yield Call(f"layers.{self._layer}.{name}", each, values)
                unnamed.clear()
        assert not unnamed, "the last kernel has the weights of down_proj, or mixes experts"

    def _up_to(self, step: str, S: int) -> list[tuple[UOp, dict[str, int]]]:
        def see(seen: str, value: Tensor) -> Tensor:
            if seen == step:
                raise _Reached(value)
            return value

        try:
            self._run(S, see)
        except _Reached as reached:
            return _schedule(reached.value)
        raise AssertionError(f"no step {step}")

    def _known(self, call: UOp, names: Mapping[int, str]) -> list[str]:
        """What a kernel does, by the buffers that it has. A cache that is read and not written says
        which product it is for."""
        written, *others = (id(u.buf_uop.buffer) for u in call.src[1:] if not u.is_bound_var)
        found = {names[number] for number in others if number in names}
        found -= {names.get(written)}  # integers of a cache are made with its scales
        found = {{"k_cache": "scores", "v_cache": "mix"}.get(name, name) for name in found}
        return sorted(found | ({names[written]} if written in names else set()), key=_ORDER.index)

    def _step_names(self, S: int) -> list[str]:
        names: list[str] = []

        def see(name: str, value: Tensor) -> Tensor:
            names.append(name)
            return value

        self._run(S, see)
        return names

    def _run(self, S: int, see: Trace) -> Tensor:
        x = self._new(S)
        most = self._capacity - S
        start_pos: Any = UOp.variable("start_pos", 0, most).bind(min(POSITION, most))
        return self._block.steps(x, self._rope, [self._cache], [start_pos], see)

    def _new(self, S: int) -> Tensor:
        """Values of the stream, which lie in memory."""
        shape, dtype = (1, S, self._config.hidden_size), DTYPES[self._policy.dtype]
        return Tensor.empty(*shape, dtype=dtype, device=self._policy.device).realize()

    def _embedded(self, S: int) -> Tensor:
        ids = Tensor.empty(1, S, dtype=dtypes.int32, device=self._policy.device).realize()
        return self._embed(ids, DTYPES[self._policy.dtype])

    def _norm_and_head(self) -> Tensor:
        """Of one position."""
        return self._head(self._norm(self._new(1))).cast(dtypes.float32)


def _buffers(named: Mapping[str, list[Tensor]]) -> dict[int, str]:
    """The name of each tensor's buffer, by its identity."""
    return {id(t.uop.base.buffer): name for name, tensors in named.items() for t in tensors}


def _schedule(value: Tensor) -> list[tuple[UOp, dict[str, int]]]:
    """The kernels that compute a value, in their order; copies are left away."""
    linear, var_vals = value.contiguous().linear_with_vars()
    return [(call, var_vals) for call in linear.src if call.src[0].op.name == "SINK"]
