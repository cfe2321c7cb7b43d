"""Adding up what a model takes on a device. Lengths are tokens."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_tg.device import Policy
from qwen3_tg.kv_sizes import cache_bytes, first_capacity, last_growth
from qwen3_tg.pace import FEW
from qwen3_tg.plan.scratch import ModelSize, scratch_bytes

_FLOAT32 = 4
_GRAPHS = 2  # prefill and decode, each with logits of its own


@dataclass(frozen=True)
class Use:
    """For more than a plain conversation: a `batch` of so many sequences at once, or with a `draft`
    model that guesses."""

    batch: int = 0
    draft: ModelSize | None = None

    @property
    def alike(self) -> int:
        """Positions of the graph that this takes more; 0: none."""
        return max(self.batch, FEW if self.draft else 0)


@dataclass(frozen=True)
class Plan:
    """Bytes on the device, or on each of several, for one model in one context. All are exact but
    scratch.

    The cache has room for `first_capacity` positions at first, and at last for `capacity`; while it
    takes its last step, the old and the new one, `growing_cache_bytes` together, are both there.
    `batch_cache_bytes` are those of all sequences of a batch, `first_batch_cache_bytes` at first.
    `draft` is the plan of the model that guesses. `remark` is what the user should know of the
    context."""

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
    batch_cache_bytes: int = 0
    first_batch_cache_bytes: int = 0
    draft: Plan | None = None

    @property
    def first_parts(self) -> dict[str, int]:
        """What short texts take, by name."""
        return {
            "weights": self.weights_bytes,
            "cache": self.first_cache_bytes + self.first_batch_cache_bytes,
            "rope table": self.rope_bytes,
            "logits": self.logits_bytes,
            "scratch": self.first_scratch_bytes,
        }

    @property
    def first_bytes(self) -> int:
        return sum(self.first_parts.values()) + (self.draft.first_bytes if self.draft else 0)

    @property
    def full_bytes(self) -> int:
        """What it takes when the context is full, of each sequence."""
        varying = self.cache_bytes + self.batch_cache_bytes + self.scratch_bytes
        draft = self.draft.full_bytes if self.draft else 0
        return self.weights_bytes + self.rope_bytes + self.logits_bytes + varying + draft

    @property
    def growing_bytes(self) -> int:
        """The most that it takes in the last step of a cache. That of one conversation has no
        graphs meanwhile; of a batch, or with a draft model, others stay."""
        if self.batch_cache_bytes or self.draft:
            return self.full_bytes + max(self.growing_cache_bytes - self.cache_bytes, 0)
        return self.weights_bytes + self.rope_bytes + self.growing_cache_bytes

    @property
    def needed_bytes(self) -> int:
        """The most that it ever takes."""
        return max(self.first_bytes, self.full_bytes, self.growing_bytes)


def make_plan(
    size: ModelSize, policy: Policy, context: int | None, factor: float = 1.0, use: Use = Use()
) -> Plan:
    """What a context takes; None is the checkpoint's own. `factor` is that of scratch.py.

    Raises UsageError for a context that the model cannot take."""
    config, context, remark = size.config.with_context(context)
    limit = context + policy.prefill_chunk  # the last chunk of a full context reaches past its end
    first, last = first_capacity(limit), last_growth(limit)

    def cache(positions: int) -> int:
        return cache_bytes(config, positions, policy.kv_dtype) // len(policy.devices)

    draft = None
    if use.draft:
        length = min(context, use.draft.config.with_context(None)[1])
        draft = make_plan(use.draft, policy, length, factor)
    each = context + 1  # of a batch: where a full one waits
    return Plan(
        context=context,
        capacity=limit,
        first_capacity=first,
        weights_bytes=size.weights_bytes,
        cache_bytes=cache(limit),
        first_cache_bytes=cache(first),
        growing_cache_bytes=cache(sum(last)) if last else 0,
        rope_bytes=limit * config.head_dim * _FLOAT32,
        logits_bytes=(_GRAPHS + use.alike) * config.vocab_size * _FLOAT32,
        scratch_bytes=scratch_bytes(size, policy, limit, factor, use.alike),
        first_scratch_bytes=scratch_bytes(size, policy, first, factor, use.alike),
        remark=remark,
        batch_cache_bytes=use.batch * cache(each),
        first_batch_cache_bytes=use.batch * cache(first_capacity(each)),
        draft=draft,
    )


def largest_context(
    size: ModelSize, policy: Policy, memory_bytes: int, factor: float = 1.0, use: Use = Use()
) -> int:
    """The longest context that the memory holds and the model can take; 0 where none fits."""

    def fits(context: int) -> bool:
        return make_plan(size, policy, context, factor, use).needed_bytes <= memory_bytes

    least, most = 0, size.config.longest_context
    while least < most:  # needed bytes never fall with the context
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
