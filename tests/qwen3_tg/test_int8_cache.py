"""Keys and values in 8 bits: the integers are numpy's, and what they cost is measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import FLOAT32_TOLERANCE, assert_close, load_golden
from format_writers import random_model, write_float
from qwen3_tg_numpy import model as reference
from tinygrad import Tensor

import qwen3_tg
from qwen3_tg import Sampling, device, kv_sizes, usage
from qwen3_tg.cli import main
from qwen3_tg.device import policy
from qwen3_tg.errors import DeviceError, UsageError
from qwen3_tg.generate import Generation
from qwen3_tg.kv_cache import dequantise, quantise
from qwen3_tg.speculate import Lookup, Speculation

TINY = Path(qwen3_tg.__file__).parent / "tiny"
DENSE, MIXTURE = "untied_bfloat16", "moe_bfloat16"
# A number so near the middle between two integers that the device's, which differs from numpy's by
# rounding, may go to the other one. Measured: at most 2e-5.
NEAR_A_TIE = 1e-3


def load(name: str, kernels: str = "exact", device: str = "CPU") -> qwen3_tg.LLM:
    """With chunks of 32 positions."""
    path = name if name == "tiny" else str(load_golden(name).path)
    how = {} if "," in device else {"kernels": kernels}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_PREFILL_CHUNK_FAST", 32)
        llm = qwen3_tg.load(path, device, kv_dtype="int8", **how)
    assert llm.policy.kv_dtype == "int8"
    return llm


@cache
def numpy_model(name: str) -> qwen3_tg_numpy.Reference:
    return qwen3_tg_numpy.load(TINY if name == "tiny" else load_golden(name).path)


def some_ids(name: str, count: int = 90) -> list[int]:
    return np.random.default_rng(1).integers(0, numpy_model(name).config.vocab_size, count).tolist()


class Following(reference.LayerCache):
    """A cache of the reference that goes on with a device's integers, once they are its own: but
    for ties, which rounding decides."""

    def __init__(self, config: qwen3_tg_numpy.ModelConfig, kept: Sequence[Tensor]):
        super().__init__(config, int8=True)
        self.kept = [tensor.numpy()[0] for tensor in kept]
        self.ties = 0

    def update(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        super().update(k, v)
        k_kept, v_kept, k_scale, v_scale = (kept[: len(k)] for kept in self.kept)
        for x, mine, scale, kept, kept_scale in (
            (k, self.k, self.k_scale, k_kept, k_scale),
            (v, self.v, self.v_scale, v_kept, v_scale),
        ):
            assert np.allclose(kept_scale, scale, rtol=1e-4, atol=0)
            apart = np.abs(kept.astype(int) - mine)
            from_tie = np.abs(np.abs(x / scale[..., None]) % 1 - 0.5)
            assert apart.max() <= 1 and (from_tie[apart > 0] < NEAR_A_TIE).all()
            self.ties += int(apart.sum())
        both = (k_kept, k_scale), (v_kept, v_scale)
        return reference.dequantise(*both[0]), reference.dequantise(*both[1])


def numpy_logits(name: str, llm: qwen3_tg.LLM, ids: Sequence[int]) -> np.ndarray:
    """By the reference, with a cache in int8 that is held against the device's. (S, V)"""
    model = numpy_model(name).model
    kept = reference.KVCache(model.config, int8=True)
    kept.layers = [Following(model.config, layer.tensors) for layer in llm._engine._cache.layers]
    logits = model.forward(ids, kept)
    assert sum(layer.ties for layer in kept.layers) < 1e-3 * 2 * len(ids) * kept.layers[0].k[0].size
    return logits


