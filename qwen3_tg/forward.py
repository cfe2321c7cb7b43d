"""Two ways to compute a step, with the same weights and the same cache.

`Lowered` is model.py as tinygrad lowers it, on every device. `Fast` gives the parts of the same
model to a device's own kernels, a package in backends/. step_graph.py captures either in a graph.
"""

from __future__ import annotations

from typing import Any, Protocol

from tinygrad import Tensor, UOp

from qwen3_tg.kv_cache import KVCache
from qwen3_tg.model import Block, MoE, Qwen3


class Forward(Protocol):
    """A step computes S new positions, of which `rows` are there and the others are padding.
    `scratch_bytes` is what it holds that tinygrad does not count."""

    @property
    def scratch_bytes(self) -> int: ...

    def symbols(self, start: int, rows: int, S: int, capacity: int) -> tuple[Any, ...]:
        """Symbolic numbers, bound for this step, that `logits` is to be given."""

    def logits(self, ids: Tensor, at: Tensor, cache: KVCache, every: bool, *symbols: Any) -> Tensor:
        """After the last position that is there, (V,), or after every one, (S, V).

        ids: (1, S) int32; at: the position of the first one and `rows`, (2,) int32"""


class Lowered:
    """By tinygrad's lowering. The position is a symbolic number in its kernels."""

    scratch_bytes = 0

    def __init__(self, model: Qwen3):
        self.model = model

    def symbols(self, start: int, rows: int, S: int, capacity: int) -> tuple[UOp, UOp | int]:
        start_pos = UOp.variable("start_pos", 0, capacity - S).bind(start)
        last_row = UOp.variable("last_row", 0, S - 1).bind(rows - 1) if S > 1 else 0
        return start_pos, last_row

    def logits(self, ids: Tensor, at: Tensor, cache: KVCache, every: bool, *symbols: Any) -> Tensor:
        start_pos, last_row = symbols
        x = self.model.hidden(ids, cache, start_pos)  # (1, S, D)
        if every:
            return self.model.logits(x)[0]  # (S, V)
        row = x[:, last_row : last_row + 1]  # the head is large: for the wanted row alone
        return self.model.logits(row).flatten()  # (V,)


class Fast:
    """By the kernels of qwen3_tg_cpu: one kernel a step. The position is two numbers in memory."""

    def __init__(self, model: Qwen3, kernels: Any):
        self.model, self.kernels = model, kernels
        self._layers = [
            (attention_weights(kernels, block), mlp_weights(kernels, block))
            for block in model.layers
        ]
        self._norm = kernels.vector(model.norm.weight)

    @property
    def scratch_bytes(self) -> int:
        return int(self.kernels.scratch_bytes)

    def symbols(self, start: int, rows: int, S: int, capacity: int) -> tuple[()]:
        return ()

    def logits(self, ids: Tensor, at: Tensor, cache: KVCache, every: bool, *symbols: Any) -> Tensor:
        from qwen3_tg_cpu import MOST_ALIKE

        model = self.model
        # few positions are those of a verification: to be what they would be one by one
        alike = int(ids.shape[1]) <= MOST_ALIKE
        steps = self.kernels.steps(ids, at, model.config.rms_norm_eps, alike)
        x = steps.embed(model.embed_tokens.weight)
        for (attention, mlp), kv in zip(self._layers, cache.layers, strict=True):
            x = steps.attention(x, attention, model.rope, *kv.tensors)
            x = steps.experts(x, mlp) if mlp.router else steps.mlp(x, mlp)
        logits: Tensor = steps.head(x, self._norm, model.lm_head.weight, every)
        return logits


def attention_weights(kernels: Any, block: Block) -> Any:
    """What the CPU's own kernels take of a block for its attention."""
    from qwen3_tg_cpu import AttentionWeights

    attn, vector = block.self_attn, kernels.vector
    return AttentionWeights(
        norm=vector(block.input_layernorm.weight),
        q_proj=attn.q_proj.weight,
        k_proj=attn.k_proj.weight,
        v_proj=attn.v_proj.weight,
        q_norm=vector(attn.q_norm.weight),
        k_norm=vector(attn.k_norm.weight),
        o_proj=attn.o_proj.weight,
        heads=attn.num_heads,
        kv_heads=attn.num_kv_heads,
    )


def mlp_weights(kernels: Any, block: Block) -> Any:
    """And for its MLP, or mixture of them."""
    from qwen3_tg_cpu import MLPWeights

    mlp, norm = block.mlp, kernels.vector(block.post_attention_layernorm.weight)
    projections = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    if isinstance(mlp, MoE):
        return MLPWeights(norm, *projections, mlp.gate.weight, mlp.k, mlp.norm_topk_prob)
    return MLPWeights(norm, *projections)
