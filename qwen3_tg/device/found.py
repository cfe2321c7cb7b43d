"""Which devices there are, and which of them work.

A device counts as working when it could be opened and one kernel gave the right numbers on it.
Touches tinygrad's internals: `Device`, `ALL_DEVICES`, `DEV`, a renderer's `supported_dtypes`, and
the CPU device's `wait_timeout_ms`.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from qwen3_tg import compiler
from qwen3_tg.device import missing
from qwen3_tg.device.forked import problem_after_fork
from qwen3_tg.device.memory import Memory, memory_of
from qwen3_tg.device.missing import Missing
from qwen3_tg.device.names import DTYPE_NAMES, each, family, one_line
from qwen3_tg.errors import DeviceError, UsageError

# What tinygrad computes by other types, each step rounded by hand: no device has it for OpenCL C.
_EMULATED = {"CL": ("bfloat16",)}
# tinygrad sees a hang after 30 s.
_CPU_PATIENCE_MS = 3_600_000.0
# Why a device was chosen.
ASKED, BY_DEV, FIRST = "asked for", "set by DEV", "the first that works"


@dataclass(frozen=True)
class DeviceReport:
    """One device for `qwen3 devices`: `missing` is None where it works. `is_software`: it is the
    CPU under another name, and never taken unless it is asked for."""

    name: str
    what: str = ""
    renderer: str = ""
    memory: Memory = field(default_factory=Memory)
    native: frozenset[str] = frozenset()
    missing: Missing | None = None
    is_software: bool = False


def reports() -> list[DeviceReport]:
    """Every device tinygrad knows, in its order of preference, each tried with one kernel; of those
    that work and of which there are several, each."""
    compiler.prepare_environment()
    from tinygrad.device import ALL_DEVICES, Device

    found = []
    for kind in ALL_DEVICES:
        if lacking := problem_of(kind):
            found.append(DeviceReport(kind, missing=lacking))
            continue
        count = Device[kind].count() if kind != "CPU" else 1
        for name in [kind, *(f"{kind}:{number}" for number in range(1, count))]:
            found.append(report(name))
    return found


def report(name: str) -> DeviceReport:
    """Of one device."""
    from tinygrad.device import Device

    if lacking := problem_of(name):
        return DeviceReport(name, missing=lacking)
    return DeviceReport(
        name,
        describe(name),
        type(Device[name].renderer).__name__,
        memory_of(name),
        native_formats(name),
        is_software=is_software(name),
    )


def pick(device: str | None) -> tuple[str, str]:
    """The device's name, or those of several with commas, and why it was chosen."""
    compiler.prepare_environment()
    from tinygrad.device import ALL_DEVICES, Device
    from tinygrad.helpers import DEV

    asked, reason = (device, ASKED) if device else (DEV.device, BY_DEV)
    if asked:
        names = [Device.canonicalize(part.strip()) for part in each(asked)]
        for name in names:
            number = name.partition(":")[2] or "0"
            if family(name) not in ALL_DEVICES or not re.fullmatch("0|[1-9][0-9]{0,3}", number):
                raise UsageError(
                    f"unknown device {asked!r}; known: {', '.join(ALL_DEVICES)}, "
                    "with a number for another one of a kind (CUDA:1); another renderer is chosen "
                    "by the environment variable DEV (DEV=CPU:LLVM)"
                )
        if len(set(names)) < len(names) or len(set(map(family, names))) > 1:
            raise UsageError(
                f"several devices must be different ones of a kind (CUDA:0,CUDA:1), found {asked!r}"
            )
        for name in names:
            if problem := problem_of(name):
                raise DeviceError(f"device {name} does not work: {problem}")
        return ",".join(names), reason
    problems = {}
    for name in ALL_DEVICES:
        problems[name] = problem_of(name)
        if problems[name] is None and not is_software(name):
            return name, FIRST
        # what the parent has taken: not another one instead, in silence
        if (lost := problem_after_fork(name)) and not is_software(name):
            raise DeviceError(f'device {name} does not work: {lost}; or name another: device="CPU"')
    raise DeviceError(f"no device works here. CPU: {problems['CPU']}")


