"""Qwen3: token ids in, logits out. Read it from top to bottom.

    embed_tokens ─> num_hidden_layers times [ x + self_attn(norm(x)) ; x + mlp(norm(x)) ]
                 ─> norm ─> lm_head

Names are those of the checkpoint: `self.layers[3].self_attn.q_proj` holds the tensor called
model.layers.3.self_attn.q_proj.weight. Axes: B batch, S new positions, T all positions so far,
H query heads, K key/value heads, G = H / K query heads that share one key/value head, Hd head
size, D hidden, F intermediate, V vocabulary, E experts, k of them chosen. `start_pos` is the
position of the first new token, of each row of a batch its own; it is symbolic, so that one
compiled graph serves every position.

Nothing here reads files, chooses devices or samples. The same model in plain numpy, in the same
order, is backends/qwen3_tg_numpy/model.py. What it computes is transformers' Qwen3ForCausalLM
and Qwen3MoeForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tinygrad import Tensor, UOp, dtypes, function
from tinygrad.dtype import DType

from qwen3_tg.config import ModelConfig
from qwen3_tg.kv_cache import KVCache, LayerCache
from qwen3_tg.linear import Embedding, ExpertLinear, Linear, Weight
from qwen3_tg.rope import apply_rope

Trace = Callable[[str, Tensor], Tensor]
"""Told the name and value of each step of a block, gives the value to go on with. The names are
those of the numpy reference; `qwen3 check` compares the two by them."""


# Of each row of a batch.
Caches = Sequence[LayerCache]
Starts = Sequence[UOp]


def no_trace(name: str, value: Tensor) -> Tensor:
    """Look at nothing and change nothing."""
    return value


class RMSNorm:
    """Scale each vector to a root mean square of one, then each of its numbers by a learned weight
    (Zhang & Sennrich 2019, arXiv:1910.07467). x: (..., D) -> (..., D)"""

    def __init__(self, weight: Weight, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        x32 = x.float()  # squares of half-precision numbers overflow and round
        normed = x32 * (x32.square().mean(axis=-1, keepdim=True) + self.eps).rsqrt()
        return normed.cast(x.dtype) * self.weight.values().cast(x.dtype)


class Attention:
    """Grouped-query attention: H query heads read K < H key/value heads, which keeps the cache
    small (Ainslie et al. 2023, arXiv:2305.13245). Qwen3 normalises each query and key head
    (QK-norm) before it rotates them, in place of the biases that Qwen2 had."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight], name: str):
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = Linear(weights[f"{name}.q_proj.weight"])
        self.k_proj = Linear(weights[f"{name}.k_proj.weight"])
        self.v_proj = Linear(weights[f"{name}.v_proj.weight"])
        self.o_proj = Linear(weights[f"{name}.o_proj.weight"])
        self.q_norm = RMSNorm(weights[f"{name}.q_norm.weight"], config.rms_norm_eps)
        self.k_norm = RMSNorm(weights[f"{name}.k_norm.weight"], config.rms_norm_eps)

    def __call__(
        self, x: Tensor, rope: Tensor, caches: Caches, start_pos: Starts, see: Trace = no_trace
    ) -> Tensor:
        """x: (B, S, D) -> (B, S, D)"""
        B, S, _ = x.shape
        H, K, Hd = self.num_heads, self.num_kv_heads, self.head_dim
        # 1. Project to heads.
        q = see("q_proj", self.q_proj(x)).reshape(B, S, H, Hd)
        k = see("k_proj", self.k_proj(x)).reshape(B, S, K, Hd)
        v = see("v_proj", self.v_proj(x)).reshape(B, S, K, Hd)
        # 2. Normalise each head.
        q, k = see("q_norm", self.q_norm(q)), see("k_norm", self.k_norm(k))
        # 3. Attend: each row of a batch has a cache and a position of its own.
        qkv = [q, k, v] if B == 1 else [whole.contiguous() for whole in (q, k, v)]
        mixes = [
            self.attend([whole[b : b + 1] for whole in qkv], rope, caches[b], start_pos[b], see)
            for b in range(B)
        ]
        mix = see("mix", mixes[0].cat(*mixes[1:]))
        # 4. Project back.
        return see("o_proj", self.o_proj(mix))

    def attend(
        self, qkv: list[Tensor], rope: Tensor, cache: LayerCache, start_pos: UOp, see: Trace
    ) -> Tensor:
        """One row of a batch. q: (1, S, H, Hd); k, v: (1, S, K, Hd) -> (1, S, H Hd)"""
        q, k, v = qkv
        S, dtype = int(q.shape[1]), q.dtype
        H, K, Hd = self.num_heads, self.num_kv_heads, self.head_dim
        # 1. Rotate each head by its position.
        q = see("q_rope", apply_rope(q, rope, start_pos))
        k = see("k_rope", apply_rope(k, rope, start_pos))
        # 2. Store the new keys and values, and take all of them so far.
        k, v = cache.update(k, v, start_pos)  # (1, T, K, Hd)
        T = start_pos + S
        # 3. Scores: query heads kG ... kG+G-1 read key/value head k.
        q = q.reshape(1, S, K, H // K, Hd).permute(0, 2, 3, 1, 4)  # (1, K, G, S, Hd)
        k = k.permute(0, 2, 3, 1).reshape(1, K, 1, Hd, T)
        v = v.permute(0, 2, 1, 3).reshape(1, K, 1, T, Hd)
        scores = see("scores", q.float().dot(k.float()) * Hd**-0.5)  # (1, K, G, S, T)
        # 4. Causal mask: the query at start_pos + s reads positions 0 ... start_pos + s.
        if S > 1:
            key_pos = Tensor.arange(cache.k.shape[1])[:T].reshape(1, T)
            query_pos = Tensor.arange(S).reshape(S, 1) + start_pos  # type: ignore[operator]
            scores = (key_pos <= query_pos).where(scores, -float("inf"))
        # 5. Mix the values by the softmax of the scores.
        probs = see("probs", scores.softmax(axis=-1))
        mix = probs.dot(v.float()).cast(dtype)  # (1, K, G, S, Hd)
        return mix.permute(0, 3, 1, 2, 4).reshape(1, S, H * Hd)


class MLP:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x)).

    x: (B, S, D) -> (B, S, D)"""

    def __init__(self, weights: Mapping[str, Weight], name: str):
        self.gate_proj = Linear(weights[f"{name}.gate_proj.weight"])
        self.up_proj = Linear(weights[f"{name}.up_proj.weight"])
        self.down_proj = Linear(weights[f"{name}.down_proj.weight"])

    def __call__(self, x: Tensor, see: Trace = no_trace) -> Tensor:
        gate, up = see("gate_proj", self.gate_proj(x)), see("up_proj", self.up_proj(x))
        return see("down_proj", self.down_proj(see("act", gate.silu() * up)))


class MoE:
    """Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): E MLPs, of which a router chooses
    num_experts_per_tok = k for each position and mixes their outputs by its probabilities.

    x: (B, S, D) -> (B, S, D)"""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight], name: str):
        self.num_experts, self.k = config.num_experts, config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = Linear(weights[f"{name}.gate.weight"])
        self.gate_proj = ExpertLinear(weights[f"{name}.experts.gate_proj.weight"])
        self.up_proj = ExpertLinear(weights[f"{name}.experts.up_proj.weight"])
        self.down_proj = ExpertLinear(weights[f"{name}.experts.down_proj.weight"])

    def route(self, x: Tensor, see: Trace = no_trace) -> tuple[Tensor, Tensor]:
        """Numbers and weights of the chosen experts, the likeliest first.

        x: (B, S, D) -> (B, S, k) int32, (B, S, k) float32"""
        probs = see("gate", self.gate(x)).float().softmax(axis=-1)  # (B, S, E)
        # An expert's rank is how many are likelier; of equals, the one with the lower number.
        expert = Tensor.arange(self.num_experts)
        mine, other = probs.unsqueeze(-1), probs.unsqueeze(-2)
        ahead = (other > mine) | ((other == mine) & (expert < expert.unsqueeze(-1)))
        rank = ahead.sum(axis=-1).contiguous()  # (B, S, E)
        is_nth = rank.unsqueeze(-2) == Tensor.arange(self.k).unsqueeze(-1)  # (B, S, k, E)
        # Not a number has no rank: the sum may then be no expert, and memory would be read there.
        chosen = is_nth.where(expert, 0).sum(axis=-1).minimum(self.num_experts - 1)
        weights = is_nth.where(probs.unsqueeze(-2), 0).sum(axis=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdim=True)
        chosen = see("topk_ids", chosen.contiguous())
        return chosen, see("topk_weights", weights.contiguous())

    def __call__(self, x: Tensor, see: Trace = no_trace) -> Tensor:
        chosen, weights = self.route(x, see)
        each = x.unsqueeze(2)  # (B, S, 1, D)
        act = self.gate_proj(each, chosen).silu() * self.up_proj(each, chosen)  # (B, S, k, F)
        out = self.down_proj(act, chosen)  # (B, S, k, D)
        return see("experts", (out.float() * weights.unsqueeze(-1)).sum(axis=2).cast(x.dtype))


class Block:
    """One decoder layer: attention, then MLP, each on a normalised copy and added to the stream."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight], layer: int):
        name, eps = f"model.layers.{layer}", config.rms_norm_eps
        self.input_layernorm = RMSNorm(weights[f"{name}.input_layernorm.weight"], eps)
        self.self_attn = Attention(config, weights, f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(
            weights[f"{name}.post_attention_layernorm.weight"], eps
        )
        self.mlp = (
            MoE(config, weights, f"{name}.mlp")
            if config.is_mixture(layer)
            else MLP(weights, f"{name}.mlp")
        )

    def __call__(self, x: Tensor, rope: Tensor, caches: Caches, start_pos: Starts) -> Tensor:
        """x: (B, S, D) -> (B, S, D)"""

        # `function` schedules the first block and reuses its kernels for all others
        @function(precompile=True, allow_implicit=True)
        def block(x: Tensor, *start_pos: UOp) -> Tensor:
            return self.steps(x, rope, caches, start_pos).contiguous()

        return block(x, *start_pos)

    def steps(
        self, x: Tensor, rope: Tensor, caches: Caches, start_pos: Starts, see: Trace = no_trace
    ) -> Tensor:
        """The same, scheduled with what is around it. x: (B, S, D) -> (B, S, D)"""
        normed = see("input_layernorm", self.input_layernorm(x))
        h = see("residual", x + self.self_attn(normed, rope, caches, start_pos, see))
        normed = see("post_attention_layernorm", self.post_attention_layernorm(h))
        return h + self.mlp(normed, see)


class Qwen3:
    """The whole model. `weights` holds every tensor of `config.weight_shapes()` on one device, or
    on several as shards.py splits them, which changes nothing here: tinygrad adds up sums whose
    parts lie on several. `rope` is the table of `rope_table` there; `dtype` is what activations are
    computed in."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Weight], rope: Tensor, dtype: DType
    ):
        self.config, self.rope, self.dtype = config, rope, dtype
        self.embed_tokens = Embedding(weights["model.embed_tokens.weight"])
        self.layers = [Block(config, weights, i) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(weights["model.norm.weight"], config.rms_norm_eps)
        self.lm_head = (
            self.embed_tokens.as_linear()
            if config.tie_word_embeddings
            else Linear(weights["lm_head.weight"])
        )

    def hidden(self, ids: Tensor, caches: Sequence[KVCache], start_pos: Starts) -> Tensor:
        """Embedding and blocks; writes the new positions of each row into its cache.

        ids: (B, S) -> (B, S, D)"""
        x = self.embed_tokens(ids, self.dtype)
        for i, block in enumerate(self.layers):
            x = block(x, self.rope, [cache.layers[i] for cache in caches], start_pos)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and output head, for whichever rows are wanted. x: (B, S, D) -> (B, S, V)"""
        return self.lm_head(self.norm(x)).cast(dtypes.float32)
