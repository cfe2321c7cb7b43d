"""Stop strings: the same end, however the text is cut into pushes."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from qwen3_tg.errors import UsageError
from qwen3_tg.stop_strings import StopStrings, unfinished


def run(strings: list[str], parts: list[str]) -> tuple[str, bool]:
    """All text that comes out, and whether a stop string was found."""
    stop = StopStrings(strings)
    out = "".join(map(stop.push, parts))
    return out + stop.flush(), stop.found


def cuts(text: str) -> list[list[str]]:
    """A text whole, in characters, with empty parts, and cut at each one and each two places."""
    found = [[text], list(text), ["", text, ""]]
    places = range(1, len(text))
    for at in [*combinations(places, 1), *combinations(places, 2)]:
        edges = [0, *at, len(text)]
        found.append([text[a:b] for a, b in pairwise(edges)])
    return found


CASES = [
    # (stop strings, text, what comes out, found)
    pytest.param([], "any text", "any text", False, id="none"),
    pytest.param(["END"], "some END more", "some ", True, id="one"),
    pytest.param(["END"], "END", "", True, id="at once"),
    pytest.param(["END"], "some EN", "some EN", False, id="unfinished at the end"),
    pytest.param(["END"], "EEN ENEND", "EEN EN", True, id="false starts"),
    pytest.param(["aab"], "aaaab!", "aa", True, id="starts inside a false start"),
    pytest.param(["abab"], "aabaabab", "aaba", True, id="repeats itself"),
    pytest.param(["\n\n", "\nQ:"], "one\ntwo\nQ: three\n\n", "one\ntwo", True, id="two"),
    pytest.param(["\nQ:", "\n\n"], "one\n\nQ:", "one", True, id="two that share a start"),
    pytest.param(["ab", "abc"], "xabc", "x", True, id="one starts another"),
    pytest.param(["bc", "abc"], "xabcd", "x", True, id="one ends another"),
    pytest.param(["b", "abc"], "xabcd", "xa", True, id="one inside another ends first"),
    pytest.param(["bcd", "abcde"], "xabcde", "xa", True, id="one inside a longer one"),
    pytest.param(["abcx", "bcd"], "abcd", "a", True, id="a false start hides another"),
    pytest.param(["é\U0001fae0"], "caf\u00e9\U0001fae0!", "caf", True, id="not ASCII"),
    pytest.param([" "], "a b", "a", True, id="white space"),
    pytest.param(["x", "x"], "axb", "a", True, id="twice the same"),
]


@pytest.mark.parametrize(("strings", "text", "out", "found"), CASES)
def test_however_a_text_is_cut_it_ends_where_the_first_stop_string_is_complete(
    strings, text, out, found
):
    for parts in cuts(text):
        assert run(strings, parts) == (out, found), parts


@pytest.mark.parametrize(("strings", "text", "out", "found"), CASES)
def test_the_order_of_the_stop_strings_means_nothing(strings, text, out, found):
    assert run(strings[::-1], [text]) == (out, found)


def test_no_start_of_a_stop_string_is_given_before_it_is_certain():
    stop = StopStrings(["END", "\n\n"])
    assert [stop.push(c) for c in "aEN"] == ["a", "", ""]
    assert stop.push("E") == "EN"  # the last E may start another
    assert stop.push("\n") == "E"
    assert stop.push("b") == "\nb"
    assert not stop.found


def test_text_that_can_start_nothing_is_given_at_once():
    stop = StopStrings(["END"])
    assert stop.push("hello") == "hello"
    assert stop.flush() == ""


def test_after_a_stop_string_nothing_comes_any_more():
    stop = StopStrings(["END"])
    assert stop.push("aENDb") == "a"
    assert stop.push("more") == ""
    assert stop.flush() == ""
    assert stop.found


def test_flush_gives_the_held_text_once():
    stop = StopStrings(["END"])
    assert stop.push("aEN") == "a"
    assert stop.flush() == "EN"
    assert stop.flush() == ""
    assert not stop.found


def test_text_after_a_flush_does_not_join_the_flushed_text():
    stop = StopStrings(["END"])
    stop.push("EN")
    stop.flush()
    assert stop.push("D") == "D"
    assert not stop.found


@pytest.mark.parametrize("strings", ["END", [""], ["a", ""], [None], [5], [b"END"], None, 7])
def test_what_is_no_list_of_texts_is_refused(strings):
    with pytest.raises(UsageError, match="stop strings must be a list of texts, none empty") as e:
        StopStrings(strings)
    assert repr(strings) in str(e.value)


@pytest.mark.parametrize(
    ("text", "words", "held"),
    [
        ("", ["ab"], 0),
        ("xa", ["ab"], 1),
        ("ab", ["ab"], 0),  # a whole word is no unfinished one
        ("xaba", ["abac"], 3),
        ("xaba", ["abac", "ba!"], 3),
        ("xaba", ["ba!", "a?"], 2),
        ("aaaa", ["aaab"], 3),
        ("x", ["a"], 0),
        ("x", [], 0),
    ],
)
def test_unfinished_is_the_longest_end_that_starts_a_word(text, words, held):
    assert unfinished(text, words) == held
