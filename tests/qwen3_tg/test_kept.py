"""Conversations whose keys and values are kept while others are computed: within their bytes, and
put back to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import load_golden
from tinygrad import Tensor, dtypes
from tinygrad.device import Allocator
from tinygrad.runtime.ops_cpu import CPUAllocator

import qwen3_tg
from qwen3_tg import LLM, Sampling, UsageError, buffers, kv_sizes, usage
from qwen3_tg.device import policy
from qwen3_tg.generate import Engine
from qwen3_tg.placement import empty
from qwen3_tg.shelf import Kept, Shelf, common_prefix, is_lost

GOLDEN_NAME = "untied_bfloat16"
VOCAB = 251
HOW: dict[str, dict[str, Any]] = {
    "fast": {"kernels": "fast"},
    "exact": {"kernels": "exact"},
    "generic": {"kernels": "generic"},
    "bfloat16": {"kernels": "generic", "dtype": "bfloat16"},
    "two devices": {"device": "CPU:0,CPU:1"},
}


def text(seed: int, count: int = 150) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, count).tolist()
    return ids


A, B, C = text(1), text(2), text(3)


def load(prefix_cache_bytes: int = 2**24, **how: Any) -> LLM:
    """With chunks of 32 positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_PREFILL_CHUNK_FAST", 32)
        path = str(load_golden(GOLDEN_NAME).path)
        return qwen3_tg.load(path, prefix_cache_bytes=prefix_cache_bytes, **how)


