"""Qwen3: token ids in, logits out. Read it from top to bottom.

Names are those of the checkpoint: `self.layers[3].self_attn.q_proj` holds the tensor called
model.layers.3.self_attn.q_proj.weight. Axes: S new positions, T all positions so far, H query
heads, K key/value heads, Hd head size, D hidden, F intermediate, E experts, V vocabulary. There is
no batch axis: one sequence at a time. `start_pos` is the position of the first new token.

Everything is float32, but that the cache may keep keys and values in 8 bits. What it computes is
transformers' Qwen3ForCausalLM, or Qwen3MoeForCausalLM, with eager attention; it is written from the
formulae, and the same model on tinygrad is qwen3_tg/model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qwen3_tg_numpy.checkpoint import Stored
from qwen3_tg_numpy.config import ModelConfig
from qwen3_tg_numpy.quantised import to_float32
from qwen3_tg_numpy.rope import apply_rope, rope_table

Array = np.ndarray  # float32, but for ids
Weights = Mapping[str, Stored]  # as stored: to_float32 decodes
Trace = Callable[[str, Array], Array]
"""Told the name and value of each intermediate, gives the value to go on with, as a rule the same.
In this order: embed_tokens (S, D); for each layer, after `layers.{i}.`: input_layernorm (S, D),
self_attn.q_proj (S, H*Hd), .k_proj .v_proj (S, K*Hd), .q_norm (S, H, Hd), .k_norm (S, K, Hd),
.q_rope, .k_rope likewise, .scores (H, S, T) scaled and before the mask, .probs (H, S, T), .mix
(S, H*Hd) the input of .o_proj (S, D), residual (S, D) the block's input with that added,
post_attention_layernorm (S, D), mlp.gate_proj .up_proj .act (S, F), act being silu(gate) * up,
mlp.down_proj (S, D), or in a mixture of experts mlp.gate (S, E) the router's logits, .topk_ids
(S, k) the chosen experts, most likely first, .topk_weights (S, k), .experts (S, D) their weighted
sum; `layers.{i}` (S, D), the block's output; norm (S, D); lm_head (S, V)."""


def no_trace(name: str, value: Array) -> Array:
    """Look at nothing and change nothing."""
    return value


