"""Statistics against published tables, closed forms and hand-computed values."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from blockdiff.statistics import incomplete_beta, paired, spread, t_cdf, t_quantile, wilson


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (10, 2.228139), (30, 2.042272), (1000, 1.962339)],
)
def test_t_quantiles_are_those_of_the_tables(df, quantile):
    assert t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-6)
    assert t_cdf(quantile, df) == pytest.approx(0.975, abs=1e-7)


def test_the_t_distribution_agrees_with_its_closed_forms():
    for t in (-40.0, -3.0, -0.5, 0.0, 0.2, 1.0, 7.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, rel=1e-12)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-10)
    # a tail so small that 1 - cdf would have lost it: P(T_2 < -t) = 1 / (t^2 (1 + ...)), leading term 1 / (2 t^2)
    assert t_cdf(-1e6, 2) == pytest.approx(0.5e-12, rel=1e-6)


def test_the_incomplete_beta_function():
    for x in (0.0, 0.1, 0.5, 0.93, 1.0):
        assert incomplete_beta(1, 1, x) == pytest.approx(x)
        assert incomplete_beta(2, 3, x) == pytest.approx(6 * x**2 - 8 * x**3 + 3 * x**4, abs=1e-14)
        assert incomplete_beta(0.7, 5, x) == pytest.approx(1 - incomplete_beta(5, 0.7, 1 - x), abs=1e-14)


def test_a_paired_test_worked_out_by_hand():
    # mean 0.3, variance 0.07, se sqrt(0.07 / 3) = 0.152753, t = 1.963961; with df = 2, p = 1 - t / sqrt(2 + t^2)
    test = paired([0.1, 0.2, 0.6])
    assert test.n == 3
    assert (test.mean, test.se, test.t) == pytest.approx((0.3, 0.152753, 1.963961), abs=1e-6)
    assert test.p == pytest.approx(1 - test.t / math.sqrt(2 + test.t**2), rel=1e-9)
    assert test.ci == pytest.approx((0.3 - 4.302653 * 0.152753, 0.3 + 4.302653 * 0.152753), abs=1e-5)
    assert paired([-0.1, -0.2, -0.6]).p == pytest.approx(test.p)


def test_what_cannot_be_known_is_none():
    assert spread([1.0]) is None
    one = paired([0.5])
    assert (one.mean, one.n, one.se, one.t, one.p, one.ci) == (0.5, 1, None, None, None, None)
    same = paired([0.5, 0.5])
    assert (same.se, same.t, same.p, same.ci) == (0, None, None, (0.5, 0.5))


def test_p_values_are_uniform_where_nothing_differs():
    generator = random.Random(0)
    values = [paired([generator.gauss(0, 1) for _ in range(3)]).p for _ in range(2000)]
    assert fmean(value < 0.05 for value in values) == pytest.approx(0.05, abs=0.015)
    shifted = [paired([generator.gauss(2, 1) for _ in range(3)]).p for _ in range(500)]
    assert fmean(value < 0.05 for value in shifted) > 0.2


def test_the_wilson_interval():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29 (without continuity correction)
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(7, 7)[1] == 1
