"""A model on several devices at once: which part of which weight each of them gets.

Tensor parallel, as in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3). The first
matrices of attention and of the MLP are split by their outputs: each device has heads, with their
keys and values, or part of the intermediate size, and needs nothing of the others. The last ones
are split by their inputs: each gives a sum of its part, and tinygrad adds these up, twice a layer.
The embedding and the output head are split by the vocabulary. Norms, the router and whatever does
not divide are whole on every device.

These are the rules; placement.py follows them. Knows nothing of tinygrad.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen3_tg.checkpoint.types import BLOCKS, FLOATS, TABLE_BLOCKS, StoredWeight
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import UsageError

_OUTPUTS, _INPUTS = -2, -1  # axes of a matrix (O, I), or (E, O, I)
_HEADS = ("q_proj", "k_proj", "v_proj")
_BY_OUTPUTS = (*_HEADS, "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_INPUTS = ("o_proj", "down_proj")
_WORD_BITS = 32


def check_heads(config: ModelConfig, devices: int) -> None:
    """Raises UsageError where the key/value heads cannot be shared out evenly."""
    heads = config.num_key_value_heads
    if heads % devices:
        counts = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UsageError(
            f"this model's {heads} key/value heads cannot be shared out among {devices} devices; "
            f"take {counts} of them"
        )


def split_axis(name: str, weight: StoredWeight, devices: int) -> int | None:
    """The axis of its values along which a weight is split, counted from the end; None: it is
    whole on every device. Raises UsageError for heads that cannot be split as they are stored."""
    if devices == 1 or len(weight.shape) < 2:
        return None
    matrix = name.removesuffix(".weight").rpartition(".")[2]
    if matrix not in (*_BY_OUTPUTS, *_BY_INPUTS):
        return None
    axis = _OUTPUTS if matrix in _BY_OUTPUTS else _INPUTS
    unit = _unit(weight, axis)
    if unit is not None and weight.shape[axis] % (unit * devices) == 0:
        return axis
    if matrix in _HEADS:
        raise UsageError(
            f"{name} ({weight.format}, {weight.shape[axis]} rows) cannot be split among "
            f"{devices} devices; take fewer"
        )
    return None


def bytes_on_each(weights: Mapping[str, StoredWeight], devices: int) -> int:
    """Bytes of weights on each of so many devices."""
    parts = {n: 1 if split_axis(n, w, devices) is None else devices for n, w in weights.items()}
    return sum(weight.device_bytes // parts[name] for name, weight in weights.items())


def array_axes(weight: StoredWeight, axis: int | None) -> dict[str, int | None]:
    """The axis of each of a weight's arrays that goes with an axis of its values."""
    names = list(weight.arrays)
    if axis is None or weight.format not in ("AWQ", "GPTQ"):
        return dict.fromkeys(names, axis)
    turned = _INPUTS if axis == _OUTPUTS else _OUTPUTS  # they are stored (I, O)
    return {name: None if name == "g_idx" else turned for name in names}


def _unit(weight: StoredWeight, axis: int) -> int | None:
    """How many values along an axis stay together; None where all do."""
    if weight.format in (*FLOATS, *TABLE_BLOCKS):
        return 1
    if weight.format == "FP8":
        return weight.params["block_size"]
    if axis == _OUTPUTS:
        return _WORD_BITS if weight.format in ("AWQ", "GPTQ") else 1
    if weight.format in BLOCKS:
        return BLOCKS[weight.format][0]
    return None if "g_idx" in weight.arrays else weight.params["group_size"]
