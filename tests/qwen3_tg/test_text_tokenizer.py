"""The tokenizer against ids recorded from the reference library, exactly."""

from __future__ import annotations

import json

import pytest
from text_data import TOKENIZER_SHA256, by_name, read_data

from qwen3_tg.checkpoint.locate import TINY
from qwen3_tg.errors import CheckpointError, UsageError
from qwen3_tg.tokenizer import Tokenizer

pytest_plugins = ("text_fixtures",)

CASES = read_data("tokenizer_cases.json")
SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
TAGS = {"<tool_call>": 151657, "</tool_call>": 151658, "<think>": 151667, "</think>": 151668}


def test_the_golden_cases_are_of_this_tokenizer_and_all_there():
    assert CASES["tokenizer_sha256"] == TOKENIZER_SHA256
    assert {kind: len(CASES[kind]) for kind in ("encode", "decode", "stream")} == {
        "encode": 123,
        "decode": 31,
        "stream": 15,
    }


@pytest.mark.parametrize("case", by_name(CASES["encode"]))
def test_a_text_becomes_the_recorded_ids_and_they_the_recorded_text(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.decode(case["ids"], skip_special=True) == case["decoded_skip_special"]


@pytest.mark.parametrize("case", by_name(CASES["decode"]))
def test_any_ids_become_the_recorded_text(tokenizer, case):
    assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer.decode(case["ids"], skip_special=True) == case["text_skip_special"]


@pytest.mark.parametrize("case", by_name(CASES["stream"]))
def test_streaming_gives_each_recorded_chunk_with_its_token(tokenizer, case):
    decoder = tokenizer.stream()
    chunks = [decoder.push(id) for id in case["ids"]] + [decoder.flush()]
    assert chunks == case["chunks"]
    assert "".join(chunks) == case["text"]


@pytest.mark.parametrize("case", by_name(CASES["encode"] + CASES["decode"]))
def test_streamed_chunks_joined_are_the_decoded_text(tokenizer, case):
    decoder = tokenizer.stream()
    streamed = "".join(map(decoder.push, case["ids"])) + decoder.flush()
    assert streamed == tokenizer.decode(case["ids"])


def test_a_character_split_over_tokens_comes_whole_with_its_last_token(tokenizer):
    ids = tokenizer.encode("\U0001fae0")  # not in the vocabulary: three tokens, four bytes
    assert len(ids) == 3
    decoder = tokenizer.stream()
    assert [decoder.push(id) for id in ids] == ["", "", "\U0001fae0"]
    assert decoder.flush() == ""


def test_an_unfinished_character_becomes_one_replacement_at_the_end(tokenizer):
    ids = tokenizer.encode("\U0001fae0")
    decoder = tokenizer.stream()
    assert [decoder.push(id) for id in ids[:-1]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_two_streams_of_one_tokenizer_do_not_mix(tokenizer):
    first, second, third = tokenizer.encode("\U0001fae0")
    one, other = tokenizer.stream(), tokenizer.stream()
    assert one.push(first) + one.push(second) == ""
    assert other.push(9707) == "Hello"
    assert one.push(third) == "\U0001fae0"


@pytest.mark.parametrize("token", list(SPECIAL) + list(TAGS))
def test_a_special_token_in_a_text_acts_unless_the_text_is_plain(tokenizer, token):
    id = (SPECIAL | TAGS)[token]
    assert tokenizer.encode(f"a{token}b") == [64, id, 65]
    plain = tokenizer.encode(f"a{token}b", plain=True)
    assert len(plain) > 3
    assert not set(plain) & set(tokenizer.added_tokens.values())
    assert tokenizer.decode(plain) == f"a{token}b"


@pytest.mark.parametrize(
    "case", by_name([c for c in CASES["encode"] if not any(i >= 151643 for i in c["ids"])])
)
def test_plain_changes_nothing_where_no_special_token_is(tokenizer, case):
    assert tokenizer.encode(case["text"], plain=True) == case["ids"]


@pytest.mark.parametrize("case", by_name(CASES["encode"]))
def test_a_plain_text_never_holds_a_special_id_and_decodes_to_itself(tokenizer, case):
    ids = tokenizer.encode(case["text"], plain=True)
    assert all(id < 151643 for id in ids)
    assert tokenizer.decode(ids) == case["decoded"]


def test_skip_special_drops_turn_ends_and_keeps_thinking_and_tool_tags(tokenizer):
    ids = [*SPECIAL.values(), *TAGS.values()]
    assert tokenizer.decode(ids) == "".join(SPECIAL) + "".join(TAGS)
    assert tokenizer.decode(ids, skip_special=True) == "".join(TAGS)


def test_the_bytes_of_the_tokens_joined_are_the_bytes_of_the_text(tokenizer):
    text = "naïve 中文 \U0001fae0\n\t<|im_end|>\x00\x7f\xa0\xad end"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_each_byte_has_one_token_that_stands_for_it_alone(tokenizer):
    found = sorted(tokenizer.token_bytes(id) for id in range(256))
    assert found == [bytes([byte]) for byte in range(256)]


def test_added_tokens_stand_for_their_text_and_ids_without_a_token_for_nothing(tokenizer):
    assert tokenizer.token_bytes(151645) == b"<|im_end|>"
    assert tokenizer.token_bytes(151668) == b"</think>"
    assert tokenizer.token_bytes(151669) == b""  # the embedding has a row for it, no text
    assert tokenizer.token_bytes(151935) == b""


def test_vocab_size_counts_the_added_tokens(tokenizer):
    assert tokenizer.vocab_size == 151_669
    assert len(tokenizer.added_tokens) == 26
    assert sorted(tokenizer.added_tokens.values()) == list(range(151_643, 151_669))


def test_the_pattern_of_added_tokens_finds_every_one_of_them(tokenizer):
    text = "x".join(tokenizer.added_tokens)
    assert tokenizer.added_pattern.findall(text) == list(tokenizer.added_tokens)
    assert tokenizer.added_pattern.findall("<|im_end> <think > im_start tool_call") == []


WORD_LEVEL = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}
GOOD = b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"", "not a readable tokenizer", id="empty"),
        pytest.param(b"\xff\xfe\x00", "not a readable tokenizer", id="not UTF-8"),
        pytest.param(GOOD, "not a readable tokenizer", id="cut off"),
        pytest.param(b"[1, 2]", "not a readable tokenizer", id="no object"),
        pytest.param(b'{"model": {}}', "not a readable tokenizer", id="no model"),
        pytest.param(json.dumps(WORD_LEVEL).encode(), "byte-level", id="another kind"),
    ],
)
def test_a_file_that_is_no_tokenizer_of_qwen3_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert "\n" not in message


