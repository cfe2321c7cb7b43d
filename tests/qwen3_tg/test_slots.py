"""Sequences side by side: each gets the logits that it would have alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import FLOAT32_TOLERANCE, assert_close, load_golden

import qwen3_tg
from qwen3_tg import kv_sizes
from qwen3_tg.errors import ContextError, DeviceError, UsageError
from qwen3_tg.slots import Slots

GOLDEN_NAME = "untied_bfloat16"
LENGTHS = [1, 7, 40, 12, 3, 9, 2, 20, 5, 16, 8, 11]  # of prompts; one is more than a chunk of 32


def load(name: str = GOLDEN_NAME, kept_bytes: int = 0, **how: Any) -> qwen3_tg.LLM:
    """Without kept prefixes, which change what is computed together, and so the last bits."""
    return qwen3_tg.load(str(load_golden(name).path), prefix_cache_bytes=kept_bytes, **how)


@pytest.fixture(scope="module", params=["fast", "exact", "generic"])
def llm(request: pytest.FixtureRequest) -> qwen3_tg.LLM:
    return load(kernels=str(request.param))


def texts(llm: qwen3_tg.LLM, more: int = 6, lengths: list[int] = LENGTHS) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(0, llm.config.vocab_size, n + more).tolist() for n in lengths]


def alone(llm: qwen3_tg.LLM, ids: list[int], first: int) -> list[np.ndarray]:
    """Logits after the first ids, and after each more."""
    return [llm.next_logits(ids[:n]) for n in range(first, len(ids) + 1)]


def test_logits_are_those_of_each_sequence_alone(llm: qwen3_tg.LLM) -> None:
    """Whatever their lengths, and whenever one ends; on a CPU's own kernels to the last bit."""
    all_ids = texts(llm)
    right = [alone(llm, ids, n) for ids, n in zip(all_ids, LENGTHS, strict=True)]
    generic = llm.policy.kernels == "generic"
    slots, running, found = llm.slots(3 if generic else 10), {}, [[] for _ in all_ids]
    waiting = list(range(len(all_ids)))
    while waiting or running:
        while waiting and slots.free:
            number = waiting.pop(0)
            slot, logits = slots.start(all_ids[number][: LENGTHS[number]])
            assert slot not in running
            running[slot] = number
            found[number].append(logits)
        for slot, number in list(running.items()):
            if len(found[number]) == len(right[number]):
                slots.end(slot)
                del running[slot]
        if running:
            new = {s: all_ids[n][LENGTHS[n] + len(found[n]) - 1] for s, n in running.items()}
            for slot, logits in slots.step(new).items():
                found[running[slot]].append(logits)
    for mine, expected in zip(found, right, strict=True):
        if generic:
            assert_close(np.stack(mine), np.stack(expected), FLOAT32_TOLERANCE / 10)
        else:
            assert np.array_equal(np.stack(mine), np.stack(expected))


