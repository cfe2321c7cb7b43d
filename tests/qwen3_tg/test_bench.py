"""What `qwen3 bench` says, and that a decoded token reads the chosen experts alone."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from format_writers import random_model, write_mlx
from tinygrad.helpers import GlobalCounters

import qwen3_tg
from qwen3_tg import device
from qwen3_tg.bench.bandwidth import read_bandwidth
from qwen3_tg.bench.measure import measure, token_bytes
from qwen3_tg.bench.random_weights import checkpoint_of_config, random_checkpoint
from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.cli import main
from qwen3_tg.errors import UsageError
from qwen3_tg.llm import LLM
from qwen3_tg.plan.forms import FORMS, stored_as
from qwen3_tg.plan.released import CONFIGS


def mixture(path: Path, experts: int) -> Path:
    sizes = {"num_experts": experts, "num_hidden_layers": 1}
    config, weights = random_model(moe=True, tied=False, seed=5, **sizes)
    write_mlx(path / str(experts), config, weights)
    return path / str(experts)


def moved_by_a_decode_step(path: Path) -> int:
    """Bytes that the kernels of one decoded token read and write, by tinygrad's own count."""
    engine = qwen3_tg.load(str(path), kernels="generic")._engine
    engine.next_logits([1, 2, 3])
    engine.next_logits([1, 2, 3, 4])  # captures the graph
    GlobalCounters.reset()
    engine.next_logits([1, 2, 3, 4, 5])
    return GlobalCounters.global_mem


def test_a_decoded_token_reads_the_chosen_experts_alone(tmp_path: Path) -> None:
    few, many = (mixture(tmp_path, experts) for experts in (8, 32))
    sizes = [sum(w.nbytes for w in open_checkpoint(str(p)).weights.values()) for p in (few, many)]
    assert sizes[1] > 2.5 * sizes[0]
    moved = [moved_by_a_decode_step(path) for path in (few, many)]
    # four times the experts, and only the router has grown
    assert moved[1] - moved[0] < 0.05 * (sizes[1] - sizes[0])
    for path, size in zip((few, many), sizes, strict=True):
        checkpoint = open_checkpoint(str(path))
        config = checkpoint.config
        experts = sum(w.nbytes for n, w in checkpoint.weights.items() if ".experts." in n)
        unread = experts - experts * config.num_experts_per_tok // config.num_experts
        embedding = checkpoint.weights["model.embed_tokens.weight"].nbytes
        rows = embedding - embedding // config.vocab_size
        assert token_bytes(config, checkpoint.weights) == size - unread - rows


def test_a_dense_tied_model_reads_every_weight() -> None:
    checkpoint = open_checkpoint("tiny")
    everything = sum(weight.nbytes for weight in checkpoint.weights.values())
    assert token_bytes(checkpoint.config, checkpoint.weights) == everything


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return qwen3_tg.load("tiny")


def test_every_test_is_measured_at_every_depth(tiny: LLM) -> None:
    said: list[str] = []
    found = measure(tiny, [5, 0], [4], [0, 30], 2, said.append)
    assert [row.name for row in found] == ["pp5", "tg4", "pp5 @ d30", "tg4 @ d30"]
    assert all(len(row.rounds) == 2 and min(row.rounds) > 0 for row in found)
    assert said[1] == "pp5, round 1 of 2" and len(said) == 12
    config = tiny.config
    one = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    weights = token_bytes(config, tiny.checkpoint.weights)
    assert [row.bytes_per_token - weights for row in found[1::2]] == [2 * one, 32 * one]
    assert found[1].bytes_per_s == pytest.approx(found[1].median * (weights + 2 * one))


def test_several_at_once_are_measured_beside_one(tiny: LLM) -> None:
    found = measure(tiny, [0], [4], [0, 30], 2, batches=[1, 3])
    names = ["tg4", "tg4 x 3", "tg4 @ d30", "tg4 x 3 @ d30"]
    assert [row.name for row in found] == names
    for one, many in zip(found[::2], found[1::2], strict=True):
        assert many.batch == 3 and len(many.rounds) == len(many.gains) == 2 and not one.gains
        assert min(many.gains) > 0
        weights = token_bytes(tiny.config, tiny.checkpoint.weights)
        cache = one.bytes_per_token - weights
        assert many.bytes_per_token == weights // 3 + cache


