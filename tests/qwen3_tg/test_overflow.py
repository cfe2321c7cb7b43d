"""A conversation that no longer fits loses whole old turns, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest

import qwen3_tg
from qwen3_tg import ContextError
from qwen3_tg.chat import Message
from qwen3_tg.cli import main
from qwen3_tg.overflow import fit, split_turns

SYSTEM = {"role": "system", "content": "s" * 10}


def turn(n: int, words: int = 10) -> list[Message]:
    return [
        {"role": "user", "content": f"{n}" * words},
        {"role": "assistant", "content": f"{n}" * words},
    ]


def conversation(turns: int) -> list[Message]:
    """10 tokens a message, the last question without an answer."""
    return [SYSTEM, *(m for n in range(1, turns + 1) for m in turn(n))][:-1]


def count(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def test_what_fits_is_left_as_it_is() -> None:
    messages = conversation(4)  # 80 tokens
    assert fit(messages, count, 106, room=26) == (messages, 0)


def test_whole_old_turns_go_until_twice_the_room_is_free() -> None:
    messages = conversation(4)
    kept, dropped = fit(messages, count, 105, room=26)
    # 105 - 52 leaves 53: system, and two turns of which the last is a question alone
    assert dropped == 2
    assert kept == [SYSTEM, *messages[5:]]
    assert count(kept) == 40


def test_where_twice_the_room_cannot_be_had_less_is_enough() -> None:
    kept, dropped = fit(conversation(3), count, 40, room=10)
    assert (count(kept), dropped) == (20, 2)
    kept, dropped = fit(conversation(3), count, 25, room=6)
    assert (count(kept), dropped) == (20, 2)


def test_the_room_is_a_quarter_by_default_and_at_most() -> None:
    messages = conversation(4)
    assert fit(messages, count, 106, room=90)[1] == 0
    assert fit(messages, count, 106)[1] == 0
    assert fit(messages, count, 105)[1] > 0


def test_calls_and_results_of_tools_stay_with_their_question() -> None:
    call: list[Message] = [
        {"role": "user", "content": "a" * 10},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "b" * 10},
        {"role": "assistant", "content": "c" * 10},
    ]
    assert split_turns([SYSTEM, *call, *turn(2)]) == ([SYSTEM], [call, turn(2)])
    kept, dropped = fit([SYSTEM, *call, *turn(2)[:1]], count, 60, room=20)
    assert (kept, dropped) == ([SYSTEM, turn(2)[0]], 1)


@pytest.mark.parametrize("turns", [1, 3])
def test_what_must_be_kept_and_is_too_long_is_an_error(turns: int) -> None:
    with pytest.raises(ContextError, match=r"have 20 tokens, which leave no room .* context of 20"):
        fit(conversation(turns), count, 20, room=5)
    kept, dropped = fit(conversation(turns), count, 21, room=5)
    assert (count(kept), dropped) == (20, turns - 1)


def test_a_model_answers_what_was_left_of_a_long_conversation() -> None:
    llm = qwen3_tg.load("tiny", context=160)
    question = {"role": "user", "content": "What is 37 + 85?"}
    messages: list[Message] = []
    for _ in range(5):
        messages += [question, {"role": "assistant", "content": "122"}]
    messages.append(question)
    with pytest.raises(ContextError):
        list(llm.chat(messages * 2))
    kept, dropped = llm.fit(messages, room=50)
    assert 0 < dropped < 5
    assert kept == messages[2 * dropped :]
    text = "".join(p.text for p in llm.chat(kept) if isinstance(p, qwen3_tg.Text))
    assert text == "122"
    assert llm.fit(kept, room=50) == (kept, 0)
    how: dict[str, Any] = {"thinking": False}
    assert llm.fit(messages[-1:], **how) == (messages[-1:], 0)


@pytest.mark.parametrize("overflow", ["error", "shift"])
def test_a_long_talk_ends_with_an_error_or_goes_on_without_its_oldest_turns(
    overflow: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = b"What is 37 + 85?\n" * 8
    stdin = io.TextIOWrapper(io.BytesIO(questions), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    limits = ["--context", "160", "--thinking-budget", "30", "--max-new-tokens", "10"]
    code = main(["chat", *limits, "--overflow", overflow])
    assert code == (1 if overflow == "error" else 0)
    out, err = capsys.readouterr()
    if overflow == "shift":
        assert out == "122\n" * 8
        assert (
            "(the context is full: the oldest " in err
            and "no longer sent" in err
            and "error" not in err
        )
    else:
        assert 0 < out.count("122\n") < 8
        assert "no longer sent" not in err and "context" in err