@pytest.mark.parametrize("kernels", ["exact", "generic"])
@pytest.mark.parametrize("name", ["untied_bfloat16", "moe_bfloat16"])
def test_logits_are_those_of_the_reference(name: str, kernels: str) -> None:
    llm = load(name, kernels=kernels, dtype="float32")
    reference = qwen3_tg_numpy.load(load_golden(name).path)
    slots, all_ids = llm.slots(2), texts(llm, 3, [5, 2])
    started = [slots.start(ids[:-3])[0] for ids in all_ids]
    for n in (-3, -2, -1):
        new = {slot: ids[n] for slot, ids in zip(started, all_ids, strict=True)}
        found = slots.step(new)
        for slot, ids in zip(started, all_ids, strict=True):
            right = reference.logits(ids[: len(ids) + n + 1])[-1]
            assert_close(np.asarray(found[slot]), right, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", ["untied_bfloat16", "moe_bfloat16"])
def test_more_sequences_than_are_computed_alike_are_near(name: str) -> None:
    """More than 64 at once are computed as the positions of a prompt are."""
    llm = load(name, kernels="fast")
    all_ids = texts(llm, 2, [3 + n % 4 for n in range(66)])
    right = [alone(llm, ids, len(ids))[0] for ids in all_ids]
    slots = llm.slots(66)
    started = [slots.start(ids[:-2])[0] for ids in all_ids]
    for n in (-2, -1):
        found = slots.step({s: ids[n] for s, ids in zip(started, all_ids, strict=True)})
    spread = float(np.std(right))
    for slot, logits in zip(started, right, strict=True):
        assert_close(np.asarray(found[slot]), logits, 8e-3 * spread)


def test_a_slot_outgrows_its_cache_and_the_others_go_on(
    llm: qwen3_tg.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = texts(llm, 8, [5, 12])
    right = [alone(llm, one, len(one))[0] for one in ids]
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 16)
    slots = llm.slots(2)
    started = [slots.start(one[:-8])[0] for one in ids]
    for n in range(-8, 0):
        found = slots.step({s: one[n] for s, one in zip(started, ids, strict=True)})
    capacities = [slots._caches[slot].capacity for slot in started]
    assert capacities == [16, 32]
    for slot, logits in zip(started, right, strict=True):
        assert_close(np.asarray(found[slot]), logits, FLOAT32_TOLERANCE / 10)


def test_keys_and_values_are_split_over_several_devices() -> None:
    one, two = load(kernels="generic"), load(device="CPU:0,CPU:1")
    assert len(two.policy.devices) == 2
    ids = texts(one, 2, [6, 3])
    found = []
    for llm in (one, two):
        slots = llm.slots(2)
        started = [slots.start(text[:-1])[0] for text in ids]
        logits = slots.step({s: text[-1] for s, text in zip(started, ids, strict=True)})
        found.append(np.stack([np.asarray(logits[slot]) for slot in started]))
    assert_close(*found, FLOAT32_TOLERANCE / 10)


def test_what_many_prompts_begin_with_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(kernels="fast")
    engine, computed = llm._engine, []
    run = engine._run

    def counted(kind: str, new: list[int], start: int) -> np.ndarray:
        computed.append(len(new))
        return run(kind, new, start)

    monkeypatch.setattr(engine, "_run", counted)
    (same,) = texts(llm, 0, [40])
    slots = llm.slots(3)
    for n in range(3):
        slots.start([*same, n, n])
    assert sum(computed) == len(same) + 3 * 2


def test_a_batch_leaves_no_prompt_on_the_shelf_but_the_conversation_before_it() -> None:
    llm = load(kernels="fast", kept_bytes=2**20)
    talk, *prompts = texts(llm, 0, [50, 45, 48])
    llm.next_logits(talk)
    slots = llm.slots(2)
    for prompt in prompts:
        slots.start(prompt)
    assert len(llm._engine.shelf) == 1
    assert llm._engine.missing(talk) == 1


def test_a_prompt_that_does_not_fit_takes_no_slot() -> None:
    llm = load(kernels="fast", context=20)
    slots = llm.slots(1)
    with pytest.raises(ContextError, match="21 tokens do not fit"):
        slots.start([1] * 21)
    with pytest.raises(UsageError, match="not in the vocabulary"):
        slots.start([10**6])
    assert slots.free == 1 and slots.start([1, 2])[0] == 0


def test_logits_that_are_no_numbers_are_an_error_of_their_sequence_alone() -> None:
    llm = load(kernels="fast")
    slots = llm.slots(2)
    first, second = (slots.start([n])[0] for n in (1, 2))
    cache = slots._caches[second].layers[0]
    cache.k.assign(cache.k * float("nan")).realize()
    slots._graph = None
    found = slots.step({first: 5, second: 5})
    assert isinstance(found[second], DeviceError) and "not finite" in str(found[second])
    assert np.array_equal(np.asarray(found[first]), alone(llm, [1, 5], 1)[1])


def test_a_batch_that_memory_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_tg.device import memory

    llm = load(kernels="fast")
    monkeypatch.setattr(memory, "free_memory", lambda name: 10)
    with pytest.raises(DeviceError, match=r"what a batch of 4 keeps takes .* take a smaller"):
        llm.slots(4).start([1])


def test_a_sequence_that_waits_loses_nothing(llm: qwen3_tg.LLM) -> None:
    one, other = texts(llm, 3, [4, 6])
    right = [alone(llm, ids, len(ids))[0] for ids in (one, other)]
    slots = llm.slots(3)
    first, second = (slots.start(ids[:-3])[0] for ids in (one, other))
    for id in one[-3:]:
        found = slots.step({first: id})
    assert_close(np.asarray(found[first]), right[0], FLOAT32_TOLERANCE / 10)
    for id in other[-3:]:
        found = slots.step({second: id})
    assert_close(np.asarray(found[second]), right[1], FLOAT32_TOLERANCE / 10)


def test_a_sequence_may_fill_the_context_and_no_more() -> None:
    for kernels in ("fast", "generic"):
        llm = load(kernels=kernels, context=12)
        (ids,) = texts(llm, 0, [12])
        slots = llm.slots(2)
        full, other = slots.start(ids)[0], slots.start(ids[:11])[0]
        logits = slots.step({other: ids[11]})[other]
        assert_close(np.asarray(logits), llm.next_logits(ids), 1e-3)
        for slot in (full, other):
            with pytest.raises(ContextError, match="the context of 12 is full"):
                slots.step({slot: 1})


def test_what_cannot_be_asked_of_slots_is_refused(llm: qwen3_tg.LLM) -> None:
    slots = llm.slots(1)
    slot, _ = slots.start([1, 2])
    for id in (-1, llm.config.vocab_size, 0.5):
        with pytest.raises(UsageError, match="is not in the vocabulary"):
            slots.step({slot: id})
    with pytest.raises(UsageError, match="slot 7 is not in use"):
        slots.step({7: 1})
    with pytest.raises(UsageError, match="all 1 slots are taken"):
        slots.start([1])
    assert slots.step({}) == {}
    slots.end(slot)
    with pytest.raises(UsageError, match="slot 0 is not in use"):
        slots.end(slot)


def test_a_sequence_that_memory_has_no_room_for_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwen3_tg.device import memory

    llm = load(kernels="fast")
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 8)
    slots = llm.slots(2)
    (long,), (short,) = texts(llm, 0, [7]), texts(llm, 0, [3])
    first, second = slots.start(long)[0], slots.start(short)[0]
    monkeypatch.setattr(memory, "free_memory", lambda name: 10)
    found = slots.step({first: 1, second: 1})
    assert isinstance(found[first], DeviceError)
    assert "no memory for more than 8 tokens of each of 2 sequences" in str(found[first])
    assert_close(np.asarray(found[second]), llm.next_logits([*short, 1]), 1e-3)


def test_what_slots_took_is_given_back_when_they_are_dropped() -> None:
    import gc

    from tinygrad.helpers import GlobalCounters

    llm = load(kernels="fast")
    llm.next_logits([1])
    gc.collect()
    gc.disable()
    try:
        before = GlobalCounters.mem_used
        for _ in range(2):
            slots = llm.slots(4)
            slot, _ = slots.start([1, 2])
            slots.step({slot: 3})
            assert GlobalCounters.mem_used > before + slots.nbytes / 2
            del slots
            assert GlobalCounters.mem_used < before + 100_000
    finally:
        gc.enable()


def test_there_is_at_least_one_slot(llm: qwen3_tg.LLM) -> None:
    with pytest.raises(UsageError, match="size must be at least 1"):
        Slots(llm._engine, 0)
