"""Kernels kept on disk: they are used again, and a damaged file costs time only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tinygrad import codegen

from qwen3_tg.kernel_cache import KernelCache

CODE = """
import time, qwen3_tg
from tinygrad.codegen import to_program_cache
llm = qwen3_tg.load("tiny", device="CPU")
before = len(to_program_cache)
print([*llm.generate_ids([1, 2, 3], 3, stop_ids=())])
print(len(to_program_cache) - before)
"""


def test_a_second_process_lowers_nothing_again(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONHASHSEED": "random"}
    env.pop("CACHEDB", None)

    def run() -> tuple[str, int]:
        lines = subprocess.check_output([sys.executable, "-c", CODE], env=env, text=True)
        ids, lowered = lines.splitlines()
        return ids, int(lowered)

    first, second = run(), run()
    assert first[1] > 20
    assert second[1] == 0
    assert first[0] == second[0]
    (file,) = (tmp_path / "qwen3_tg").glob("programs-*.pickle")
    file.write_bytes(file.read_bytes()[:1000])
    assert run() == first, "a damaged file is written anew"
    assert run() == second


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codegen, "to_program_cache", {("key",): "program"})
    cache = KernelCache(tmp_path / "made", "x")
    cache.save()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["programs-x.pickle"]
    codegen.to_program_cache.clear()
    KernelCache(tmp_path / "made", "x").load()
    assert codegen.to_program_cache == {("key",): "program"}


def test_an_unwritable_directory_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codegen, "to_program_cache", {("key",): "program"})
    (tmp_path / "file").write_text("")
    KernelCache(tmp_path / "file", "x").save()
    KernelCache(tmp_path / "file", "x").load()