def strange_heads() -> np.ndarray:
    """Of every size, with ties, zeros, numbers of one size, and such as are hardly numbers."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.uniform(-60, 60, (500, 2, 1)))
    x = (random.normal(size=(500, 2, 40)) * sizes).astype(np.float32)
    x[0] = 0
    x[1] *= 0
    x[1, 0, 3] = -3.4e38
    x[2] = 1e-42
    x[3] = 2e-36
    x[4] = random.integers(-254, 255, x[4].shape) / 2
    x[4, :, 7] = 127
    x[5] = -5.0
    return x


def test_integers_and_scales_are_those_of_numpy() -> None:
    x = strange_heads()
    right, right_scale = reference.quantise(x)
    q, scale = (t.numpy() for t in quantise(Tensor(x)))
    assert q.dtype == np.int8 and scale.dtype == np.float32
    assert np.array_equal(q, right) and np.array_equal(scale, right_scale)
    largest = np.abs(q).max(-1)
    assert set(largest[6:].flat) == {127} and not largest[0].any() and not largest[2].any()
    read = dequantise(Tensor(q), Tensor(scale)).numpy()
    assert np.array_equal(read, reference.dequantise(right, right_scale))
    assert (np.abs(read - x)[3:] <= scale[3:, :, None] * 0.5001).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_read_as_not_a_number(bad: float) -> None:
    x = np.ones((3, 2, 8), dtype=np.float32)
    x[1, 0, 5] = bad
    read = dequantise(*quantise(Tensor(x))).numpy()
    assert np.isnan(read[1, 0]).all() and np.isnan(read).sum() == 8
    with np.errstate(invalid="ignore"):
        assert np.isnan(reference.dequantise(*reference.quantise(x))).sum() == 8


@pytest.mark.parametrize(("kernels", "ids"), [("fast", [5]), ("fast", [5, 6, 7]), ("generic", [5])])
def test_an_overflow_is_told_and_not_hidden(kernels: str, ids: list[int], tmp_path: Path) -> None:
    config, weights = random_model(seed=4, num_hidden_layers=1)
    name = "model.layers.0.self_attn.v_proj.weight"
    write_float(tmp_path, config, weights | {name: weights[name] * np.float32(3e38)})
    llm = qwen3_tg.load(str(tmp_path), "CPU", kernels=kernels, kv_dtype="int8")
    with pytest.raises(DeviceError, match="logits that are not finite"):
        llm._engine.next_logits(ids)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *((name, "exact") for name in (DENSE, MIXTURE, "yarn_v4_bfloat16", "tiny")),
        *((name, "generic") for name in (DENSE, MIXTURE)),
    ],
)
def test_logits_are_those_of_numpy_with_the_same_cache(name: str, kernels: str) -> None:
    llm, ids = load(name, kernels), some_ids(name)
    found = llm.logits(ids)
    assert_close(found, numpy_logits(name, llm, ids), FLOAT32_TOLERANCE)
    lengths = [33, 34, 35, 80, 81]  # chunks, single positions, and chunks behind them
    found = np.stack([llm._engine.next_logits(ids[:length]) for length in lengths])
    right = numpy_logits(name, llm, ids[: lengths[-1]])[[n - 1 for n in lengths]]
    assert_close(found, right, FLOAT32_TOLERANCE)


# Root mean square of the difference that int8 makes to logits, by their spread; measured with the
# ids of this file: 0.0166, 0.0125, 0.0163, 0.0193, 0.0056.
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        (DENSE, 0.03),
        ("tied_float32", 0.03),
        ("multi_query_float16", 0.03),
        ("yarn_bfloat16", 0.03),
        ("tiny", 0.01),
    ],
)
def test_int8_costs_little_against_the_float_reference(name: str, bound: float) -> None:
    llm, ids = load(name), some_ids(name)
    right = numpy_model(name).logits(ids)
    error = float(np.sqrt(np.mean((llm.logits(ids) - right) ** 2)) / np.std(right))
    assert 1e-3 < error < bound, "int8 is no float, and not much worse"


def test_the_embedded_model_still_adds() -> None:
    llm = qwen3_tg.load("tiny", "CPU", kv_dtype="int8")
    messages = [{"role": "user", "content": "What is 637 + 285?"}]
    pieces = list(llm.chat(messages, sampling=Sampling(temperature=0)))
    assert "".join(p.text for p in pieces if isinstance(p, qwen3_tg.Text)).strip() == "922"


@pytest.mark.parametrize("kernels", ["exact", "generic"])
def test_a_cache_that_grows_keeps_what_it_holds(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 40)
    monkeypatch.setattr(kv_sizes, "GROWTH", 2)
    llm, ids = load(DENSE, kernels), some_ids(DENSE)
    llm._engine.next_logits(ids[:5])
    before = [tensor.numpy()[:, :5] for tensor in llm._engine._cache.layers[1].tensors]
    assert llm.cache_capacity == 40 and len(before) == 4
    found = llm._engine.next_logits(ids)
    assert llm.cache_capacity == 160
    for tensor, old in zip(llm._engine._cache.layers[1].tensors, before, strict=True):
        assert tensor.shape[1] == 160 and np.array_equal(tensor.numpy()[:, :5], old)
    assert_close(found, numpy_logits(DENSE, llm, ids)[-1], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("kernels", ["exact", "generic"])
def test_a_prefix_is_reused_and_what_follows_is_computed_anew(kernels: str) -> None:
    llm, ids = load(DENSE, kernels), some_ids(DENSE)
    llm._engine.next_logits(ids)
    edited = [*ids[:40], (ids[40] + 1) % 251, *ids[41:70]]
    assert llm._engine.missing(edited) == 30
    found = llm._engine.next_logits(edited)
    assert_close(found, numpy_logits(DENSE, llm, edited)[-1], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("kernels", ["fast", "exact"])
def test_a_position_has_the_same_logits_alone_and_in_a_guess(kernels: str) -> None:
    engine, ids = load(DENSE, kernels)._engine, some_ids(DENSE)
    engine.next_logits(ids[:29])
    alone = [engine.next_logits(ids[:n]) for n in range(30, 38)]
    engine.next_logits([5, 4, 3])  # nothing left
    engine.next_logits(ids[:29])
    few = [engine.next_logits(ids[:30], ids[30:37])]
    few += [engine.next_logits(ids[:n]) for n in range(31, 38)]
    assert np.array_equal(np.stack(few), np.stack(alone))


def test_guesses_change_no_token() -> None:
    engine, greedy = load(DENSE, "fast")._engine, Sampling(temperature=0)
    prompt = some_ids(DENSE)[:20] * 2
    alone = list(Generation(engine, prompt, 30, greedy, ()))
    speculation = Speculation(Lookup(), clock=lambda: 0.0)
    assert list(Generation(engine, prompt, 30, greedy, (), speculation)) == alone
    assert speculation.guessed > 0


def test_two_devices_have_their_heads_and_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 40)
    llm, ids = load(DENSE, device="CPU:0,CPU:1"), some_ids(DENSE)
    for length in (5, 6, 70):
        found = llm._engine.next_logits(ids[:length])
        assert_close(found, numpy_logits(DENSE, llm, ids[:length])[-1], FLOAT32_TOLERANCE)
    assert llm.cache_capacity > 40
    for tensor in llm._engine._cache.layers[0].tensors:
        assert tensor.uop.axis == 2


@pytest.mark.parametrize("kernels", ["fast", "generic"])
def test_the_cache_is_planned_to_the_byte(kernels: str) -> None:
    llm = qwen3_tg.load("tiny", "CPU", kernels=kernels, kv_dtype="int8")
    plan, kept, config = usage.plan_of(llm), llm._engine._cache, llm.config
    used = usage.allocated_bytes("CPU")
    for layer in kept.layers:
        for tensor in layer.tensors:
            tensor.uop.base.buffer.ensure_allocated()
    found = usage.allocated_bytes("CPU") - used
    head = config.head_dim + 4
    assert (
        found
        == plan.first_cache_bytes
        == 2 * (config.num_hidden_layers * plan.first_capacity * config.num_key_value_heads * head)
    )


def test_used_is_what_was_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main("-v --thinking off --kv-dtype int8 --max-new-tokens 2 x".split()) == 0
    (used,) = (line for line in capsys.readouterr().err.splitlines() if "for 2,048 pos" in line)
    assert f"cache {2 * 5 * 2048 * 2 * (32 + 4):,} for 2,048 positions" in used


def test_int8_is_for_the_cache_on_every_device_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match=r"dtype must be one of .*bfloat16, found 'int8'"):
        qwen3_tg.load("tiny", dtype="int8")
    monkeypatch.setattr(device.found, "native_formats", lambda name: frozenset({"float32"}))
    chosen: Any = device.choose("CPU", kv_dtype="int8")
    assert (chosen.dtype, chosen.kv_dtype) == ("float32", "int8")
    assert all(one.kv_dtype == "int8" for one in device.working_policies("int8"))
