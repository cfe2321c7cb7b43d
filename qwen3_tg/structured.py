"""Answers of a given form: a JSON schema, a regular expression or a grammar says which tokens may
come next, and sampling takes no other.

The parsing is the library llguidance's. What is ours is when it begins, after the thinking, and
that an answer which was cut is an error and never looks like a whole one. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_tg.errors import UnfinishedError, UsageError
from qwen3_tg.json_schema import schema_problem
from qwen3_tg.reply import END_THINK, THINK
from qwen3_tg.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Between the parts of a JSON text: nothing, a space, or a line break with indentation. JSON permits
# endless white space, which models fall into that are not sure what to say.
_JSON_SPACE = r"( |\n[ \t]{0,40})?"
# What the chat template writes between the thinking and the answer.
_LEAD = "\n\n"
# To llguidance's own word for a grammar that nothing can be derived from.
_NO_TEXT = ", no whole text follows it; does a rule lead to itself without an end, as `a: a` does?"


@dataclass(frozen=True)
class Constraint:
    """The form of an answer. `grammar` is llguidance's own text, `name` says in messages what it
    is. Make one with `json_schema`, `regex` or `lark`; each raises UsageError where it is wrong."""

    grammar: str
    name: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool, where: str = "the schema") -> Constraint:
        """A JSON text that satisfies a schema; {} is any JSON."""
        if problem := schema_problem(schema):
            raise UsageError(f"{where}: {problem}")
        if schema is False:
            raise UsageError(f"{where}: false allows no answer at all")
        schema = {} if schema is True else schema
        space: Any = {"whitespace_pattern": _JSON_SPACE}  # llguidance's own word for it
        matcher = _llguidance().LLMatcher
        with _refused(where):
            grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides=space)
        return cls(grammar, f"JSON as in {where}")._checked(where)

    @classmethod
    def regex(cls, regex: str, where: str = "the regular expression") -> Constraint:
        """A text that matches from beginning to end, in the syntax of Rust's crate regex."""
        if not isinstance(regex, str) or not regex:
            raise UsageError(f"{where}: expected a text that is not empty, found {regex!r:.80}")
        matcher = _llguidance().LLMatcher
        with _refused(where):
            grammar = matcher.grammar_from_regex(regex)
        return cls(grammar, f"a match of {regex!r:.80}")._checked(where)

    @classmethod
    def lark(cls, grammar: str, where: str = "the grammar") -> Constraint:
        """What the rule `start` of a grammar derives, in llguidance's variant of Lark's syntax."""
        if not isinstance(grammar, str):
            raise UsageError(f"{where}: expected a text, found {type(grammar).__name__}")
        matcher = _llguidance().LLMatcher
        with _refused(where):
            grammar = matcher.grammar_from_lark(grammar)
        return cls(grammar, f"a text as in {where}")._checked(where)

    def _checked(self, where: str) -> Constraint:
        wrong, problems = _llguidance().LLMatcher.validate_grammar_with_warnings(self.grammar)
        if wrong:
            problem = " ".join(problems[0].split())
            raise UsageError(f"{where}: {problem:.400}")
        return self


