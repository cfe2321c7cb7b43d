"""The engine: what the cache holds never changes what is computed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import FLOAT32_TOLERANCE, assert_close, load_golden
from tinygrad import Tensor
from tinygrad.codegen import to_program_cache
from tinygrad.helpers import Context

import qwen3_tg
from qwen3_tg import kv_sizes
from qwen3_tg.device import policy
from qwen3_tg.errors import ContextError, DeviceError, UsageError
from qwen3_tg.forward import Fast
from qwen3_tg.generate import Engine, Generation
from qwen3_tg.sampling import Sampling

GOLDEN_NAME = "untied_bfloat16"
GREEDY = Sampling(temperature=0)


def new_engine(kernels: str, context: int | None = None, kept_bytes: int = 0) -> Engine:
    """With chunks of 32 positions."""
    path = str(load_golden(GOLDEN_NAME).path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_PREFILL_CHUNK_FAST", 32)
        how = {"context": context, "kernels": kernels, "prefix_cache_bytes": kept_bytes}
        return qwen3_tg.load(path, **how)._engine


@pytest.fixture(scope="module", params=["generic", "exact"])
def kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(kernels: str) -> Engine:
    return new_engine(kernels)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """More than two prefill chunks."""
    golden = load_golden(GOLDEN_NAME)
    return (golden.ids + golden.greedy_ids + golden.ids)[:90]


@pytest.fixture(scope="module")
def expected(engine: Engine, ids: list[int]) -> np.ndarray:
    return engine.all_logits(ids)


def test_uncached_logits_are_transformers_own(engine: Engine) -> None:
    golden = load_golden(GOLDEN_NAME)
    assert_close(engine.all_logits(golden.ids), golden.logits, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 34, 63, 64, 65, 66, 90])
def test_prefill_of_any_length_equals_one_pass(
    engine: Engine, ids: list[int], expected: np.ndarray, length: int
) -> None:
    engine.next_logits([5, 4, 3])  # nothing left from the last length
    assert_close(engine.next_logits(ids[:length]), expected[length - 1], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("split", [1, 2, 31, 32, 33, 64, 89])
def test_cached_equals_uncached_at_any_split(
    engine: Engine, ids: list[int], expected: np.ndarray, split: int
) -> None:
    engine.next_logits([5, 4, 3])
    engine.next_logits(ids[:split])
    assert_close(engine.next_logits(ids), expected[-1], FLOAT32_TOLERANCE)


def test_token_by_token_equals_one_pass(
    engine: Engine, ids: list[int], expected: np.ndarray
) -> None:
    found = np.stack([engine.next_logits(ids[: n + 1]) for n in range(40)])
    assert_close(found, expected[:40], FLOAT32_TOLERANCE)


def test_an_edited_earlier_token_is_computed_anew(engine: Engine, ids: list[int]) -> None:
    engine.next_logits(ids)
    edited = [*ids[:20], (ids[20] + 1) % 251, *ids[21:]]
    found = engine.next_logits(edited)
    assert_close(found, engine.all_logits(edited)[-1], FLOAT32_TOLERANCE)


def test_the_same_ids_again_give_the_same_logits(engine: Engine, ids: list[int]) -> None:
    assert_close(engine.next_logits(ids), engine.next_logits(ids), FLOAT32_TOLERANCE)


def test_two_generations_may_take_turns(engine: Engine, ids: list[int]) -> None:
    prompts = [ids[:40], ids[3:20]]
    alone = [list(Generation(engine, p, 6, GREEDY, ())) for p in prompts]
    both = [Generation(engine, p, 6, GREEDY, ()) for p in prompts]
    together = [[next(g) for g in both] for _ in range(6)]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_threads_may_share_an_engine(
    engine: Engine, ids: list[int], expected: np.ndarray, kernels: str
) -> None:
    other = new_engine(kernels)

    def run(n: int) -> np.ndarray:
        return [engine, other][n % 2].next_logits(ids[: 40 + n])

    with ThreadPoolExecutor(4) as threads:
        found = np.stack(list(threads.map(run, range(8))))
    assert_close(found, expected[39:47], FLOAT32_TOLERANCE)


def test_only_new_tokens_are_computed(
    engine: Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.next_logits(ids[:50])
    steps: list[tuple[str, int, int]] = []
    run = engine._run

    def watch(kind: str, new: list[int], start: int) -> np.ndarray:
        steps.append((kind, len(new), start))
        return run(kind, new, start)

    monkeypatch.setattr(engine, "_run", watch)
    engine.next_logits(ids[:51])
    engine.next_logits(ids[:60])
    assert steps == [("decode", 1, 50), ("prefill", 9, 51)]


def test_a_step_that_breaks_off_leaves_no_trace(
    engine: Engine, ids: list[int], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [(i + 1) % 251 for i in ids]
    engine.next_logits(other)
    run = engine._run

    def break_off(kind: str, new: list[int], start: int) -> np.ndarray:
        logits = run(kind, new, start)  # the cache has been overwritten
        if start >= 32:
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_run", break_off)
        engine.next_logits(ids)
    assert_close(engine.next_logits(other), engine.all_logits(other)[-1], FLOAT32_TOLERANCE)
    assert_close(engine.next_logits(ids), expected[-1], FLOAT32_TOLERANCE)


def test_captured_graphs_equal_uncaptured_ones(
    ids: list[int], expected: np.ndarray, kernels: str
) -> None:
    engine = new_engine(kernels)
    with Context(JIT=0):
        first = engine.next_logits(ids[:40])
        second = engine.next_logits(ids[:41])
    assert_close(np.stack([first, second]), expected[39:41], FLOAT32_TOLERANCE)


def test_no_length_is_compiled_anew(engine: Engine, ids: list[int]) -> None:
    engine.next_logits(ids[:50])
    engine.next_logits(ids[:51])
    programs, graphs = len(to_program_cache), dict(engine._graphs)
    for length in (1, 7, 33, 52, 90):
        engine.next_logits(ids[:length])
    assert len(to_program_cache) == programs
    assert engine._graphs == graphs


def test_a_cache_that_grows_keeps_what_it_holds(
    ids: list[int], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 40)
    monkeypatch.setattr(kv_sizes, "GROWTH", 2)
    engine = new_engine(kernels)
    assert engine._cache.capacity == 40
    assert_close(engine.next_logits(ids[:5]), expected[4], FLOAT32_TOLERANCE)
    assert engine._cache.capacity == 40
    assert_close(engine.next_logits(ids[:20]), expected[19], FLOAT32_TOLERANCE)
    assert engine._cache.capacity == 80
    assert_close(engine.next_logits(ids), expected[-1], FLOAT32_TOLERANCE)
    assert engine._cache.capacity == 160


@pytest.mark.parametrize(
    ("name", "at", "error"), [("assign", 3, KeyboardInterrupt), ("empty", 3, MemoryError)]
)
def test_a_growth_that_breaks_off_leaves_the_cache_as_it_was(
    ids: list[int],
    expected: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    at: int,
    error: type[BaseException],
    kernels: str,
) -> None:
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 64)
    engine = new_engine(kernels)
    engine.next_logits(ids[:20])
    real, calls = getattr(Tensor, name), []

    def break_off(*given: object, **more: object) -> Tensor:
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Tensor, name, break_off)
        engine.next_logits(ids[:70])
    assert engine._cache.capacity == 64
    assert_close(engine.next_logits(ids[:30]), expected[29], FLOAT32_TOLERANCE)
    assert_close(engine.next_logits(ids[:75]), expected[74], FLOAT32_TOLERANCE)
    assert engine._cache.capacity == 160


def test_generation_ends_where_the_context_is_full(ids: list[int], kernels: str) -> None:
    engine = new_engine(kernels, context=45)
    generation = Generation(engine, ids[:40], None, GREEDY, ())
    assert len(list(generation)) == 5
    assert generation.stop_reason == "context"
    with pytest.raises(ContextError, match="45 tokens and the context 45"):
        Generation(engine, ids[:45], None, GREEDY, ())
    with pytest.raises(ContextError, match="46 tokens do not fit in the context of 45"):
        engine.all_logits(ids[:46])


def test_the_last_position_of_a_full_context_is_right(
    ids: list[int], expected: np.ndarray, kernels: str
) -> None:
    engine = new_engine(kernels, context=90)
    assert_close(engine.next_logits(ids), expected[-1], FLOAT32_TOLERANCE)


def test_generation_stops_at_a_stop_id_and_does_not_give_it(engine: Engine) -> None:
    golden = load_golden(GOLDEN_NAME)
    stop = golden.greedy_ids[5]
    generation = Generation(engine, golden.ids, 24, GREEDY, {stop})
    given = list(generation)
    assert given == golden.greedy_ids[: golden.greedy_ids.index(stop)]
    assert (generation.stop_reason, generation.stop_id) == ("stop", stop)
    assert next(generation, None) is None, "an ended generation stays ended"


def test_inserted_ids_are_continued_as_if_generated(engine: Engine, ids: list[int]) -> None:
    generation = Generation(engine, ids[:30], 10, GREEDY, ())
    next(generation)
    assert generation.insert(ids[30:34]) == ids[30:34]
    assert generation.new_tokens == 5
    assert len(list(generation)) == 5
    assert generation.stop_reason == "length"


def test_ids_and_limits_that_are_no_integers_are_refused(engine: Engine) -> None:
    for wrong in (1.5, "a", -1, 251, None):
        with pytest.raises(UsageError, match=f"token id {wrong!r} is not in the vocabulary of 251"):
            engine.next_logits([1, wrong])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"max_new_tokens must be at least 1 .* found 2\.5"):
        Generation(engine, [1], 2.5, GREEDY, ())  # type: ignore[arg-type]


def test_more_inserted_ids_than_were_wanted_end_it(engine: Engine, ids: list[int]) -> None:
    generation = Generation(engine, ids[:30], 3, GREEDY, ())
    next(generation)
    generation.insert(ids[30:34])
    assert list(generation) == []
    assert generation.stop_reason == "length"


def test_sampling_repeats_with_its_seed_and_differs_with_another(
    engine: Engine, ids: list[int]
) -> None:
    def draw(seed: int) -> list[int]:
        return list(Generation(engine, ids[:10], 12, Sampling(temperature=1.5, seed=seed), ()))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("bad", [[], [-1], [10**6]])
def test_impossible_ids_are_refused(engine: Engine, bad: list[int]) -> None:
    with pytest.raises(UsageError):
        engine.next_logits(bad)


def test_logits_that_are_not_finite_are_an_error_and_no_token(ids: list[int], kernels: str) -> None:
    engine = new_engine(kernels)
    norm = engine.forward.model.norm
    bad = np.full(norm.weight.shape, 0x7FC0, dtype=np.uint16)  # of bfloat16
    norm.weight = replace(norm.weight, arrays={"data": Tensor(bad, device="CPU").realize()})
    if isinstance(engine.forward, Fast):
        engine.forward = Fast(engine.forward.model, engine.forward.kernels)
    with pytest.raises(DeviceError, match="not finite"):
        engine.next_logits(ids[:3])
