"""Speculative decoding changes the time, never a token."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import FLOAT32_TOLERANCE, assert_close, load_golden

import qwen3_tg
from qwen3_tg import LLM, End, Sampling, UsageError
from qwen3_tg.cli.main import main
from qwen3_tg.device import policy
from qwen3_tg.generate import Engine, Generation
from qwen3_tg.pace import LENGTHS, Pace
from qwen3_tg.reply import Piece
from qwen3_tg.sampling import candidates
from qwen3_tg.speculate import Choose, Draft, Lookup, Speculation, check_vocabulary
from qwen3_tg.tokenizer import Tokenizer

GOLDEN_NAME = "untied_bfloat16"
VOCAB = 251
TINY = Path(qwen3_tg.__file__).parent / "tiny"
GREEDY = Sampling(temperature=0)
HOT = Sampling(temperature=1.2, top_p=0.95, seed=5)
PENALISED = Sampling(1.0, seed=9, repetition_penalty=1.3, frequency_penalty=0.4)


def new_engine(kernels: str, context: int | None = None) -> Engine:
    """With chunks of 32 positions."""
    path = str(load_golden(GOLDEN_NAME).path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_PREFILL_CHUNK_FAST", 32)
        return qwen3_tg.load(path, context=context, kernels=kernels)._engine


@pytest.fixture(scope="module", params=["fast", "exact", "generic"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return new_engine(str(request.param))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    golden = load_golden(GOLDEN_NAME)
    return (golden.ids + golden.greedy_ids + golden.ids)[:60]


class Told:
    """Guesses what it was told, with every so many-th token wrong: all lengths are accepted."""

    captures = 0

    def __init__(self, text: Sequence[int], wrong_every: int = 0):
        self._text, self._wrong_every = list(text), wrong_every

    def prepare(self, ids: Sequence[int]) -> None:
        pass

    def guess(self, ids: Sequence[int], most: int, choose: Choose) -> list[int]:
        def said(n: int) -> int:
            wrong = self._wrong_every and n % self._wrong_every == 0
            return (self._text[n] + bool(wrong)) % VOCAB

        return [said(n) for n in range(len(ids), min(len(ids) + most, len(self._text)))]


def always(guesser: Any) -> Speculation:
    """No time passes, so that it never seems to lose."""
    return Speculation(guesser, clock=lambda: 0.0)


def generated(
    engine: Any,
    prompt: Sequence[int],
    count: int | None,
    sampling: Sampling,
    speculation: Speculation | None = None,
    stop_ids: Sequence[int] = (),
) -> tuple[list[int], Generation]:
    generation = Generation(cast(Engine, engine), prompt, count, sampling, stop_ids, speculation)
    return list(generation), generation


@pytest.mark.parametrize("sampling", [GREEDY, HOT, PENALISED], ids=["greedy", "hot", "penalised"])
def test_tokens_are_those_without_guesses(
    engine: Engine, ids: list[int], sampling: Sampling
) -> None:
    for prompt in (ids[:1], ids[:7], ids):
        alone, _ = generated(engine, prompt, 40, sampling)
        text = prompt + alone
        told: list[Any] = [Told(text, every) for every in (0, 1, 2, 3, 5, 11)]
        for guesser in [*told, Lookup()]:
            speculation = always(guesser)
            found, _ = generated(engine, prompt, 40, sampling, speculation)
            assert found == alone
            assert speculation.right <= speculation.guessed
            assert speculation.guessed or isinstance(guesser, Lookup)


def test_a_right_guess_is_accepted_whole_and_a_wrong_one_not_at_all(
    engine: Engine, ids: list[int]
) -> None:
    alone, _ = generated(engine, ids, 40, GREEDY)
    for every, share in ((0, 1.0), (1, 0.0)):
        speculation = always(Told(ids + alone, every))
        generated(engine, ids, 40, GREEDY, speculation)
        assert speculation.guessed > 10
        assert speculation.right == share * speculation.guessed


def test_a_position_has_the_same_logits_alone_and_in_a_guess(
    engine: Engine, ids: list[int]
) -> None:
    """To the last bit with a CPU's own kernels; tinygrad's lowering adds up in another order."""

    def begin() -> None:
        engine.next_logits([5, 4, 3])  # nothing left
        engine.next_logits(ids[:29])

    begin()
    alone = [engine.next_logits(ids[:n]) for n in range(30, 38)]
    for guessed in (1, 3, 6, 7):
        begin()
        few = [engine.next_logits(ids[:30], ids[30 : 30 + guessed])]
        assert engine.missing(ids[:31]) == 0
        few += [engine.next_logits(ids[: 31 + n]) for n in range(guessed)]
        if engine.forward.__class__.__name__ == "Fast":
            assert np.array_equal(np.stack(few), np.stack(alone[: guessed + 1]))
        assert_close(np.stack(few), np.stack(alone[: guessed + 1]), FLOAT32_TOLERANCE)


def test_a_wrong_guess_does_not_count_as_cached(engine: Engine, ids: list[int]) -> None:
    right = engine.next_logits(ids[:40])
    engine.next_logits(ids[:29])
    wrong = [(id + 1) % VOCAB for id in ids[30:37]]
    engine.next_logits(ids[:30], wrong)
    assert engine.missing(ids[:31]) == 1
    assert engine.missing(ids[:40]) == 10
    assert_close(engine.next_logits(ids[:40]), right, FLOAT32_TOLERANCE)


def test_a_right_guess_counts_as_cached_only_once_it_is_asked_for(
    engine: Engine, ids: list[int]
) -> None:
    engine.next_logits(ids[:29])
    engine.next_logits(ids[:30], ids[30:37])
    engine.next_logits(ids[:31])
    assert engine.missing(ids[:32]) == 0
    assert engine.missing(ids[:40]) == 9


def test_a_guess_that_breaks_off_leaves_no_trace(
    engine: Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine.next_logits(ids[:33])
    engine.next_logits(ids[:29])
    run = engine._run

    def break_off(kind: str, new: list[int], start: int) -> np.ndarray:
        run(kind, new, start)  # the cache has been overwritten
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_run", break_off)
        engine.next_logits(ids[:30], [1, 2, 3])
    assert engine.missing(ids[:33]) == 4
    assert_close(engine.next_logits(ids[:33]), right, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("kernels", ["exact", "generic"])
def test_a_context_that_fills_up_within_a_guess(kernels: str, ids: list[int]) -> None:
    engine = new_engine(kernels, context=45)
    alone, _ = generated(engine, ids[:30], None, GREEDY)
    for every in (0, 4):
        speculation = always(Told(ids[:30] + alone + [1] * 20, every))
        found, generation = generated(engine, ids[:30], None, GREEDY, speculation)
        assert found == alone
        assert generation.stop_reason == "context"
        assert len(engine._cached_ids) <= 45
    assert len(alone) == 15
    engine.next_logits(ids[:43])
    engine.next_logits(ids[:44], [1] * 20)
    assert (len(engine._cached_ids), len(engine._ahead)) == (44, 1), "the rest does not fit"


def test_limits_within_a_guess_end_it_where_they_would(engine: Engine, ids: list[int]) -> None:
    alone, _ = generated(engine, ids, 30, HOT)
    for count in range(1, 14):
        found, generation = generated(engine, ids, count, HOT, always(Told(ids + alone)))
        assert (found, generation.stop_reason) == (alone[:count], "length")
        assert len(engine._cached_ids) < len(ids) + count, "nothing beyond the wanted was guessed"
    for stop in dict.fromkeys(alone[:12]):
        found, generation = generated(engine, ids, 30, HOT, always(Told(ids + alone)), [stop])
        assert (found, generation.stop_id) == (alone[: alone.index(stop)], stop)


def test_inserted_ids_are_continued_as_without_guesses(engine: Engine, ids: list[int]) -> None:
    def run(speculation: Speculation | None) -> list[int]:
        generation = Generation(engine, ids[:30], 25, HOT, (), speculation)
        found = [next(generation) for _ in range(5)]
        found += generation.insert(ids[30:36])
        generation.sampling = GREEDY
        return found + list(generation)

    alone = run(None)
    for every in (0, 3):
        assert run(always(Told(ids[:30] + alone, every))) == alone
    assert run(always(Told(ids[:30] + alone[:5] + alone))) == alone  # does not know of the insert


def test_two_generations_with_guesses_may_take_turns(engine: Engine, ids: list[int]) -> None:
    prompts = [ids[:40], ids[3:20]]
    alone = [generated(engine, prompt, 12, HOT)[0] for prompt in prompts]
    both = [
        Generation(engine, prompt, 12, HOT, (), always(Told(prompt + text, 4)))
        for prompt, text in zip(prompts, alone, strict=True)
    ]
    together = [[next(g) for g in both] for _ in range(12)]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_one_graph_more_is_captured_and_only_for_guesses(ids: list[int]) -> None:
    engine = new_engine("exact")
    alone, _ = generated(engine, ids, 30, GREEDY)
    assert engine.captures == len(engine._graphs) == 2
    for every in (0, 2, 3, 7):
        generated(engine, ids, 30, GREEDY, always(Told(ids + alone, every)))
    assert engine.captures == len(engine._graphs) == 3


def test_a_draft_that_is_the_model_itself_is_always_right(ids: list[int]) -> None:
    engine, other = new_engine("exact"), new_engine("exact")
    for sampling in (GREEDY, HOT, PENALISED):
        speculation = always(Draft(other))
        alone, _ = generated(engine, ids, 40, sampling)
        assert generated(engine, ids, 40, sampling, speculation)[0] == alone
        assert speculation.right == speculation.guessed > 20


def test_a_draft_with_a_smaller_context_falls_silent(ids: list[int]) -> None:
    engine, other = new_engine("exact"), new_engine("exact", context=50)
    speculation = always(Draft(other))
    alone, _ = generated(engine, ids[:40], 40, GREEDY)
    assert generated(engine, ids[:40], 40, GREEDY, speculation)[0] == alone
    assert 0 < speculation.guessed <= 11
    assert generated(engine, ids[:55], 20, GREEDY, always(Draft(other)))[0]


class TestLookup:
    def guess(self, ids: list[int], most: int = 5) -> list[int]:
        lookup = Lookup()
        lookup.prepare(ids)
        return lookup.guess(ids, most, lambda logits, ahead: 0)

    def test_it_says_what_followed_the_same_tokens(self) -> None:
        assert self.guess([1, 2, 3, 4, 5, 6, 9, 1, 2]) == [3, 4, 5, 6, 9]
        assert self.guess([1, 2, 3, 4]) == []
        assert self.guess([]) == self.guess([1]) == self.guess([1, 1]) == []

    def test_longer_matches_come_first_then_later_ones(self) -> None:
        assert self.guess([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [3]
        assert self.guess([6, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [4]

    def test_what_repeats_is_continued_for_ever(self) -> None:
        assert self.guess([5, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]

    def test_step_by_step_it_knows_what_it_knows_at_once(self) -> None:
        ids = np.random.default_rng(0).integers(0, 4, 200).tolist()
        lookup = Lookup()
        for n in range(len(ids)):
            lookup.prepare(ids[:n])
            assert lookup.guess(ids[:n], 5, lambda logits, ahead: 0) == self.guess(ids[:n])


class Scripted:
    """An engine whose logits are a function of the ids, on a clock of its own: `seconds` says what
    a step of so many positions takes."""

    context, captures = 100_000, 0

    def __init__(
        self, logits: Callable[[Sequence[int]], np.ndarray], seconds: Callable[[int], float]
    ):
        self._logits, self._seconds = logits, seconds
        self._held: list[int] = []
        self.now, self.steps = 0.0, Counter[int]()

    def missing(self, ids: Sequence[int]) -> int:
        if list(ids) == self._held[: len(ids)]:
            return 0
        return 1 if list(ids[:-1]) == self._held[: len(ids) - 1] else len(ids)

    def next_logits(self, ids: Sequence[int], guess: Sequence[int] = ()) -> np.ndarray:
        if self.missing(ids):
            self._held = [*ids, *guess]
            self.now += self._seconds(1 + len(guess))
            self.steps[1 + len(guess)] += 1
        return self._logits(ids)

    def speculation(self, guesser: Any) -> Speculation:
        return Speculation(guesser, clock=lambda: self.now)


def by_last(ids: Sequence[int]) -> np.ndarray:
    """Logits that depend on the last two ids."""
    return np.random.default_rng([3, *ids[-2:]]).normal(0, 2, VOCAB).astype(np.float32)


def free(positions: int) -> float:
    return 1 + 0.01 * positions


def dear(positions: int) -> float:
    return float(positions)


@pytest.mark.parametrize("guesser", [Lookup, lambda: Told([0] * 5000)])
def test_the_distribution_is_that_of_the_logits(guesser: Callable[[], Any]) -> None:
    logits = np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).astype(np.float32)
    sampling = Sampling(temperature=1.0, seed=11)
    engine = Scripted(lambda ids: logits, free)
    found, generation = generated(engine, [0], 4000, sampling, engine.speculation(guesser()))
    assert generation.speculation is not None
    assert generation.speculation.guessed > 1000
    ids, p = candidates(logits, sampling)
    expected = 4000 * p
    observed = np.bincount(found, minlength=6)[ids]
    # 5 degrees of freedom: 20.5 is passed once in a thousand
    assert ((observed - expected) ** 2 / expected).sum() < 20.5
    # and a token does not depend on the one before: 25 degrees, 52.6
    pairs = Counter(pairwise(found))
    table = np.array([[pairs[a, b] for b in ids] for a in ids])
    expected_pairs = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert ((table - expected_pairs) ** 2 / expected_pairs).sum() < 52.6


def test_guesses_that_win_grow_to_the_longest_and_the_gain_is_told() -> None:
    engine = Scripted(by_last, free)
    alone, _ = generated(Scripted(by_last, free), [1, 2], 400, HOT)
    speculation = engine.speculation(Told([1, 2, *alone]))
    assert generated(engine, [1, 2], 400, HOT, speculation)[0] == alone
    assert max(engine.steps) == LENGTHS[-1] + 1
    assert engine.steps[LENGTHS[-1] + 1] > 30
    assert engine.now < 100
    assert speculation.gain == pytest.approx(400 * free(1) / engine.now, rel=0.05)


def test_guesses_that_lose_are_left_away_but_for_a_try_now_and_then() -> None:
    engine = Scripted(by_last, dear)
    alone, _ = generated(Scripted(by_last, free), [1, 2], 1500, HOT)
    speculation = engine.speculation(Told([1, 2, *alone], 2))
    assert generated(engine, [1, 2], 1500, HOT, speculation)[0] == alone
    assert engine.now < 1500 * 1.1
    tries = sum(count for width, count in engine.steps.items() if width > 1)
    assert 12 <= tries <= 60
    assert speculation.gain is not None
    assert 0.9 < speculation.gain < 1


def test_what_lost_is_taken_up_again_when_it_pays() -> None:
    price = [dear]
    engine = Scripted(by_last, lambda positions: price[0](positions))
    alone, _ = generated(Scripted(by_last, free), [1, 2], 1500, HOT)
    speculation = engine.speculation(Told([1, 2, *alone], 3))
    generation = Generation(cast(Engine, engine), [1, 2], 1500, HOT, (), speculation)
    for _ in range(200):
        next(generation)
    engine.steps.clear()
    price[0] = free
    assert len(list(generation)) == 1300
    assert engine.steps[1] < 400


class TestPace:
    def begun(self) -> Pace:
        pace = Pace()
        while pace.length == 0:
            pace.single(1.0)
        return pace

    def test_it_measures_single_steps_first(self) -> None:
        pace = Pace()
        assert pace.length == 0
        assert self.begun().single_s == 1.0

    def test_it_grows_with_right_guesses_and_shrinks_with_wrong_ones(self) -> None:
        pace, lengths = self.begun(), []
        for right in (3, 7, 7, 4, 3, 1, 0, 1, 3):
            lengths.append(pace.length)
            pace.round(pace.length, min(right, pace.length), 0.1)
        assert lengths == [3, 7, 7, 7, 7, 3, 1, 1, 3]

    def test_rests_double_until_it_wins(self) -> None:
        pace, rests = self.begun(), []
        for _ in range(7):
            while pace.length:
                pace.round(pace.length, 0, 3.0)
            count = 0
            while not pace.length:
                pace.single(1.0)
                count += 1
            rests.append(count)
        assert rests == [16, 32, 64, 128, 256, 512, 512]
        for _ in range(4):
            pace.round(pace.length, pace.length, 1.0)
        while pace.length:
            pace.round(pace.length, 0, 9.0)
        for _ in range(16):
            assert pace.length == 0
            pace.single(1.0)
        assert pace.length

    def test_what_had_to_be_compiled_is_not_judged(self) -> None:
        pace = self.begun()
        for _ in range(20):
            pace.round(pace.length, 0, None)
        assert pace.length == 1

    def test_a_single_step_is_measured_now_and_then(self) -> None:
        pace, singles = self.begun(), 0
        for _ in range(300):
            if pace.length:
                pace.round(pace.length, pace.length, 1.0)
            else:
                pace.single(1.0)
                singles += 1
        assert 3 <= singles <= 6


@pytest.fixture(scope="module")
def plain() -> LLM:
    return qwen3_tg.load("tiny")


@pytest.fixture(scope="module", params=["lookup", "draft"])
def guessing(request: pytest.FixtureRequest) -> LLM:
    return qwen3_tg.load(
        "tiny", **{"lookup": {"speculate": "lookup"}, "draft": {"draft": "tiny"}}[request.param]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"thinking": False},
        {"thinking_budget": 7},
        {"thinking_budget": 0, "max_new_tokens": 3},
        {"max_new_tokens": 2},
        {"stop": ["0"]},
        {"sampling": Sampling(temperature=1.5, seed=3)},
    ],
    ids=str,
)
def test_a_chat_is_the_same_with_guesses(
    plain: LLM, guessing: LLM, options: dict[str, Any]
) -> None:
    def said(llm: LLM, question: str) -> tuple[list[Piece], list[Any]]:
        given = {"sampling": GREEDY} | options
        *pieces, end = llm.chat([{"role": "user", "content": question}], **given)
        assert isinstance(end, End)
        return pieces, [end.reason, end.prompt_tokens, end.thinking_tokens, end.answer_tokens]

    for question in ("234+567", "What is 37 + 85?", "say 801801801801"):
        assert said(guessing, question) == said(plain, question)


def test_the_end_counts_guesses(plain: LLM, guessing: LLM) -> None:
    ends = []
    for llm in (plain, guessing):
        *_, end = llm.chat([{"role": "user", "content": "234+567"}], sampling=GREEDY)
        assert isinstance(end, End)
        ends.append(end)
    assert (ends[0].guessed_tokens, ends[0].right_guesses, ends[0].gain) == (0, 0, None)
    assert ends[1].guessed_tokens >= ends[1].right_guesses > 0
    assert ends[1].gain is not None


def test_text_is_the_same_with_guesses(plain: LLM, guessing: LLM) -> None:
    prompt = "234+567\n234+567\n"
    assert list(guessing.generate(prompt, 40, GREEDY)) == list(plain.generate(prompt, 40, GREEDY))


def test_a_draft_with_another_vocabulary_is_refused() -> None:
    golden = str(load_golden(GOLDEN_NAME).path)
    with pytest.raises(
        UsageError, match=r"the draft model .*tiny has a vocabulary of \d+ ids, the"
    ):
        qwen3_tg.load(golden, draft="tiny")
    text = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    other = json.loads(text)
    vocab: dict[str, int] = other["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tokenizers = Tokenizer(text), Tokenizer(json.dumps(other))
    id = min(vocab[first], vocab[second])
    with pytest.raises(UsageError, match=rf"draft model small has b'.*' for id {id}, the model b'"):
        check_vocabulary("small", (9, 9), tokenizers)
    check_vocabulary("small", (9, 9), (tokenizers[0], None))
    check_vocabulary("small", (9, 9), (tokenizers[0], Tokenizer(json.dumps(json.loads(text)))))


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(UsageError, match="speculate must be \"lookup\" or None, found 'guess'"):
        qwen3_tg.load("tiny", speculate="guess")
    with pytest.raises(UsageError, match="not from both"):
        qwen3_tg.load("tiny", speculate="lookup", draft="tiny")


def test_the_command_guesses_and_says_how_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for option in (["--speculate", "lookup"], ["--draft", "tiny"]):
        assert main([*option, "-v", "--temperature", "0", "234+567"]) == 0
        out, err = capsys.readouterr()
        assert out == "801\n"
        assert "tokens right" in err
