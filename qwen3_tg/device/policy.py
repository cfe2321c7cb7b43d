"""How the model runs on a device: in which types, by which kernels, how much at a time.

Everything that differs from device to device is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen3_tg.device import found
from qwen3_tg.device.names import DTYPE_NAMES, KERNELS, KV_DTYPE_NAMES, each, family, gib
from qwen3_tg.errors import DeviceError, UsageError, check_count

# New positions a prefill step computes. Where it is short, prompts waste little on padding; where
# it is long, each weight that is read serves more positions, which a GPU needs.
_PREFILL_CHUNK = {"CPU": 32}
_PREFILL_CHUNK_ELSEWHERE = 256
_PREFILL_CHUNK_FAST = 512  # of the CPU's own kernels, which compute nothing for padding


@dataclass(frozen=True)
class Policy:
    """How the model runs on a device, or on several whose names `device` has with commas.

    `dtype` is what activations are computed in, `kv_dtype` what keys and values are kept in,
    `native` the float formats that the device computes with, `prefill_chunk` in positions,
    `kernels` one of KERNELS, `threads` those that compute, where that is ours to say."""

    device: str
    dtype: str
    kv_dtype: str
    native: frozenset[str]
    prefill_chunk: int
    reason: str
    kernels: str = "generic"
    threads: int | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """The name of each."""
        return each(self.device)


def choose(
    device: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    kernels: str | None = None,
    threads: int | None = None,
) -> Policy:
    """Open the device asked for, or else DEV's, or else the first that works in tinygrad's order.

    `kernels` is one of KERNELS, by default "fast" on a CPU, and "exact" where float32 is asked for;
    with "fast" keys and values are kept in float16. `threads`: by default one a core.

    Raises DeviceError with what is missing, UsageError for a name or dtype that does not exist."""
    for what, asked, names in (
        ("dtype", dtype, DTYPE_NAMES),
        ("kv_dtype", kv_dtype, KV_DTYPE_NAMES),
    ):
        if asked is not None and asked not in names:
            raise UsageError(f"{what} must be one of {', '.join(names)}, found {asked!r}")
    if kernels is not None and kernels not in KERNELS:
        raise UsageError(f"kernels must be one of {', '.join(KERNELS)}, found {kernels!r}")
    check_count("threads", threads, least=1)
    name, reason = found.pick(device)
    found.be_patient(name)
    native = found.native_formats(name)
    for asked in (dtype, kv_dtype):
        if asked not in (None, "int8", *native):
            raise DeviceError(
                f"{name} does not compute in {asked}; it does {', '.join(sorted(native))}: "
                "leave the dtype away or choose one of these"
            )
    kernels = _choose_kernels(name, dtype, kernels, threads)
    dtype = dtype or best_dtype(name, native)
    fast = kernels != "generic"
    return Policy(
        device=name,
        dtype=dtype,
        kv_dtype=kv_dtype or ("float16" if kernels == "fast" else dtype),
        native=native,
        prefill_chunk=_PREFILL_CHUNK_FAST
        if fast
        else _PREFILL_CHUNK.get(family(name), _PREFILL_CHUNK_ELSEWHERE),
        reason=reason,
        kernels=kernels,
        threads=_cpu_kernels(threads, exact=False).threads if fast else None,
    )


def own_kernels(policy: Policy) -> Any:
    """The kernels that a policy computes with; None for tinygrad's lowering."""
    if policy.kernels == "generic":
        return None
    return _cpu_kernels(policy.threads, exact=policy.kernels == "exact")


def check_single(policy: Policy, what: str) -> None:
    """Raises UsageError where there are several devices."""
    if len(policy.devices) > 1:
        raise UsageError(f"{what} is for one device at a time, found {policy.device}")


def shares_memory(policy: Policy) -> bool:
    """Whether weights can be used where they lie in the host's memory, at any address."""
    return policy.kernels != "generic"


def _choose_kernels(name: str, dtype: str | None, asked: str | None, threads: int | None) -> str:
    """Those asked for, or the fastest there are. Only tinygrad's own compiler for C will do, and
    activations in float32."""
    from tinygrad.device import Device
    from tinygrad.renderer.cstyle import ClangRenderer

    suits = name == "CPU" and type(Device[name].renderer) is ClangRenderer
    suits = suits and dtype in (None, "float32")
    if asked in ("fast", "exact") and not suits:
        raise UsageError(
            f"kernels {asked!r} are for --device CPU (tinygrad's clang) in float32, not for {name}"
            + (f" in {dtype}" if dtype else "")
        )
    if threads is not None and (not suits or asked == "generic"):
        raise UsageError("threads can be chosen for the CPU's own kernels alone")
    if asked == "generic" or not suits:
        return "generic"
    if _cpu_kernels(threads, exact=False) is None:
        if asked:
            raise DeviceError(f"the CPU's {asked} kernels do not work here; leave --kernels away")
        return "generic"
    return asked or ("fast" if dtype is None else "exact")


def _cpu_kernels(threads: int | None, exact: bool) -> Any:
    """None, after one warning that says why, where they cannot be compiled or started."""
    import qwen3_tg_cpu

    return qwen3_tg_cpu.load(threads, exact)


def imagined(memory_bytes: int | None = None, kv_dtype: str | None = None) -> Policy:
    """The policy of a GPU that is not there, with so much memory."""
    return Policy(
        device="a GPU" if memory_bytes is None else f"a GPU with {gib(memory_bytes)}",
        dtype="bfloat16",
        kv_dtype=kv_dtype or "bfloat16",
        native=frozenset(DTYPE_NAMES),
        prefill_chunk=_PREFILL_CHUNK_ELSEWHERE,
        reason="imagined",
    )


def working_policies(kv_dtype: str | None = None) -> list[Policy]:
    """That of every device that works here, the one that would be chosen first. A device without
    this type for keys and values is left out."""
    policies = [
        choose(report.name, kv_dtype=kv_dtype)
        for report in found.reports()
        if not report.missing and kv_dtype in (None, "int8", *report.native)
    ]
    try:
        first = choose(kv_dtype=kv_dtype).device
    except DeviceError:
        return policies
    return sorted(policies, key=lambda policy: policy.device != first)


def best_dtype(name: str, native: frozenset[str]) -> str:
    """float32 on a CPU, which has no faster unit for half; elsewhere bfloat16, the type the model
    was trained in. float16 never by itself: activations of a bfloat16 model can pass its 65,504."""
    return "bfloat16" if family(name) != "CPU" and "bfloat16" in native else "float32"
