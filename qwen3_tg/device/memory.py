"""How much memory a device has. Touches tinygrad's internals: `Device`, an allocator's
`free_cache`, and what the devices of CUDA, AMD, Metal and OpenCL know of their memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_tg.device.names import each, family, gib
from qwen3_tg.errors import DeviceError

_MEMINFO = Path("/proc/meminfo")
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_WITHOUT_MEMORY_PLANNER = ("CL", "WEBGPU")  # tinygrad's schedule/memory.py: they have no views


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, and those that it still has for us; None where that is not known."""

    total: int | None = None
    free: int | None = None


def memory_of(name: str) -> Memory:
    """That of a working device; of several, what each has at least."""
    ask, names = _ASK.get(family(name)), each(name)
    try:
        found = [ask(one) for one in names] if ask else [Memory()]
    except Exception:  # drivers fail in every way there is, and to know it is not needed to run
        return Memory()
    shared_by = len(names) if family(name) == "CPU" else 1

    def least(values: list[int | None]) -> int | None:
        return None if None in values else min(v for v in values if v is not None) // shared_by

    return Memory(least([one.total for one in found]), least([one.free for one in found]))


def free_memory(name: str) -> int | None:
    """Bytes that a working device still has for us; None where that is not known."""
    return memory_of(name).free


def check_memory(
    name: str,
    bytes_by_part: Mapping[str, int],
    what: str = "the model",
    todo: str = "take a smaller model or a larger machine (qwen3 plan says what fits)",
) -> None:
    """Refuse what the free memory cannot hold, where that is known. Without this the system would
    kill the process in the middle. Raises DeviceError."""
    needed, free = sum(bytes_by_part.values()), free_memory(name)
    if free is not None and needed > free:
        parts = ", ".join(f"{part} {gib(nbytes)}" for part, nbytes in bytes_by_part.items())
        raise DeviceError(
            f"{what} takes {gib(needed)} ({parts}) and {gib(free)} of memory are free on "
            f"{' and on '.join(each(name))}: {todo}"
        )


def free_unused(name: str) -> None:
    """Give freed buffers back to the system: tinygrad keeps them for others of the same size."""
    from tinygrad.device import Device

    for one in each(name):
        device: Any = Device[one]
        if hasattr(device.allocator, "free_cache"):
            device.synchronize()
            device.allocator.free_cache()


def takes_read_only(name: str) -> bool:
    """Whether tinygrad copies to the device from memory that cannot be written, as that of mapped
    files: for drivers it takes the address in a way that Python refuses then."""
    return family(name) == "CPU"


def shares_scratch(name: str) -> bool:
    """Whether tinygrad lets the values of a graph take each other's place in memory."""
    return family(name) not in _WITHOUT_MEMORY_PLANNER


def _cpu(name: str) -> Memory:
    """Under Linux, with the limit of a container."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return Memory()
    fields = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    limits = []
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", where there is no limit
        limits.append(int(_CONTAINER_LIMIT.read_text()))
    total, free = (
        min([fields[key], *limits] if key in fields else limits, default=None)
        for key in ("MemTotal:", "MemAvailable:")
    )
    return Memory(total, free)


def _cuda(name: str) -> Memory:
    from tinygrad.device import Device
    from tinygrad.runtime.autogen import cuda

    device: Any = Device[name]
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cuCtxSetCurrent(device.context) or cuda.cuMemGetInfo_v2(free, total):
        raise OSError("cuMemGetInfo failed")
    return Memory(total.value, free.value)


def _nv(name: str) -> Memory:
    """By the library of NVIDIA's own tool, nvidia-smi."""

    class Info(ctypes.Structure):
        _fields_ = [(field, ctypes.c_ulonglong) for field in ("total", "free", "used")]

    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    handle, info = ctypes.c_void_p(), Info()
    number = int(name.partition(":")[2] or 0)
    if (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info))
    ):
        raise OSError("NVML failed")
    return Memory(int(info.total), int(info.free))


def _amd(name: str) -> Memory:
    from tinygrad.device import Device

    device: Any = Device[name]
    folder = Path(device.iface.dev_sysfs_path)
    total, used = (
        int((folder / f"mem_info_vram_{what}").read_text()) for what in ("total", "used")
    )
    return Memory(total, total - used)


def _metal(name: str) -> Memory:
    from tinygrad.device import Device

    device: Any = Device[name]
    system = device.sysdevice
    total = int(system.recommendedMaxWorkingSetSize())
    return Memory(total, total - int(system.currentAllocatedSize()))


def _cl(name: str) -> Memory:
    """OpenCL tells how much there is, not how much is free."""
    from tinygrad.device import Device
    from tinygrad.runtime.autogen import opencl

    device: Any = Device[name]
    total = ctypes.c_uint64()
    size = ctypes.sizeof(total)
    what = opencl.CL_DEVICE_GLOBAL_MEM_SIZE
    if opencl.clGetDeviceInfo(device.cl_dev, what, size, ctypes.byref(total), None):
        raise OSError("clGetDeviceInfo failed")
    return Memory(total.value)


_ASK: dict[str, Callable[[str], Memory]] = {
    "CPU": _cpu,
    "CUDA": _cuda,
    "NV": _nv,
    "AMD": _amd,
    "METAL": _metal,
    "CL": _cl,
}
