"""Which device to compute on, in which types, and why; the only file that knows device names.

tinygrad brings the devices. A device counts as working when it could be opened and one kernel gave
the right numbers on it. Touches tinygrad's internals: `Device`, `ALL_DEVICES`, `DEV`, a renderer's
`supported_dtypes`, an allocator's `free_cache`, and the CPU device's `wait_timeout_ms`.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_tg import compiler
from qwen3_tg.errors import DeviceError, UsageError, check_count

DTYPE_NAMES = ("float32", "float16", "bfloat16")
# New positions a prefill step computes. Where it is short, prompts waste little on padding; where
# it is long, each weight that is read serves more positions, which a GPU needs.
_PREFILL_CHUNK = {"CPU": 32}
_PREFILL_CHUNK_ELSEWHERE = 256
_PREFILL_CHUNK_FAST = 512  # of the CPU's own kernels, which compute nothing for padding
# How a CPU computes: "fast" and "exact" by its own kernels (backends/qwen3_tg_cpu), "exact" without
# rounding activations to 16 bits, "generic" by tinygrad's lowering, as every other device does.
KERNELS = ("fast", "exact", "generic")
# One step of a big model on a CPU takes longer than the 30 s after which tinygrad sees a hang.
_CPU_PATIENCE_MS = 3_600_000.0
_MEMINFO = Path("/proc/meminfo")
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SOFTWARE_CL = ("pocl", "llvmpipe", "cpu")  # OpenCL drivers that are the CPU, only slower
_WITHOUT_MEMORY_PLANNER = ("CL", "WEBGPU")  # tinygrad's schedule/memory.py: they have no views
_SYS = Path("/sys")
# Of what Linux shows as hardware: files of the driver, PCI's number of the maker, and USB's.
_HARDWARE: dict[str, tuple[tuple[str, ...], str, str]] = {
    "AMD": (("/dev/kfd",), "0x1002", "add1"),
    "NV": (("/dev/nvidiactl",), "0x10de", ""),
    "QCOM": (("/dev/kgsl-3d0",), "", ""),
}
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
    `prefill_chunk` in positions, `kernels` one of KERNELS, `threads` those that compute, where that
    is ours to say."""

    device: str
    dtype: str
    kv_dtype: str
    native: frozenset[str]
    prefill_chunk: int
    reason: str
    kernels: str = "generic"
    threads: int | None = None


@dataclass(frozen=True)
class DeviceReport:
    """One device for `qwen3 devices`: `problem` is None where it works."""

    name: str
    what: str
    native: frozenset[str]
    problem: str | None


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
    for what, asked in (("dtype", dtype), ("kv_dtype", kv_dtype)):
        if asked is not None and asked not in DTYPE_NAMES:
            raise UsageError(f"{what} must be one of {', '.join(DTYPE_NAMES)}, found {asked!r}")
    if kernels is not None and kernels not in KERNELS:
        raise UsageError(f"kernels must be one of {', '.join(KERNELS)}, found {kernels!r}")
    check_count("threads", threads, least=1)
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
    kernels = _choose_kernels(name, dtype, kernels, threads)
    dtype = dtype or _best_dtype(name, native)
    fast = kernels != "generic"
    return Policy(
        device=name,
        dtype=dtype,
        kv_dtype=kv_dtype or ("float16" if kernels == "fast" else dtype),
        native=native,
        prefill_chunk=_PREFILL_CHUNK_FAST
        if fast
        else _PREFILL_CHUNK.get(_family(name), _PREFILL_CHUNK_ELSEWHERE),
        reason=reason,
        kernels=kernels,
        threads=_cpu_kernels(threads, exact=False).threads if fast else None,
    )


def own_kernels(policy: Policy) -> Any:
    """The kernels that a policy computes with; None for tinygrad's lowering."""
    if policy.kernels == "generic":
        return None
    return _cpu_kernels(policy.threads, exact=policy.kernels == "exact")


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


def imagined(memory_bytes: int | None = None, kv_dtype: str | None = None) -> Policy:
    """The policy of a GPU that is not there, with so much memory."""
    return Policy(
        device="a GPU" if memory_bytes is None else f"a GPU with {_gib(memory_bytes)}",
        dtype="bfloat16",
        kv_dtype=kv_dtype or "bfloat16",
        native=frozenset(DTYPE_NAMES),
        prefill_chunk=_PREFILL_CHUNK_ELSEWHERE,
        reason="imagined",
    )


def working_policies(kv_dtype: str | None = None) -> list[Policy]:
    """That of every device that works here, the one that would be chosen first. A device without
    this type for keys and values is left out."""
    found = [
        choose(report.name, kv_dtype=kv_dtype)
        for report in reports()
        if not report.problem and kv_dtype in (None, *report.native)
    ]
    try:
        first = choose(kv_dtype=kv_dtype).device
    except DeviceError:
        return found
    return sorted(found, key=lambda policy: policy.device != first)