class Allowed:
    """Which tokens may follow those that were generated, of one answer. Call it with all of them.

    `opened`: the prompt has opened the thinking; `may_think`: the model may open it. Until it is
    closed every token is allowed but those that end the text. The constraint begins thereafter;
    `answering` says whether it has. No special token is ever a part of a text in it.

    Raises UsageError for a constraint that this vocabulary cannot meet."""

    def __init__(
        self,
        constraint: Constraint,
        vocabulary: LLTokenizer,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        opened: bool = False,
        may_think: bool = False,
    ):
        self._constraint, self._stop_ids = constraint, sorted(stop_ids)
        library = _llguidance()
        limits = library.LLParserLimits(verbose_errors=False)  # else a page of its inner state
        grammar = constraint.grammar
        self._matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if self._matcher.is_error():  # such as a special token that this vocabulary has not
            raise UsageError(f"{constraint.name}: {self._problem}")
        self._size = vocabulary.vocab_size
        self._think = tokenizer.added_tokens.get(THINK)
        self._end_think = tokenizer.added_tokens.get(END_THINK)
        self._lead = tokenizer.encode(_LEAD, plain=True)
        self._state = "thinking" if opened else "start" if may_think else "answer"
        if self._think is None or self._end_think is None:  # not a model that thinks
            self._state = "answer"
        self._seen = 0

    @property
    def answering(self) -> bool:
        return self._state == "answer"

    def __call__(self, new_ids: Sequence[int]) -> np.ndarray:
        """(V,) bool, of the tokens generated so far. Raises UnfinishedError where llguidance gives
        up, as it does on grammars that branch too much."""
        self._read(new_ids)
        if self._state == "thinking":
            allowed = np.ones(self._size, dtype=bool)
            allowed[self._stop_ids] = False
            return allowed
        if self._state == "lead":
            allowed = np.zeros(self._size, dtype=bool)
            allowed[self._lead[0]] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        if self._matcher.is_accepting():
            allowed[self._stop_ids] = True
        if self._state == "start":
            allowed[self._think] = True
        return allowed

    def finish(self, new_ids: Sequence[int], reason: str) -> None:
        """Raises UnfinishedError unless the whole answer satisfies the constraint."""
        self._read(new_ids)
        is_whole = self._state in ("start", "answer") and self._matcher.is_accepting()
        if is_whole and (reason == "stop" or not self._can_go_on()):
            return
        why = {
            "length": "max_new_tokens was reached; allow more",
            "context": "the context is full; load with a larger one, or shorten the prompt",
        }.get(reason, f"it ended by {reason}")
        raise UnfinishedError(f"the answer is unfinished and not {self._constraint.name}: {why}")

    def _can_go_on(self) -> bool:
        """Whether the text could be longer: then it was cut, although it has the form so far."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        more = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        more[self._stop_ids] = False
        return bool(more.any())

    def _read(self, new_ids: Sequence[int]) -> None:
        for id in new_ids[self._seen :]:
            if self._state == "start":
                self._state = "thinking" if id == self._think else "answer"
            elif self._state == "thinking" and id == self._end_think:
                self._state = "lead"
            elif self._state == "lead":
                del self._lead[0]
                self._state = "lead" if self._lead else "answer"
                continue
            if self._state == "answer":
                self._matcher.consume_token(id)
                self._check()
        self._seen = len(new_ids)

    @property
    def _problem(self) -> str:
        problem = " ".join(self._matcher.get_error().split()).removesuffix(" <non-verbose/>")
        why = _NO_TEXT if "NoExtensionBias" in problem else ""
        return f"llguidance says: {problem:.300}{why}"

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnfinishedError(
                f"no answer that is {self._constraint.name} can be made: {self._problem}"
            )


def vocabulary(tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> LLTokenizer:
    """The tokens as llguidance needs them; takes seconds for a large vocabulary, so keep it.

    Rows without a token have no text, and every added token is a special one, <think> and
    <tool_call> too: spelled out letter by letter they are text, as such they are none."""
    if not stop_ids:
        raise UsageError("this model has no token that ends a text, which a constraint needs")

    class Tokens:
        eos_token_id, bos_token_id = min(stop_ids), None
        tokens = tuple(tokenizer.token_bytes(id) for id in range(vocab_size))
        special_token_ids = tuple(sorted(tokenizer.added_tokens.values()))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text, plain=True)

    library = _llguidance()
    wrapped = library.TokenizerWrapper(Tokens())
    made: LLTokenizer = library.LLTokenizer(wrapped, vocab_size, sorted(stop_ids))
    return made


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """What llguidance raises for what it cannot read, such as a schema nested too deeply, half a
    surrogate pair, or an object that JSON has not, is a UsageError."""
    try:
        yield
    except (TypeError, ValueError, RecursionError) as e:
        raise UsageError(f"{where}: {' '.join(str(e).split()):.400}") from None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "a JSON schema, regex or grammar needs the package llguidance: "
            "pip install 'qwen3-tg[structured]'"
        ) from None
    return llguidance