def test_the_embedded_tokenizer_is_byte_level_and_gives_any_text_back():
    tokenizer = Tokenizer(TINY / "tokenizer.json")
    text = "Hello, wörld! 中文 \U0001fae0 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    plain = tokenizer.encode(text, plain=True)
    assert not set(plain) & set(tokenizer.added_tokens.values())
    assert tokenizer.decode(plain) == text


@pytest.fixture
def odd(tmp_path) -> Tokenizer:
    """The embedded tokenizer with more added tokens, and one that it wants before every text."""
    made = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    first = max(token["id"] for token in made["added_tokens"]) + 1
    for id, content in enumerate(["<a>", "<a>b", "caf\u00e9 \U0001fae0"], first):
        made["added_tokens"].append(made["added_tokens"][0] | {"id": id, "content": content})
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<a>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<a>": {"id": "<a>", "ids": [first], "tokens": ["<a>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    return Tokenizer(tmp_path / "tokenizer.json")


def test_no_token_is_put_around_a_text_even_where_the_tokenizer_asks_for_one(odd):
    assert odd.decode(odd.encode("Hello")) == "Hello"
    assert odd.decode(odd.encode("Hello", plain=True)) == "Hello"


def test_the_pattern_finds_the_longest_added_token(odd):
    assert odd.added_pattern.findall("<a>bc<a>c") == ["<a>b", "<a>"]


def test_an_added_token_stands_for_its_own_letters_in_utf8(odd):
    text = "caf\u00e9 \U0001fae0"
    id = odd.added_tokens[text]
    assert odd.token_bytes(id) == text.encode()
    assert odd.stream().push(id) == text


def test_half_a_surrogate_pair_is_refused_and_ids_without_a_token_give_nothing(tokenizer):
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.encode("a\udcff")
    assert tokenizer.decode([-1, 2**40]) == ""
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(2**40) == b""
