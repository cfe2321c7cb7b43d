"""tools/bench_peers.py: the page says what was measured, and its worker does what it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_writers import random_model, write_float

from tools import bench_peers, bench_workers
from tools.bench_peers import LLAMA_CPP, OURS, Results, Row, against_best, page

ROOT = Path(__file__).parent.parent


def row(type: str, do: str, depth: int, tokens: int, **seconds: list[float]) -> Row:
    named = {name.replace("llama_cpp", LLAMA_CPP): values for name, values in seconds.items()}
    return Row(type, do, tokens, depth, named, dict.fromkeys(named, tokens))


def recorded() -> Results:
    """Two types: one is won, one lost; tinygrad has one of them."""
    results = Results(
        "python tools/bench_peers.py", "A model", versions={OURS: "1", LLAMA_CPP: "2"}
    )
    results.versions["tinygrad"] = "3"
    results.rows = [
        row("f16", "prefill", 0, 100, ours=[1.0, 2.0], llama_cpp=[2.0, 2.0], tinygrad=[50.0]),
        row("f16", "decode", 0, 10, ours=[1.0, 1.0], llama_cpp=[2.0, 2.0]),
        row("f16", "decode", 512, 10, ours=[2.0, 2.0], llama_cpp=[2.0, 2.0]),
        row("q8_0", "prefill", 0, 100, ours=[4.0, 4.0], llama_cpp=[4.0, 4.0]),
        row("q8_0", "decode", 0, 10, ours=[2.0, 2.0], llama_cpp=[1.0, 1.0]),
    ]
    results.missing = {"q8_0": {"tinygrad": "tinygrad: too slow"}}
    results.peak_bytes = {
        "f16": {OURS: 10**9, LLAMA_CPP: 2 * 10**9},
        "q8_0": {OURS: 10**8, LLAMA_CPP: 10**8},
    }
    results.file_bytes = dict.fromkeys(results.peak_bytes, 5 * 10**8)
    results.cache_bytes = dict.fromkeys(results.peak_bytes, 10**8)
    results.alone = {"cold": {"unit": "s", "values": [3.0, 1.0, 2.0]}}
    return results


def line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_that_of_medians_is_told_apart() -> None:
    one = row("f16", "decode", 0, 10, ours=[1.0, 2.0, 4.0], llama_cpp=[4.0, 2.0, 2.0])
    assert one.ratio_of_rounds(LLAMA_CPP) == 1  # of 4, 1 and 1/2
    assert one.ratio_of_medians(LLAMA_CPP) == 1
    one.seconds[LLAMA_CPP] = [4.0, 3.0, 2.0]
    assert one.ratio_of_rounds(LLAMA_CPP) == 1.5
    assert one.ratio_of_medians(LLAMA_CPP) == 1.5
    one.seconds[OURS] = [4.0, 1.0, 2.0]
    assert one.ratio_of_rounds(LLAMA_CPP) == 1  # of 1, 3 and 1
    assert one.ratio_of_medians(LLAMA_CPP) == 1.5
    assert one.ratio_of_rounds("tinygrad") is one.ratio_of_medians("tinygrad") is None


def test_a_peer_with_fewer_rounds_and_tokens_is_compared_by_its_speed() -> None:
    one = row("f16", "decode", 0, 10, ours=[1.0, 1.0, 9.0], tinygrad=[4.0, 4.0])
    one.counts["tinygrad"] = 4
    assert one.speed("tinygrad") == 1
    assert one.ratio_of_rounds("tinygrad") == 10


def test_lost_rows_are_marked_and_won_ones_are_not() -> None:
    text = page(recorded())
    assert "missed" not in line(text, "| f16 | tg10 @ d0 ")
    assert "| 0.50 | 0.50 | 1.00 **missed** |" in line(text, "| q8_0 | tg10 @ d0 ")
    assert "0.50 **missed** | 1.00" in line(text, "| f16 | d512 / d0 ")
    assert "1,000 **missed**" in line(text, "| f16 | 1,000")
    assert "missed" not in line(text, "| q8_0 | 100 ")


def test_a_prompts_goal_is_the_best_type_of_llama_cpp_in_the_same_round() -> None:
    results = recorded()
    results.together = {
        "f16": {OURS: [1.0, 2.0, 4.0], LLAMA_CPP: [2.0, 4.0, 8.0]},
        "q8_0": {OURS: [4.0, 8.0, 16.0], LLAMA_CPP: [3.0, 6.0, 2.0]},
    }
    assert against_best(results.together, "q8_0") == 0.5  # of 2/4, 4/8 and 2/16
    assert "best type: 0.50 **missed**" in line(page(results), "| q8_0 | pp100 @ d0 ")
    assert "best type: 2.00 |" in line(page(results), "| f16 | pp100 @ d0 ")
    assert against_best({}, "f16") is None
    assert against_best({"f16": {OURS: [1.0]}}, "f16") is None


def test_what_a_program_cannot_run_is_a_dash_with_its_reason() -> None:
    text = page(recorded())
    assert line(text, "| q8_0 | tg10 @ d0 ").endswith("| - (2) |")
    assert "(2) tinygrad: too slow" in text
    assert "(1) tinygrad: not at this depth" in text


def test_the_page_gives_medians_with_least_and_most() -> None:
    text = page(recorded())
    assert "75.0 (50.0..100.0)" in line(text, "| f16 | pp100 @ d0 ")
    assert "| cold | 2.00 (1.00..3.00) s | - |" in text
    assert "1,000 **missed** | 2,000 | - | 900 = 500 + 100 + 300" in text


def test_a_page_that_is_not_finished_says_so_and_has_no_empty_tables() -> None:
    results = Results("command", "A model")
    assert "Not finished" in page(results)
    assert "|" not in page(results)
    results.finished = True
    assert "Not finished" not in page(results)


@pytest.mark.parametrize(("taken", "said"), [(0.01, False), (1.0, True)])
def test_a_machine_that_was_busy_with_something_else_is_no_measurement(
    taken: float, said: bool
) -> None:
    results = recorded()
    results.others = [(2.0, taken), (2.0, 0.0)]
    assert ("Too busy" in page(results)) == said


REQUIRED = ["--llama-cpp", sys.executable, "--work", "w"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--types", "f16,q9"], "unknown types: q9"),
        (["-d", "0,x"], "-d takes numbers"),
        (["-d=-1"], "-d must not be negative"),
        (["-r", "0"], "rounds must be at least 1"),
        (["--tinygrad", "no/such/python"], "--tinygrad: no program no/such/python"),
        (["--json", "no/such/folder/x.json"], "--json: no folder"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_peers.arguments(REQUIRED + wrong)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_on_the_page_names_no_folder_of_the_machine() -> None:
    given = ["--llama-cpp", "/a/b/env/bin/python", "--json=/a/b/x.json", "-p", "512"]
    expected = ["--llama-cpp", "env/bin/python", "--json=x.json", "-p", "512"]
    assert bench_peers.shown(given) == expected


def test_deep_rows_are_for_some_types_and_slow_programs_have_a_depth_of_their_own() -> None:
    options = bench_peers.arguments(REQUIRED)
    programs = [bench_peers.Program(OURS, "a"), bench_peers.Program("tinygrad", "b", slow=True)]
    bench = bench_peers.Bench(options, Results("", ""), programs)
    assert bench.depths("q8_0") == [0, 512, 8192]
    assert bench.depths("f16") == [0, 512]
    assert bench.depths("q8_0", programs[1]) == [0, 512]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    config, weights = random_model(vocab_size=64, num_hidden_layers=1, max_position_embeddings=256)
    write_float(folder, config, weights)
    return folder


def test_our_worker_answers_every_question_with_seconds_and_memory(model: Path) -> None:
    command = [sys.executable, bench_peers.WORKER, "ours", model, "--threads", "1"]
    questions: list[dict[str, Any]] = [
        {"do": "prefill", "tokens": 4, "depth": 0},
        {"do": "prefill", "tokens": 4, "depth": 6},
        {"do": "decode", "tokens": 3, "depth": 6},
        {"do": "decode", "tokens": 3, "depth": 0},
    ]
    done = subprocess.run(
        [*command, "--context", "64", "--vocab-size", "64"],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    loaded, *answers = map(json.loads, done.stdout.splitlines())
    assert loaded["version"].startswith("qwen3_tg ")
    assert len(answers) == len(questions)
    assert all(answer["seconds"] > 0 and answer["peak_bytes"] > 10**6 for answer in answers)


def test_a_worker_that_ends_says_why(tmp_path: Path) -> None:
    program = bench_peers.Program(OURS, sys.executable)
    options = {"threads": 1, "context": 64, "vocab_size": 64}
    with pytest.raises(bench_peers.WorkerError, match=r"ours ended with code 1: .*no-such-model"):
        bench_peers.Worker(program, tmp_path / "no-such-model", tmp_path / "log", **options)


def test_our_worker_continues_a_prompt_as_the_public_api_does(model: Path) -> None:
    options = Namespace(model=str(model), threads=1, context=64, kernels=None)
    ours = bench_workers.Ours(options)
    ids = bench_workers.draw(np.random.default_rng(0), 6, 64)
    found = list(islice(ours.stream(ids), 3))
    assert found[1:] == list(islice(ours.stream([*ids, found[0]]), 2))


@pytest.mark.parametrize(
    ("cached", "ids", "kept"),
    [([], [1, 2], 0), ([1, 2, 3], [1, 2, 4, 5], 2), ([1, 2], [1, 2], 1), ([1, 2, 3], [1, 2], 1)],
)
def test_the_last_id_is_always_computed(cached: list[int], ids: list[int], kept: int) -> None:
    assert bench_workers.common_prefix(cached, ids) == kept
