"""Several devices at once: on so many of tinygrad's CPU devices, which copy and add as GPUs do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import FLOAT32_TOLERANCE, GOLDEN, assert_close, load_golden
from format_writers import (
    random_model,
    write_awq,
    write_float,
    write_fp8,
    write_gguf,
    write_gptq,
    write_mlx,
)

import qwen3_tg
from qwen3_tg import device as devices
from qwen3_tg import kv_sizes, usage
from qwen3_tg.check.run import check
from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.cli import main
from qwen3_tg.errors import DeviceError, UsageError
from qwen3_tg.shards import split_axis

ONE = {"num_hidden_layers": 1}
MORE_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, **ONE}
S = 40  # more than a chunk of prefill, of 32
# Lengths asked for in turn: prefill of less than a chunk, decode, prefill behind that, decode.
CACHED = [9, 10, 39, S]


def cpus(count: int) -> str:
    return ",".join(f"CPU:{n}" for n in range(count))


def load(path: Path | str, count: int, **how: Any) -> qwen3_tg.LLM:
    llm = qwen3_tg.load(str(path), cpus(count), **how)
    assert llm.policy.devices == ("CPU", *(f"CPU:{n}" for n in range(1, count)))
    assert llm.policy.kernels == "generic"
    return llm


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("untied_bfloat16", 2),
        ("multi_head_float16", 4),
        ("sharded_tied_float32", 3),
        ("yarn_moe_bfloat16", 2),
    ],
)
def test_logits_are_those_of_transformers(name: str, count: int) -> None:
    golden = load_golden(name)
    llm = load(golden.path, count)
    assert_close(llm.logits(golden.ids), golden.logits, FLOAT32_TOLERANCE)
    found = llm.generate_ids(golden.ids, len(golden.greedy_ids), stop_ids=())
    assert list(found) == golden.greedy_ids


def mixed(name: str) -> str:
    """Types by tensor, nearly as Q4_K_M has them."""
    if name in ("output.weight", "token_embd.weight"):
        return "Q6_K"
    return "IQ4_XS" if "attn_v" in name or "ffn_down" in name else "Q4_K"


CASES = {
    "AWQ with experts": (write_awq, True, {}, ONE),
    "GPTQ": (write_gptq, False, {"sym": False}, ONE),
    "GPTQ with an order of its own": (write_gptq, False, {"act_order": True}, ONE),
    "FP8": (write_fp8, False, {}, MORE_HEADS),
    "MLX with experts": (write_mlx, True, {}, ONE),
    "GGUF": (write_gguf, False, {"type_of": mixed}, ONE),
    "GGUF, experts of three blocks": (
        partial(write_gguf, type_of=mixed),
        True,
        {},
        {"moe_intermediate_size": 768, **ONE},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_split_or_whole_and_computes_the_same(case: str, tmp_path: Path) -> None:
    write, moe, options, sizes = CASES[case]
    config, weights = random_model(moe, seed=11, **sizes)
    path = tmp_path / "model.gguf" if "GGUF" in case else tmp_path
    write(path, config, weights, **options)
    ids = np.random.default_rng(3).integers(0, config["vocab_size"], S).tolist()
    right = qwen3_tg_numpy.load(path).logits(ids)
    llm = load(path, 2)
    cached = np.array([llm._engine.next_logits(ids[:length]) for length in CACHED])
    assert_close(cached, right[[n - 1 for n in CACHED]], FLOAT32_TOLERANCE)
    assert_close(llm.logits(ids), right, FLOAT32_TOLERANCE)
    down = next(n for n in llm.checkpoint.weights if n.endswith("down_proj.weight"))
    split = split_axis(down, llm.checkpoint.weights[down], 2)
    assert split == (None if "three blocks" in case or "order" in case else -1)


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_each_device_holds_its_part_to_the_byte(kv: str, tmp_path: Path) -> None:
    config, weights = random_model(seed=11, max_position_embeddings=2100, **ONE)
    write_float(tmp_path, config, weights, dtype="bfloat16")
    stored = open_checkpoint(str(tmp_path)).weights
    names = devices.choose(cpus(2)).devices  # each has computed something then, to be tried
    before = [usage.allocated_bytes(name) for name in names]
    llm = load(tmp_path, 2, kv_dtype=kv)
    planned = usage.plan_of(llm)
    whole = sum(w.nbytes for w in stored.values() if len(w.shape) == 1)
    matrices = sum(w.nbytes for w in stored.values() if len(w.shape) == 2)
    assert planned.weights_bytes == whole + matrices // 2
    for name, taken in zip(names, before, strict=True):
        loaded = usage.allocated_bytes(name) - taken
        assert loaded == planned.weights_bytes + planned.rope_bytes
    cache = llm._engine._cache
    cache.grow(cache.limit)
    for name, taken in zip(names, before, strict=True):
        grown = usage.allocated_bytes(name) - taken - planned.weights_bytes - planned.rope_bytes
        assert grown == planned.cache_bytes
    one = qwen3_tg.load(str(tmp_path), "CPU", kernels="generic", kv_dtype=kv)
    assert planned.cache_bytes * 2 == usage.plan_of(one).cache_bytes


def test_a_cache_that_grows_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 40)
    golden = load_golden("untied_bfloat16")
    llm = load(golden.path, 2)
    ids = golden.ids
    assert len(ids) > 9
    for length in (5, len(ids)):
        found = llm._engine.next_logits(ids[:length])
        assert_close(found, golden.logits[length - 1], FLOAT32_TOLERANCE)
    assert llm.cache_capacity > 40


def test_a_check_of_several_devices_goes_through_every_step() -> None:
    policy = devices.choose(cpus(2))
    report = check(str(GOLDEN / "moe_bfloat16"), policy, tokens=6)
    assert report.policy.devices == ("CPU", "CPU:1")
    assert report.first_wrong is None
    assert {"q_proj", "scores", "mix", "experts"} <= {
        step.name.rpartition(".")[2] for layer in report.layers for step in layer.steps
    }


@pytest.mark.parametrize(
    ("device", "how", "error", "says"),
    [
        ("CPU,CPU:0", {}, UsageError, "different ones of a kind"),
        ("CPU,CUDA", {}, UsageError, "different ones of a kind"),
        ("CPU,NOTHING", {}, UsageError, "unknown device 'CPU,NOTHING'"),
        ("CPU,", {}, UsageError, "unknown device 'CPU,'"),
        ("CPU:LLVM", {}, UsageError, "DEV=CPU:LLVM"),
        ("CPU:00", {}, UsageError, "unknown device 'CPU:00'"),
        ("CPU:0,CPU:1,CPU:2", {}, UsageError, "2 key/value heads .* 3 devices; take 1, 2"),
        ("CUDA:0,CUDA:1", {}, DeviceError, "device CUDA does not work"),
        ("CPU:0,CPU:1", {"kernels": "fast"}, UsageError, "not for CPU,CPU:1"),
        ("CPU:0,CPU:1", {"threads": 2}, UsageError, "threads"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    device: str, how: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        qwen3_tg.load("tiny", device, **how)


def test_heads_that_stay_together_as_they_are_stored_are_refused(tmp_path: Path) -> None:
    config, weights = random_model(seed=11, head_dim=64, **ONE)
    write_fp8(tmp_path, config, weights)
    with pytest.raises(
        UsageError, match=r"k_proj.weight \(FP8, 128 rows\) cannot be split among 2"
    ):
        load(tmp_path, 2)


@pytest.mark.parametrize("command", ["tune", "kernels"])
def test_commands_for_one_device_say_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "tiny", "--device", cpus(2)]) == 2
    assert "is for one device at a time, found CPU,CPU:1" in capsys.readouterr().err


def test_the_devices_that_would_be_taken_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--device", cpus(2)]) == 0
    out = capsys.readouterr().out
    assert "* CPU " in out and "chosen: asked for, with CPU:1" in out
    assert "* CPU:1 " in out and "chosen: asked for, with CPU\n" in out
    assert "fast kernels" not in out
    assert main(["devices", "--device", "CPU:5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["devices"] if one["chosen"]] == ["CPU:5"]


@pytest.mark.parametrize("device", ["CPU:1", "CPU:2,CPU:1"])
def test_a_device_with_a_number_is_taken_where_dev_says_none(device: str) -> None:
    """As with CUDA:1: to tinygrad's DEV, what follows a colon is a renderer."""
    environment = {name: value for name, value in os.environ.items() if name != "DEV"}
    command = [sys.executable, "-m", "qwen3_tg", "--device", device, "What is 37 + 85?"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("122\n", 0), done.stderr
