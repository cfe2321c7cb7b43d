"""Which device to compute on, in which types, and why; the only file that knows device names.

tinygrad brings the devices. A device counts as working when it could be opened and one kernel gave
the right numbers on it. Touches tinygrad's internals: `Device`, `ALL_DEVICES`, `DEV`, a renderer's
`supported_dtypes`, an allocator's `free_cache`, and the CPU device's `wait_timeout_ms`.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_tg import compiler
from qwen3_tg.errors import DeviceError, UsageError

DTYPE_NAMES = ("float32", "float16", "bfloat16")
# New positions a prefill step computes. Where it is short, prompts waste little on padding; where
# it is long, each weight that is read serves more positions, which a GPU needs.
_PREFILL_CHUNK = {"CPU": 32}
_PREFILL_CHUNK_ELSEWHERE = 256
# One step of a big model on a CPU takes longer than the 30 s after which tinygrad sees a hang.
_CPU_PATIENCE_MS = 3_600_000.0
_MEMINFO = Path("/proc/meminfo")
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SOFTWARE_CL = ("pocl", "llvmpipe", "cpu")  # OpenCL drivers that are the CPU, only slower
_MISSING = {
    "METAL": "only on macOS with Apple Silicon or an AMD GPU",
    "AMD": "no AMD GPU with the amdgpu kernel driver (/dev/kfd) found",
    "NV": "no NVIDIA GPU with the kernel driver (/dev/nvidiactl) found",
    "CUDA": "no libcuda: install the NVIDIA driver",
    "QCOM": "no Adreno GPU (/dev/kgsl-3d0) found",
    "CL": "no OpenCL: install the GPU's OpenCL driver and its loader (libOpenCL)",
    "DSP": "no Hexagon DSP found",
    "WEBGPU": "no WebGPU library: install Dawn (pip install dawn-python) and set WEBGPU_PATH",
}


@dataclass(frozen=True)
class Policy:
    """How the model runs on a device: `dtype` is what activations are computed in, `kv_dtype` what
    keys and values are kept in, `native` the float formats that the device computes with,
    `prefill_chunk` in positions."""

    device: str
    dtype: str
    kv_dtype: str
    native: frozenset[str]
    prefill_chunk: int
    reason: str


@dataclass(frozen=True)
class DeviceReport:
    """One device for `qwen3 devices`: `problem` is None where it works."""

    name: str
    what: str
    native: frozenset[str]
    problem: str | None


def choose(
    device: str | None = None, dtype: str | None = None, kv_dtype: str | None = None
) -> Policy:
    """Open the device asked for, or else DEV's, or else the first that works in tinygrad's order.

    Raises DeviceError with what is missing, UsageError for a name or dtype that does not exist."""
    for what, asked in (("dtype", dtype), ("kv_dtype", kv_dtype)):
        if asked is not None and asked not in DTYPE_NAMES:
            raise UsageError(f"{what} must be one of {', '.join(DTYPE_NAMES)}, found {asked!r}")
    name, reason = _pick(device)
    if _family(name) == "CPU":
        _be_patient(name)
    native = _native_formats(name)
    for asked in (dtype, kv_dtype):
        if asked is not None and asked not in native:
            raise DeviceError(
                f"{name} does not compute in {asked}; it does {', '.join(sorted(native))}: "
                "leave the dtype away or choose one of these"
            )
    dtype = dtype or _best_dtype(name, native)
    return Policy(
        device=name,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        native=native,
        prefill_chunk=_PREFILL_CHUNK.get(_family(name), _PREFILL_CHUNK_ELSEWHERE),
        reason=reason,
    )


def reports() -> list[DeviceReport]:
    """Every device tinygrad knows, in its order of preference, each tried with one kernel."""
    compiler.prepare_environment()
    from tinygrad.device import ALL_DEVICES

    found = []
    for name in ALL_DEVICES:
        problem = _problem(name)
        native = frozenset() if problem else _native_formats(name)
        found.append(DeviceReport(name, "" if problem else _describe(name), native, problem))
    return found


def check_memory(policy: Policy, weights_bytes: int) -> None:
    """Refuse weights that the free memory cannot hold, where that is known: on a CPU under Linux.
    Without this the system would kill the process in the middle. Raises DeviceError."""
    if _family(policy.device) != "CPU":
        return
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", where there is no limit
        available.append(int(_CONTAINER_LIMIT.read_text()))
    free = min(available, default=weights_bytes)
    if weights_bytes > free:
        raise DeviceError(
            f"the weights take {weights_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "of memory are free: take a smaller model or a larger machine"
        )


def free_unused(name: str) -> None:
    """Give freed buffers back to the system: tinygrad keeps them for others of the same size."""
    from tinygrad.device import Device

    device = Device[name]
    if hasattr(device.allocator, "free_cache"):
        device.synchronize()
        device.allocator.free_cache()


def _pick(device: str | None) -> tuple[str, str]:
    """The device's name and why it was chosen."""
    compiler.prepare_environment()
    from tinygrad.device import ALL_DEVICES, Device
    from tinygrad.helpers import DEV

    asked, reason = (device, "asked for") if device else (DEV.device, "set by DEV")
    if asked:
        name = Device.canonicalize(asked)
        number = name.partition(":")[2]
        if _family(name) not in ALL_DEVICES or (number and not number.isdecimal()):
            raise UsageError(
                f"unknown device {asked!r}; known: {', '.join(ALL_DEVICES)}, "
                "with a number for another one of a kind (CUDA:1)"
            )
        if problem := _problem(name):
            raise DeviceError(f"device {name} does not work: {problem}")
        return name, reason
    problems = {}
    for name in ALL_DEVICES:
        problem = _problem(name)
        if problem is None and not _is_software(name):
            return name, "the first that works"
        problems[name] = problem
    raise DeviceError(f"no device works here. CPU: {problems['CPU']}")


