"""Sampling against distributions computed by hand, and against the reference's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import qwen3_tg_numpy.sampling as reference

from qwen3_tg.errors import UsageError
from qwen3_tg.sampling import Sampling, Seen, adjusted, candidates, explain, sample, uniform

# Probabilities in twentieths, by id: 2, 10, 1, 4, 3; most likely first: 1, 3, 4, 0, 2.
TWENTIETHS = np.log(np.array([2, 10, 1, 4, 3], np.float32) / 20)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {1: 10 / 20, 3: 4 / 20, 4: 3 / 20, 0: 2 / 20, 2: 1 / 20}),
        # temperature 1/2 squares the odds: 100 + 16 + 9 + 4 + 1
        ({"temperature": 0.5}, {1: 100 / 130, 3: 16 / 130, 4: 9 / 130, 0: 4 / 130, 2: 1 / 130}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 3}, {1: 10 / 17, 3: 4 / 17, 4: 3 / 17}),
        ({"top_k": 5}, {1: 10 / 20, 3: 4 / 20, 4: 3 / 20, 0: 2 / 20, 2: 1 / 20}),
        ({"top_k": 1000}, {1: 10 / 20, 3: 4 / 20, 4: 3 / 20, 0: 2 / 20, 2: 1 / 20}),
        ({"top_p": 1e-9}, {1: 1.0}),  # the most likely one always stays
        ({"top_p": 0.49}, {1: 1.0}),
        ({"top_p": 0.51}, {1: 10 / 14, 3: 4 / 14}),
        ({"top_p": 0.69}, {1: 10 / 14, 3: 4 / 14}),
        ({"top_p": 0.71}, {1: 10 / 17, 3: 4 / 17, 4: 3 / 17}),
        ({"min_p": 0.11}, {1: 10 / 19, 3: 4 / 19, 4: 3 / 19, 0: 2 / 19}),  # below 1.1 of 10
        ({"min_p": 0.35}, {1: 10 / 14, 3: 4 / 14}),
        ({"min_p": 1.0}, {1: 1.0}),
        # The order matters. top_k before top_p: of 17, 10 and 4 reach 0.8, which needs 16 of 20.
        ({"top_k": 3, "top_p": 0.8}, {1: 10 / 14, 3: 4 / 14}),
        # temperature before top_p: 100 of 130 reach 0.75, which 10 of 20 do not.
        ({"temperature": 0.5, "top_p": 0.75}, {1: 1.0}),
        # temperature before min_p: 16 of 100 is below 0.17, while 4, 3 and 2 of 10 are not.
        ({"temperature": 0.5, "min_p": 0.17}, {1: 1.0}),
        ({"temperature": 1.0, "min_p": 0.17}, {1: 10 / 19, 3: 4 / 19, 4: 3 / 19, 0: 2 / 19}),
        # top_p before min_p: were it after, 10 of 14 would already reach 0.71.
        ({"top_p": 0.71, "min_p": 0.35}, {1: 10 / 14, 3: 4 / 14}),
        ({"top_k": 4, "top_p": 0.85, "min_p": 0.35}, {1: 10 / 14, 3: 4 / 14}),
    ],
)
def test_the_filters_leave_the_distribution_computed_by_hand(settings, expected):
    ids, p = candidates(TWENTIETHS, Sampling(**{"temperature": 1.0} | settings))
    assert ids.tolist() == list(expected)
    assert p == pytest.approx(list(expected.values()), rel=1e-6)
    assert p.dtype == np.float64
    assert p.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("settings", "prompt", "answer", "expected"),
    [
        # what is positive is divided by 2, what is negative multiplied, each token once
        ({"repetition_penalty": 2.0}, [0, 2], [2, 2], [1.0, 1.0, -2.0, 0.5, 0.0]),
        ({"repetition_penalty": 0.5}, [0], [3], [4.0, 1.0, -1.0, 1.0, 0.0]),
        # the prompt's tokens are not counted
        ({"presence_penalty": 1.5}, [0, 1], [3, 3, 3, 4], [2.0, 1.0, -1.0, -1.0, -1.5]),
        ({"frequency_penalty": 0.5}, [0, 1], [3, 3, 3, 4], [2.0, 1.0, -1.0, -1.0, -0.5]),
        ({"frequency_penalty": -0.5}, [], [3, 3], [2.0, 1.0, -1.0, 1.5, 0.0]),
        ({"logit_bias": {1: -np.inf, 4: 2.5}}, [], [], [2.0, -np.inf, -1.0, 0.5, 2.5]),
        # in order: 2 + 4 is halved, then 1 and twice 0.25 taken
        (
            {
                "logit_bias": {0: 4.0},
                "repetition_penalty": 2.0,
                "presence_penalty": 1.0,
                "frequency_penalty": 0.25,
            },
            [],
            [0, 0],
            [1.5, 1.0, -1.0, 0.5, 0.0],
        ),
    ],
)
def test_biases_and_penalties_change_the_logits_as_computed_by_hand(
    settings, prompt, answer, expected
):
    logits = np.array([2.0, 1.0, -1.0, 0.5, 0.0], np.float32)
    found = adjusted(logits, Sampling(**settings), Seen(prompt, answer))
    assert found.tolist() == expected
    theirs = reference.penalised(logits, reference.Sampling(**settings), prompt, answer)
    assert theirs.tolist() == expected
    assert sample(logits, Sampling(**settings), 0, Seen(prompt, answer)) == np.argmax(expected)


def test_only_allowed_tokens_are_drawn_and_none_is_an_error():
    allowed = np.array([False, False, True, False, True])
    drawn = {sample(TWENTIETHS, Sampling(1.0), n, allowed=allowed) for n in range(60)}
    assert drawn == {2, 4}
    assert sample(TWENTIETHS, Sampling(), 0, allowed=allowed) == 4
    with pytest.raises(UsageError, match="every token is forbidden"):
        sample(TWENTIETHS, Sampling(), 0, allowed=np.zeros(5, bool))
    with pytest.raises(UsageError, match="logit_bias is of token 5; the last is 4"):
        sample(TWENTIETHS, Sampling(logit_bias={5: 1.0}), 0)


def test_an_explanation_shows_each_step_that_is_on_and_ends_with_the_draw():
    settings = Sampling(0.5, top_p=0.9, top_k=3, min_p=0.1, logit_bias={2: -1.0})
    found = explain(TWENTIETHS, settings)
    assert [step.step for step in found] == [
        *("", "logit_bias of 1", "temperature 0.5", "top_k 3", "top_p 0.9", "min_p 0.1")
    ]
    assert [len(step.ids) for step in found] == [5, 5, 5, 3, 2, 2]
    assert found[0].p == pytest.approx([0.5, 0.2, 0.15, 0.1, 0.05])
    ids, p = candidates(TWENTIETHS, settings)
    assert found[-1].ids.tolist() == ids.tolist()
    assert found[-1].p.tolist() == p.tolist()
    greedy = explain(TWENTIETHS, Sampling(top_k=3))
    assert [step.step for step in greedy] == ["", "temperature 0"]
    assert greedy[-1].ids.tolist() == [1]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8])
def test_the_largest_are_those_of_a_stable_sort(count):
    logits = np.array([0, 3, 1, 3, 1, 1, 3], np.float32)
    ids, _ = candidates(logits, Sampling(1.0, top_k=count))
    assert ids.tolist() == np.argsort(-logits, kind="stable")[:count].tolist()


def test_top_p_takes_no_token_more_than_reaches_it_exactly():
    ids, p = candidates(np.zeros(8, np.float32), Sampling(temperature=1.0, top_p=0.5))
    assert (ids.tolist(), p.tolist()) == ([0, 1, 2, 3], [0.25] * 4)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 49, 1000, 151_936])
def test_top_p_just_below_one_leaves_a_distribution_although_the_sum_rounds(size):
    sampling = Sampling(temperature=1.0, top_p=float(np.nextafter(1, 0)))
    ids, p = candidates(np.zeros(size, np.float32), sampling)
    assert ids.tolist() == list(range(len(ids)))
    assert size - 1 <= len(ids) <= size
    assert p.sum() == pytest.approx(1)


def test_of_equal_logits_the_lower_ids_come_first_and_fill_top_k():
    logits = np.array([0, 3, 1, 3, 1, 1, 3], np.float32)
    ids, _ = candidates(logits, Sampling(temperature=0.7, top_k=5))
    assert ids.tolist() == [1, 3, 6, 2, 4]


def test_temperature_zero_takes_the_lowest_id_of_the_largest_logit():
    logits = np.array([1, 5, 2, 5], np.float32)
    for n in range(5):
        assert sample(logits, Sampling(temperature=0, seed=n, top_p=0.1, min_p=1), n) == 1


def test_a_logit_of_minus_infinity_is_never_drawn():
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    drawn = {sample(logits, Sampling(temperature=1.0, seed=5), n) for n in range(60)}
    assert drawn == {1, 3}


def test_large_logits_neither_overflow_nor_warn():
    with np.errstate(all="raise", under="ignore"):
        ids, p = candidates(np.array([-3e4, 3e4, 2.9e4], np.float32), Sampling(temperature=0.01))
    assert ids[0] == 1
    assert p[0] == 1


def test_the_logits_are_left_as_they_were():
    logits = TWENTIETHS.copy()
    sample(logits, Sampling(temperature=0.6, top_k=3, top_p=0.9, min_p=0.1), 0)
    assert logits.tolist() == TWENTIETHS.tolist()


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = counts.sum() * p
    return float(((counts - expected) ** 2 / expected).sum())


# Exceeded by one honest series in a thousand, by degrees of freedom: NIST/SEMATECH e-Handbook of
# Statistical Methods, 1.3.6.7.4 "Critical Values of the Chi-Square Distribution", column 0.001.
CRITICAL = {2: 13.816, 4: 18.467}


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"temperature": 2.0}])
@pytest.mark.parametrize("series", ["over the steps of a seed", "over seeds at one step"])
def test_draws_are_as_frequent_as_their_probabilities(settings, series):
    settings = {"temperature": 1.0} | settings
    draws = 4000
    pairs = [(1234, n) for n in range(draws)]
    if series == "over seeds at one step":
        pairs = [(seed, 7) for seed in range(draws)]
    drawn = [sample(TWENTIETHS, Sampling(**settings, seed=seed), n) for seed, n in pairs]
    odds = np.array([2.0, 10, 1, 4, 3]) ** (1 / settings["temperature"])
    kept = [1, 3, 4] if "top_k" in settings else [0, 1, 2, 3, 4]
    assert set(drawn) == set(kept)
    counts = np.bincount(drawn, minlength=5)[kept]
    assert chi_square(counts, odds[kept] / odds[kept].sum()) < CRITICAL[len(kept) - 1]


def test_the_chi_square_would_notice_another_distribution():
    drawn = [sample(TWENTIETHS, Sampling(temperature=1.0, seed=1234), n) for n in range(4000)]
    even = np.full(5, 0.2)
    near = np.array([2, 9.4, 1, 4.6, 3]) / 20
    counts = np.bincount(drawn, minlength=5)
    assert chi_square(counts, even) > 100 * CRITICAL[4]
    assert chi_square(counts, near) > CRITICAL[4]


def test_a_draw_depends_on_seed_and_step_alone():
    steps = [uniform(3, n) for n in range(20)]
    assert [uniform(3, n) for n in reversed(range(20))] == steps[::-1]
    assert len(set(steps)) == 20
    assert all(0 <= u < 1 for u in steps)
    assert not set(steps) & {uniform(4, n) for n in range(20)}


def philox(counter: int, key: int) -> int:
    """The first word of Philox4x64-10, in plain integers, after the paper (Salmon et al.
    2011)."""
    word = 2**64 - 1
    c = [counter, 0, 0, 0]
    k0, k1 = key & word, key >> 64
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k0, b & word, (a >> 64) ^ c[3] ^ k1, a & word]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return c[0]


@pytest.mark.parametrize(
    ("seed", "n"), [(0, 0), (0, 1), (42, 7), (2**64, 3), (2**128 - 1, 262_144)]
)
def test_the_number_of_a_step_is_that_of_philox_for_ever(seed, n):
    # numpy adds one to the counter before it draws, and makes a float of the upper 53 bits
    assert uniform(seed, n) == (philox(n + 1, seed) >> 11) / 2**53


def random_case(n: int) -> tuple[np.ndarray, dict[str, float], int]:
    random = np.random.default_rng(n)
    logits = random.normal(0, 3, int(random.integers(1, 400))).astype(np.float32)
    if n % 3 == 0:  # many ties
        logits = np.round(logits)
    settings = {
        "temperature": float(random.choice([0.0, 0.2, 0.6, 0.7, 1.0, 1.9])),
        "top_p": float(random.choice([1.0, 0.95, 0.8, 0.3, 0.01])),
        "top_k": int(random.choice([0, 1, 2, 20, 1000])),
        "min_p": float(random.choice([0.0, 0.05, 0.5, 1.0])),
        "seed": int(random.integers(2**63)),
        "repetition_penalty": float(random.choice([1.0, 1.0, 1.1, 0.8])),
        "presence_penalty": float(random.choice([0.0, 0.0, 1.5])),
        "frequency_penalty": float(random.choice([0.0, 0.0, 0.3, -0.2])),
        "logit_bias": {0: 3.0, 1: -np.inf} if len(logits) > 2 and random.random() < 0.3 else {},
    }
    return logits, settings, int(random.integers(10_000))


def test_the_reference_written_apart_agrees_on_200_random_cases():
    several = 0
    for n in range(200):
        logits, settings, step = random_case(n)
        ours, theirs = Sampling(**settings), reference.Sampling(**settings)
        prompt, answer = np.random.default_rng(n).integers(0, len(logits), (2, 9)).tolist()
        seen = Seen(prompt, answer)
        token = sample(logits, ours, step, seen)
        assert token == reference.sample(logits, theirs, step, prompt, answer), n
        if settings["temperature"] > 0:
            ids, p = candidates(logits, ours, seen)
            reference_ids, reference_p = reference.candidates(logits, theirs, prompt, answer)
            assert ids.tolist() == reference_ids.tolist(), n
            assert p == pytest.approx(reference_p, rel=1e-12), n
            several += len(ids) > 1
    assert several > 40  # the cases are not all of one candidate


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("inf"), "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", float("nan"), "above 0 and at most 1"),
        ("top_k", -1, "at least 0"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
        ("min_p", float("nan"), "from 0 to 1"),
        ("seed", -1, "from 0 to 2**128 - 1"),
        ("seed", 2**128, "from 0 to 2**128 - 1"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", float("inf"), "above 0"),
        ("presence_penalty", float("nan"), "a number"),
        ("frequency_penalty", float("inf"), "a number"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value, expected):
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == f"{name} must be {expected}, found {value}"


@pytest.mark.parametrize("value", ["1", None, [1], 1j, float("nan"), 10**400])
@pytest.mark.parametrize("setting", dataclasses.fields(Sampling), ids=lambda s: s.name)
def test_what_is_no_number_is_refused_by_name_with_the_value(
    setting: dataclasses.Field, value: object
) -> None:
    if (setting.name, value) == ("top_k", 10**400):
        return  # as many as there are
    with pytest.raises(UsageError) as caught:
        Sampling(**{setting.name: value})
    assert str(caught.value).startswith(f"{setting.name} must be ")
    assert f"found {value!r:.80}" in str(caught.value)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, bool])
def test_numbers_of_other_types_are_numbers(number: type) -> None:
    names = {setting.name for setting in dataclasses.fields(Sampling)}
    names -= {"top_k", "seed", "logit_bias"}
    sampling = Sampling(**{name: number(1) for name in names}, logit_bias={0: number(1)})
    assert sample(TWENTIETHS, sampling, 0) in range(5)


def test_the_ends_of_the_ranges_are_allowed():
    Sampling(temperature=0, top_p=1, top_k=0, min_p=0, seed=0)
    Sampling(temperature=100, top_p=1e-9, top_k=10**9, min_p=1, seed=2**128 - 1)


def test_by_default_it_is_greedy_and_every_filter_is_off():
    assert Sampling() == Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)


def test_a_tiny_temperature_takes_the_likeliest_token() -> None:
    assert sample(np.array([1.0, 30.0, -5.0]), Sampling(temperature=1e-308), 0) == 1


@pytest.mark.parametrize(
    "bias", [{-1: 1.0}, {"a": 1.0}, {3: np.inf}, {3: np.nan}, {3: "1"}, {3: 10**400}, {3: None}]
)
def test_a_bias_that_is_none_is_refused(bias: dict) -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        Sampling(logit_bias=bias)


@pytest.mark.parametrize("bad", [{"top_k": None}, {"top_k": 2.5}, {"seed": 1.5}])
def test_what_must_be_an_integer_is_refused_by_name(bad: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(bad))} must be an integer"):
        Sampling(**bad)


def test_other_answers_and_turns_have_seeds_of_their_own_that_json_holds() -> None:
    for seed in (0, 5, 2**53 + 1, 2**128 - 1):
        one = Sampling(temperature=1.0, seed=seed)
        assert one.another(0) == one.next_turn(0) == one
        others = [one.another(n).seed for n in range(1, 200)]
        others += [one.next_turn(n).seed for n in range(1, 200)]
        others += [one.another(n).next_turn(m).seed for n in (1, 2) for m in (1, 2)]
        assert len({*others, seed}) == len(others) + 1
        assert max(others) < 2**53
        assert all(float(other) == other for other in others)


def test_equal_settings_have_one_hash():
    some = Sampling(temperature=0.5, logit_bias={1: -1.0, 2: 3.0})
    same = Sampling(temperature=0.5, logit_bias={2: 3.0, 1: -1.0})
    assert some == same and hash(some) == hash(same)
    others = [Sampling(), Sampling(seed=1), Sampling(temperature=0.5), Sampling(logit_bias={1: 2})]
    assert len({some, same, *others}) == 5
