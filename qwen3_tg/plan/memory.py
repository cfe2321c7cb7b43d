"""Adding up what a model takes on a device. Lengths are tokens."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_tg.device import Policy
from qwen3_tg.kv_sizes import cache_bytes, first_capacity, last_growth
from qwen3_tg.plan.scratch import ModelSize, scratch_bytes

_FLOAT32 = 4
_GRAPHS = 2  # prefill and decode, each with logits of its own


@dataclass(frozen=True)
class Plan:
    """Bytes on the device, or on each of several, for one model in one context. All are exact but
    scratch.

    The cache has room for `first_capacity` positions at first, and at last for `capacity`; while it
    takes its last step, the old and the new one, `growing_cache_bytes` together, are both there.
    `remark` is what the user should know of the context."""

    context: int
    capacity: int
    first_capacity: int
    weights_bytes: int
    cache_bytes: int
    first_cache_bytes: int
    growing_cache_bytes: int
    rope_bytes: int
    logits_bytes: int
    scratch_bytes: int
    first_scratch_bytes: int
    remark: str

    @property
    def first_parts(self) -> dict[str, int]:
        """What a short conversation takes, by name."""
        return {
            "weights": self.weights_bytes,
            "cache": self.first_cache_bytes,
            "rope table": self.rope_bytes,
            "logits": self.logits_bytes,
            "scratch": self.first_scratch_bytes,
        }

    @property
    def first_bytes(self) -> int:
        return sum(self.first_parts.values())

    @property
    def full_bytes(self) -> int:
        """What it takes when the context is full."""
        varying = self.cache_bytes + self.scratch_bytes
        return self.weights_bytes + self.rope_bytes + self.logits_bytes + varying

    @property
    def growing_bytes(self) -> int:
        """What it takes in the last step of the cache, when there are no graphs."""
        return self.weights_bytes + self.rope_bytes + self.growing_cache_bytes

    @property
    def needed_bytes(self) -> int:
        """The most that it ever takes."""
        return max(self.first_bytes, self.full_bytes, self.growing_bytes)


def make_plan(size: ModelSize, policy: Policy, context: int | None, factor: float = 1.0) -> Plan:
    """What a context takes; None is the checkpoint's own. `factor` is that of scratch.py.

    Raises UsageError for a context that the model cannot take."""
    config, context, remark = size.config.with_context(context)
    limit = context + policy.prefill_chunk  # the last chunk of a full context reaches past its end
    first, last = first_capacity(limit), last_growth(limit)

    def cache(positions: int) -> int:
        return cache_bytes(config, positions, policy.kv_dtype) // len(policy.devices)

    return Plan(
        context=context,
        capacity=limit,
        first_capacity=first,
        weights_bytes=size.weights_bytes,
        cache_bytes=cache(limit),
        first_cache_bytes=cache(first),
        growing_cache_bytes=cache(sum(last)) if last else 0,
        rope_bytes=limit * config.head_dim * _FLOAT32,
        logits_bytes=_GRAPHS * config.vocab_size * _FLOAT32,
        scratch_bytes=scratch_bytes(size, policy, limit, factor),
        first_scratch_bytes=scratch_bytes(size, policy, first, factor),
        remark=remark,
    )


def largest_context(size: ModelSize, policy: Policy, memory_bytes: int, factor: float = 1.0) -> int:
    """The longest context that the memory holds and the model can take; 0 where none fits."""

    def fits(context: int) -> bool:
        return make_plan(size, policy, context, factor).needed_bytes <= memory_bytes

    least, most = 0, size.config.longest_context
    while least < most:  # needed bytes never fall with the context
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