def engine(prefix_cache_bytes: int = 2**24, **how: Any) -> Engine:
    return load(prefix_cache_bytes, **how)._engine


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Positions that were computed by any engine since the last call."""
    run, counts = Engine._run, [0]

    def counted(self: Engine, kind: str, new: list[int], start: int) -> np.ndarray:
        counts[0] += len(new)
        return run(self, kind, new, start)

    monkeypatch.setattr(Engine, "_run", counted)

    def since() -> int:
        found, counts[0] = counts[0], 0
        return found

    return since


@pytest.mark.parametrize("how", HOW)
def test_what_comes_back_is_to_the_last_bit_what_it_was(
    how: str, computed: Callable[[], int]
) -> None:
    undisturbed, disturbed = engine(**HOW[how]), engine(**HOW[how])
    right = [undisturbed.next_logits(A[:n]) for n in (70, 80, 81)]
    found = [disturbed.next_logits(A[:70])]
    disturbed.next_logits(B[:60])
    computed()
    assert disturbed.missing(A[:80]) == 10
    found += [disturbed.next_logits(A[:n]) for n in (80, 81)]
    assert computed() == 10 + 1
    assert np.array_equal(found, right)
    assert disturbed.missing(B[:61]) == 1, "the other one is kept now"


@pytest.mark.parametrize("kernels", ["exact", "generic"])
def test_it_comes_back_into_a_cache_that_has_grown(
    kernels: str, monkeypatch: pytest.MonkeyPatch, computed: Callable[[], int]
) -> None:
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 80)
    undisturbed, disturbed = engine(kernels=kernels), engine(kernels=kernels)
    right = [undisturbed.next_logits(A[:n]) for n in (40, 49)]
    found = [disturbed.next_logits(A[:40])]
    assert disturbed.cache_capacity == 80
    disturbed.next_logits(B[:120])
    assert disturbed.cache_capacity > 120
    computed()
    found.append(disturbed.next_logits(A[:49]))
    assert computed() == 9 and np.array_equal(found, right)


def test_it_comes_back_and_has_the_cache_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_sizes, "FIRST_STEP", 80)
    source, found = engine(kernels="exact"), engine(kernels="exact")
    source.next_logits(A[:110])
    kept = source.give(A)
    assert kept and list(kept.ids) == A[:110]
    assert found.take(kept) and found.cache_capacity == 80
    assert np.array_equal(found.next_logits(A[:115]), source.next_logits(A[:115]))


@pytest.mark.parametrize("kernels", ["fast", "exact", "generic"])
def test_it_comes_back_between_guesses(kernels: str) -> None:
    repeating = (A[:20] * 4)[:70]
    sampling = Sampling(temperature=0.8, seed=3)

    def two_turns(llm: LLM, other: bool) -> list[int]:
        first = list(llm.generate_ids(repeating, 12, sampling, ()))
        if other:
            list(llm.generate_ids((B[:15] * 5)[:66], 8, sampling, ()))
        return first + list(llm.generate_ids([*repeating, *first, *A[:5]], 12, sampling, ()))

    guessing = load(kernels=kernels, speculate="lookup")
    assert two_turns(guessing, other=True) == two_turns(load(kernels=kernels), other=False)


def test_conversations_in_turn_compute_what_they_would_alone(computed: Callable[[], int]) -> None:
    system = {"role": "system", "content": "You add and subtract numbers."}
    questions = [
        [f"Of {what}, which are many, there are 37 and then 85. " * 3 + "How many?", "now add 12"]
        for what in ("apples", "stars")
    ]

    def say(llm: LLM, messages: list[Any], question: str) -> tuple[str, int]:
        messages.append({"role": "user", "content": question})
        computed()
        greedy = Sampling(temperature=0)
        pieces = llm.chat(messages, thinking=False, max_new_tokens=8, sampling=greedy)
        answer = "".join(piece.text for piece in pieces if isinstance(piece, qwen3_tg.Text))
        messages.append({"role": "assistant", "content": answer})
        return answer, computed()

    def alone(talk: list[str]) -> list[tuple[str, int]]:
        llm, messages = qwen3_tg.load("tiny"), [system]
        return [say(llm, messages, question) for question in talk]

    right = [alone(talk) for talk in questions]
    llm, talks = qwen3_tg.load("tiny"), ([system], [system])
    found: list[list[tuple[str, int]]] = [[], []]
    for turn in range(2):
        for n, talk in enumerate(talks):
            found[n].append(say(llm, talk, questions[n][turn]))
    first = right[1][0][0], found[1][0][1]  # its system message was computed for the other one
    assert first[1] < right[1][0][1]
    assert found == [right[0], [first, right[1][1]]]
    assert found[0][1][1] < found[0][0][1] / 2 and llm.kept[0] == 1


def test_a_common_beginning_serves_a_third_text(computed: Callable[[], int]) -> None:
    found = engine(kernels="exact")
    system = A[:50]
    for rest in (B[:60], C[:60]):
        found.next_logits(text(9)[:60])  # so that neither is cached
        found.next_logits([*system, *rest])
    found.next_logits(text(9)[:60])
    computed()
    found.next_logits([*system, *A[100:120]])
    assert computed() == 20
    assert found.missing([*system, *B[:61]]) == 1, "both are still there"
    assert found.missing([*system, *C[:61]]) == 1


def test_a_next_turn_keeps_nothing_of_the_thinking_that_it_drops() -> None:
    found = engine(kernels="exact")
    found.next_logits(A[:40])
    for n in range(41, 120):  # thinks for long
        found.next_logits(A[:n])
    found.next_logits([*A[:38], *B[:30]])  # the next prompt
    assert found.shelf.nbytes == 0
    found.next_logits(C[:40])
    assert [len(kept.ids) for kept in found.shelf._texts] == [68]
    found.next_logits([*A[:38], *B[:26], *C[:40]])  # its next turn
    assert [len(kept.ids) for kept in found.shelf._texts] == [40], "the former one is out of date"


@pytest.mark.parametrize(
    ("length", "prompt", "shared", "lost"),
    [
        (100, 100, 0, True),
        (400, 400, 350, True),
        (400, 400, 351, False),  # most of it stays
        (1000, 40, 36, False),  # the next turn, without the thinking
        (1000, 40, 35, True),
        (31, 31, 0, False),  # too short
        (1000, 1, 0, True),
    ],
)
def test_what_is_lost(length: int, prompt: int, shared: int, lost: bool) -> None:
    assert is_lost(length, prompt, shared) == lost


class TestBytes:
    def test_the_one_needed_longest_ago_goes_first(self) -> None:
        one = sum(engine(0, kernels="exact").row_bytes)
        found, D = engine(120 * one, kernels="exact"), text(4)

        def missing(*texts: list[int]) -> list[int]:
            return [found.missing(ids[:52]) for ids in texts]

        for ids in (A, B, C, D):
            found.next_logits(ids[:50])
            assert found.shelf.nbytes <= 120 * one
        assert missing(A, B, C, D) == [52, 2, 2, 2]
        found.next_logits(B[:51])  # comes back; D goes there
        found.next_logits(A[:40])  # B goes there, and C out
        assert missing(A, B, C, D) == [12, 1, 52, 2]

    def test_one_that_is_exchanged_is_not_pushed_out_by_the_other(
        self, computed: Callable[[], int]
    ) -> None:
        found = engine(0, kernels="exact")
        found = engine(60 * sum(found.row_bytes), kernels="exact")
        found.next_logits(A[:50])
        found.next_logits(B[:50])
        for n in (51, 52, 53):
            computed()
            found.next_logits(A[:n])
            found.next_logits(B[:n])
            assert computed() == 2

    def test_none_is_kept_where_the_limit_is_0_or_too_small(self) -> None:
        one = sum(engine(0, kernels="exact").row_bytes)
        for limit in (0, 49 * one):
            found = engine(limit, kernels="exact")
            found.next_logits(A[:50])
            found.next_logits(B[:50])
            assert found.shelf.nbytes == 0 and found.missing(A[:51]) == 51

    def test_a_negative_limit_is_refused(self) -> None:
        with pytest.raises(UsageError, match="prefix_cache_bytes must be at least 0"):
            qwen3_tg.load("tiny", prefix_cache_bytes=-1)

    def test_what_is_kept_is_no_memory_of_the_device(self) -> None:
        llm = load(kernels="generic")
        llm.next_logits(A[:60])
        before = usage.taken_bytes(llm)
        llm.next_logits(B[:60])
        assert usage.taken_bytes(llm) == before
        one = sum(llm._engine.row_bytes)
        assert llm.kept == (1, 60 * one)
        assert f"kept of other texts in main memory {60 * one:,}" in usage.used_report(llm)


def test_threads_may_share_what_is_kept() -> None:
    found, texts = engine(kernels="exact"), [A, B, C]
    right = []
    for ids in texts:
        undisturbed = engine(kernels="exact")
        right.append([undisturbed.next_logits(ids[:n]) for n in range(60, 66)])

    def run(ids: list[int]) -> list[np.ndarray]:
        return [found.next_logits(ids[:n]) for n in range(60, 66)]

    with ThreadPoolExecutor(3) as threads:
        assert np.array_equal(list(threads.map(run, texts)), right)


class TestShelf:
    def rows(self, n: int, mark: int = 0) -> list[np.ndarray]:
        return [np.full((n, 4), mark, np.uint8), np.full((n, 2), mark, np.uint8)]

    def keep(self, shelf: Shelf, ids: list[int]) -> bool:
        return shelf.keep(ids, len(ids), len(ids) * 6, lambda: self.rows(len(ids)))

    def test_a_beginning_of_another_text_is_not_kept_twice(self) -> None:
        shelf = Shelf(1000)
        assert self.keep(shelf, A[:10]) and self.keep(shelf, B[:10]) and self.keep(shelf, A[:20])
        assert [len(kept.ids) for kept in shelf._texts] == [10, 20] and shelf.nbytes == 180
        assert self.keep(shelf, A[:15]), "it is there, as part of the longer one"
        assert len(shelf) == 2
        assert shelf.find(A[:12], 1) == (shelf._texts[1], 12)
        assert shelf.find(A[:12], 13) is None and shelf.find(C, 1) is None

    def test_nothing_is_read_for_one_that_is_too_large(self) -> None:
        assert not Shelf(59).keep(A[:10], 10, 60, lambda: pytest.fail("read"))

    def test_main_memory_that_is_full_keeps_nothing_and_is_no_error(self) -> None:
        def full() -> list[np.ndarray]:
            raise MemoryError

        assert not (shelf := Shelf(100)).keep(A[:10], 10, 60, full)
        assert len(shelf) == 0

    def test_the_first_of_it_has_the_first_rows(self) -> None:
        kept = Kept(A[:10], self.rows(10), 8)
        assert kept.nbytes == 60 and kept.first(5).nbytes == 30
        assert (kept.first(9).prompt, kept.first(5).prompt) == (8, 5)

    def test_common_prefix(self) -> None:
        assert [common_prefix(A, b) for b in ([], A, A[:3], [*A[:7], -1], B)] == [0, 150, 3, 7, 0]


class TestBreakingOff:
    def test_rows_that_are_put_back_in_part_count_as_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, undisturbed = engine(kernels="exact"), engine(kernels="exact")
        _, right = [undisturbed.next_logits(A[:n]) for n in (70, 71)]
        found.next_logits(A[:70])
        found.next_logits(B[:60])
        put = found._cache.put

        def break_off(rows: list[np.ndarray]) -> None:
            put([*rows[:1], *(np.zeros_like(one) for one in rows[1:])])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(found._cache, "put", break_off)
            found.next_logits(A[:71])
        assert found._cached_ids == []
        assert found.missing(A[:71]) == found.missing(B[:61]) == 1, "both are on the shelf"
        assert np.array_equal(found.next_logits(A[:71]), right)

    def test_rows_that_cannot_be_read_stay_where_they_are(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = engine(kernels="exact")
        found.next_logits(A[:70])

        def break_off(n: int) -> list[np.ndarray]:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(found._cache, "rows", break_off)
            found.next_logits(B[:60])
        assert found._cached_ids == A[:70] and len(found.shelf) == 0

    def test_a_step_that_breaks_off_leaves_what_was_kept(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = engine(kernels="exact")
        found.next_logits(A[:70])

        def break_off(kind: str, new: list[int], start: int) -> np.ndarray:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(found, "_run", break_off)
            found.next_logits(B[:60])
        assert found._cached_ids == [] and found.missing(A[:71]) == 1


WAYS = ["as the host's memory", "by parts", "as a whole"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To call before buffers are read or written: then they are, in this way."""

    def choose() -> None:
        if request.param != WAYS[0]:
            monkeypatch.delattr(CPUAllocator, "_as_buffer")
        if request.param == WAYS[2]:
            monkeypatch.setattr(CPUAllocator, "_offset", Allocator._offset, raising=False)

    return choose


