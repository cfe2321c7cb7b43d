"""Many conversations at once: each answer is what it would be alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import qwen3_tg
from qwen3_tg import (
    LLM,
    ChatError,
    Constraint,
    ContextError,
    DeviceError,
    End,
    Sampling,
    Text,
    Thinking,
    ToolCall,
    UnfinishedError,
    UsageError,
)
from qwen3_tg.batch import Answer, Batch, Request

SUMS = [(37, 85), (5, 6), (999, 1), (12, 5), (123, 456), (7, 8), (41, 9)]
WARM = Sampling(temperature=0.8, top_p=0.95, seed=11)


def question(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {a} + {b}?"}]


@pytest.fixture(scope="module", params=["fast", "generic"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return qwen3_tg.load("tiny", kernels=str(request.param), prefix_cache_bytes=0)


@pytest.fixture(scope="module")
def batch(llm: LLM) -> Batch:
    """One for several tests: to capture a graph takes seconds."""
    return llm.batch(3)


@pytest.fixture(scope="module")
def fast() -> LLM:
    return qwen3_tg.load("tiny", kernels="fast", prefix_cache_bytes=0)


def by_number(answers: Iterator[Answer]) -> list[Answer]:
    found = sorted(answers, key=lambda answer: answer.number)
    assert [answer.number for answer in found] == list(range(len(found)))
    return found


def alone(llm: LLM, messages: Sequence[Any], **options: Any) -> Answer:
    """The answer of a reply as it is without a batch."""
    pieces = list(llm.chat(messages, **options))
    texts = {
        kind: "".join(piece.text for piece in pieces if isinstance(piece, kind))
        for kind in (Thinking, Text)
    }
    calls = tuple(piece for piece in pieces if isinstance(piece, ToolCall))
    end = pieces[-1]
    assert isinstance(end, End)
    return Answer(0, texts[Thinking], texts[Text], calls, end)


def same(batch: Answer, one: Answer) -> bool:
    assert batch.end is not None and one.end is not None
    counts = "reason", "prompt_tokens", "thinking_tokens", "answer_tokens"
    return (batch.thinking, batch.text, batch.calls) == (one.thinking, one.text, one.calls) and all(
        getattr(batch.end, name) == getattr(one.end, name) for name in counts
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"thinking": False},
        {"thinking_budget": 5},
        {"thinking_budget": 0, "max_new_tokens": 2},
        {"stop": ["2", "1"]},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_answers_are_those_of_each_alone(llm: LLM, batch: Batch, options: dict[str, Any]) -> None:
    """Also where more are asked than there are slots, and where ids are put in on the way."""
    found = by_number(batch.answers((question(*s) for s in SUMS), sampling=WARM, **options))
    for answer, numbers in zip(found, SUMS, strict=True):
        assert answer.error is None
        one = alone(llm, question(*numbers), sampling=WARM.another(answer.number), **options)
        assert same(answer, one), (answer, one)


def test_each_request_can_have_options_of_its_own(fast: LLM) -> None:
    greedy = Sampling(temperature=0)
    requests = [
        Request(question(37, 85), {"thinking": False, "max_new_tokens": 3}),
        question(37, 85),
        Request(question(37, 85), {"sampling": WARM}),
        Request("37 + 85 = ", {"max_new_tokens": 4}),
    ]
    found = by_number(fast.batch(4).answers(requests, sampling=greedy, max_new_tokens=9))
    own = alone(fast, question(37, 85), thinking=False, max_new_tokens=3, sampling=greedy)
    assert same(found[0], own)
    assert same(found[1], alone(fast, question(37, 85), max_new_tokens=9, sampling=greedy))
    assert same(found[2], alone(fast, question(37, 85), max_new_tokens=9, sampling=WARM))
    text = "".join(fast.generate("37 + 85 = ", 4, greedy))
    assert (found[3].text, found[3].thinking) == (text, "")
    assert found[3].end and found[3].end.reason == "length" and found[3].end.answer_tokens == 4


def test_without_a_seed_each_draws_otherwise(fast: LLM) -> None:
    hot = Sampling(temperature=3.0, seed=3)
    how = {"thinking": False, "max_new_tokens": 12, "sampling": hot}
    texts = {answer.text for answer in fast.batch(4).answers([question(1, 2)] * 6, **how)}
    assert len(texts) == 6


def test_calls_and_forms_are_those_of_each(fast: LLM) -> None:
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    greedy, digits = Sampling(temperature=0), Constraint.regex("[0-9]{2}", "a test")
    requests = [
        Request(question(37, 85), {"tools": [tool], "thinking": False}),
        Request(question(5, 6), {"constraint": digits}),
        Request(question(5, 6), {"constraint": digits, "max_new_tokens": 1}),
    ]
    found = by_number(fast.batch(3).answers(requests, sampling=greedy))
    assert same(
        found[0], alone(fast, question(37, 85), tools=[tool], thinking=False, sampling=greedy)
    )
    assert len(found[1].text) == 2 and found[1].text.isdigit() and found[1].error is None
    assert isinstance(found[2].error, UnfinishedError) and found[2].text in "0123456789"
    assert found[2].end and found[2].end.reason == "length"


def test_what_is_wrong_with_one_stops_no_other(fast: LLM) -> None:
    long = [{"role": "user", "content": "1" * 3000}]
    wrong: list[Any] = [
        [{"role": "nobody", "content": "?"}],
        "",
        Request(question(1, 1), {"thinking_budget": -1}),
        Request(question(1, 1), {"what": 1}),
        long,
        Request(question(1, 1), {"stop": "text"}),
    ]
    requests = [item for request in wrong for item in (request, question(5, 6))]
    found = by_number(fast.batch(2).answers(requests, sampling=Sampling(temperature=0)))
    kinds = [type(answer.error) for answer in found]
    right: list[Any] = [ChatError, UsageError, UsageError, UsageError, ContextError, UsageError]
    assert kinds[::2] == right and kinds[1::2] == [type(None)] * len(wrong)
    assert {answer.text for answer in found[1::2]} == {"11"}
    assert all(answer.end is None and not answer.text for answer in found[::2])


def test_a_reply_whose_logits_are_no_numbers_ends_with_what_there_was(
    fast: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_tg.slots import Slots

    step, calls = Slots.step, []

    def broken(self: Slots, new: Any) -> Any:
        calls.append(new)
        found = dict(step(self, new))
        if len(calls) == 6:
            found[max(found)] = DeviceError("not finite")
        return found

    monkeypatch.setattr(Slots, "step", broken)
    found = by_number(fast.batch(2).answers([question(5, 6), question(37, 85)], sampling=WARM))
    failed = [answer for answer in found if answer.error]
    assert len(failed) == 1 and isinstance(failed[0].error, DeviceError)
    assert failed[0].thinking and failed[0].end is None
    assert [answer.end is not None for answer in found if not answer.error] == [True]


def test_one_that_is_left_halfway_leaves_nothing_behind(fast: LLM) -> None:
    batch, greedy = fast.batch(2), Sampling(temperature=0)
    answers = batch.answers([question(*s) for s in SUMS], sampling=greedy)
    next(answers)
    with pytest.raises(UsageError, match="one call of answers"):
        next(batch.answers([question(1, 1)]))
    answers.close()

    def broken(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(batch.answers([question(*s) for s in SUMS], sampling=greedy, on_step=broken))
    found = by_number(batch.answers([question(5, 6), question(7, 8)], sampling=greedy))
    assert [answer.text for answer in found] == ["11", "15"]


@pytest.mark.parametrize(
    "wrong", [5, {"role": "user", "content": "?"}, Request("x", "y"), Request(3), [5], None]
)
def test_what_is_no_request_is_an_error_of_its_own(fast: LLM, wrong: Any) -> None:
    found = by_number(fast.batch(2).answers([question(5, 6), wrong], max_new_tokens=9))
    assert found[0].text == "11"
    assert isinstance(found[1].error, UsageError | ChatError)
    with pytest.raises(UsageError, match="a list of texts or conversations"):
        next(fast.batch(2).answers("a text"))


@pytest.mark.parametrize("option", ["thinking", "on_end", "model", "nonsense"])
def test_an_option_that_does_not_exist_is_an_error_of_each(fast: LLM, option: str) -> None:
    found = by_number(fast.batch(2).answers(["1 + 1 = ", question(1, 1)], **{option: True}))
    assert isinstance(found[0].error, UsageError) and option in str(found[0].error)
    assert isinstance(found[1].error, UsageError) == (option != "thinking")


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {}])
def test_what_is_no_sampling_is_an_error_of_each_that_it_is_for(fast: LLM, wrong: Any) -> None:
    own = Request(question(5, 6), {"sampling": Sampling(temperature=0)})
    found = by_number(fast.batch(2).answers(["1 + 1 = ", own, question(1, 1)], sampling=wrong))
    for answer in (found[0], found[2]):
        assert isinstance(answer.error, UsageError)
        assert str(answer.error) == "sampling must be a qwen3_tg.Sampling, found dict"
    assert found[1].text == "11"
    bad = Request(question(5, 6), {"sampling": wrong})
    found = by_number(fast.batch(2).answers([bad, own]))
    assert isinstance(found[0].error, UsageError) and found[1].text == "11"


def test_a_batch_that_memory_has_no_room_for_is_no_answer(
    fast: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_tg.device import memory

    monkeypatch.setattr(memory, "free_memory", lambda name: 10)
    with pytest.raises(DeviceError, match="take a smaller batch"):
        next(fast.batch(2).answers([question(1, 1)]))


def test_loops_are_noticed_in_each(fast: LLM) -> None:
    """A bias that lets nothing but one token through."""
    notices: list[str] = []
    only = Sampling(temperature=0, logit_bias={50: 1000.0})
    requests = [Request(question(5, 6), {"sampling": only}), question(37, 85)]
    answers = fast.batch(2).answers(requests, sampling=WARM, on_notice=notices.append)
    found = by_number(answers)
    assert found[0].end and found[0].end.reason == "loop" and len(notices) == 2
    assert found[1].end and found[1].end.reason == "stop"


def test_no_more_requests_are_taken_than_there_are_slots(fast: LLM) -> None:
    taken: list[int] = []

    def requests() -> Iterator[Any]:
        for n, numbers in enumerate(SUMS):
            taken.append(n)
            yield question(*numbers)

    answers = fast.batch(2).answers(requests(), sampling=WARM)
    next(answers)
    assert len(taken) == 2
    assert len(list(answers)) == len(SUMS) - 1


def test_what_requests_raise_comes_after_the_answers_under_way(fast: LLM) -> None:
    def requests() -> Iterator[list[dict[str, str]]]:
        yield question(5, 6)
        yield question(7, 8)
        raise LookupError("no more of them")

    batch, found = fast.batch(3), []
    with pytest.raises(LookupError, match="no more of them"):
        for answer in batch.answers(requests(), sampling=Sampling(temperature=0)):
            found.append(answer.text)
    assert sorted(found) == ["11", "15"]
    again = by_number(batch.answers([question(5, 6)], sampling=Sampling(temperature=0)))
    assert again[0].text == "11"

    def interrupted() -> Iterator[list[dict[str, str]]]:
        yield question(5, 6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # at once
        next(batch.answers(interrupted()))


def test_steps_are_shared(fast: LLM) -> None:
    batch = fast.batch(4)
    list(batch.answers([question(5, 6)] * 4, sampling=Sampling(temperature=0)))
    assert batch.new_tokens == 4 * batch.steps


def test_times_count_the_steps_that_were_waited_for(fast: LLM) -> None:
    (answer,) = fast.batch(1).answers([question(37, 85)], sampling=Sampling(temperature=0))
    assert answer.end is not None and answer.end.first_token_s > 0
    assert answer.end.later_tokens_s > 0


def test_a_draft_and_lookup_guess_for_none_of_a_batch() -> None:
    llm = qwen3_tg.load("tiny", speculate="lookup")
    (answer,) = llm.batch(2).answers([question(37, 85)], sampling=Sampling(temperature=0))
    assert answer.text == "122" and answer.end and answer.end.guessed_tokens == 0


def test_a_conversation_goes_on_after_a_batch(fast: LLM) -> None:
    greedy = Sampling(temperature=0)
    before = alone(fast, question(37, 85), sampling=greedy)
    list(fast.batch(2).answers([question(*s) for s in SUMS], sampling=WARM))
    assert same(alone(fast, question(37, 85), sampling=greedy), before)
