"""The reply parser: the same pieces, however the text is cut, and nothing lost."""

from __future__ import annotations

import json
import re
from itertools import combinations, groupby

import pytest

from qwen3_tg.reply import Piece, ReplyParser, Text, Thinking, ToolCall


def joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces with neighbours of one kind put together."""
    found: list[Piece] = []
    for kind, group in groupby(pieces, type):
        if kind is ToolCall:
            found += group
        else:
            found.append(kind("".join(piece.text for piece in group)))
    return found


def run(parts: list[str], in_thinking: bool = False, tools: bool = False) -> list[Piece]:
    parser = ReplyParser(in_thinking, tools)
    pieces = [piece for part in parts for piece in parser.push(part)]
    pieces += parser.finish()
    assert all(piece.text for piece in pieces if not isinstance(piece, ToolCall)), "an empty piece"
    return joined(pieces)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "</x>"}}\n</tool_call>'
ADD = ToolCall("add", {"a": 1, "b": "</x>"})
# (settings, text, pieces)
CASES = {
    "empty": ({}, "", []),
    "text": ({}, "Hello, world!", [Text("Hello, world!")]),
    "thinking then text": (
        {},
        "<think>\nOne.\n\nTwo.\n</think>\n\nHello\nyou\n",
        [Thinking("One.\n\nTwo."), Text("Hello\nyou\n")],
    ),
    "thinking with no line breaks": ({}, "<think>a</think>b", [Thinking("a"), Text("b")]),
    "empty thinking": ({}, "<think>\n\n</think>\n\nHello", [Text("Hello")]),
    "line breaks before thinking": ({}, "\n\n<think>a</think>b", [Thinking("a"), Text("b")]),
    "only white space": ({}, " \n\t ", [Text(" \n\t ")]),
    "white space before text": ({}, "\n  Hello", [Text("\n  Hello")]),
    "white space in thinking": ({}, "<think>\n \n</think>x", [Thinking(" "), Text("x")]),
    "thinking that never ends": ({}, "<think>\nOne. Two", [Thinking("One. Two")]),
    "thinking that ends in line breaks": ({}, "<think>\nOne\n\n", [Thinking("One")]),
    "thinking that ends in half a tag": ({}, "<think>\nOne</thi", [Thinking("One</thi")]),
    "thinking that ends in a tag's start after breaks": (
        {},
        "<think>One\n\n</",
        [Thinking("One\n\n</")],
    ),
    "nothing after the thinking": ({}, "<think>\na\n</think>\n\n", [Thinking("a")]),
    "only an opening tag": ({}, "<think>", []),
    "half an opening tag": ({}, "<thi", [Text("<thi")]),
    "almost an opening tag": ({}, "<thick>a</thick>", [Text("<thick>a</thick>")]),
    "almost a closing tag": (
        {},
        "<think>a</thin></b\n</think>c",
        [Thinking("a</thin></b"), Text("c")],
    ),
    "a tag in the text means nothing": (
        {},
        "Write <think>a</think> so",
        [Text("Write <think>a</think> so")],
    ),
    "a second block of thinking is text": (
        {},
        "<think>a</think>b<think>c</think>",
        [Thinking("a"), Text("b<think>c</think>")],
    ),
    "an opening tag within thinking": (
        {},
        "<think>a<think>b</think>c",
        [Thinking("a<think>b"), Text("c")],
    ),
    "inside thinking": (
        {"in_thinking": True},
        "\nOne.\n</think>\n\nHello",
        [Thinking("One."), Text("Hello")],
    ),
    "inside thinking that never ends": ({"in_thinking": True}, "One", [Thinking("One")]),
    "inside thinking, ended at once": ({"in_thinking": True}, "</think>Hello", [Text("Hello")]),
    "inside thinking, then line breaks": ({"in_thinking": True}, "\n\n\n", []),
    "a call when there are no tools is text": ({}, f"a\n{CALL}\nb", [Text(f"a\n{CALL}\nb")]),
    "tools but no call": ({"tools": True}, "Hello < you\n\n", [Text("Hello < you\n\n")]),
    "a call": ({"tools": True}, CALL, [ADD]),
    "thinking, text and a call": (
        {"tools": True},
        f"<think>\na\n</think>\n\nI add.\n{CALL}",
        [Thinking("a"), Text("I add."), ADD],
    ),
    "calls in thinking are thinking": (
        {"tools": True},
        f"<think>{CALL}</think>\n\nb",
        [Thinking(CALL), Text("b")],
    ),
    "several calls": ({"tools": True}, f"{CALL}\n{CALL}\n\n{CALL}", [ADD, ADD, ADD]),
    "calls with text between": (
        {"tools": True},
        f"a\n\n{CALL}\nb\nc\n{CALL}\n\nd\n",
        [Text("a"), ADD, Text("b\nc"), ADD, Text("d\n")],
    ),
    "a call without arguments": (
        {"tools": True},
        '<tool_call>{"name": "now"}</tool_call>',
        [ToolCall("now", {})],
    ),
    "a call with special characters": (
        {"tools": True},
        '<tool_call>{"name": "f", "arguments": {"é": ["\\u4e2d", null, 1.5]}}</tool_call>',
        [ToolCall("f", {"é": ["\u4e2d", None, 1.5]})],
    ),
    "half a character in a call": (
        {"tools": True},
        '<tool_call>{"name": "f", "arguments": {"q": "\\ud83d"}}</tool_call>',
        [Text('<tool_call>{"name": "f", "arguments": {"q": "\\ud83d"}}</tool_call>')],
    ),
    "half a tag at the end": ({"tools": True}, "a <tool_c", [Text("a <tool_c")]),
    "line breaks and half a tag at the end": ({"tools": True}, "a\n\n<t", [Text("a\n\n<t")]),
    "almost a call": ({"tools": True}, "<tool_cell>\n<tool_", [Text("<tool_cell>\n<tool_")]),
}
BROKEN_CALLS = {
    "no JSON": "what?",
    "nothing": "",
    "cut off": '{"name": "f", "arguments": {"a": 1',
    "two objects": '{"name": "f"} {"name": "g"}',
    "no object": '["f"]',
    "no name": '{"arguments": {}}',
    "name is no text": '{"name": 5, "arguments": {}}',
    "arguments are no object": '{"name": "f", "arguments": [1]}',
    "too deep": "[" * 100_000,
    "a number too long": '{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}",
}


def cases() -> list[object]:
    return [pytest.param(*case, id=name) for name, case in CASES.items()]


@pytest.mark.parametrize(("settings", "text", "pieces"), cases())
def test_a_whole_reply_gives_its_pieces(settings, text, pieces):
    assert run([text], **settings) == pieces


@pytest.mark.parametrize(("settings", "text", "pieces"), cases())
def test_a_reply_in_single_characters_gives_the_same_pieces(settings, text, pieces):
    assert run(list(text), **settings) == pieces


@pytest.mark.parametrize(("settings", "text", "pieces"), cases())
def test_a_reply_cut_in_two_anywhere_gives_the_same_pieces(settings, text, pieces):
    for at in range(len(text) + 1):
        assert run([text[:at], text[at:]], **settings) == pieces, f"cut at {at}"


@pytest.mark.parametrize(("settings", "text", "pieces"), cases())
def test_a_reply_cut_in_three_around_its_tags_gives_the_same_pieces(settings, text, pieces):
    places = sorted({at for m in re.finditer(r"[<>\n/]", text) for at in m.span()})
    for a, b in combinations(places, 2):
        assert run([text[:a], text[a:b], "", text[b:]], **settings) == pieces, f"cut at {a}, {b}"


@pytest.mark.parametrize(("settings", "text", "pieces"), cases())
def test_nothing_is_lost_but_tags_and_the_line_breaks_next_to_them(settings, text, pieces):
    parts = [
        json.dumps({"name": p.name, "arguments": p.arguments}, ensure_ascii=False)
        if isinstance(p, ToolCall)
        else p.text
        for p in pieces
    ]
    rest = text.replace("\\u4e2d", "\u4e2d").replace('"now"}', '"now", "arguments": {}}')
    lost = []
    for part in parts:
        before, found, rest = rest.partition(part)
        assert found, f"{part!r} is not in the reply"
        lost.append(before)
    for between in [*lost, rest]:
        assert re.fullmatch(r"(\n|</?think>|</?tool_call>)*", between), between


@pytest.mark.parametrize("inside", [pytest.param(v, id=k) for k, v in BROKEN_CALLS.items()])
def test_a_call_that_is_none_comes_out_as_text_with_its_tags(inside):
    call = f"<tool_call>{inside}</tool_call>"
    expected = [Text(f"a {call} b")]
    assert run([f"a {call} b"], tools=True) == expected
    at = len(call) // 2
    assert run(["a ", call[:at], call[at:], " b"], tools=True) == expected


def test_a_broken_call_does_not_hide_the_next_one():
    broken = "<tool_call>{oops}</tool_call>"
    assert run([f"{broken}\n{CALL}"], tools=True) == [Text(broken), ADD]


@pytest.mark.parametrize(
    "inside", ["", "\n", '\n{"name": "f", "argum', '{"name": "f"}', "<", "</tool_c"]
)
def test_an_unfinished_call_comes_out_as_it_is(inside):
    text = f"a <tool_call>{inside}"
    for parts in ([text], list(text)):
        assert run(parts, tools=True) == [Text(text)]


def test_pieces_come_as_soon_as_they_are_certain():
    parser = ReplyParser(in_thinking=False, tools=True)
    assert parser.push("<think>\n") == []
    assert parser.thinking
    assert parser.push("One") == [Thinking("One")]
    assert parser.push(" <") == [Thinking(" ")]
    assert parser.push("b") == [Thinking("<b")]
    assert parser.push("\n") == []  # belongs to the tag, if one comes
    assert parser.push("</think>") == []
    assert not parser.thinking
    assert parser.push("\n\nHello") == [Text("Hello")]
    assert parser.push("\n<tool_call>") == []
    assert parser.push('{"name": "f"}') == []
    assert parser.push("</tool_call>") == [ToolCall("f", {})]
    assert parser.finish() == []


def test_white_space_at_the_start_waits_for_what_follows():
    parser = ReplyParser(in_thinking=False, tools=False)
    assert parser.push(" \n") == []
    assert parser.push("a") == [Text(" \na")]


def test_a_reply_that_starts_in_thinking_says_so_at_once():
    assert ReplyParser(in_thinking=True, tools=False).thinking
    assert not ReplyParser(in_thinking=False, tools=False).thinking


def test_finish_gives_the_rest_once():
    parser = ReplyParser(in_thinking=False, tools=False)
    parser.push("<thi")
    assert parser.finish() == [Text("<thi")]
    assert parser.finish() == []


def test_a_closing_tag_inside_an_argument_does_not_end_the_call():
    call = '{"name": "f", "arguments": {"x": "a</tool_call>b\\"</tool_call>"}}'
    for cut in range(len(call)):
        parser = ReplyParser(in_thinking=False, tools=True)
        text = f"<tool_call>\n{call}\n</tool_call>"
        pieces = parser.push(text[:cut]) + parser.push(text[cut:]) + parser.finish()
        assert pieces == [ToolCall("f", {"x": 'a</tool_call>b"</tool_call>'})]


def test_a_string_that_never_ends_is_text_and_not_lost():
    text = '<tool_call>{"name": "f</tool_call> and more'
    parser = ReplyParser(in_thinking=False, tools=True)
    assert parser.push(text) + parser.finish() == [Text(text)]