@pytest.mark.parametrize("devices", [("CPU",), ("CPU", "CPU:1")], ids=["one", "two"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_the_first_positions_are_read_and_written_in_any_way(
    way: Callable[[], None], dtype: str, devices: tuple[str, ...]
) -> None:
    shape = (1, 64, 4, 8)
    tensor = empty(shape, getattr(dtypes, dtype), devices, axis=2)
    whole = buffers.part_bytes(tensor)
    part = whole[0] // 64 * 10
    random = np.random.default_rng(0)
    first = [random.integers(0, 60, n).astype(np.uint8) for n in whole]
    second = [random.integers(0, 60, part).astype(np.uint8) for _ in devices]
    buffers.write_first(tensor, first)
    if dtype == "float16":  # heads are split between devices, and position comes first
        heads = [one.view(np.float16).reshape(1, 64, 4 // len(devices), 8) for one in first]
        assert np.array_equal(tensor.numpy(), np.concatenate(heads, axis=2))
    way()
    assert np.array_equal(buffers.read_first(tensor, part), [one[:part] for one in first])
    buffers.write_first(tensor, second)
    right = [np.concatenate([b, a[part:]]) for a, b in zip(first, second, strict=True)]
    assert np.array_equal(buffers.read_first(tensor, whole[0]), right)


def test_views_of_a_buffer_are_gone_after_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(CPUAllocator, "_as_buffer")
    tensor = Tensor.zeros(64, dtype=dtypes.float32, device="CPU").contiguous().realize()
    buffers.write_first(tensor, buffers.read_first(tensor, 40))
    assert buffers._buffers(tensor)[0].allocated_views == 0


def test_texts_come_back_in_any_way(way: Callable[[], None]) -> None:
    undisturbed, disturbed = engine(kernels="exact"), engine(kernels="exact")
    right = [undisturbed.next_logits(A[:n]) for n in (70, 80)]
    disturbed.next_logits(B[:90])
    kept = disturbed.give(B)
    found = [disturbed.next_logits(A[:70])]
    assert kept
    way()
    rows = disturbed._cache.rows(70)
    disturbed._cache.put(kept.rows)
    disturbed._cache.put(rows)
    pytest.MonkeyPatch().undo()
    found.append(disturbed.next_logits(A[:80]))
    assert np.array_equal(found, right)