def problem_of(name: str) -> Missing | None:
    """What keeps a device from working; None if a kernel ran on it."""
    from tinygrad import Tensor
    from tinygrad.device import Device

    if lacking := missing.before_opening(name) or problem_after_fork(name):
        return lacking
    try:
        Device[name]
        Device[name].renderer  # noqa: B018 - the compiler is looked for here
    except Exception as e:  # drivers fail in every way there is
        return _absent_number(name) or missing.after_failing(name, e)
    try:
        # no constant, for which tinygrad would first look for its default device, in all of them
        one, other = (Tensor(values, device=name) for values in ([1.0, 2.0], [3.0, 0.5]))
        right = (one * other).tolist() == [3.0, 1.0]
    except Exception as e:
        return Missing(f"a test kernel failed: {one_line(e)}")
    return None if right else Missing("a test kernel gave wrong numbers")


def _absent_number(name: str) -> Missing | None:
    """Where there are devices of this kind, but not so many."""
    from tinygrad.device import Device

    kind, number = family(name), int(name.partition(":")[2] or 0)
    if number == 0 or problem_of(kind) is not None:
        return None
    count = Device[kind].count()
    what = f"the last {kind} device is {kind}:{count - 1}" if count > 1 else f"there is one {kind}"
    return Missing(what) if number >= count else None


@contextlib.contextmanager
def as_default(name: str) -> Iterator[None]:
    """tinygrad's default device, where the user set none with DEV: or else tinygrad looks for one,
    in all there are, whenever something has no device of its own, or a kernel is tried out."""
    from tinygrad import helpers

    if helpers.DEV.device:
        yield
        return
    context: Any = helpers.Context
    with context(DEV=family(name)):  # with a number, DEV would say a renderer
        yield


def native_formats(name: str) -> frozenset[str]:
    """The float formats that a working device, or each of several, computes with."""
    from tinygrad.device import Device

    return frozenset.intersection(
        *(formats_of(Device[one].renderer, family(one)) for one in each(name))
    )


def formats_of(renderer: Any, kind: str) -> frozenset[str]:
    """Those that code of a renderer computes with on this kind of device."""
    from tinygrad import dtypes

    supported, emulated = renderer.supported_dtypes(), _EMULATED.get(kind, ())
    return frozenset(
        n for n in DTYPE_NAMES if n not in emulated and getattr(dtypes, n) in supported
    )


def be_patient(name: str) -> None:
    """Let a step take its time: that of a big model on a CPU is longer than what tinygrad takes for
    a hang."""
    from tinygrad.device import Device

    for one in each(name) if family(name) == "CPU" else ():
        device: Any = Device[one]
        device.wait_timeout_ms = _CPU_PATIENCE_MS


@cache  # so that a forked child need not ask the driver
def is_software(name: str) -> bool:
    """Whether an OpenCL device is the CPU."""
    if family(name) != "CL":
        return False
    from tinygrad.device import Device
    from tinygrad.runtime.autogen import opencl

    device: Any = Device[name]
    type, size = ctypes.c_uint64(), ctypes.sizeof(ctypes.c_uint64)
    what = opencl.CL_DEVICE_TYPE
    failed = opencl.clGetDeviceInfo(device.cl_dev, what, size, ctypes.byref(type), None)
    return not failed and bool(type.value & opencl.CL_DEVICE_TYPE_CPU)


def describe(name: str) -> str:
    """A device's own name, or what is known of it instead."""
    from tinygrad.device import Device
    from tinygrad.renderer.cstyle import ClangRenderer

    device = Device[name]
    if isinstance(device.renderer, ClangRenderer):
        found = compiler.find_compiler()
        return found.version if found else ""
    what = getattr(device, "device_name", None) or getattr(device, "arch", None)
    return str(what or device.renderer.target.arch or type(device.renderer).__name__)