def shares_scratch(name: str) -> bool:
    """Whether tinygrad lets the values of a graph take each other's place in memory."""
    return _family(name) not in _WITHOUT_MEMORY_PLANNER


def free_memory(name: str) -> int | None:
    """Bytes that a working device still has for us; None where that is not known."""
    ask = _FREE_MEMORY.get(_family(name))
    try:
        return ask(name) if ask else None
    except Exception:  # drivers fail in every way there is, and to know it is not needed to run
        return None


def check_memory(policy: Policy, bytes_by_part: Mapping[str, int]) -> None:
    """Refuse a model that the free memory cannot hold, where that is known. Without this the system
    would kill the process in the middle. Raises DeviceError."""
    needed, free = sum(bytes_by_part.values()), free_memory(policy.device)
    if free is not None and needed > free:
        parts = ", ".join(f"{part} {_gib(nbytes)}" for part, nbytes in bytes_by_part.items())
        raise DeviceError(
            f"the model takes {_gib(needed)} ({parts}) and {_gib(free)} of memory are free on "
            f"{policy.device}: take a smaller model or a larger machine (qwen3 plan says what fits)"
        )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _free_cpu(name: str) -> int | None:
    """Under Linux, with the limit of a container."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", where there is no limit
        available.append(int(_CONTAINER_LIMIT.read_text()))
    return min(available, default=None)


def _free_cuda(name: str) -> int:
    from tinygrad.device import Device
    from tinygrad.runtime.autogen import cuda

    device: Any = Device[name]
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cuCtxSetCurrent(device.context) or cuda.cuMemGetInfo_v2(free, total):
        raise OSError("cuMemGetInfo failed")
    return free.value


def _free_nv(name: str) -> int:
    """By the library of NVIDIA's own tool, nvidia-smi."""

    class Memory(ctypes.Structure):
        _fields_ = [(field, ctypes.c_ulonglong) for field in ("total", "free", "used")]

    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    handle, memory = ctypes.c_void_p(), Memory()
    number = int(name.partition(":")[2] or 0)
    if (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    ):
        raise OSError("NVML failed")
    return int(memory.free)


def _free_amd(name: str) -> int:
    from tinygrad.device import Device

    device: Any = Device[name]
    folder = Path(device.iface.dev_sysfs_path)
    total, used = (
        int((folder / f"mem_info_vram_{what}").read_text()) for what in ("total", "used")
    )
    return total - used


def _free_metal(name: str) -> int:
    from tinygrad.device import Device

    device: Any = Device[name]
    system = device.sysdevice
    return int(system.recommendedMaxWorkingSetSize()) - int(system.currentAllocatedSize())


_FREE_MEMORY: dict[str, Callable[[str], int | None]] = {
    "CPU": _free_cpu,
    "CUDA": _free_cuda,
    "NV": _free_nv,
    "AMD": _free_amd,
    "METAL": _free_metal,
}


def free_unused(name: str) -> None:
    """Give freed buffers back to the system: tinygrad keeps them for others of the same size."""
    from tinygrad.device import Device

    device: Any = Device[name]
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
    if not _is_plugged_in(family):
        return _MISSING[family]
    if family == "CPU" and compiler.find_compiler() is None:
        return f"no C compiler that tinygrad can use; {compiler.HOW_TO_GET}"
    try:
        Device[name]
    except Exception as e:  # drivers fail in every way there is
        return _MISSING.get(family) or _one_line(e)
    try:
        # no constant, for which tinygrad would first look for its default device, in all of them
        one, other = (Tensor(values, device=name) for values in ([1.0, 2.0], [3.0, 0.5]))
        right = (one * other).tolist() == [3.0, 1.0]
    except Exception as e:
        return f"a test kernel failed: {_one_line(e)}"
    return None if right else "a test kernel gave wrong numbers"


def _is_plugged_in(family: str) -> bool:
    """False where Linux knows of no such hardware: to ask tinygrad takes tenths of a second for
    each kind, which it spends on importing its drivers."""
    if sys.platform != "linux" or family not in _HARDWARE:
        return True
    files, vendor, usb = _HARDWARE[family]
    if any(Path(file).exists() for file in files):
        return True
    found = [*_read_all("bus/pci/devices/*/vendor"), *_read_all("bus/usb/devices/*/idVendor")]
    return not _SYS.exists() or vendor in found or (usb in found if usb else False)


def _read_all(pattern: str) -> list[str]:
    texts = []
    for path in _SYS.glob(pattern):
        with contextlib.suppress(OSError):
            texts.append(path.read_text().strip())
    return texts


@contextlib.contextmanager
def as_default(name: str) -> Iterator[None]:
    """tinygrad's default device, where the user set none with DEV: or else tinygrad looks for one,
    in all there are, whenever something has no device of its own."""
    from tinygrad import helpers

    if helpers.DEV.device:
        yield
        return
    context: Any = helpers.Context
    with context(DEV=name):
        yield


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