def _problem(name: str) -> str | None:
    """What keeps a device from working, in one line; None if a kernel ran on it."""
    from tinygrad import Tensor
    from tinygrad.device import Device

    family = _family(name)
    if family == "METAL" and sys.platform != "darwin":
        return _MISSING["METAL"]
    if family == "CPU" and compiler.find_compiler() is None:
        return f"no C compiler that tinygrad can use; {compiler.HOW_TO_GET}"
    try:
        Device[name]
    except Exception as e:  # drivers fail in every way there is
        return _MISSING.get(family) or _one_line(e)
    try:
        right = (Tensor([1.0, 2.0], device=name) * 3).tolist() == [3.0, 6.0]
    except Exception as e:
        return f"a test kernel failed: {_one_line(e)}"
    return None if right else "a test kernel gave wrong numbers"


def _native_formats(name: str) -> frozenset[str]:
    from tinygrad import dtypes
    from tinygrad.device import Device

    supported = Device[name].renderer.supported_dtypes()
    return frozenset(n for n in DTYPE_NAMES if getattr(dtypes, n) in supported)


def _best_dtype(name: str, native: frozenset[str]) -> str:
    """float32 on a CPU, which has no faster unit for half; elsewhere bfloat16, the type the model
    was trained in. float16 never by itself: activations of a bfloat16 model can pass its 65,504."""
    return "bfloat16" if _family(name) != "CPU" and "bfloat16" in native else "float32"


def _be_patient(name: str) -> None:
    from tinygrad.device import Device

    device: Any = Device[name]
    device.wait_timeout_ms = _CPU_PATIENCE_MS


def _is_software(name: str) -> bool:
    return _family(name) == "CL" and any(word in _describe(name).lower() for word in _SOFTWARE_CL)


def _describe(name: str) -> str:
    from tinygrad.device import Device

    device = Device[name]
    if _family(name) == "CPU":
        found = compiler.find_compiler()
        return found.version if found else ""
    what = getattr(device, "device_name", None) or getattr(device, "arch", None)
    return str(what or device.renderer.target.arch or type(device.renderer).__name__)


def _family(name: str) -> str:
    return name.partition(":")[0]


def _one_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
