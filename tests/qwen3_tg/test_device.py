"""Device choice: what is taken, what is refused, and what the user is told."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import with_cache
from tinygrad import Tensor, dtypes
from tinygrad.helpers import Context

from qwen3_tg import compiler, device
from qwen3_tg.checkpoint import StoredWeight
from qwen3_tg.dequantise import from_float16
from qwen3_tg.device import Missing, found, memory
from qwen3_tg.device.policy import best_dtype
from qwen3_tg.errors import DeviceError, UsageError
from qwen3_tg.linear import to_device


def test_the_cpu_is_found_and_computes_in_float32() -> None:
    policy = device.choose("cpu")
    assert (policy.device, policy.dtype, policy.reason) == ("CPU", "float32", "asked for")
    assert policy.native == {"float32", "float16", "bfloat16"}


def test_dev_is_respected_where_no_device_is_asked_for() -> None:
    assert device.choose().reason == "set by DEV"


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown device 'GPU'; known: METAL, AMD, .*CPU"):
        device.choose("GPU")
    with pytest.raises(UsageError, match="unknown device 'CPU:x'"):
        device.choose("CPU:x")


def test_an_absent_device_says_what_is_missing() -> None:
    absent = "METAL" if sys.platform != "darwin" else "AMD"
    with pytest.raises(DeviceError, match=f"device {absent} does not work: "):
        device.choose(absent)


def test_an_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"dtype must be one of float32, .*found 'int8'"):
        device.choose("CPU", "int8")


def test_a_dtype_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "native_formats", lambda name: frozenset({"float32"}))
    with pytest.raises(DeviceError, match="CPU does not compute in bfloat16"):
        device.choose("CPU", "bfloat16")


def test_a_gpu_with_bfloat16_computes_in_it_and_one_without_in_float32() -> None:
    assert best_dtype("CUDA", frozenset({"float32", "bfloat16"})) == "bfloat16"
    assert best_dtype("METAL", frozenset({"float32", "float16"})) == "float32"


def test_by_itself_the_first_that_works_is_taken_but_no_software_opencl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    working, software = {"CL", "CPU"}, {"CL"}
    monkeypatch.setattr(found, "problem_of", lambda n: None if n in working else Missing("absent"))
    monkeypatch.setattr(found, "is_software", lambda name: name in software)
    with Context(DEV=""):
        assert found.pick(None) == ("CPU", "the first that works")
        software.clear()
        assert found.pick(None) == ("CL", "the first that works")
        working.clear()
        with pytest.raises(DeviceError, match=r"no device works here\. CPU: absent"):
            found.pick(None)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is unknown here")
def test_a_model_larger_than_the_free_memory_is_refused_with_what_takes_how_much() -> None:
    policy = device.choose("CPU")
    device.check_memory(policy.device, {"weights": 10**6})
    text = r"takes 931322.9 GiB \(weights 931322.6 GiB, cache 0.3 GiB\) and [\d.]+ GiB of memory"
    with pytest.raises(DeviceError, match=text):
        device.check_memory(policy.device, {"weights": 10**15, "cache": 3 * 10**8})


def test_the_report_names_every_device_once_and_never_raises() -> None:
    reports = {report.name: report for report in device.reports()}
    assert reports["CPU"].missing is None and reports["CPU"].renderer == "ClangRenderer"
    assert {"METAL", "AMD", "CUDA", "CL", "CPU", "WEBGPU"} <= set(reports)
    for report in reports.values():
        assert report.missing is None or "\n" not in str(report.missing)


def test_the_memory_limit_of_a_container_counts_and_an_unknown_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = device.choose("CPU")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    device.check_memory(policy.device, {"weights": 10**15})  # nothing is known
    (tmp_path / "meminfo").write_text("MemTotal:  8 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    device.check_memory(policy.device, {"weights": 10**15})
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 9999999 kB\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    device.check_memory(policy.device, {"weights": 2**30})
    with pytest.raises(DeviceError, match=r"2\.0 GiB \(weights 2\.0 GiB\) and 1\.0 GiB of memory"):
        device.check_memory(policy.device, {"weights": 2 * 2**30})


@pytest.mark.parametrize("format", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
def test_a_weight_keeps_its_exact_values_on_the_device(format: str, native: bool) -> None:
    values = np.array([[1.5, -0.0078125, 3.0], [0.0, 255.0, -2.0]], dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored = bits if format == "bfloat16" else values.astype(format)
    formats = frozenset({"float32", format} if native else {"float32"})
    weight = to_device(StoredWeight(format, values.shape, {"data": stored}), "CPU", formats)
    tensor = weight.arrays["data"]
    assert tensor.device == "CPU"
    assert weight.nbytes == stored.nbytes, "a weight stays as it is stored"
    as_bits = {"float32": dtypes.float32, "float16": dtypes.int16, "bfloat16": dtypes.uint16}
    as_bits |= {"float16": dtypes.float16} if native else {}
    assert tensor.dtype == as_bits[format]
    assert np.array_equal(weight.values().float().numpy(), values)


def test_every_float16_is_decoded_without_float16() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[bits & 0x7C00 != 0x7C00]  # infinities and NaN are in no weight
    found = from_float16(Tensor(bits, device="CPU")).numpy()
    assert np.array_equal(found, bits.view(np.float16).astype(np.float32))


class TestCompiler:
    def test_a_clang_that_is_too_old_and_a_gcc_are_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake(tmp_path / "clang", "Debian clang version 14.0.6")
        fake(tmp_path / "cc", "cc (Debian 12.2.0) 12.2.0")
        (tmp_path / "sh").symlink_to("/bin/sh")
        monkeypatch.setenv("PATH", str(tmp_path))  # no compiler of this machine
        monkeypatch.setenv("CC", "cc")
        monkeypatch.setattr(compiler, "_ziglang", lambda: None)
        assert compiler.find_compiler.__wrapped__() is None

    @pytest.mark.parametrize(
        "version",
        ["clang version 19.1.7", "Ubuntu clang version 16.0.0", "Apple clang version 15.0.0"],
    )
    def test_a_fitting_clang_is_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
    ) -> None:
        fake(tmp_path / "my-clang", version)
        monkeypatch.setenv("CC", str(tmp_path / "my-clang"))
        found = compiler.find_compiler.__wrapped__()
        assert found == compiler.Compiler(tmp_path / "my-clang", version)

    def test_without_any_compiler_one_line_says_how_to_get_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compiler, "find_compiler", lambda: None)
        with pytest.raises(
            DeviceError, match=r"no C compiler .*pip install 'qwen3-tg\[compiler\]'"
        ):
            device.choose("CPU")

    def test_the_fingerprint_changes_with_the_compiler(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = compiler.fingerprint()
        other = compiler.Compiler(Path("clang"), "clang version 99")
        monkeypatch.setattr(compiler, "find_compiler", lambda: other)
        assert compiler.fingerprint() != before

    def test_the_cache_is_ours_alone_or_lasts_as_long_as_the_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "made"))
        ours = tmp_path / "made" / "qwen3_tg"
        assert compiler.cache_dir() == ours
        assert stat.S_IMODE(ours.stat().st_mode) == 0o700
        ours.chmod(0o777)
        temporary = compiler.cache_dir()
        assert temporary != ours and compiler.is_ours(temporary)
        assert compiler.cache_dir() == temporary, "one for the whole process"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
        assert compiler.cache_dir() == temporary

    def test_an_unwritable_cache_is_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        code = (
            "import os, qwen3_tg.compiler as c; c.prepare_environment(); "
            "from qwen3_tg.device import choose; print(choose('CPU').device)"
        )
        (tmp_path / "tmp").mkdir()
        env = with_cache(tmp_path / "file") | {"TMPDIR": str(tmp_path / "tmp")}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "CPU\n"), run.stderr
        assert list((tmp_path / "tmp").iterdir()) == [], "nothing is left behind"

    def test_a_damaged_database_of_kernels_is_made_anew(self, tmp_path: Path) -> None:
        code = (
            "import os; from qwen3_tg.device import choose; "
            "print(choose('CPU').device, os.environ['CACHEDB'])"
        )
        env = with_cache(tmp_path)

        def run() -> list[str]:
            return subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split()

        device, database = run()
        Path(database).write_bytes(b"no database " * 1000)
        assert run() == [device, database] == ["CPU", database]

    def test_where_processes_cannot_share_locks_it_compiles_in_this_one(
        self, tmp_path: Path
    ) -> None:
        code = (
            "import multiprocessing.synchronize as s\n"
            "def refused(*_, **__): raise PermissionError(13, 'Permission denied')\n"
            "s.SemLock.__init__ = refused\n"
            "import qwen3_tg\n"
            "print(len(list(qwen3_tg.load().generate_ids([1, 2], max_new_tokens=2))))"
        )
        env = with_cache(tmp_path)
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def fake(path: Path, version: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