def test_what_is_before_a_depth_is_read_once(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run, steps = tiny._engine._run, []

    def counted(kind: str, new: list[int], start: int) -> Any:
        steps.append((kind, len(new), start))
        return run(kind, new, start)

    monkeypatch.setattr(tiny._engine, "_run", counted)
    measure(tiny, [40], [], [50], 3)
    assert steps[0] == ("prefill", 50, 0)
    assert [step for step in steps if step[1] == 40] == [("prefill", 40, 50)] * 4
    assert len([step for step in steps if step[2] == 0]) == 1


@pytest.mark.parametrize(
    ("prompts", "news", "depths", "rounds"),
    [
        *[([-1], [1], [0], 1), ([1], [-1], [0], 1), ([1], [1], [-1], 1), ([1], [1], [0], 0)],
        *[([0], [0], [0], 1), ([2050], [1], [0], 1), ([1], [1], [2050], 1)],
    ],
)
def test_impossible_counts_are_refused(
    tiny: LLM, prompts: list[int], news: list[int], depths: list[int], rounds: int
) -> None:
    with pytest.raises(UsageError):
        measure(tiny, prompts, news, depths, rounds)


SMALL = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("form", FORMS)
def test_random_weights_of_every_form_give_finite_logits(form: str, mixture: bool) -> None:
    config = replace(CONFIGS["Qwen3-30B-A3B" if mixture else "Qwen3-0.6B"], **SMALL)
    if mixture:
        config = replace(config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256)
    checkpoint = checkpoint_of_config(config, form, "small")
    stored = stored_as(config, form)
    for name, weight in checkpoint.weights.items():
        assert weight.nbytes == stored[name].nbytes
        for key, array in weight.arrays.items():
            assert (array.shape, array.dtype) == (
                stored[name].arrays[key].shape,
                stored[name].arrays[key].dtype,
            )
    llm = LLM(checkpoint, device.choose(), 100)
    logits = llm.logits([1, 2, 3])
    assert 1e-3 < logits.std() < 100
    assert len(list(llm.generate_ids([1, 2], 3, stop_ids=()))) == 3


def test_random_weights_take_no_memory_before_they_are_asked_for() -> None:
    checkpoint = random_checkpoint("Qwen/Qwen3-32B", "Q4_0")
    assert 18e9 < sum(w.device_bytes for w in checkpoint.weights.values()) < 19e9
    assert checkpoint.config == CONFIGS["Qwen3-32B"]
    norm = checkpoint.weights["model.norm.weight"].arrays["data"]
    assert norm.shape == (5120,) and (norm == 1).all()


def test_memory_is_faster_than_a_disk_and_slower_than_a_cache() -> None:
    assert 1e9 < read_bandwidth(device.choose("CPU")) < 2e12


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], line: str) -> str:
        assert main(["bench", *line.split()]) == 0
        return capsys.readouterr().out

    def test_a_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.run(capsys, "-p 8 -n 4 -r 2 -d 0,20")
        assert out.startswith("tiny: 2,174,336 bytes of weights\nCPU, float32, fast kernels, ")
        rows = re.findall(r"^\| (\S.*?) \| (\d+\.\d\d) \| .*\|$", out, re.MULTILINE)
        assert [name for name, _ in rows] == ["pp8", "tg4", "pp8 @ d20", "tg4 @ d20"]
        assert "of one at a time" not in out
        assert all(len(line.split("|")) == 8 for line in out.splitlines() if line[:1] == "|")
        assert re.search(r"measured before and after: [\d.]+ GB/s", out)
        cold, warm = re.findall(r"([\d.]+) s cold, ([\d.]+) s warm", out)[0]
        assert float(cold) > float(warm) > 0

    def test_several_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.run(capsys, "-p 0 -n 4 -r 2 -b 2,3 --no-first-token")
        said = re.findall(r"^(tg4 x \d): [\d.]+ times the tokens/s of one at a time", out, re.M)
        assert said == ["tg4 x 2", "tg4 x 3"]

    def test_json_and_csv(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = "-p 8 -n 4 -r 2 --no-first-token"
        report = json.loads(self.run(capsys, f"{options} --json --threads 1"))
        assert report["threads"] == 1 and report["kernels"] == "fast"
        assert report["first_token_cold_s"] is None
        assert [test["kind"] for test in report["tests"]] == ["prefill", "decode"]
        assert len(report["tests"][0]["rounds_tokens_per_s"]) == 2
        decode = report["tests"][1]
        share = decode["bytes_per_s"] / report["bandwidth_bytes_per_s"]
        assert decode["of_bandwidth"] == pytest.approx(share)
        assert decode["batch"] == 1 and decode["times_one_at_a_time"] is None
        lines = list(csv.DictReader(self.run(capsys, f"{options} --csv").splitlines()))
        assert [line["test"] for line in lines] == ["pp8", "tg4"]
        assert lines[0]["bytes_per_token"] == "" and float(lines[1]["tokens_per_s"]) > 0

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("tiny --shape Qwen3-8B", "give a MODEL or --shape, not both"),
            ("--quant q4_0", "--quant is for --shape"),
            ("--shape Qwen9", "unknown shape 'Qwen9'; known: Qwen3-0.6B"),
            ("--shape Qwen3-8B --quant q9", "unknown quantisation 'q9'"),
            ("-d 7000", "7514 tokens do not fit in the context of 2048; --context 7514"),
            ("-d 9000 --context 7000", "9514 tokens do not fit in the context of 7000\n"),
            ("-p x", "-p must be a number, or several as 0,4096; found 'x'"),
            ("-p 0 -n 0", "nothing to measure"),
            ("-b 0", "-b must be at least 1"),
            ("-n 0 -b 4", "-b decodes several at once"),
            ("-r 0", "-r must be at least 1"),
            ("--json --csv", "not allowed with argument --json"),
        ],
    )
    def test_what_cannot_be_is_one_error(
        self, capsys: pytest.CaptureFixture[str], line: str, message: str
    ) -> None:
        assert main(["bench", *line.split()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err
        assert [part for part in err.splitlines() if part.startswith("error: ")] == [
            err.splitlines()[-1]
        ]
