"""What `qwen3 bench` says, and that a decoded token reads the chosen experts alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import GOLDEN
from format_writers import random_model, write_mlx
from tinygrad.helpers import GlobalCounters

import qwen3_tg
from qwen3_tg.bench import measure, token_bytes
from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.cli import main
from qwen3_tg.errors import UsageError


def mixture(path: Path, experts: int) -> Path:
    sizes = {"num_experts": experts, "num_hidden_layers": 1}
    config, weights = random_model(moe=True, tied=False, seed=5, **sizes)
    write_mlx(path / str(experts), config, weights)
    return path / str(experts)


def moved_by_a_decode_step(path: Path) -> int:
    """Bytes that the kernels of one decoded token read and write, by tinygrad's own count."""
    engine = qwen3_tg.load(str(path))._engine
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


def test_every_round_is_measured() -> None:
    found = measure(qwen3_tg.load("tiny"), prompt_tokens=5, new_tokens=4, rounds=2)
    assert len(found.prefill.rounds) == len(found.decode.rounds) == 2
    assert min(*found.prefill.rounds, *found.decode.rounds) > 0
    config = open_checkpoint("tiny").config
    one = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    assert found.cache_bytes == 7 * one


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2000, 48, 1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        measure(qwen3_tg.load("tiny"), *counts)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(GOLDEN / "moe_bfloat16")
    assert main(["bench", path, "-p", "4", "-n", "2", "-r", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path} on CPU in float32, 1 rounds"
    assert main(["bench", path, "-p", "4", "-n", "2", "-r", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes_per_token"] < found["weight_bytes"]
    expected = f"{found['weight_bytes_per_token']:,} of {found['weight_bytes']:,} bytes"
    assert lines[3].endswith(expected)
