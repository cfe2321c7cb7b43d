"""What a model really takes: tinygrad's count of what it allocated, and the process's memory.

Also measures the factor of plan/scratch.py. Touches tinygrad's internals: `GlobalCounters`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwen3_tg.device.names import each
from qwen3_tg.kv_sizes import cache_bytes
from qwen3_tg.llm import LLM, load
from qwen3_tg.plan import ModelSize, Plan, load_factor, make_plan, save_factor, scratch_bytes

_STATUS = Path("/proc/self/status")
_PROMPT = list(range(3, 12))  # any ids, fewer than a chunk


def plan_of(llm: LLM) -> Plan:
    """What was planned for a loaded model."""
    return make_plan(_size(llm), llm.policy, llm.context, _factor(llm))


def allocated_bytes(device: str) -> int:
    """What tinygrad has allocated on a device, or at most on one of several, for all that this
    process has there."""
    from tinygrad.helpers import GlobalCounters

    return max(int(GlobalCounters.mem_used_per_device[one]) for one in each(device))


def taken_bytes(llm: LLM) -> int:
    """What tinygrad has allocated on the model's device, and what the model has besides: weights
    used where they lie in mapped files, and the scratch of a device's own kernels."""
    drafts = llm.draft.bytes_besides if llm.draft else 0
    return allocated_bytes(llm.policy.device) + llm.bytes_besides + drafts


def peak_resident_bytes() -> int | None:
    """The most memory that this process ever had, where the system tells."""
    try:  # getrusage counts the parent's too, up to the moment when this program was started
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def loaded_report(llm: LLM) -> str:
    """Planned against allocated after loading. tinygrad takes memory for the cache only when it is
    first written, and for scratch when a graph first runs."""
    plan, device = plan_of(llm), llm.policy.device
    return (
        f"memory of {device}: planned {plan.weights_bytes:,} bytes of weights and "
        f"{plan.rope_bytes:,} of rope table; taken {taken_bytes(llm):,}{_shared(llm)}"
        f"{', with the draft model' if llm.draft else ''}{_peak()}"
    )


def used_report(llm: LLM, batch_bytes: int = 0) -> str:
    """Planned against allocated after a reply, when everything is there; `batch_bytes` are those
    of the caches of a batch."""
    plan, device, capacity = plan_of(llm), llm.policy.device, llm.cache_capacity
    cache = cache_bytes(llm.config, capacity, llm.policy.kv_dtype)
    cache //= len(llm.policy.devices)
    exact = plan.weights_bytes + cache + plan.rope_bytes + plan.logits_bytes + batch_bytes
    scratch = scratch_bytes(_size(llm), llm.policy, capacity, _factor(llm))
    found = taken_bytes(llm)
    batch = f", caches of the batch {batch_bytes:,}" if batch_bytes else ""
    # what a draft model takes is counted by the device, but not planned here
    scratch_taken = "with the draft model's" if llm.draft else f"of it scratch {found - exact:,}"
    return (
        f"memory of {device}: planned {exact + scratch:,} bytes (weights {plan.weights_bytes:,}, "
        f"cache {cache:,} for {capacity:,} positions{batch}, rope table {plan.rope_bytes:,}, "
        f"logits {plan.logits_bytes:,}, scratch about {scratch:,}); taken {found:,}, "
        f"{scratch_taken}{_kept(llm)}{_peak()}"
    )


def _size(llm: LLM) -> ModelSize:
    return ModelSize.of(llm.config, llm.checkpoint.weights, len(llm.policy.devices))


def _factor(llm: LLM) -> float:
    return load_factor(llm.policy) or 1.0


def _shared(llm: LLM) -> str:
    return f" ({llm.shared_bytes:,} of them where the file is mapped)" if llm.shared_bytes else ""


def _kept(llm: LLM) -> str:
    texts, nbytes = llm.kept
    return f"; kept of other texts in main memory {nbytes:,}" if texts else ""


def _peak() -> str:
    peak = peak_resident_bytes()
    return "" if peak is None else f"; this process's peak in main memory {peak:,}"


def scratch_factor(device: str) -> float:
    """Measure the factor of a device now, with the embedded model, and keep it. Takes seconds.
    Raises DeviceError if the model does not run there."""
    llm = load("tiny", device, kernels="generic")
    size, plan = _size(llm), plan_of(llm)
    before = allocated_bytes(llm.policy.device)
    list(llm.generate_ids(_PROMPT, max_new_tokens=2, stop_ids=()))
    found = allocated_bytes(llm.policy.device) - before
    found -= plan.first_cache_bytes + plan.logits_bytes
    factor = found / scratch_bytes(size, llm.policy, plan.first_capacity)
    save_factor(device, factor)
    return factor
