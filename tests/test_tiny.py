"""The embedded model through our own engine: recorded ids, held-out problems, its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import qwen3_tg
from qwen3_tg import LLM, Sampling, Text, ToolCall
from qwen3_tg.checkpoint.locate import TINY

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "tiny_golden.json").read_text(encoding="utf-8"))
HELD_OUT = json.loads((DATA / "tiny_heldout.json").read_text(encoding="utf-8"))


def name_of(case: dict[str, Any]) -> str:
    return f"{case['kind']}: {case['messages'][-1]['content'][:40]}".encode(
        "ascii", "replace"
    ).decode()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return qwen3_tg.load("tiny")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=name_of)
def test_greedy_ids_are_those_of_transformers(llm: LLM, case: dict[str, Any]) -> None:
    prompt = llm.render(
        case["messages"],
        tools=case["tools"],
        add_generation_prompt=True,
        enable_thinking=case["thinking"],
    )
    assert prompt == case["prompt"]
    ids = llm.tokenizer.encode(prompt)
    assert ids == case["prompt_ids"]
    generation = llm.generate_ids(ids, GOLDEN["_meta"]["max_new_tokens"])
    assert list(generation) == case["new_ids"]
    assert (generation.stop_reason == "stop") == case["stopped"]


@pytest.mark.parametrize("case", HELD_OUT["cases"], ids=name_of)
def test_a_held_out_problem_is_answered_right(llm: LLM, case: dict[str, Any]) -> None:
    pieces = list(llm.chat(case["messages"], tools=case["tools"], thinking=case["thinking"]))
    assert pieces[-1].reason == "stop"
    answer = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    expected = case["expected"]
    if expected.startswith("<tool_call>"):
        call = json.loads(expected.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert calls == [ToolCall(call["name"], call["arguments"])]
        assert answer == ""
    else:
        assert (answer, calls) == (expected, [])


def test_the_sample_covers_every_kind() -> None:
    kinds = {case["kind"] for case in HELD_OUT["cases"]}
    assert kinds >= {"add", "subtract", "negative", "follow_up_2", "follow_up_3", "tool_call"}
    assert kinds >= {"again_2", "again_3", "tool_answer", "chat", "beyond", "no_thinking"}
    assert len(HELD_OUT["cases"]) >= 40


def test_it_is_greedy_by_its_own_advice(llm: LLM) -> None:
    assert llm.default_sampling(seed=0) == Sampling(temperature=0, top_p=0.95, top_k=20)


def test_it_is_small_and_has_qwen3s_own_template() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 4_000_000
    template = (TINY / "chat_template.jinja").read_bytes()
    assert template == (DATA / "chat_template.jinja").read_bytes()
    digest = "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8"
    assert hashlib.sha256(template).hexdigest() == digest


def test_its_card_holds_measured_accuracies_that_reach_the_aim() -> None:
    card = (TINY / "README.md").read_text(encoding="utf-8")
    table = card.partition("<!-- results: start -->")[2].partition("<!-- results: end -->")[0]
    assert "Engine: qwen3_tg" in table
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.rstrip().endswith("% |")]
    shares = {title.strip(): int(right) / int(of) for title, right, of, _ in rows}
    aims = ("addition", "subtraction", "second turn", "third turn", "calculator call, usual")
    for start in (*aims, "greetings"):
        titles = [title for title in shares if title.startswith(start)]
        assert titles and all(shares[title] >= 0.98 for title in titles), (start, shares)
