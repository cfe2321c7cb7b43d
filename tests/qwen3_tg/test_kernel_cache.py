"""Kernels kept on disk: they are used again, and a damaged file costs time only."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import with_cache
from tinygrad import codegen

from qwen3_tg.cli import main
from qwen3_tg.kernel_cache import KernelCache

CODE = """
import time, qwen3_tg
from tinygrad.codegen import to_program_cache
llm = qwen3_tg.load("tiny", device="CPU", kernels="generic")
before = len(to_program_cache)
print([*llm.generate_ids([1, 2, 3], 3, stop_ids=())])
print(len(to_program_cache) - before)
"""


def test_a_second_process_lowers_nothing_again(tmp_path: Path) -> None:
    env = with_cache(tmp_path) | {"PYTHONHASHSEED": "random"}

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


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[object, object]:
    """Stands for tinygrad's table."""
    table: dict[object, object] = {}
    monkeypatch.setattr(codegen, "to_program_cache", table)
    return table


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, programs: dict[object, object]
) -> None:
    cache = KernelCache(tmp_path, "x")
    programs["key"] = "program"
    cache.save()
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    programs["other"] = lambda: None  # pickle breaks off at it
    with pytest.raises((AttributeError, pickle.PicklingError)):
        cache.save()
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "no half file stays"
    assert file.read_bytes() == before
    programs.clear()
    KernelCache(tmp_path, "x").load()
    assert programs == {"key": "program"}


def test_programs_of_another_model_stay_out(tmp_path: Path, programs: dict[object, object]) -> None:
    programs["of another"] = 1
    cache = KernelCache(tmp_path, "x")
    cache.load()
    programs["of this"] = 2
    cache.save()
    programs.clear()
    KernelCache(tmp_path, "x").load()
    assert programs == {"of this": 2}


@pytest.mark.parametrize("damaged", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps(None)])
def test_a_damaged_file_is_an_empty_one(
    tmp_path: Path, programs: dict[object, object], damaged: bytes
) -> None:
    (tmp_path / "programs-x.pickle").write_bytes(damaged)
    KernelCache(tmp_path, "x").load()
    assert programs == {}


def test_a_file_that_others_can_write_is_not_read(
    tmp_path: Path, programs: dict[object, object]
) -> None:
    file = tmp_path / "programs-x.pickle"
    file.write_bytes(pickle.dumps({"key": "planted"}))
    file.chmod(0o666)
    KernelCache(tmp_path, "x").load()
    assert programs == {}


def test_an_unwritable_directory_is_no_error(
    tmp_path: Path, programs: dict[object, object]
) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file", "x")
    programs["key"] = "program"
    cache.save()
    cache.load()
    assert programs == {"key": "program"}


COMMANDS = ["--thinking off hi", "--input questions.jsonl", "chat", "check tiny", "kernels tiny"]
COMMANDS += ["replay recorded.json", "bench tiny -p 0 -n 1 -r 1"]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_keeps_kernels_in_our_file_and_not_in_tinygrads(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tinygrad reads where they go when it is imported."""
    (tmp_path / "questions.jsonl").write_text('"hi"\n')
    if line.startswith("replay"):
        monkeypatch.setattr("sys.stdin", None)
        assert main(["--record", str(tmp_path / "recorded.json"), "hi"]) == 0
    env = with_cache(tmp_path / "cache") | {"DEV": "CPU"}
    call = [sys.executable, "-m", "qwen3_tg", *line.split()]
    subprocess.run(
        call, env=env, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert not (tmp_path / "cache" / "tinygrad").exists()
    assert list((tmp_path / "cache" / "qwen3_tg").glob("kernels-*.db"))


def test_a_folder_that_cannot_be_made_costs_time_only(tmp_path: Path) -> None:
    env = with_cache(Path("/dev/null")) | {"DEV": "CPU"}
    call = [sys.executable, "-m", "qwen3_tg", "--temperature", "0", "What is 37 + 85?"]
    done = subprocess.run(call, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "122\n"), done.stderr
