"""Two ways to compute a step, with the same weights and the same caches.

`Lowered` is model.py as tinygrad lowers it, on every device. `Fast` gives the parts of the same
model to a device's own kernels, a package in backends/. step_graph.py captures either in a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tinygrad import Tensor, UOp

from qwen3_tg.kv_cache import KVCache
from qwen3_tg.model import Block, MoE, Qwen3
from qwen3_tg.pace import FEW

Place = tuple[int, int]
"""An id and the position where it stands."""


class Forward(Protocol):
    """A step computes S new positions, of which `rows` are there and the others are padding; or,
    in a batch, one position of each of some sequences, whose caches are told apart by slots.
    `scratch_bytes` is what it holds that tinygrad does not count."""

    @property
    def scratch_bytes(self) -> int: ...

    def symbols(self, start: int, rows: int, S: int, capacity: int) -> tuple[Any, ...]:
        """Symbolic numbers, bound for this step, that `logits` is to be given."""

    def logits(self, ids: Tensor, at: Tensor, cache: KVCache, every: bool, *symbols: Any) -> Tensor:
        """After the last position that is there, (V,), or after every one, (S, V).

        ids: (1, S) int32; at: the position of the first one and `rows`, (2,) int32"""

    def batch_rows(self, new: Mapping[int, Place], waiting: Sequence[int]) -> Mapping[int, Place]:
        """What a step of a batch computes, by slot and in this order: `new`, and what else must.
        `waiting` is the next free position of each slot."""

    def batch_symbols(self, rows: Mapping[int, Place], caches: Sequence[KVCache]) -> Any:
        """As `symbols`, for `batch_logits`."""

    def batch_logits(
        self, ids: Tensor, at: Tensor, caches: Sequence[KVCache], *symbols: Any
    ) -> Tensor:
        """After the one new position of each row: (B, V).

        ids: (1, B) int32; at: (2 + 2 B,) int32: 0, how many rows there are, and of each its
        position and its slot"""


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
        x = self.model.hidden(ids, [cache], [start_pos])  # (1, S, D)
        if every:
            return self.model.logits(x)[0]  # (S, V)
        row = x[:, last_row : last_row + 1]  # the head is large: for the wanted row alone
        return self.model.logits(row).flatten()  # (V,)

    def batch_rows(self, new: Mapping[int, Place], waiting: Sequence[int]) -> Mapping[int, Place]:
        """All slots: what the others compute goes where their next position will."""
        return {slot: new.get(slot, (0, position)) for slot, position in enumerate(waiting)}

    def batch_symbols(
        self, rows: Mapping[int, Place], caches: Sequence[KVCache]
    ) -> tuple[UOp, ...]:
        return tuple(
            UOp.variable(f"start_pos_{slot}", 0, caches[slot].capacity - 1).bind(position)
            for slot, (_, position) in rows.items()
        )

    def batch_logits(
        self, ids: Tensor, at: Tensor, caches: Sequence[KVCache], *symbols: Any
    ) -> Tensor:
        x = self.model.hidden(ids.reshape(-1, 1), caches, symbols)  # (B, 1, D)
        return self.model.logits(x)[:, 0]


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
        return self._logits(ids, at, [cache], every)

    def batch_rows(self, new: Mapping[int, Place], waiting: Sequence[int]) -> Mapping[int, Place]:
        """No others."""
        return new

    def batch_symbols(self, rows: Mapping[int, Place], caches: Sequence[KVCache]) -> tuple[()]:
        return ()

    def batch_logits(
        self, ids: Tensor, at: Tensor, caches: Sequence[KVCache], *symbols: Any
    ) -> Tensor:
        return self._logits(ids, at, caches, every=True, batch=True)

    def _logits(
        self,
        ids: Tensor,
        at: Tensor,
        caches: Sequence[KVCache],
        every: bool,
        batch: bool = False,
    ) -> Tensor:
        from qwen3_tg_cpu import MOST_ALIKE

        model = self.model
        # few positions are those of a verification: to be what they would be one by one, as those
        # of a batch
        alike = int(ids.shape[1]) <= (MOST_ALIKE if batch else FEW)
        steps = self.kernels.steps(ids, at, model.config.rms_norm_eps, alike, batch)
        x = steps.embed(model.embed_tokens.weight)
        for i, (attention, mlp) in enumerate(self._layers):
            tensors = [cache.layers[i].tensors for cache in caches]
            x = steps.attention(x, attention, model.rope, tensors)
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
