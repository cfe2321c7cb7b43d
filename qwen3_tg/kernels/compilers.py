"""Compile what was rendered for a target, without the target: by its own compiler, or a check of
its text by clang. Each says what it is, so that nothing is called compiled that was only checked.

Touches tinygrad's internals: its compilers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qwen3_tg import compiler
from qwen3_tg.device.names import one_line
from qwen3_tg.kernels.targets import Target

_METAL_HEADER = Path(__file__).with_name("metal_stdlib.h")
_OPENCL_HEADER = Path(__file__).with_name("opencl_base.h")
_METAL_VECTOR = re.compile(r"\b((?:float|half|bfloat|u?(?:int|short|char|long))[24])\(")


@dataclass(frozen=True)
class TargetCompiler:
    """`compiles` is False for a check of syntax and types alone. `run` raises CompileProblem."""

    name: str
    run: Callable[[str], None]
    compiles: bool = True


class CompileProblem(Exception):
    """What a compiler said."""


def compiler_for(target: Target) -> TargetCompiler | str:
    """The compiler that is here, or what is missing, in one line."""
    make = _MAKERS.get(target.renderer)
    if make is None:
        return f"no compiler for {target.language} of this kind outside of the device's driver"
    try:
        return make(target.arch)
    except Exception as e:  # libraries are missing in every way there is
        how = _HOW_TO_GET.get(target.renderer)
        return one_line(e) + (f" ({how})" if how else "")


def _nvrtc(arch: str) -> TargetCompiler:
    import ctypes

    from tinygrad.runtime.autogen import nvrtc
    from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler

    made = NVRTCCompiler(arch, ptx=False, cache_key="nv")
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(major, minor)
    return TargetCompiler(f"NVRTC {major.value}.{minor.value}", _by(made.compile))


def _nvjitlink(arch: str) -> TargetCompiler:
    import ctypes

    from tinygrad.runtime.autogen import nvjitlink
    from tinygrad.runtime.support.compiler_cuda import NVPTXCompiler

    made = NVPTXCompiler(arch)
    major, minor = ctypes.c_uint(), ctypes.c_uint()
    nvjitlink.nvJitLinkVersion(major, minor)
    return TargetCompiler(f"nvJitLink {major.value}.{minor.value}", _by(made.compile))


def _llvm(arch: str) -> TargetCompiler:
    import ctypes

    from tinygrad.runtime.autogen import llvm
    from tinygrad.runtime.support.compiler_llvm import AMDLLVMCompiler

    made = AMDLLVMCompiler(arch)
    parts = [ctypes.c_uint() for _ in range(3)]
    llvm.LLVMGetVersion(*parts)
    return TargetCompiler(f"LLVM {'.'.join(str(p.value) for p in parts)}", _by(made.compile))


def _hip(arch: str) -> TargetCompiler:
    """AMD's comgr, or the clang it is made of, to the GPU's assembly."""
    from tinygrad.runtime.support.compiler_amd import HIPCompiler

    try:
        return TargetCompiler("AMD's comgr", _by(HIPCompiler(arch).compile))
    except AssertionError:  # tinygrad's, where the library is not here
        found = _clang()
    flags = ["-x", "hip", "--cuda-device-only", f"--offload-arch={arch}", "-nogpulib", "-nogpuinc"]
    flags += ["-std=c++14", "-O3", "-mcumode", "-S"]
    return TargetCompiler(found.version, lambda text: _run_clang(found, flags, text))


def _opencl(arch: str) -> TargetCompiler:
    """clang to LLVM's code for SPIR-V, as OpenCL drivers that are made of it begin."""
    found = _clang()
    half = f"-cl-ext={'+' if 'cl_khr_fp16' in arch else '-'}cl_khr_fp16"
    flags = [
        "-x",
        "cl",
        "-cl-std=CL1.2",
        "--target=spir64",
        "-cl-no-stdinc",
        "-include",
        str(_OPENCL_HEADER),
    ]
    flags += ["-Xclang", half, "-emit-llvm", "-c", "-O1"]
    return TargetCompiler(found.version, lambda text: _run_clang(found, flags, text))


def _adreno(arch: str) -> TargetCompiler:
    """Adreno's own compiler is in its driver alone: what clang says of the text is a check."""
    found = _opencl(arch)
    return replace(found, name=f"{found.name}, syntax and types", compiles=False)


def _metal(arch: str) -> TargetCompiler:
    if sys.platform == "darwin":
        from tinygrad.runtime.ops_metal import MetalCompiler

        return TargetCompiler("Apple's Metal compiler", _by(MetalCompiler().compile))
    found = _clang()
    header = _METAL_HEADER.read_text(encoding="utf-8")

    def check(text: str) -> None:
        lines = text.replace("#include <metal_stdlib>", "").replace("using namespace metal;", "")
        lines = _METAL_VECTOR.sub(r"make_\1(", lines)
        _run_clang(found, ["-x", "c++", "-std=c++17", "-fsyntax-only"], header + lines)

    return TargetCompiler(f"{found.version}, syntax and types", check, compiles=False)


_PIP = f"{sys.executable} -m pip install 'qwen3-tg[targets]'"
_HOW_TO_GET = {
    "CUDARenderer": _PIP,
    "PTXRenderer": _PIP,
    "AMDLLVMRenderer": "install LLVM 18 or newer, Debian: sudo apt install libllvm19",
}
_MAKERS: dict[str, Callable[[str], TargetCompiler]] = {
    "CUDARenderer": _nvrtc,
    "PTXRenderer": _nvjitlink,
    "AMDLLVMRenderer": _llvm,
    "HIPRenderer": _hip,
    "OpenCLRenderer": _opencl,
    "QCOMCLRenderer": _adreno,
    "MetalRenderer": _metal,
}


def _by(compile: Callable[[str], bytes]) -> Callable[[str], None]:
    def run(text: str) -> None:
        try:
            made = compile(text)
        except Exception as e:
            raise CompileProblem(str(e)) from e
        if not made:
            raise CompileProblem("the compiler gave nothing")

    return run


@cache
def _clang() -> compiler.Compiler:
    found = compiler.find_compiler()
    if found is None:
        raise FileNotFoundError(f"no clang: {compiler.HOW_TO_GET}")
    return found


def _run_clang(found: compiler.Compiler, flags: list[str], text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = [] if "-fsyntax-only" in flags else ["-o", str(Path(folder, "out"))]
        command = [str(found.executable), *flags, "-Wno-everything", "-", *out]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileProblem(done.stderr.strip())
