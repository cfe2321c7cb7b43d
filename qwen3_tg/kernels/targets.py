"""Targets that need not be here: what tinygrad makes for them can be read, and often compiled.

A renderer turns a kernel into the language of a target. tinygrad makes one together with the
target's compiler, which is absent on most machines: here it is made without, and what it rendered
is compiled apart (compilers.py), where there is something to compile it with.

Touches tinygrad's internals: renderers, `Target`, and the modules of their compilers.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qwen3_tg import compiler
from qwen3_tg.device import Policy, formats_of
from qwen3_tg.errors import UsageError

_COMPILERS = (  # modules that renderers take their compilers from
    "tinygrad.runtime.support.compiler_amd",
    "tinygrad.runtime.support.compiler_cpu",
    "tinygrad.runtime.support.compiler_cuda",
    "tinygrad.runtime.support.compiler_llvm",
    "tinygrad.runtime.support.compiler_qcom",
    "tinygrad.runtime.ops_metal",
)
_CHUNK = 256  # positions of a prompt at once, as on a GPU


@dataclass(frozen=True)
class Target:
    """`name` is what the user types, `device` tinygrad's name, `renderer` a class of
    tinygrad.renderer in `module`, `arch` as tinygrad has it, `language` of what it renders,
    `hardware` in words."""

    name: str
    device: str
    module: str
    renderer: str
    arch: str
    language: str
    hardware: str


TARGETS = {
    target.name: target
    for target in (
        Target("CUDA:sm_80", "NV", "cstyle", "CUDARenderer", "sm_80", "CUDA C", "A100"),
        Target("CUDA:sm_90", "NV", "cstyle", "CUDARenderer", "sm_90", "CUDA C", "H100, H200"),
        Target("PTX:sm_80", "NV", "ptx", "PTXRenderer", "sm_80", "PTX", "A100"),
        Target("PTX:sm_90", "NV", "ptx", "PTXRenderer", "sm_90", "PTX", "H100, H200"),
        Target("AMD:gfx1100", "AMD", "llvmir", "AMDLLVMRenderer", "gfx1100", "LLVM", "RX 7900"),
        Target("AMD:gfx1201", "AMD", "llvmir", "AMDLLVMRenderer", "gfx1201", "LLVM", "RX 9070"),
        Target("AMD:gfx942", "AMD", "llvmir", "AMDLLVMRenderer", "gfx942", "LLVM", "MI300X"),
        Target("HIP:gfx1100", "AMD", "cstyle", "HIPRenderer", "gfx1100", "HIP", "RX 7900"),
        Target("HIP:gfx1201", "AMD", "cstyle", "HIPRenderer", "gfx1201", "HIP", "RX 9070"),
        Target("HIP:gfx942", "AMD", "cstyle", "HIPRenderer", "gfx942", "HIP", "MI300X"),
        Target("OPENCL", "CL", "cstyle", "OpenCLRenderer", "", "OpenCL C", "without fp16"),
        Target(
            "OPENCL:fp16", "CL", "cstyle", "OpenCLRenderer", "cl_khr_fp16", "OpenCL C", "with fp16"
        ),
        Target("METAL:Apple7", "METAL", "cstyle", "MetalRenderer", "Apple7", "Metal", "M1"),
        Target("METAL:Apple9", "METAL", "cstyle", "MetalRenderer", "Apple9", "Metal", "M3, M4"),
        Target("WGSL", "WEBGPU", "wgsl", "WGSLRenderer", "", "WGSL", "WebGPU without f16"),
        Target("WGSL:f16", "WEBGPU", "wgsl", "WGSLRenderer", "shader-f16", "WGSL", "with f16"),
        Target("QCOM", "QCOM", "cstyle", "QCOMCLRenderer", "a630", "OpenCL C", "Adreno 630"),
    )
}


def find_target(typed: str) -> Target:
    """By its name in any case. Raises UsageError."""
    for name, target in TARGETS.items():
        if name.lower() == typed.strip().lower():
            return target
    raise UsageError(f"unknown target {typed!r}; known: {', '.join(TARGETS)}")


def renderer_of(target: Target) -> Any:
    """tinygrad's renderer for a target, whose compiler gives the text back."""
    compiler.prepare_environment()
    from tinygrad.helpers import Target as TinygradTarget

    module = import_module(f"tinygrad.renderer.{target.module}")
    with _text_for_code():
        made = getattr(module, target.renderer)(TinygradTarget(target.device, arch=target.arch))
    made.compiler = _text_only()
    return made


def policy_for(target: Target, dtype: str | None = None, kv_dtype: str | None = None) -> Policy:
    """How the model would run there. Raises UsageError for a type that the target lacks."""
    native = formats_of(renderer_of(target), target.device)
    for asked in (dtype, kv_dtype):
        if asked not in (None, "int8", *native):
            raise UsageError(
                f"{target.name} does not compute in {asked}; it does {', '.join(sorted(native))}"
            )
    dtype = dtype or ("bfloat16" if "bfloat16" in native else "float32")
    return Policy("NULL", dtype, kv_dtype or dtype, native, _CHUNK, f"lowered for {target.name}")


def _text_only() -> Any:
    from tinygrad.device import Compiler

    return Compiler()  # tinygrad's own default, which compiles nothing


@contextlib.contextmanager
def _text_for_code() -> Iterator[None]:
    """While this lasts, every compiler of tinygrad's is one that gives the text back."""

    class Module(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return lambda *of, **options: _text_only()

    before = {name: sys.modules.get(name) for name in _COMPILERS}
    sys.modules.update((name, Module(name)) for name in _COMPILERS)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
