"""The few statistics that results need: spreads, paired t tests, rank correlations, intervals of proportions.

Standard library only. A number that cannot be known is None, never 0: there is no spread of a single value, and no t
value where there is no spread.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1; None from fewer than two values."""
    return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Paired:
    """Mean of paired differences, tested against 0: standard error, t, two-sided p value, 95 % interval."""

    mean: float
    n: int
    se: float | None = None
    t: float | None = None
    p: float | None = None
    ci: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired(differences: Sequence[float]) -> Paired:
    """Student's paired t test; the errors are None from fewer than two differences, t and p also without spread."""
    n, mean, sd = len(differences), fmean(differences), spread(differences)
    if sd is None:
        return Paired(mean, n)
    se = sd / math.sqrt(n)
    half = t_quantile(0.975, n - 1) * se
    if se == 0:
        return Paired(mean, n, se, ci=(mean, mean))
    t = mean / se
    return Paired(mean, n, se, t, 2 * t_cdf(-abs(t), n - 1), (mean - half, mean + half))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None from fewer than three, or no spread."""
    if len(a) != len(b):
        raise ValueError(f"rank correlation of {len(a)} and {len(b)} values: give pairs")
    if len(a) < 3:
        return None
    ranks = [[sum(x < y for x in values) + sum(x == y for x in values) / 2 for y in values] for values in (a, b)]
    try:
        return correlation(*ranks)
    except StatisticsError:
        return None


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t distribution with df > 0 degrees of freedom.

    Its tail is half of the regularised incomplete beta function I_x(df/2, 1/2) at x = df / (df + t^2): no cancellation,
    so small p values keep their digits.
    """
    tail = 0.5 * incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t <= 0 else 1 - tail


def t_quantile(probability: float, df: float) -> float:
    """The t with P(T <= t) = probability (between 0.5 and 1), by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), a and b above 0.

    The continued fraction (DLMF 8.17.22) by Lentz's algorithm, on the side of (a + 1) / (a + b + 2) where it converges
    fast; I_x(a, b) = 1 - I_{1-x}(b, a) on the other.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            change = c * d
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return math.exp(scale) * value / a


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's score interval: sound at 0 and at n, too)."""
    z = 1.959963984540054
    share, room = successes / n, z * z / n
    middle = share + room / 2
    half = z * math.sqrt(share * (1 - share) / n + room / (4 * n))
    return max(0.0, (middle - half) / (1 + room)), min(1.0, (middle + half) / (1 + room))


def area_under_parallelism(points: Sequence[tuple[float, float]], best: float | None = None) -> float | None:
    """AUP of (tokens per forward, score in percent) points: the area under score over parallelism, where scores below
    the first one's by more than 5 are left out, and a score y weighs min(exp(-3 (1 - y / best)), 1) (d3LLM,
    hao-ai-lab/d3LLM). best: the best score known, default the points' own. None without points."""
    ordered = sorted(points)
    if not ordered:
        return None
    first = ordered[0][1]
    kept = [(rho, y) for rho, y in ordered if y >= first - 5]
    top = max(y for _, y in kept) if best is None else best

    def weighed(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / top)), 1.0) if top > 0 else 0.0

    area = kept[0][0] * kept[0][1]
    for (low, y), (high, z) in pairwise(kept):
        area += 0.5 * (high - low) * (weighed(y) + weighed(z))
    return area


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """Chance that of k texts, taken from the drawn ones without replacement, at least one is right: the unbiased
    estimate 1 - C(drawn - right, k) / C(drawn, k) (arXiv 2107.03374, equation 1), for k up to `drawn`."""
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


def interval_of_share(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of numbers from 0 to 1: Wilson's where every value is 0 or 1, else the percentile
    bootstrap over the values (drawn with a fixed seed)."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(int(sum(values)), len(values))
    generator = random.Random(0)
    means = sorted(fmean(generator.choices(values, k=len(values))) for _ in range(resamples))
    return means[round(0.025 * (resamples - 1))], means[round(0.975 * (resamples - 1))]
