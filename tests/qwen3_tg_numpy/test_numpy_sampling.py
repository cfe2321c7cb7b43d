"""The reference's sampling against distributions computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from qwen3_tg_numpy.sampling import Sampling, candidates, sample, uniform

LOGITS = np.log(np.array([1, 8, 2, 4, 1], np.float32))  # 16ths: 1/16, 8/16, 2/16, 4/16, 1/16


def chosen(**settings: float) -> dict[int, float]:
    ids, p = candidates(LOGITS, Sampling(**{"temperature": 1.0, **settings}))
    assert p.dtype == np.float64
    assert p.sum() == pytest.approx(1, abs=1e-15)
    return dict(zip(ids.tolist(), p.tolist(), strict=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {1: 8 / 16, 3: 4 / 16, 2: 2 / 16, 0: 1 / 16, 4: 1 / 16}),
        ({"temperature": 0.5}, {1: 64 / 86, 3: 16 / 86, 2: 4 / 86, 0: 1 / 86, 4: 1 / 86}),
        ({"top_k": 2}, {1: 8 / 12, 3: 4 / 12}),
        ({"top_k": 4}, {1: 8 / 15, 3: 4 / 15, 2: 2 / 15, 0: 1 / 15}),  # of the tie the lower id
        ({"top_k": 99}, {1: 8 / 16, 3: 4 / 16, 2: 2 / 16, 0: 1 / 16, 4: 1 / 16}),
        ({"top_k": None}, {1: 8 / 16, 3: 4 / 16, 2: 2 / 16, 0: 1 / 16, 4: 1 / 16}),
        ({"top_p": 0.01}, {1: 1.0}),
        ({"top_p": 0.49}, {1: 1.0}),
        ({"top_p": 0.51}, {1: 8 / 12, 3: 4 / 12}),
        ({"top_p": 0.8}, {1: 8 / 14, 3: 4 / 14, 2: 2 / 14}),
        ({"min_p": 0.2}, {1: 8 / 14, 3: 4 / 14, 2: 2 / 14}),  # 0.2 of 8 is 1.6
        ({"min_p": 0.3}, {1: 8 / 12, 3: 4 / 12}),
        ({"min_p": 1.0}, {1: 1.0}),
        # top_p acts on what top_k left: 8/14 is above 0.55, though 8/16 is not
        ({"top_k": 3, "top_p": 0.55}, {1: 1.0}),
        # min_p is a share of the most likely, so top_p before it changes nothing about it
        ({"top_p": 0.8, "min_p": 0.3}, {1: 8 / 12, 3: 4 / 12}),
        ({"temperature": 0.5, "min_p": 0.1}, {1: 64 / 80, 3: 16 / 80}),  # after temperature
    ],
)
def test_the_filters_leave_the_distribution_computed_by_hand(settings, expected):
    found = chosen(**settings)
    assert list(found) == list(expected)  # most likely first
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)


def test_top_p_that_is_reached_exactly_takes_no_token_more():
    ids, p = candidates(np.zeros(4, np.float32), Sampling(temperature=1.0, top_p=0.5))
    assert ids.tolist() == [0, 1]
    assert p.tolist() == [0.5, 0.5]


def test_top_p_a_hair_below_one_survives_a_sum_that_rounds_short():
    sampling = Sampling(temperature=1.0, top_p=float(np.nextafter(1, 0)))
    for size in (3, 7, 10, 49, 1000):
        ids, p = candidates(np.zeros(size, np.float32), sampling)
        assert 0 < len(ids) <= size
        assert p.sum() == pytest.approx(1)


def test_equal_logits_are_ordered_by_id():
    ids, _ = candidates(np.zeros(100, np.float32), Sampling(temperature=0.7, top_k=5))
    assert ids.tolist() == [0, 1, 2, 3, 4]


def test_logits_of_minus_infinity_are_never_chosen():
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    sampling = Sampling(temperature=1.0, seed=3)
    assert {sample(logits, sampling, n) for n in range(50)} == {1, 3}


def test_large_logits_do_not_overflow():
    with np.errstate(over="raise", invalid="raise"):
        ids, p = candidates(np.array([1e4, 0], np.float32), Sampling(temperature=0.01))
    assert ids[0] == 0
    assert p[0] == 1


def test_temperature_zero_is_the_lowest_id_of_the_largest_logit():
    logits = np.array([1, 5, 5, 2], np.float32)
    assert sample(logits, Sampling(temperature=0, top_p=0.5, seed=9), 0) == 1
    assert sample(logits, Sampling(), 7) == 1


def philox(key: int, counter: int) -> int:
    """The first 64 bits of Philox4x64-10 (Salmon et al. 2011, table 2 and section 3.3)."""
    mask = 2**64 - 1
    c = [counter >> 64 * i & mask for i in range(4)]
    k0, k1 = key & mask, key >> 64
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [b >> 64 ^ c[1] ^ k0, b & mask, a >> 64 ^ c[3] ^ k1, a & mask]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & mask, k1 + 0xBB67AE8584CAA73B & mask
    return c[0]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**64 + 7, 2**128 - 1])
@pytest.mark.parametrize("n", [0, 1, 2, 1000, 2**64 - 1])
def test_the_random_number_is_philox_with_the_seed_as_key_and_the_step_as_counter(seed, n):
    # numpy counts up before the first block, and makes a float of the upper 53 bits
    assert uniform(seed, n) == (philox(seed, n + 1) >> 11) * 2.0**-53


def test_the_choice_is_the_first_whose_cumulative_probability_exceeds_the_random_number():
    sampling = Sampling(temperature=1.0, seed=11)
    ids, p = candidates(LOGITS, sampling)
    for n in range(200):
        u, total = uniform(11, n), 0.0
        for token, probability in zip(ids, p, strict=True):  # noqa: B007
            total += probability
            if total > u:
                break
        assert sample(LOGITS, sampling, n) == token


def test_draws_follow_the_distribution():
    sampling = Sampling(temperature=1.0, top_k=3, seed=5)
    draws = [sample(LOGITS, sampling, n) for n in range(4000)]
    shares = np.bincount(draws, minlength=5) / 4000
    # 4 standard deviations of a share of 4000 draws are at most 0.032
    assert shares == pytest.approx([0, 8 / 14, 2 / 14, 4 / 14, 0], abs=0.032)


def test_a_token_depends_on_seed_and_step_and_not_on_earlier_draws():
    sampling = Sampling(temperature=1.0, seed=5)
    forward = [sample(LOGITS, sampling, n) for n in range(30)]
    backward = [sample(LOGITS, sampling, n) for n in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward != [sample(LOGITS, Sampling(temperature=1.0, seed=6), n) for n in range(30)]


def test_logits_are_not_changed():
    logits = LOGITS.copy()
    sample(logits, Sampling(temperature=0.5, top_k=2), 0)
    assert np.array_equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**128),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sampling(**{name: value})
