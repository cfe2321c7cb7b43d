"""The C program: compiled when it can be, and done without, with one warning, when it cannot."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import FLOAT32_TOLERANCE, assert_close
from qwen3_tg_cpu import library
from tinygrad.helpers import GlobalCounters
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.runtime.support.compiler_cpu import ClangCompiler
from tinygrad.runtime.support.elf import jit_loader

import qwen3_tg
from qwen3_tg.llm import LLM

# Measured: 12 to 16 on two cores, and on one.
LEAST_SPEEDUP = 3.0


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


BREAK = """
import numpy as np, qwen3_tg, qwen3_tg_numpy
from pathlib import Path
from qwen3_tg_cpu import library
library.source = lambda: "this is no C;"
"""


def test_a_failing_compile_falls_back_to_the_lowering_with_one_warning() -> None:
    done = run(
        BREAK
        + """
for _ in range(2):
    llm = qwen3_tg.load("tiny", device="CPU")
    assert llm.policy.kernels == "generic" and llm.policy.threads is None
    assert llm.policy.prefill_chunk == 32 and llm.policy.kv_dtype == "float32"
right = qwen3_tg_numpy.load(Path(qwen3_tg.__file__).parent / "tiny").logits([1, 2, 3])
print(abs(llm.logits([1, 2, 3]) - right).max())
"""
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < FLOAT32_TOLERANCE
    warnings = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(warnings) == 1
    assert "computing without the fast CPU kernels: Command" in warnings[0]


def test_the_command_says_it_in_a_note() -> None:
    ask = 'from qwen3_tg.cli import main; main(["--temperature", "0", "What is 2 + 3?"])'
    done = run(BREAK + ask)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].startswith("note: computing without the fast CPU kernels: Command")
    assert done.stdout.endswith("5\n")


def test_fast_kernels_that_were_asked_for_and_fail_are_an_error() -> None:
    done = run(
        BREAK
        + """
try:
    qwen3_tg.load("tiny", device="CPU", kernels="exact")
except qwen3_tg.DeviceError as e:
    print(e)
"""
    )
    assert "do not work here" in done.stdout


def test_generic_never_compiles_the_program() -> None:
    done = run(BREAK + 'print(qwen3_tg.load("tiny", device="CPU", kernels="generic").logits([1]))')
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("ids", "cores"), [([(0, 0), (0, 0), (0, 1), (0, 1)], 2), ([(0, 0), (1, 0)], 2), ([(0, 3)], 1)]
)
def test_two_threads_of_a_core_count_once(
    ids: list[tuple[int, int]], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu, (package, core) in enumerate(ids):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    monkeypatch.setattr(library, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(library.os, "sched_getaffinity", lambda pid: set(range(len(ids))))
    assert library.physical_cores() == cores


@pytest.mark.parametrize(
    ("arch", "cpu"),
    [
        ("arm64", "apple-m1"),
        ("arm64", "neoverse-n1"),
        ("x86_64", "x86-64-v3"),
        ("x86_64", "znver4"),
    ],
)
def test_other_processors_code_can_be_loaded_by_tinygrad(arch: str, cpu: str) -> None:
    """Compiled and linked for them, not run."""
    libs = [CPUProgram.libm, CPUProgram.rt_lib]
    # Loaded near libc, on x86. Not malloc from CDLL(None): some Pythons have an entry of their own.
    near = ctypes.cast(CPUProgram.libm.malloc, ctypes.c_void_p).value
    program = ClangCompiler([arch, cpu]).compile(library.source())
    code = jit_loader(program, base=near if arch == "x86_64" else 0, link_libs=libs)
    assert len(code) > 50_000


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("", 8)]
)
def test_a_container_has_no_more_cores_than_its_share(
    limit: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(library, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(library, "_TOPOLOGY", tmp_path)  # unknown
    monkeypatch.setattr(library.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert library.physical_cores() == cores


@pytest.fixture(scope="module")
def both() -> Iterator[dict[str, LLM]]:
    """On one thread: several wait for each other while another process has one of the cores."""
    yield {
        "fast": qwen3_tg.load("tiny", kernels="fast", threads=1),
        "generic": qwen3_tg.load("tiny", kernels="generic"),
    }
    library.library().use(library.physical_cores())


def test_the_fast_path_is_taken_by_itself_and_a_step_is_one_kernel(both: dict[str, LLM]) -> None:
    assert qwen3_tg.load("tiny").policy.kernels == "fast"
    counts = {}
    for name, llm in both.items():
        generation = llm.generate_ids([3, 4, 5], 9, stop_ids=())
        next(generation), next(generation)
        before = GlobalCounters.kernel_count
        next(generation)
        counts[name] = GlobalCounters.kernel_count - before
    assert counts["fast"] == 1
    assert counts["generic"] > 20


@pytest.mark.parametrize("prompt", [1, 200], ids=["decode", "prefill"])
def test_the_fast_path_is_faster(both: dict[str, LLM], prompt: int) -> None:
    """A ratio of times taken in turn, with much room: it fails when the lowering is used."""
    random, ratios = np.random.default_rng(0), []
    for _ in range(7):
        ids = random.integers(0, 700, prompt).tolist()
        seconds = {}
        for name, llm in both.items():
            generation = llm.generate_ids(ids, 12, stop_ids=())
            if prompt == 1:
                next(generation)
            began = time.perf_counter()
            next(generation)
            if prompt == 1:
                list(generation)
            seconds[name] = time.perf_counter() - began
        ratios.append(seconds["generic"] / seconds["fast"])
    print(ratios)
    assert statistics.median(ratios[1:]) > LEAST_SPEEDUP


def test_both_compute_the_same(both: dict[str, LLM]) -> None:
    ids = list(range(40))
    exact = qwen3_tg.load("tiny", kernels="exact").logits(ids)
    assert_close(exact, both["generic"].logits(ids), FLOAT32_TOLERANCE)
