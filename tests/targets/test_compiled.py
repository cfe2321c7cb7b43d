"""A layer in real shapes, rendered for GPUs that are not here, and all of it compiled: a chunk of a
prompt and one position, in bfloat16 (where the target has it); for one of each kind also in 4 bits
and with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from qwen3_tg.kernels.compilers import CompileProblem, TargetCompiler, compiler_for
from qwen3_tg.kernels.lower import lowered
from qwen3_tg.kernels.targets import TARGETS, policy_for, renderer_of
from qwen3_tg.plan import find_released, stored_as

pytestmark = pytest.mark.targets
# Of these the whole is compiled; of Metal and Adreno, syntax and types are checked.
COMPILED = ["CUDA:sm_80", "CUDA:sm_90", "PTX:sm_80", "PTX:sm_90", "AMD:gfx1100", "AMD:gfx942"]
COMPILED += ["AMD:gfx1201", "HIP:gfx1100", "HIP:gfx1201", "HIP:gfx942", "OPENCL", "OPENCL:fp16"]
CHECKED = ["METAL:Apple7", "METAL:Apple9", "QCOM"]
LOWERED = ["WGSL", "WGSL:f16"]


def test_every_target_is_tried() -> None:
    assert sorted([*COMPILED, *CHECKED, *LOWERED]) == sorted(TARGETS)


IN_FOUR_BITS = ["CUDA:sm_90", "PTX:sm_90", "AMD:gfx1100", "OPENCL", "METAL:Apple7"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "bf16") for name in [*COMPILED, *CHECKED]),
        *((name, "q4_k_m") for name in IN_FOUR_BITS),
    ],
)
def test_all_kernels_of_a_layer_compile(
    name: str, form: str, absent: Callable[[str], NoReturn]
) -> None:
    compiler = compiler_for(TARGETS[name])
    if isinstance(compiler, str):
        absent(f"{name}: {compiler}")
    assert compiler.compiles == (name in COMPILED)
    sources = rendered(name, "Qwen3-0.6B", form)
    compile_all(compiler, sources)


@pytest.mark.parametrize("name", ["CUDA:sm_90", "AMD:gfx1100", "METAL:Apple7"])
def test_all_kernels_of_a_mixture_compile(name: str, absent: Callable[[str], NoReturn]) -> None:
    compiler = compiler_for(TARGETS[name])
    if isinstance(compiler, str):
        absent(f"{name}: {compiler}")
    compile_all(compiler, rendered(name, "Qwen3-30B-A3B", "bf16"))


@pytest.mark.parametrize("name", LOWERED)
def test_the_others_are_lowered(name: str) -> None:
    assert len(rendered(name, "Qwen3-0.6B", "bf16")) > 20


def rendered(name: str, model: str, form: str) -> list[str]:
    """The sources, each once."""
    released = find_released(model)
    assert released is not None
    target = TARGETS[name]
    how = 0, policy_for(target), renderer_of(target)
    made = list(lowered(released.config, stored_as(released.config, form), *how))
    assert {kernel.phase for kernel in made} == {"prompt", "decode"}
    assert all(kernel.source for kernel in made)
    return list(dict.fromkeys(kernel.source for kernel in made))


def compile_all(compiler: TargetCompiler, sources: list[str]) -> None:
    problems = []
    for source in sources:
        try:
            compiler.run(source)
        except CompileProblem as e:
            problems.append(f"{e}\n{source}")
    assert not problems, f"{len(problems)} of {len(sources)}: {problems[0][:3000]}"
