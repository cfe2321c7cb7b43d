"""What a device that does not work lacks, and the command that gets it on this system.

A device needs hardware, the system's driver for it and the right to use that, a library, and a
compiler, in this order: what is named is the first of these that is missing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qwen3_tg import compiler
from qwen3_tg.device.names import family, one_line

_SYS, _OS_RELEASE, _WSL = Path("/sys"), Path("/etc/os-release"), Path("/dev/dxg")
AMD, NVIDIA, INTEL = "0x1002", "0x10de", "0x8086"  # PCI's numbers of the makers
_DISPLAY_CLASSES = ("0x03", "0x12")  # PCI's of displays and of processing accelerators
# Of what Linux shows as hardware: files of the driver, PCI's number of the maker, and USB's.
_HARDWARE: dict[str, tuple[tuple[str, ...], str, str]] = {
    "AMD": (("/dev/kfd",), AMD, "add1"),
    "NV": (("/dev/nvidiactl",), NVIDIA, ""),
    "QCOM": (("/dev/kgsl-3d0",), "", ""),
}
# What gets a thing, by system; "" where no command is known.
_NVIDIA_DRIVER = {
    "debian": "sudo apt install nvidia-driver (Ubuntu: sudo ubuntu-drivers install)",
    "fedora": "sudo dnf install akmod-nvidia xorg-x11-drv-nvidia-cuda (from RPM Fusion)",
    "arch": "sudo pacman -S nvidia nvidia-utils",
    "windows": "winget install Nvidia.GeForceExperience (or the driver from nvidia.com)",
}
_AMD_DRIVER = {
    "debian": "sudo apt install firmware-amd-graphics && sudo modprobe amdgpu",
    "fedora": "sudo dnf install amd-gpu-firmware && sudo modprobe amdgpu",
    "arch": "sudo pacman -S linux-firmware-amdgpu && sudo modprobe amdgpu",
}
_AMD_COMPILER = {
    "debian": "sudo apt install libllvm19",
    "fedora": "sudo dnf install llvm-libs",
    "arch": "sudo pacman -S llvm-libs",
    "macos": "brew install llvm@20",
}
_CLANG = {
    "macos": "xcode-select --install",
    "debian": "sudo apt install clang-19",
    "fedora": "sudo dnf install clang",
    "arch": "sudo pacman -S clang",
    "windows": "winget install LLVM.LLVM",
}
_NO_CLANG = (
    "no C compiler that tinygrad can use, such as clang 16 or newer "
    "(pip install 'qwen3-tg[compiler]', or pip install ziglang, brings one everywhere)"
)
_CL_LOADER = {
    "debian": "sudo apt install ocl-icd-libopencl1",
    "fedora": "sudo dnf install ocl-icd",
    "arch": "sudo pacman -S ocl-icd",
    "windows": "reinstall the GPU's driver, which brings OpenCL.dll",
}
_CL_DRIVER = {
    INTEL: {
        "debian": "sudo apt install intel-opencl-icd",
        "fedora": "sudo dnf install intel-compute-runtime",
        "arch": "sudo pacman -S intel-compute-runtime",
    },
    AMD: {
        "debian": "sudo apt install mesa-opencl-icd",
        "fedora": "sudo dnf install mesa-libOpenCL",
        "arch": "sudo pacman -S opencl-mesa",
    },
    NVIDIA: _NVIDIA_DRIVER,
}
_VULKAN = {
    "debian": "sudo apt install mesa-vulkan-drivers libvulkan1",
    "fedora": "sudo dnf install mesa-vulkan-drivers vulkan-loader",
    "arch": "sudo pacman -S vulkan-icd-loader vulkan-swrast",
}
_DAWN = dict.fromkeys(("macos", "debian", "fedora", "arch", "windows"), "dawn-python==0.3.0")
_NVRTC = dict.fromkeys(
    ("debian", "fedora", "arch", "windows"), "nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
)


@dataclass(frozen=True)
class Missing:
    """What is missing, in one line, and the command that gets it here; "" where there is none:
    hardware cannot be installed."""

    what: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.what}; get it with: {self.command}" if self.command else self.what


def before_opening(name: str) -> Missing | None:
    """What can be told without tinygrad: to ask it takes tenths of a second for each device, which
    it spends on importing its drivers."""
    kind = family(name)
    if kind == "METAL" and sys.platform != "darwin":
        return Missing("Metal is part of macOS")
    if kind == "CPU" and compiler.find_compiler() is None:
        return _get(_NO_CLANG, _CLANG)
    if sys.platform != "linux" or kind not in _HARDWARE:
        return None
    files, vendor, usb = _HARDWARE[kind]
    if any(Path(file).exists() for file in files):
        refused = [file for file in files if Path(file).exists() and not _may_use(file)]
        if not refused:
            return None
        return Missing(
            f"no permission for {refused[0]}",
            'sudo usermod -aG render,video "$USER", then log in again',
        )
    if not _SYS.exists() or (usb and usb in _read_all("bus/usb/devices/*/idVendor")):
        return None
    if vendor not in gpu_makers():
        what = {"AMD": "AMD GPU", "NV": "NVIDIA GPU", "QCOM": "Adreno GPU"}[kind]
        return Missing(f"no {what} in this machine")
    if kind == "AMD":
        return None  # tinygrad can drive it over PCI without a kernel driver
    return _get("an NVIDIA GPU, but not its kernel driver (/dev/nvidiactl)", _NVIDIA_DRIVER)


def after_failing(name: str, error: BaseException) -> Missing:
    """What the error of opening a device, or of its first kernel, means."""
    kind, text = family(name), _all_text(error)
    makers = gpu_makers()
    if kind == "CUDA":
        if "nvrtc" in text.lower():
            return _get("the compiler for CUDA (NVRTC)", _NVRTC, pip=True)
        if _is_linux_without(NVIDIA) and not _WSL.exists():
            return Missing("no NVIDIA GPU in this machine")
        return _get("the NVIDIA driver's library (libcuda)", _NVIDIA_DRIVER)
    if kind == "NV" and "nvrtc" in text.lower():
        return _get("the compiler for CUDA (NVRTC)", _NVRTC, pip=True)
    if kind == "AMD":
        if "comgr" in text or "llvm" in text.lower():
            return _get("a compiler for AMD GPUs (LLVM 18 or newer)", _AMD_COMPILER)
        if sys.platform == "linux" and not Path("/dev/kfd").exists():
            return _get(f"the amdgpu kernel driver (/dev/kfd): {one_line(error)}", _AMD_DRIVER)
    if kind == "CL":
        if _names_no_library(text, "opencl"):
            return _get("the OpenCL loader (libOpenCL)", _CL_LOADER)
        maker = next((maker for maker in (INTEL, AMD, NVIDIA) if maker in makers), "")
        if not maker:
            return Missing("no OpenCL driver, and no GPU found that there is one for")
        return _get("the GPU's OpenCL driver", _CL_DRIVER[maker])
    if kind == "WEBGPU":
        if _names_no_library(text, "webgpu"):
            return _get("the WebGPU library Dawn", _DAWN, pip=True)
        return _get(f"a Vulkan driver for WebGPU ({one_line(error)})", _VULKAN)
    if kind == "QCOM":
        return Missing("no Adreno GPU (/dev/kgsl-3d0) in this machine")
    if kind == "DSP":
        return Missing("no Hexagon DSP in this machine")
    return Missing(one_line(error))


def gpu_makers() -> frozenset[str]:
    """PCI numbers of those whose GPUs Linux sees; empty elsewhere."""
    found = set()
    for folder in _SYS.glob("bus/pci/devices/*"):
        with contextlib.suppress(OSError):
            if (folder / "class").read_text().startswith(_DISPLAY_CLASSES):
                found.add((folder / "vendor").read_text().strip())
    return frozenset(found)


def _is_linux_without(maker: str) -> bool:
    return sys.platform == "linux" and _SYS.exists() and maker not in gpu_makers()


def _get(what: str, commands: dict[str, str], pip: bool = False) -> Missing:
    command = commands.get(system(), "")
    return Missing(what, f"{sys.executable} -m pip install {command}" if pip else command)


@cache
def system() -> str:
    """macos, windows, debian, fedora or arch, by what it descends from; else platform's name."""
    if sys.platform == "darwin":
        return "macos"
    if sys.platform == "win32":
        return "windows"
    with contextlib.suppress(OSError):
        lines = _OS_RELEASE.read_text(encoding="utf-8").splitlines()
        pairs = (line.partition("=") for line in lines)
        values = {key: value.strip("'\"").split() for key, _, value in pairs}
        for word in [*values.get("ID", []), *values.get("ID_LIKE", [])]:
            for known, names in _DESCENDANTS.items():
                if word in names:
                    return known
    return platform.system().lower()


_DESCENDANTS = {
    "debian": ("debian", "ubuntu"),
    "fedora": ("fedora", "rhel", "centos"),
    "arch": ("arch", "archlinux"),
}


def _may_use(file: str) -> bool:
    return os.access(file, os.R_OK | os.W_OK)


def _read_all(pattern: str) -> list[str]:
    texts = []
    for path in _SYS.glob(pattern):
        with contextlib.suppress(OSError):
            texts.append(path.read_text().strip())
    return texts


def _all_text(error: BaseException) -> str:
    """Of an error and of those it was made of."""
    parts = [str(error)]
    if isinstance(error, BaseExceptionGroup):
        parts += map(_all_text, error.exceptions)
    if error.__cause__ or error.__context__:
        parts.append(_all_text(error.__cause__ or error.__context__))  # type: ignore[arg-type]
    return "\n".join(parts)


def _names_no_library(text: str, library: str) -> bool:
    return f"failed to load library {library}:" in text