class Linear:
    """A matrix without bias. x: (S, inputs) -> (S, outputs)"""

    ROWS = 2048  # decoded at a time: bounds memory where the head of a large model has 151,936

    def __init__(self, weight: Stored):
        self.weight = weight  # (outputs, inputs)

    def __call__(self, x: Array) -> Array:
        starts = range(0, len(self.weight), self.ROWS)
        parts = [x @ to_float32(self.weight[i : i + self.ROWS]).T for i in starts]
        return np.concatenate(parts, axis=-1)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4).

    x: (..., D) -> (..., D)"""

    def __init__(self, weight: Stored, eps: float):
        self.weight, self.eps = to_float32(weight), np.float32(eps)

    def __call__(self, x: Array) -> Array:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        scaled: Array = x / np.sqrt(mean_square + self.eps) * self.weight
        return scaled


def softmax(x: Array) -> Array:
    """x: (..., T) -> (..., T), each row with sum 1"""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    probs: Array = e / e.sum(axis=-1, keepdims=True)
    return probs


def silu(x: Array) -> Array:
    """x * sigmoid(x). x: (..., F) -> (..., F)"""
    with np.errstate(over="ignore"):  # exp(-x) may be infinite; x / inf is the right 0
        out: Array = x / (1 + np.exp(-x))
    return out


def quantise(x: Array) -> tuple[Array, Array]:
    """Each head as integers from -127 to 127 and a scale: its largest number becomes 127 or -127.
    Heads of zeros, or too small for normal numbers, become zeros; of those with infinities or NaN
    nothing finite is left. x: (..., Hd) -> (..., Hd) int8, (...) float32"""
    scale = np.abs(x).max(axis=-1) * np.float32(1 / 127)
    is_normal = (scale >= np.finfo(np.float32).tiny) & (scale < np.inf)
    steps = x / np.where(is_normal, scale, 1)[..., None]
    q = np.rint(np.where(is_normal[..., None], steps, 0)).astype(np.int8)  # ties to even
    return q, scale


def dequantise(q: Array, scale: Array) -> Array:
    """q: (..., Hd) int8, scale: (...) -> (..., Hd) float32"""
    values: Array = q.astype(np.float32) * scale[..., None]
    return values


class LayerCache:
    """Keys (normalised and rotated) and values of one layer, as they are or as int8 with scales.
    k, v: (T, K, Hd); k_scale, v_scale: (T, K), used for int8 alone"""

    def __init__(self, config: ModelConfig, int8: bool = False):
        shape, self.int8 = (0, config.num_key_value_heads, config.head_dim), int8
        self.k = self.v = np.zeros(shape, dtype=np.int8 if int8 else np.float32)
        self.k_scale = self.v_scale = np.zeros(shape[:2], dtype=np.float32)

    def update(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Append S new positions and return all T. k, v: (S, K, Hd) -> 2 x (T, K, Hd)"""
        if not self.int8:
            self.k, self.v = np.concatenate([self.k, k]), np.concatenate([self.v, v])
            return self.k, self.v
        (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        self.k, self.v = np.concatenate([self.k, k]), np.concatenate([self.v, v])
        self.k_scale = np.concatenate([self.k_scale, k_scale])
        self.v_scale = np.concatenate([self.v_scale, v_scale])
        return dequantise(self.k, self.k_scale), dequantise(self.v, self.v_scale)


class KVCache:
    """One LayerCache a layer. The next token's position is how many are stored: no second count."""

    def __init__(self, config: ModelConfig, int8: bool = False):
        self.layers = [LayerCache(config, int8) for _ in range(config.num_hidden_layers)]

    @property
    def length(self) -> int:
        return len(self.layers[0].k)


class Attention:
    """Grouped-query attention: H query heads read K key/value heads (Ainslie et al. 2023,
    arXiv:2305.13245), each query and key head normalised before it is rotated (QK-norm)."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str):
        self.name, self.config = name, config
        self.q_proj = Linear(weights[f"model.{name}.q_proj.weight"])
        self.k_proj = Linear(weights[f"model.{name}.k_proj.weight"])
        self.v_proj = Linear(weights[f"model.{name}.v_proj.weight"])
        self.o_proj = Linear(weights[f"model.{name}.o_proj.weight"])
        self.q_norm = RMSNorm(weights[f"model.{name}.q_norm.weight"], config.rms_norm_eps)
        self.k_norm = RMSNorm(weights[f"model.{name}.k_norm.weight"], config.rms_norm_eps)

    def __call__(self, x: Array, cache: LayerCache, start_pos: int, trace: Trace) -> Array:
        """x: (S, D) -> (S, D)"""
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        S, Hd = len(x), self.config.head_dim
        positions = np.arange(start_pos, start_pos + S)

        def see(name: str, value: Array) -> Array:
            return trace(f"{self.name}.{name}", value)

        # 1. Project to heads.
        q = see("q_proj", self.q_proj(x))
        k = see("k_proj", self.k_proj(x))
        v = see("v_proj", self.v_proj(x))
        # 2. Normalise each head, then rotate it by its position.
        q = see("q_norm", self.q_norm(q.reshape(S, H, Hd)))
        k = see("k_norm", self.k_norm(k.reshape(S, K, Hd)))
        cos, sin = rope_table(self.config, positions)
        q, k = see("q_rope", apply_rope(q, cos, sin)), see("k_rope", apply_rope(k, cos, sin))
        # 3. Store the new keys and values, and take all of them so far.
        all_k, all_v = cache.update(k, v.reshape(S, K, Hd))  # (T, K, Hd)
        # 4. Scores: H / K neighbouring query heads share a key/value head, so repeat each so often.
        all_k, all_v = np.repeat(all_k, H // K, axis=1), np.repeat(all_v, H // K, axis=1)
        scores = q.transpose(1, 0, 2) @ all_k.transpose(1, 2, 0)  # (H, S, T)
        scores = see("scores", scores / np.sqrt(np.float32(Hd)))
        # 5. Causal mask: a query reads its own position and earlier ones.
        visible = np.arange(len(all_k)) <= positions[:, None]  # (S, T)
        probs = see("probs", softmax(np.where(visible, scores, np.float32(-np.inf))))
        # 6. Mix the values by these weights, and project back.
        mix = (probs @ all_v.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(S, H * Hd)
        return see("o_proj", self.o_proj(see("mix", mix)))


class MLP:
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202). x: (S, D) -> (S, D)"""

    def __init__(self, weights: Weights, name: str):
        self.name = name
        self.gate_proj = Linear(weights[f"model.{name}.gate_proj.weight"])
        self.up_proj = Linear(weights[f"model.{name}.up_proj.weight"])
        self.down_proj = Linear(weights[f"model.{name}.down_proj.weight"])

    def __call__(self, x: Array, trace: Trace) -> Array:
        gate = trace(f"{self.name}.gate_proj", self.gate_proj(x))
        up = trace(f"{self.name}.up_proj", self.up_proj(x))
        act = trace(f"{self.name}.act", silu(gate) * up)
        return trace(f"{self.name}.down_proj", self.down_proj(act))


class MoE:
    """Mixture of experts: E MLPs of which each token passes through a few, its own choice (Shazeer
    et al. 2017, arXiv:1701.06538; the softmax before the choice as in Qwen3). x: (S, D) -> (S, D)
    """

    def __init__(self, config: ModelConfig, weights: Weights, name: str):
        self.name, self.config = name, config
        self.gate = Linear(weights[f"model.{name}.gate.weight"])  # the router
        self.experts = [MLP(weights, f"{name}.experts.{e}") for e in range(config.num_experts)]

    def __call__(self, x: Array, trace: Trace) -> Array:
        k = self.config.num_experts_per_tok
        # 1. A probability for each expert, and the k most likely; the lower expert first on a tie.
        logits = trace(f"{self.name}.gate", self.gate(x))  # (S, E)
        probs = softmax(logits)
        topk_ids = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
        topk_ids = trace(f"{self.name}.topk_ids", topk_ids)
        topk_weights = np.take_along_axis(probs, topk_ids, axis=-1)
        if self.config.norm_topk_prob:
            topk_weights = topk_weights / topk_weights.sum(axis=-1, keepdims=True)
        topk_weights = trace(f"{self.name}.topk_weights", topk_weights)
        # 2. Each expert on the tokens that chose it, added up by weight.
        out = np.zeros_like(x)
        for e in np.unique(topk_ids):
            token, rank = np.nonzero(topk_ids == e)
            out[token] += self.experts[e](x[token], no_trace) * topk_weights[token, rank, None]
        return trace(f"{self.name}.experts", out)


class Block:
    """One decoder layer: attention, then MLP or MoE, each on a normalised copy and added to the
    stream."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        self.name, eps = f"layers.{layer}", config.rms_norm_eps
        name = self.name
        self.input_layernorm = RMSNorm(weights[f"model.{name}.input_layernorm.weight"], eps)
        self.self_attn = Attention(config, weights, f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(
            weights[f"model.{name}.post_attention_layernorm.weight"], eps
        )
        self.mlp: MLP | MoE
        if config.is_mixture(layer):
            self.mlp = MoE(config, weights, f"{name}.mlp")
        else:
            self.mlp = MLP(weights, f"{name}.mlp")

    def __call__(self, x: Array, cache: LayerCache, start_pos: int, trace: Trace) -> Array:
        """x: (S, D) -> (S, D)"""
        name = self.name
        normed = trace(f"{name}.input_layernorm", self.input_layernorm(x))
        h = trace(f"{name}.residual", x + self.self_attn(normed, cache, start_pos, trace))
        normed = trace(f"{name}.post_attention_layernorm", self.post_attention_layernorm(h))
        return trace(name, h + self.mlp(normed, trace))


class Qwen3:
    """The whole model. `weights` holds every tensor of `config.weight_shapes()`, as stored."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config = config
        self.embed_tokens = weights["model.embed_tokens.weight"]  # (V, D)
        self.layers = [Block(config, weights, i) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(weights["model.norm.weight"], config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = Linear(self.embed_tokens if tied else weights["lm_head.weight"])

    def hidden(self, ids: Sequence[int] | Array, cache: KVCache, trace: Trace = no_trace) -> Array:
        """Embedding and blocks, at the positions that follow the cache's. ids: (S,) -> (S, D)"""
        start_pos = cache.length
        x = to_float32(self.embed_tokens[self.config.check_ids(ids, start_pos)])
        x = trace("embed_tokens", x)
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = block(x, layer_cache, start_pos, trace)
        return x

    def logits(self, x: Array, trace: Trace = no_trace) -> Array:
        """Final norm and output head, for whichever rows are wanted. x: (S, D) -> (S, V)"""
        return trace("lm_head", self.lm_head(trace("norm", self.norm(x))))

    def forward(
        self,
        ids: Sequence[int] | Array,
        cache: KVCache | None = None,
        trace: Trace = no_trace,
    ) -> Array:
        """Logits of every new position; a cache goes on where it ended. ids: (S,) -> (S, V)"""
        cache = KVCache(self.config) if cache is None else cache
        return self.logits(self.hidden(ids, cache, trace), trace)
