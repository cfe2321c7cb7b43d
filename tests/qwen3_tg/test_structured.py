"""Answers of a given form: every token that is allowed leads to one, and a cut one is an error."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen3_tg
from qwen3_tg import (
    LLM,
    Constraint,
    End,
    Sampling,
    Text,
    Thinking,
    Tokenizer,
    UnfinishedError,
    UsageError,
)
from qwen3_tg.checkpoint.locate import TINY
from qwen3_tg.cli import main
from qwen3_tg.json_schema import value_problem
from qwen3_tg.structured import Allowed, vocabulary

pytest_plugins = ["text_fixtures"]

SUM = [{"role": "user", "content": "What is 37 + 85?"}]
SUM_SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
# Each bounded, so that even random tokens come to an end.
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"enum": ["a", "Größe", 'quote " and \\', None, 1.5, [1]]},
    {"type": "string", "minLength": 2, "maxLength": 9},
    {"type": "string", "pattern": "^[a-fß]{3}-(x|yy)$"},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"const": "<|im_end|>"}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "kind": {"enum": ["<think>", "</think>", "<tool_call>"]},
            "near": {"$ref": "#/$defs/place"},
        },
        "required": ["city", "kind"],
        "additionalProperties": False,
        "$defs": {"place": {"type": ["string", "null"], "maxLength": 3}},
    },
]


@dataclass(frozen=True)
class Words:
    """A tokenizer with its vocabulary for constraints."""

    tokenizer: Tokenizer
    size: int
    stop_ids: frozenset[int]
    made: Any

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Words:
        stop = frozenset(tokenizer.added_tokens[t] for t in ("<|im_end|>", "<|endoftext|>"))
        return cls(tokenizer, size, stop, vocabulary(tokenizer, size, stop))

    def allowed(self, constraint: Constraint, **options: bool) -> Allowed:
        return Allowed(constraint, self.made, self.tokenizer, self.stop_ids, **options)

    def random_answer(self, constraint: Constraint, seed: int, most: int = 400) -> str:
        """What a model says that knows nothing: any allowed token, each as likely. Ends are taken
        where they are allowed, every second time."""
        draw, allowed, ids = np.random.default_rng(seed), self.allowed(constraint), list[int]()
        while len(ids) < most:
            mask = allowed(ids)
            assert mask.shape == (self.size,) and mask.any()
            stops = mask[sorted(self.stop_ids)]
            assert stops.all() or not stops.any()
            choices = np.flatnonzero(mask)
            assert not set(choices) & (set(self.tokenizer.added_tokens.values()) - self.stop_ids)
            assert all(self.tokenizer.token_bytes(int(id)) for id in choices[-30:])
            texts = [int(id) for id in choices if int(id) not in self.stop_ids]
            if stops.all() and (not texts or draw.random() < 0.5):
                allowed.finish(ids, "stop")
                return self.tokenizer.decode(ids)
            ids.append(texts[int(draw.integers(len(texts)))])
        raise AssertionError(f"no end: {self.tokenizer.decode(ids)[:300]!r}")


@pytest.fixture(scope="module")
def tiny_words() -> Words:
    return Words.of(Tokenizer(TINY / "tokenizer.json"), 800)


@pytest.fixture(scope="module")
def qwen_words(tokenizer: Tokenizer) -> Words:
    return Words.of(tokenizer, 151936)


@pytest.fixture(params=["tiny", "released"])
def words(request: pytest.FixtureRequest) -> Words:
    name = "tiny_words" if request.param == "tiny" else "qwen_words"
    found: Words = request.getfixturevalue(name)
    return found


class TestTokens:
    @pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:40])
    def test_any_allowed_tokens_make_json_that_jsonschema_accepts(
        self, words: Words, schema: dict[str, Any]
    ) -> None:
        constraint = Constraint.json_schema(schema)
        for seed in range(8):
            text = words.random_answer(constraint, seed)
            assert value_problem(json.loads(text), schema) is None, text

    @pytest.mark.parametrize(
        "regex", ["[0-9]{1,4}", "(ja|nein|größer)( [A-Zß]{2,5}){0,3}", r"\n\n<think>x|[^a]{2}"]
    )
    def test_any_allowed_tokens_match_the_whole_regex(self, words: Words, regex: str) -> None:
        for seed in range(8):
            text = words.random_answer(Constraint.regex(regex), seed)
            assert re.fullmatch(regex, text), repr(text)

    def test_any_allowed_tokens_follow_the_grammar(self, words: Words) -> None:
        grammar = 'start: sum\nsum: NUMBER | "(" sum ("+" | "-") NUMBER ")"\nNUMBER: /[1-9]/'
        for seed in range(8):
            text = words.random_answer(Constraint.lark(grammar), seed)
            assert isinstance(eval(text, {"__builtins__": {}}), int)

    def test_a_text_in_a_string_may_take_any_tokens_but_special_ones(self, words: Words) -> None:
        text = json.dumps("Größe 🎉 <|im_end|><think>", ensure_ascii=False)
        constraint = Constraint.json_schema({"type": "string"})
        ids, allowed = words.tokenizer.encode(text, plain=True), words.allowed(constraint)
        for n, id in enumerate(ids):
            mask = allowed(ids[:n])
            assert mask[id], f"{words.tokenizer.decode(ids[:n])!r}"
            assert not mask[list(words.tokenizer.added_tokens.values())].any()
        assert allowed(ids)[sorted(words.stop_ids)].all()
        assert allowed(ids).sum() == len(words.stop_ids), "nothing may follow a closed string"

    def test_rows_without_a_token_are_never_allowed(self, words: Words) -> None:
        mask = words.allowed(Constraint.regex("(?s:.)*"))([])
        assert not mask[words.tokenizer.size :].any()
        assert mask.sum() > words.size / 4

    def test_the_constraint_begins_after_the_thinking(self, words: Words) -> None:
        think, end_think = (words.tokenizer.added_tokens[t] for t in ("<think>", "</think>"))
        lead = words.tokenizer.encode("\n\n")
        stop, number = sorted(words.stop_ids), words.tokenizer.encode("7")
        allowed = words.allowed(Constraint.regex("7"), may_think=True)
        assert set(np.flatnonzero(allowed([]))) == {think, *number}
        thinking = [think, *words.tokenizer.encode("\nno 7\n")]
        for n in range(1, len(thinking) + 1):
            mask = allowed(thinking[:n])
            assert not mask[stop].any() and mask.sum() == words.size - len(stop)
        ids = [*thinking, end_think]
        for id in lead:
            assert not allowed.answering
            assert np.flatnonzero(allowed(ids)).tolist() == [id]
            ids.append(id)
        assert np.flatnonzero(allowed(ids)).tolist() == number
        assert allowed.answering
        assert np.flatnonzero(allowed(ids + number)).tolist() == stop
        allowed.finish(ids + number, "stop")

    def test_a_thinking_that_the_prompt_opened_and_another_closed(self, words: Words) -> None:
        from qwen3_tg.reply_loop import BUDGET_SPENT

        allowed = words.allowed(Constraint.regex("7"), opened=True)
        ids = words.tokenizer.encode(f"hm{BUDGET_SPENT}")
        assert np.flatnonzero(allowed(ids)).tolist() == words.tokenizer.encode("7")

    @pytest.mark.parametrize("reason", ["length", "context", "stop"])
    def test_a_cut_answer_is_an_error_and_a_whole_one_is_none(
        self, tiny_words: Words, reason: str
    ) -> None:
        constraint = Constraint.regex("[0-9]{3,4}")
        ids = tiny_words.tokenizer.encode("1234")
        tiny_words.allowed(constraint).finish(ids, reason)
        with pytest.raises(UnfinishedError, match=r"not a match of '\[0-9\]\{3,4\}'"):
            tiny_words.allowed(constraint).finish(ids[:2], reason)
        if reason == "stop":
            tiny_words.allowed(constraint).finish(ids[:3], reason)
        else:  # it might have gone on
            with pytest.raises(UnfinishedError, match="unfinished"):
                tiny_words.allowed(constraint).finish(ids[:3], reason)
        with pytest.raises(UnfinishedError, match="unfinished"):
            tiny_words.allowed(constraint, opened=True).finish(ids, reason)

    def test_what_this_vocabulary_cannot_meet_is_refused(self, tiny_words: Words) -> None:
        with pytest.raises(UsageError, match=r"a text as in the grammar: .*unknown special token"):
            tiny_words.allowed(Constraint.lark("start: <|nope|>"))

    @pytest.mark.parametrize("grammar", ["start: start", 'start: "a" start'])
    def test_a_grammar_without_an_end_is_an_error_and_no_endless_answer(
        self, tiny_words: Words, grammar: str
    ) -> None:
        with pytest.raises(UnfinishedError, match="can be made") as caught:
            tiny_words.random_answer(Constraint.lark(grammar), 0)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("grammar", ["start: a\na: a", 'start: "x" a\na: a "y"'])
    def test_a_grammar_that_derives_nothing_is_said_to_do_so(
        self, tiny_words: Words, grammar: str
    ) -> None:
        words = "llguidance says: NoExtensionBias, no whole text follows it; does a rule lead to"
        with pytest.raises(UnfinishedError, match=f"can be made: {words} itself"):
            tiny_words.random_answer(Constraint.lark(grammar), 0)

    def test_a_token_that_is_not_allowed_is_told_and_not_taken(self, tiny_words: Words) -> None:
        allowed = tiny_words.allowed(Constraint.regex("[0-9]+"))
        with pytest.raises(UnfinishedError, match="can be made"):
            allowed(tiny_words.tokenizer.encode("x"))


class TestWrong:
    @pytest.mark.parametrize("levels", [40, 64, 80, 98, 130, 300, 3000])
    @pytest.mark.parametrize("kind", ["items", "properties"])
    def test_a_schema_that_is_nested_too_deeply_is_refused(self, kind: str, levels: int) -> None:
        schema: dict[str, Any] = {}
        for _ in range(levels):
            schema = {kind: {"a": schema} if kind == "properties" else schema}
        if levels == 40 or (kind == "items" and levels < 100):
            Constraint.json_schema(schema)
            return
        with pytest.raises(UsageError, match=r"^x: (nested too deeply|recursion limit exceeded)"):
            Constraint.json_schema(schema, "x")

    @pytest.mark.parametrize(
        ("make", "value"),
        [
            (Constraint.regex, "\ud800"),
            (Constraint.lark, 'start: "\ud800"'),
            (Constraint.json_schema, {"const": "\ud800"}),
            (Constraint.json_schema, {"enum": [{1}]}),
            (Constraint.json_schema, {"const": float("nan")}),
        ],
    )
    def test_what_llguidance_cannot_be_given_is_refused(
        self, make: Callable[..., Constraint], value: Any
    ) -> None:
        with pytest.raises(UsageError, match=r"^x: ."):
            make(value, "x")

    @pytest.mark.parametrize(
        ("make", "problem"),
        [
            (lambda: Constraint.json_schema({"type": "nonsense"}), "the schema: .*'nonsense'"),
            (lambda: Constraint.json_schema([]), "object, found list"),  # type: ignore[arg-type]
            (lambda: Constraint.json_schema(False), "allows no answer"),
            (lambda: Constraint.json_schema({"not": {}}), "Unimplemented keys"),
            (lambda: Constraint.json_schema({"$ref": "#/$defs/x"}), "leads nowhere"),
            (lambda: Constraint.regex("(a"), "regular expression: .*unclosed group"),
            (lambda: Constraint.regex("(?=a)b"), "look-around"),
            (lambda: Constraint.regex(""), "not empty"),
            (lambda: Constraint.lark('start: "a" | b'), 'the grammar: .*unknown name: "b"'),
            (lambda: Constraint.lark('x: "a"'), "no start rule"),
        ],
    )
    def test_a_wrong_form_is_refused_at_once_in_one_line(
        self, make: Callable[[], Constraint], problem: str
    ) -> None:
        with pytest.raises(UsageError, match=problem) as caught:
            make()
        assert "\n" not in str(caught.value)

    def test_without_the_library_it_says_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "llguidance", None)
        assert main(["--model", "/none", "--regex", "a", "hi"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("pip install 'qwen3-tg[structured]'")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return qwen3_tg.load("tiny")


def answer(llm: LLM, constraint: Constraint, **options: Any) -> tuple[str, str, End]:
    """Thinking, answer and end."""
    pieces = list(llm.chat(SUM, constraint=constraint, **options))
    thinking = "".join(p.text for p in pieces if isinstance(p, Thinking))
    text = "".join(p.text for p in pieces if isinstance(p, Text))
    assert isinstance(pieces[-1], End)
    return thinking, text, pieces[-1]


class TestModel:
    def test_json_after_the_thinking(self, llm: LLM) -> None:
        thinking, text, end = answer(llm, Constraint.json_schema(SUM_SCHEMA))
        assert "7+5=12" in thinking
        assert json.loads(text) == {"sum": 122} and end.reason == "stop"

    @pytest.mark.parametrize(
        "options", [{"thinking": False}, {"thinking_budget": 5}, {"thinking_budget": 0}]
    )
    def test_json_however_it_thinks(self, llm: LLM, options: dict[str, Any]) -> None:
        _, text, _ = answer(llm, Constraint.json_schema(SUM_SCHEMA), **options)
        assert value_problem(json.loads(text), SUM_SCHEMA) is None

    @pytest.mark.parametrize("seed", range(4))
    def test_a_high_temperature_changes_nothing_of_the_form(self, llm: LLM, seed: int) -> None:
        regex = "(?s:.){3}-[0-9]{2}"
        wild = Sampling(temperature=5, seed=seed, repetition_penalty=1.5)
        _, text, _ = answer(llm, Constraint.regex(regex), sampling=wild, thinking=False)
        assert re.fullmatch(regex, text), repr(text)

    @pytest.mark.parametrize("thinking", [True, False])
    @pytest.mark.parametrize(
        "regex", [r"\n\n<think>[0-9]{3}</think>\n", r"<tool_call>\n\{\}</tool_call>", "  x \n"]
    )
    def test_what_looks_like_a_tag_or_is_white_space_comes_out_as_it_is(
        self, llm: LLM, regex: str, thinking: bool
    ) -> None:
        _, text, _ = answer(llm, Constraint.regex(regex), thinking=thinking)
        assert re.fullmatch(regex, text), repr(text)

    def test_a_cut_answer_is_an_error_after_its_end(self, llm: LLM) -> None:
        pieces = llm.chat(SUM, constraint=Constraint.json_schema(SUM_SCHEMA), max_new_tokens=3)
        seen: list[Any] = []
        with pytest.raises(UnfinishedError, match="max_new_tokens was reached"):
            for piece in pieces:
                seen.append(piece)
        assert isinstance(seen[-1], End) and seen[-1].reason == "length"

    def test_a_full_context_is_an_error_also_while_it_thinks(self) -> None:
        short = qwen3_tg.load("tiny", context=40)
        with pytest.raises(UnfinishedError, match="the context is full"):
            list(short.chat(SUM, constraint=Constraint.regex("[0-9]+")))

    def test_raw_text_is_constrained_from_its_first_token(self, llm: LLM) -> None:
        greedy = Sampling(temperature=0)
        text = "".join(
            llm.generate("37+85", constraint=Constraint.regex("=[0-9]{3}!"), sampling=greedy)
        )
        assert re.fullmatch("=[0-9]{3}!", text)
        with pytest.raises(UnfinishedError):
            list(llm.generate("37+85", 2, constraint=Constraint.regex("=[0-9]{3}!")))

    def test_without_a_constraint_nothing_is_masked(self, llm: LLM) -> None:
        generation = llm.generate_ids(llm.tokenizer.encode("hi") if llm.tokenizer else [], 1)
        assert generation.allow is None

    def test_allow_is_asked_with_the_new_ids_before_every_token(self, llm: LLM) -> None:
        asked: list[list[int]] = []

        def only_five(ids: Sequence[int]) -> np.ndarray | None:
            asked.append(list(ids))
            return np.arange(800) == 5 if len(ids) < 2 else None

        generation = llm.generate_ids([1, 2], 3, stop_ids=())
        generation.allow = only_five
        ids = list(generation)
        assert ids[:2] == [5, 5] and asked == [[], [5], [5, 5]]

    def test_tools_and_stop_strings_are_refused_with_it(self, llm: LLM) -> None:
        constraint = Constraint.regex("a")
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        for options in ({"stop": ["b"]}, {"tools": [tool]}):
            with pytest.raises(UsageError, match="neither tools nor stop strings"):
                llm.chat(SUM, constraint=constraint, **options)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _empty_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))

    def test_json_on_stdout(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "schema.json"
        file.write_text(json.dumps(SUM_SCHEMA), encoding="utf-8")
        assert main(["--json-schema", str(file), "What is 37 + 85?"]) == 0
        assert json.loads(capsys.readouterr().out) == {"sum": 122}

    def test_a_grammar_and_a_cut_answer(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "sum.lark"
        file.write_text('start: "It is " /[0-9]{3}/ "."', encoding="utf-8")
        command = ["--grammar", str(file), "What is 37 + 85?"]
        assert main(command) == 0
        assert capsys.readouterr().out == "It is 122.\n"
        assert main([*command, "--max-new-tokens", "4"]) == 1
        out, err = capsys.readouterr()
        assert out.startswith("It") and err.count("error: ") == 1
        assert "the answer is unfinished and not a text as in --grammar" in err

    def test_each_answer_of_a_chat_has_the_form(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = b"What is 37 + 85?\nnow add 12\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        assert main(["chat", "--regex", "[0-9]{3}"]) == 0
        assert capsys.readouterr().out == "122\n134\n"

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["--json-schema", "/no/such"], "--json-schema /no/such: No such file"),
            (["--grammar", "/no/such"], "--grammar /no/such: No such file"),
            (["--regex", "[a"], "--regex: "),
            (["--regex", "a", "--stop", "b"], "--stop would make"),
            (["--regex", "a", "--tools", "b"], "--tools would make"),
            (["--regex", "a", "--grammar", "b"], "not allowed with argument --regex"),
        ],
    )
    @pytest.mark.parametrize("command", [["hi"], ["chat"]])
    def test_what_is_wrong_is_one_line_before_a_model_loads(
        self,
        command: list[str],
        arguments: list[str],
        problem: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        words = command if command == ["chat"] else ["generate", *command]
        assert main([words[0], "--model", "/none", *arguments, *words[1:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and problem in line

    def test_a_schema_that_is_no_json_names_the_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "schema.json"
        file.write_text('{"type": }', encoding="utf-8")
        assert main(["--model", "/none", "--json-schema", str(file), "hi"]) == 2
        assert f"{file}: not valid JSON" in capsys.readouterr().err
