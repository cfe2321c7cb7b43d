"""The same for the CPU's own kernels: each of their steps, timed alone, and its function in C."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tinygrad import Tensor

from qwen3_tg.checkpoint import StoredWeight
from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy, own_kernels
from qwen3_tg.forward import attention_weights, mlp_weights
from qwen3_tg.kernels.lower import TIMES, Kernel, phases
from qwen3_tg.kernels.schedule import POSITION, ModelParts, sizes
from qwen3_tg.kv_cache import KV_DTYPES, LayerCache
from qwen3_tg.kv_sizes import cache_bytes
from qwen3_tg.linear import Weight, to_device
from qwen3_tg.model import Block
from qwen3_tg.step_graph import capture_at_once

# What the functions of steps.c do, in the order in which a layer has them, and the matrices that
# they multiply by; "+" joins steps of the model that one function does together. For one position,
# norms are within the products that follow.
_NORM = ("input_layernorm", ())
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (
    ("self_attn.q_proj + k_proj + v_proj", _QKV),
    ("self_attn.q_norm + k_norm + q_rope + k_rope + k_cache + v_cache", ()),
    ("self_attn.scores + probs + mix", ()),
    ("self_attn.o_proj + residual", ("self_attn.o_proj",)),
)
_MLP_NORM = ("post_attention_layernorm", ())
_MLP = (
    ("mlp.gate_proj + up_proj + act", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down_proj + residual", ("mlp.down_proj",)),
)
_EXPERTS = (
    ("mlp.gate", ("mlp.gate",)),
    ("mlp.topk_ids + topk_weights", ()),
    ("mlp.experts, put in order", ()),
    (
        "mlp.experts.gate_proj + up_proj + act",
        ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    ),
    ("mlp.experts.down_proj", ("mlp.experts.down_proj",)),
    ("mlp.experts, mixed + residual", ()),
)


def measured(
    config: ModelConfig,
    stored: Mapping[str, StoredWeight],
    layer: int,
    policy: Policy,
    on_kernel: Callable[[int, int], None] | None = None,
) -> Iterator[Kernel]:
    """Each step of a layer, the embedding and the head, for a chunk of a prompt and for one
    position. `nbytes` are those of weights and of the cache, `flop` those of products."""
    kernels = own_kernels(policy)
    names = ModelParts.names(config, layer)
    weights = {
        name: to_device(stored[name], policy.device, policy.native, shared=True)
        for name in names
        if name in stored
    }
    block = Block(config, weights, layer)
    positions, capacity = sizes(config, policy)
    cache = LayerCache(config, capacity, KV_DTYPES[policy.kv_dtype], policy.device)
    rope = Tensor.zeros(positions, config.head_dim, device=policy.device).contiguous().realize()
    attention, mlp = attention_weights(kernels, block), mlp_weights(kernels, block)
    norm = kernels.vector(weights["model.norm.weight"])
    embedding = weights["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    for phase, S in phases(policy).items():
        start = min(POSITION, capacity - S)
        ids = Tensor(np.zeros((1, S), dtype=np.int32), device=policy.device).realize()
        at = Tensor(np.array([start, S], dtype=np.int32), device=policy.device).realize()
        steps = kernels.steps(ids, at, config.rms_norm_eps)
        x = steps.embed(embedding)
        middle = steps.attention(x, attention, rope, [cache.tensors])
        out = steps.experts(middle, mlp) if mlp.router else steps.mlp(middle, mlp)
        logits = steps.head(out, norm, head, every=False)
        logits.realize()  # memory that is first used takes longer
        for number, (step, (function, read)) in enumerate(
            zip(_steps(layer, S, mlp.router is not None), steps.described, strict=True)
        ):
            label, matrices = step
            if function == "attend":
                read = cache_bytes(config, start + S, policy.kv_dtype) // config.num_hidden_layers
                pairs = sum(range(start + 1, start + S + 1))  # of a position and one it sees
                flop = 4 * config.head_dim * config.num_attention_heads * pairs
            else:
                if function == "embed":
                    read = S * embedding.nbytes // config.vocab_size
                flop = sum(
                    _products(config, head if name == "head" else stored[name]) for name in matrices
                )
                flop *= 1 if label == "norm + lm_head" else S
            yield Kernel(
                phase, label, function, _source(function), read, flop, _time(steps, number)
            )
            if on_kernel:
                on_kernel(number + 1, len(steps))


def _steps(layer: int, S: int, is_mixture: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Name and matrices of each step."""
    inner = [
        *([_NORM] if S > 1 else []),
        *_ATTENTION,
        *([_MLP_NORM] if S > 1 or is_mixture else []),
        *(_EXPERTS if is_mixture else _MLP),
    ]
    prefix = f"layers.{layer}"
    within = [
        (f"{prefix}.{label}", tuple(f"model.{prefix}.{name}.weight" for name in names))
        for label, names in inner
    ]
    return [("embed_tokens", ()), *within, ("norm + lm_head", ("head",))]


def _time(steps: Any, number: int) -> float:
    """Seconds of one step, the shortest of some runs, with the call of a kernel around it."""
    run = capture_at_once(lambda: steps.part(number, number + 1).realize())
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _products(config: ModelConfig, matrix: StoredWeight | Weight) -> int:
    """Operations of one position."""
    *experts, outputs, inputs = matrix.shape
    return 2 * outputs * inputs * (config.num_experts_per_tok if experts else 1)


def _source(function: str) -> str:
    """The text of one function of steps.c."""
    from qwen3_tg_cpu.library import source

    found = re.search(rf"(?:^//[^\n]*\n)*^static void {function}\(.*?^}}\n", source(), re.M | re.S)
    assert found is not None, function
    return found[0]
