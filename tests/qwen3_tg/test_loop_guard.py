"""Loops are noticed and answered step by step; what only looks like one is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import qwen3_tg
from qwen3_tg import LLM, End, Sampling, Text, Thinking
from qwen3_tg.loop_guard import LEAST_REPEATS, LEAST_TOKENS, LONGEST, PENALISED, Cycles
from qwen3_tg.reply_loop import BUDGET_SPENT
from qwen3_tg.tokenizer import Tokenizer

pytest_plugins = ("text_fixtures",)

SUM = [{"role": "user", "content": "What is 37 + 85?"}]
HARMLESS = {
    "a table": "| name | size |\n| --- | --- |\n"
    + "".join(f"| row {n} | {n * n} |\n" for n in range(60)),
    "a table with equal cells": "".join(f"| {n} | 0 | 0 | 0 | 0 | yes |\n" for n in range(40)),
    "a wide table": "|" + " --- |" * 60 + "\n",
    "a list": "".join(f"{n}. The number {n} is followed by {n + 1}.\n" for n in range(60)),
    "code": "".join(
        f"    def test_{n}(self) -> None:\n        self.assertEqual(f({n}), {n * 7})\n\n"
        for n in range(40)
    ),
    "an identity matrix": "".join(
        "[" + ", ".join("1" if i == j else "0" for j in range(12)) + "],\n" for i in range(12)
    ),
    "a line": "=" * 200 + "\n",
    "a refrain": "Row, row, row your boat, gently down the stream.\n" * 3,
}


def first_alarm(ids: Sequence[int]) -> tuple[int, list[int]] | None:
    cycles = Cycles()
    for n, id in enumerate(ids):
        if cycle := cycles.push(id):
            return n, cycle
    return None


@pytest.fixture(scope="module")
def llm() -> LLM:
    return qwen3_tg.load("tiny")


@pytest.mark.parametrize("period", [1, 2, 7, 63, 64, 100, LONGEST])
def test_a_cycle_is_found_when_it_has_gone_on_for_long_enough_and_not_before(period: int) -> None:
    start = [10_000 + n for n in range(30)]
    cycle = list(range(period))
    length = max(LEAST_TOKENS, LEAST_REPEATS * period)
    found = first_alarm(start + cycle * (length // period + 2))
    assert found is not None
    assert found[0] == len(start) + length - 1
    assert sorted(found[1]) == cycle


def test_a_longer_cycle_and_a_difference_in_each_round_are_no_loop() -> None:
    assert first_alarm(list(range(LONGEST + 1)) * 8) is None
    counting = [id for n in range(400) for id in (1, 2, 3, 1000 + n, 4)]
    assert first_alarm(counting) is None


@pytest.mark.parametrize("name", HARMLESS)
def test_tables_code_and_lists_are_no_loop(name: str, llm: LLM, tokenizer: Tokenizer) -> None:
    assert llm.tokenizer is not None
    assert first_alarm(tokenizer.encode(HARMLESS[name])) is None
    assert first_alarm(llm.tokenizer.encode(HARMLESS[name])) is None  # nearly all single characters


class Scripted:
    """In place of an engine: `answer` says the next id for the ids after the prompt; the next best
    is 10 below it, the others 20."""

    context, cache_capacity = 5000, 5000

    def __init__(self, llm: LLM, answer: Callable[[list[int]], int], second: int = 5):
        self._llm, self._answer, self._second = llm, answer, second
        self.prompt: int | None = None

    def next_logits(self, ids: Sequence[int]) -> np.ndarray:
        self.prompt = len(ids) if self.prompt is None else self.prompt
        logits = np.full(self._llm.config.vocab_size, -20, np.float32)
        logits[self._second] = -10
        logits[self._answer(list(ids)[self.prompt :])] = 0
        return logits


@pytest.fixture
def scripted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LLM]]:
    def put(answer: Callable[[list[int]], int]) -> LLM:
        monkeypatch.setattr(llm, "_engine", Scripted(llm, answer))
        return llm

    yield put


def encoded(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text)


def replied(llm: LLM, **how: Any) -> tuple[str, str, End, list[str]]:
    notices: list[str] = []
    pieces = list(llm.chat(SUM, sampling=Sampling(), on_notice=notices.append, **how))
    (end,) = (piece for piece in pieces if isinstance(piece, End))
    thinking = "".join(piece.text for piece in pieces if isinstance(piece, Thinking))
    answer = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    return thinking, answer, end, notices


def test_thinking_that_loops_is_penalised_then_closed_and_an_answer_stopped(
    scripted: Callable[..., LLM], llm: LLM
) -> None:
    think, loop = encoded(llm, "<think>\n"), encoded(llm, " one two three")

    def answer(new: list[int]) -> int:
        return think[len(new)] if len(new) < len(think) else loop[len(new) % len(loop)]

    thinking, text, end, notices = replied(scripted(answer))
    assert [notice.partition(": ")[2] for notice in notices] == [
        f"they are made unlikely for {PENALISED} tokens",
        "the thinking is closed",
        f"they are made unlikely for {PENALISED} tokens",
        "stopped",
    ]
    assert "in the thinking" in notices[1] and "in the answer" in notices[3]
    assert end.reason == "loop"
    assert thinking.endswith(BUDGET_SPENT.partition("</think>")[0].strip())
    second = scripted(answer)._engine._second
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode([second]) * PENALISED in text  # while the penalty held


def test_a_loop_that_the_penalty_ends_is_left_alone_afterwards(
    scripted: Callable[..., LLM], llm: LLM
) -> None:
    loop, stop = encoded(llm, " one two"), min(llm.stop_ids)

    def answer(new: list[int]) -> int:
        return stop if 5 in new and new[-1] != 5 else loop[len(new) % len(loop)]

    *_, end, notices = replied(scripted(answer), thinking=False)
    assert len(notices) == 1
    assert end.reason == "stop"
    assert end.answer_tokens == LEAST_TOKENS + PENALISED + 1


def test_without_the_guard_a_loop_goes_on(scripted: Callable[..., LLM], llm: LLM) -> None:
    (loop,) = encoded(llm, "1")
    *_, end, notices = replied(
        scripted(lambda new: loop), thinking=False, loop_guard=False, max_new_tokens=900
    )
    assert (end.reason, end.answer_tokens, notices) == ("length", 900, [])


def test_plain_text_that_loops_is_stopped_too(scripted: Callable[..., LLM], llm: LLM) -> None:
    (loop,) = encoded(llm, "1")
    ends: list[End] = []
    notices: list[str] = []
    model = scripted(lambda new: loop)
    text = "".join(
        model.generate("x", None, Sampling(), on_end=ends.append, on_notice=notices.append)
    )
    assert ends[0].reason == "loop"
    assert len(notices) == 2
    assert text.startswith("1" * LEAST_TOKENS)


def test_an_honest_reply_is_not_touched(llm: LLM) -> None:
    with_guard, without = (list(llm.chat(SUM, loop_guard=guard))[:-1] for guard in (True, False))
    assert with_guard == without
