"""Words to values: right distributions, exact edges, and no help from any math library."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.views import draws
from cache_service.views.draws import ONE, exact_exp, exact_log, exact_pow

LOWEST = np.array([0], dtype=np.uint64)
HIGHEST = np.array([2**64 - 1], dtype=np.uint64)


@pytest.fixture(scope="module")
def words():
    return draws.draw_words(0, np.arange(40_000), [1])[0][:, 0]


def test_uniform_covers_zero_to_one_and_never_reaches_one(words):
    assert draws.uniform(LOWEST)[0] == 0.0
    assert draws.uniform(HIGHEST)[0] == 1.0 - 2.0**-53
    assert abs(draws.uniform(words).mean() - 0.5) < 0.01


def test_chance_zero_never_happens_and_chance_one_always_does(words):
    assert not draws.chance(words, 0.0).any()
    assert draws.chance(words, 1.0).all()
    assert draws.chance(HIGHEST, 1.0).all()
    assert not draws.chance(LOWEST, 0.0).any()
    assert abs(draws.chance(words, 0.3).mean() - 0.3) < 0.01


@pytest.mark.parametrize("count", [1, 2, 9, 24, 31])
def test_integers_are_uniform_and_inside(words, count, assert_uniform):
    values = draws.below(words, count)
    assert values.dtype == np.int64
    assert_uniform(values, count)
    assert draws.below(LOWEST, count)[0] == 0
    assert draws.below(HIGHEST, count)[0] == count - 1


def test_fixed_numbers_include_both_ends(words):
    assert draws.uniform_fixed(LOWEST, 0.5, 2.0)[0] == ONE // 2
    assert draws.uniform_fixed(HIGHEST, 0.5, 2.0)[0] == 2 * ONE
    assert draws.uniform_fixed(words, 1.0, 1.0).tolist() == [ONE] * len(words)
    assert draws.to_fixed(1 / 3) == 21845
    assert draws.to_fixed(-0.5) == -ONE // 2


def test_log_uniform_is_uniform_in_the_logarithm(words, assert_uniform):
    values = draws.log_uniform_fixed(words, 0.25, 4.0)
    assert values.min() >= ONE // 4
    assert values.max() <= 4 * ONE
    places = (np.log(values / ONE) - np.log(0.25)) / np.log(16)
    assert_uniform(np.minimum((places * 16).astype(int), 15), 16)


def test_log_uniform_ends_are_exact():
    assert draws.log_uniform_fixed(LOWEST, 0.75, 4 / 3)[0] == draws.to_fixed(0.75)
    assert draws.log_uniform_fixed(HIGHEST, 0.75, 4 / 3)[0] == draws.to_fixed(4 / 3)


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 0.2, 0.8, 1.0, 2.0, 7.5, 32.0])
def test_beta_has_the_exact_mean_and_variance(alpha):
    cdf = np.concatenate([[0.0], draws._beta_steps(alpha), [1.0]])
    mass = np.diff(cdf)
    values = np.arange(ONE + 1) / ONE
    assert (mass >= 0).all()
    assert (mass * values).sum() == pytest.approx(0.5, abs=1e-9)
    variance = (mass * (values - 0.5) ** 2).sum()
    assert variance == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (3.0, lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5),
    ],
)
def test_beta_follows_the_closed_form_where_there_is_one(alpha, cdf):
    halfway = (np.arange(ONE) + 0.5) / ONE
    np.testing.assert_allclose(draws._beta_steps(alpha), cdf(halfway), rtol=0, atol=1e-7)


def test_beta_draws_are_symmetric_and_reach_both_ends(words):
    values = draws.beta_fixed(words, 0.2)
    assert values.min() == 0
    assert values.max() == ONE
    assert abs((values < ONE // 2).mean() - 0.5) < 0.01
    assert abs((values / ONE).var() - 1 / (4 * 1.4)) < 0.005


@given(st.floats(-30, 30))
def test_exp_is_right_to_a_few_last_places(x):
    assert exact_exp(np.array([x]))[0] == pytest.approx(math.exp(x), rel=1e-15)


@given(st.floats(1e-300, 1e300))
def test_log_is_right_to_a_few_last_places(x):
    assert exact_log(np.array([x]))[0] == pytest.approx(math.log(x), rel=1e-15, abs=1e-16)


@given(st.floats(1e-6, 1.0), st.floats(-31, 31))
def test_powers_are_right(base, exponent):
    expected = max(base**exponent, math.exp(-700))
    assert exact_pow(np.array([base]), exponent)[0] == pytest.approx(expected, rel=1e-12)


def test_exp_and_log_are_pinned_to_the_bit():
    x = np.array([-0.2876820724517809, 0.1, 1.0, 3.0])
    assert [v.hex() for v in exact_exp(x).tolist()] == [
        "0x1.8000000000000p-1",
        "0x1.1aec7b35a00d4p+0",
        "0x1.5bf0a8b14576ap+1",
        "0x1.415e5bf6fb106p+4",
    ]
    assert [v.hex() for v in exact_log(np.array([0.75, 4 / 3, 0.1, 10.0])).tolist()] == [
        "-0x1.269621134db92p-2",
        "0x1.269621134db92p-2",
        "-0x1.26bb1bbb55515p+1",
        "0x1.26bb1bbb55516p+1",
    ]
