"""What the graphs of prefill and decode need besides weights, cache and tables: an estimate.

tinygrad lays what a graph computes in between into one buffer, in which later values take the place
of earlier ones. The formula is the largest of what is there together: the attention scores, twice;
or the matrices of an MLP, dequantised for a chunk of positions (linear.py). It is made to fit by a
factor that is measured once a device, with the embedded model, and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qwen3_tg import compiler
from qwen3_tg.atomic import replacing
from qwen3_tg.checkpoint.types import FLOATS, TABLE_BLOCKS, StoredWeight
from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy, shares_scratch
from qwen3_tg.shards import bytes_on_each, check_heads

_FLOAT32 = 4
_PARTS = 64  # of the keys, at most: qwen3_tg_cpu's attention.c
_FILE = "scratch.json"
# What a factor can sensibly be; anything else in the file is not believed.
_LEAST, _MOST = 0.1, 10.0


@dataclass(frozen=True)
class ModelSize:
    """Of a model's weights, what planning needs: their bytes on the device, whether any of its
    matrices are packed, and the bytes of one expert that are copied where it is chosen, in a chunk
    of positions and for a single one (linear.py's ExpertLinear)."""

    config: ModelConfig
    weights_bytes: int
    is_packed: bool
    copied_expert_bytes: int
    copied_expert_bytes_for_one: int

    @staticmethod
    def of(config: ModelConfig, weights: Mapping[str, StoredWeight], devices: int = 1) -> ModelSize:
        """On each of so many devices. Raises UsageError where they cannot share the model out."""
        check_heads(config, devices)
        floats = (*FLOATS, *TABLE_BLOCKS)
        is_packed = False
        copied, copied_for_one = Counter[str](), Counter[str]()  # by layer
        for name, weight in weights.items():
            if not name.startswith("model.layers.") or weight.format in floats:
                continue
            is_packed = True
            layer, expert, _ = name.partition(".mlp.experts.")
            has_own_order = "g_idx" in weight.arrays
            if expert and has_own_order:
                copied[layer] += weight.device_bytes
            if expert and (has_own_order or weight.format == "AWQ"):
                copied_for_one[layer] += weight.device_bytes
        experts = max(config.num_experts, 1)
        return ModelSize(
            config,
            bytes_on_each(weights, devices),
            is_packed,
            max(copied.values(), default=0) // experts,
            max(copied_for_one.values(), default=0) // experts,
        )


def scratch_bytes(
    size: ModelSize, policy: Policy, capacity: int, factor: float = 1.0, alike: int = 0
) -> int:
    """What the graphs of prefill and decode hold when the cache has this capacity, and one of
    `alike` positions where there is one: of a batch, or to look at guesses."""
    if policy.kernels != "generic":
        return _own_kernels(size.config, policy.prefill_chunk, max(alike, 1))
    one = FLOATS[policy.dtype]
    shares = len(policy.devices)
    graphs = [
        _phases(size, S, capacity, one, shares) for S in (policy.prefill_chunk, 1, alike) if S
    ]
    if shares_scratch(policy.device):
        return round(sum(map(max, graphs)) * factor)
    layers = size.config.num_hidden_layers
    return round(sum(map(sum, graphs)) * layers * factor)


def _own_kernels(config: ModelConfig, S: int, alike: int) -> int:
    """Exactly what qwen3_tg_cpu takes for S positions at a time, whatever the capacity: scores stay
    in the processor's cache. Parts of the keys are joined for each of `alike` positions."""
    H, K, Hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    D = config.hidden_size
    stream = 3 * D  # x, with attention added, normed
    heads = (2 * H + 2 * K) * Hd
    parts = alike * _PARTS * H * (Hd + 2)
    layers = [config.is_mixture(layer) for layer in range(config.num_hidden_layers)]
    widths, others = [], 0
    if not all(layers):
        widths.append(config.intermediate_size)
    if any(layers):
        k, F, E = config.num_experts_per_tok, config.moe_intermediate_size, config.num_experts
        widths.append(k * F)
        others = E + 3 * k + 2 * k * D  # router, pairs of position and expert, their rows
        parts += E + 1
    return _FLOAT32 * (max(S, alike) * (stream + heads + max(widths) + others) + parts)


def _phases(size: ModelSize, S: int, capacity: int, one: int, shares: int) -> tuple[int, int]:
    """Bytes of attention and of the MLP for S new positions, `one` for a value of theirs, on each
    of so many devices."""
    config = size.config
    H, Hd, D = config.num_attention_heads // shares, config.head_dim, config.hidden_size
    stream = 2 * S * D * one
    attention = 2 * H * S * capacity * _FLOAT32 + S * H * Hd * one + stream
    dequantised = size.is_packed and S > 1
    # o_proj has been dequantised before; the place it leaves is too small for the next ones
    matrices = H * Hd * D * one if dequantised else 0
    if config.num_experts:
        k, F = config.num_experts_per_tok, config.moe_intermediate_size // shares
        copied = size.copied_expert_bytes if S > 1 else size.copied_expert_bytes_for_one
        router = 4 * S * config.num_experts * _FLOAT32
        return attention, S * k * ((2 * F + D) * one + copied) + router + matrices
    F = config.intermediate_size // shares
    matrices += 2 * F * D * one if dequantised else 0
    return attention, 2 * S * F * one + stream + matrices


def load_factor(policy: Policy) -> float | None:
    """The factor that was measured on a device, or None. A device's own kernels need none."""
    if policy.kernels != "generic":
        return 1.0
    device = policy.device
    value = _read().get(_key(device))
    return value if isinstance(value, float) and _LEAST <= value <= _MOST else None


def save_factor(device: str, factor: float) -> None:
    """Keep a measured factor; where nothing can be written it is measured again next time."""
    found = _read() | {_key(device): factor}
    with contextlib.suppress(OSError), replacing(_path()) as part:
        part.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _path() -> Path:
    return compiler.cache_dir() / _FILE


def _key(device: str) -> str:
    return f"{device} tinygrad {version('tinygrad')}"


def _read() -> dict[str, object]:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
