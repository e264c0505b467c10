"""Means and intervals: against values worked out by hand, and against the coverage they promise."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.spread import Spread, interval_of_mean, pooled, t_quantile


def density(x: float, df: int) -> float:
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return scale * (1 + x * x / df) ** (-(df + 1) / 2)


@pytest.mark.parametrize("df", [1, 2, 3, 7, 30, 31, 60, 500])
def test_t_quantile_leaves_a_fortieth_above(df: int):
    t, n = t_quantile(df), 20_000
    below = sum(density((i + 0.5) * t / n, df) for i in range(n)) * t / n
    assert 0.5 + below == pytest.approx(0.975, abs=1e-5)


def test_t_quantile_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="df=0"):
        t_quantile(0)


def test_pooled_spread_by_hand():
    spread = pooled([[9.0, 11.0], [90.0, 110.0, 100.0], [5.0]])
    assert spread is not None
    assert (spread.df, spread.relative) == (3, True)
    assert spread.deviation == pytest.approx(math.sqrt((2 * 0.01 + 2 * 0.01) / 3))
    assert spread.half_width(10, 2) == pytest.approx(3.1824 * spread.deviation * 10 / math.sqrt(2))


def test_spread_is_absolute_where_a_value_is_not_positive():
    spread = pooled([[0.0, 0.2], [0.5, 0.7]])
    assert spread is not None
    assert (spread.relative, spread.df) == (False, 2)
    assert spread.deviation == pytest.approx(math.sqrt(0.02))


def test_without_repetition_there_is_no_spread():
    assert pooled([[1.0], [2.0], []]) is None
    assert pooled([]) is None
    assert interval_of_mean([1.0]) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_interval_holds_the_mean(values: list[float]):
    found = interval_of_mean(values)
    assert found is not None
    assert found[0] <= math.fsum(values) / len(values) + 1e-6
    assert found[1] >= math.fsum(values) / len(values) - 1e-6


def test_equal_means_are_never_resolved_and_far_ones_are():
    spread = Spread(0.1, 4, relative=True)
    assert not spread.resolves((1.0, 2), (1.0, 2))
    assert spread.resolves((1.0, 2), (2.0, 2))
    assert not spread.resolves((1.0, 1), (1.2, 1))


def test_intervals_cover_as_often_as_they_promise():
    draw = random.Random(0)
    n_hit = n_pooled = 0
    for _ in range(2000):
        cells = [[draw.gauss(mean, 0.05 * mean) for _ in range(2)] for mean in (1.0, 2.0, 4.0)]
        low, high = interval_of_mean(cells[0]) or (0.0, 0.0)
        n_hit += low <= 1 <= high
        spread = pooled(cells)
        assert spread is not None
        mean = sum(cells[0]) / 2
        n_pooled += abs(mean - 1) <= spread.half_width(mean, 2)
    assert 0.93 < n_hit / 2000 < 0.97
    assert 0.93 < n_pooled / 2000 < 0.97
