"""The released models by name: their shapes, as their config.json files have them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen3_tg.config import ModelConfig
from qwen3_tg.plan.forms import form_of_name

# name -> hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
# num_key_value_heads, tie_word_embeddings
_SIZES = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "14B": (5120, 17408, 40, 40, 8, False),
    "32B": (5120, 25600, 64, 64, 8, False),
    "30B-A3B": (2048, 6144, 48, 32, 4, False),
    "235B-A22B": (4096, 12288, 94, 64, 4, False),
}
# of mixtures: num_experts, num_experts_per_tok, moe_intermediate_size
_MIXTURES = {"30B-A3B": (128, 8, 768), "235B-A22B": (128, 8, 1536)}
# name -> the sizes released so, max_position_embeddings, rope_theta
_VARIANTS = {
    "": (tuple(_SIZES), 40960, 1e6),
    "-Base": (("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B"), 32768, 1e6),
    "-Instruct-2507": (("4B", "235B-A22B"), 262144, 5e6),
    "-Thinking-2507": (("4B", "235B-A22B"), 262144, 5e6),
    "30B-A3B-Instruct-2507": (("30B-A3B",), 262144, 1e7),
    "30B-A3B-Thinking-2507": (("30B-A3B",), 262144, 1e7),
}


@dataclass(frozen=True)
class Released:
    """A released model. `form` is what the name said of the format, a key of FORMS, or None."""

    name: str
    config: ModelConfig
    form: str | None = None


def _config(size: str, longest: int, rope_theta: float) -> ModelConfig:
    hidden, intermediate, layers, heads, kv_heads, tied = _SIZES[size]
    experts, per_token, moe_intermediate = _MIXTURES.get(size, (0, 0, 0))
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=longest,
        rms_norm_eps=1e-6,
        rope_theta=rope_theta,
        tie_word_embeddings=tied,
        num_experts=experts,
        num_experts_per_tok=per_token,
        moe_intermediate_size=moe_intermediate,
        norm_topk_prob=experts > 0,
    )


CONFIGS = {
    f"Qwen3-{size}{variant.removeprefix(size)}": _config(size, longest, rope_theta)
    for variant, (sizes, longest, rope_theta) in _VARIANTS.items()
    for size in sizes
}


def find_released(typed: str) -> Released | None:
    """The model that a name means, if it is a released one: Qwen3-32B, Qwen/Qwen3-32B-AWQ,
    Qwen3-8B-GGUF:Q4_K_M, Qwen3-8B-Q8_0.gguf. Capitals do not matter."""
    name = typed.strip().lower().removeprefix("qwen/").removesuffix(".gguf")
    longest_first = sorted(CONFIGS, key=len, reverse=True)
    found = next((known for known in longest_first if _begins(name, known.lower())), None)
    if found is None:
        return None
    rest = re.sub("[-_.:]gguf(?=[-_.:]|$)", "", name[len(found) :])
    if not rest:
        return Released(found, CONFIGS[found])
    form = form_of_name(rest[1:])
    return Released(found, CONFIGS[found], form) if form else None


def _begins(name: str, known: str) -> bool:
    return name.startswith(known) and name[len(known) : len(known) + 1] in ("", "-", "_", ".", ":")
