"""Ways to lower kernels: found by search, kept, given away, and used."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.codegen import to_program_cache

import qwen3_tg
from qwen3_tg import device, tuning
from qwen3_tg.cli.main import main
from qwen3_tg.errors import UsageError
from qwen3_tg.tuning import Kind, Tuning

RANDOM = np.random.default_rng(1)
A = RANDOM.normal(size=(48, 40)).astype(np.float32)
B = RANDOM.normal(size=(40, 56)).astype(np.float32)


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """The CPU's, with a cache of its own."""
    monkeypatch.setattr(tuning.compiler, "cache_dir", lambda: tmp_path)
    return Kind.of("CPU")


def product() -> np.ndarray:
    a, b = Tensor(A, device="CPU").realize(), Tensor(B, device="CPU").realize()
    return a.dot(b).relu().numpy()


def seen_keys(run: object) -> list[str]:
    """Of the kernels that are compiled while this runs."""
    keys: list[str] = []

    def note(sinks: list) -> dict:
        keys.extend(sink.key.hex() for sink in sinks)
        return {}

    to_program_cache.clear()
    with tuning._before_compiling(note):
        run()  # type: ignore[operator]
    return keys


def applied_opts() -> list[list[str]]:
    return [
        [opt.op.name for opt in program.src[0].arg.applied_opts]
        for program in to_program_cache.values()
    ]


def test_a_way_is_used_for_its_kernel_and_the_result_is_the_same(kind: Kind) -> None:
    (key,) = seen_keys(product)
    found = Tuning(kind, {key: [("UPCAST", 0, 4), ("UPCAST", 1, 2)]})
    to_program_cache.clear()
    with found.applied():
        result = product()
    assert applied_opts() == [["UPCAST", "UPCAST"]]
    np.testing.assert_allclose(result, np.maximum(A @ B, 0), rtol=1e-5, atol=1e-5)
    to_program_cache.clear()
    with Tuning(kind, {"0" * 64: [("UPCAST", 0, 2)]}).applied():
        product()
    assert applied_opts() != [["UPCAST", "UPCAST"]], "another kernel's way is not taken"


def test_a_search_keeps_what_is_faster_and_ends_in_time(kind: Kind) -> None:
    found, told = Tuning(kind), []
    to_program_cache.clear()
    with found.searching(1, time.monotonic() + 600, lambda n, of, what: told.append((n, of, what))):
        result = product()
    np.testing.assert_allclose(result, np.maximum(A @ B, 0), rtol=1e-5, atol=1e-5)
    assert len(found.ways) == 1 and told[0][:2] == (1, 1) and "µs" in told[0][2]
    before, after = next(iter(found.seconds.values()))
    assert 0 < after <= before
    kept = tuning.load(kind)
    assert kept.seconds == found.seconds, "kept as soon as it was found"
    assert [list(map(tuple, way)) for way in kept.ways.values()] == list(found.ways.values())
    late, told = Tuning(kind), []
    to_program_cache.clear()
    with late.searching(1, time.monotonic() - 1, lambda n, of, what: told.append(what)):
        product()
    assert late.ways == {} and told == ["left as it is: no time left"]


def test_generation_uses_what_is_kept_and_says_the_same(kind: Kind) -> None:
    def logits() -> np.ndarray:
        llm = qwen3_tg.load("tiny", "CPU", kernels="generic")
        return llm.logits([1, 2, 3, 4])

    keys = seen_keys(logits)
    before = logits()
    ways = {key: [("UPCAST", 0, 4)] for key in keys}
    tuned = Tuning(kind, ways)
    assert tuned.fingerprint and not Tuning(kind, {key: [] for key in keys}).fingerprint
    used: list[str] = []
    original = tuning.with_way

    def spy(sink: object, way: list) -> object:
        used.append(sink.key.hex())  # type: ignore[attr-defined]
        return original(sink, [])  # any way will do: whether it suits is the search's business

    with pytest.MonkeyPatch.context() as patch:
        tuning.save(tuned)
        patch.setattr(tuning, "with_way", spy)
        to_program_cache.clear()
        after = logits()
    assert len(used) > 10 and set(used) <= set(keys)
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_a_file_is_taken_by_the_same_kind_of_device_alone(kind: Kind, tmp_path: Path) -> None:
    file = tmp_path / "given.json"
    given = Tuning(kind, {"ab": [("TC", 0, [-1, 2, 1]), ("LOCAL", 1, 8)]}, {"ab": (2e-5, 1e-5)})
    tuning.write(file, given)
    assert tuning.read(file, kind).seconds == given.seconds
    assert tuning.read(file, kind).ways["ab"][0][0] == "TC"
    other = replace(kind, what="RX 7900")
    with pytest.raises(UsageError, match=r"is for what '.*'; here it is 'RX 7900'"):
        tuning.read(file, other)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"ways": {"ab": [["EXPLODE", 0, 1]]}},
        {"ways": {"ab": [["UPCAST", "0", 1]]}},
        {"ways": {"ab": [["UPCAST", 0, "x"]]}},
        {"ways": [1]},
        {"kind": {"device": "CPU"}},
        {"seconds": {"ab": [1]}},
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    change: dict[str, object], kind: Kind, tmp_path: Path
) -> None:
    file = tmp_path / "given.json"
    tuning.write(file, Tuning(kind, {"ab": [("UPCAST", 0, 4)]}, {"ab": (2e-5, 1e-5)}))
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=r"given\.json"):
        tuning.read(file, kind)


def test_the_command_gives_away_and_takes(
    kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generic = ["tune", "--device", "CPU", "--kernels", "generic"]
    file = tmp_path / "given.json"
    assert main([*generic, "--export", str(file)]) == 2
    assert "nothing was tuned" in capsys.readouterr().err
    tuning.save(Tuning(kind, {"ab": [("UPCAST", 0, 4)], "cd": []}))
    assert main([*generic, "--export", str(file)]) == 0
    assert "2 kernels are known, 1 in a way of their own" in capsys.readouterr().out
    tuning.save(Tuning(kind, {"ef": [("UPCAST", 0, 2)]}))
    assert main([*generic, "--import", str(file)]) == 0
    assert "2 kernels are new; now 3 kernels are known" in capsys.readouterr().out
    for text in ("{}", "[1]", "7", "{"):
        file.write_text(text)
        assert main([*generic, "--import", str(file)]) == 2
        assert "not a tuning file" in capsys.readouterr().err
    for option, path in (("--import", tmp_path), ("--import", tmp_path / "no" / "t.json")):
        assert main([*generic, option, str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: ")
    assert main([*generic, "--export", str(tmp_path / "no" / "t.json")]) == 2
    assert "--export: " in capsys.readouterr().err


def test_the_cpus_own_kernels_are_not_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.choose("CPU").kernels == "fast"
    assert main(["tune", "--device", "CPU"]) == 2
    assert "--kernels generic" in capsys.readouterr().err
    assert main(["tune", "--device", "CPU", "--kernels", "generic", "--beam", "0"]) == 2
    assert "--beam" in capsys.readouterr().err
