"""The third axis of a configuration: which k of a block's n maskable tokens are masked.

Training with `noise.ExactCount(left_bias)` masks what a Plackett-Luce order with slot weights a_i = exp(-beta * i) has
not revealed yet, a mixture of betas being a mixture of such laws; every other noise masks a uniform set of k. As an
exponential race (slot i comes at time T_i ~ Exp(a_i)) the probability of a set is one integral,

    P(M) = P(max of T outside M < min of T inside M) = integral of A exp(-A t) * prod over i outside M of
           (1 - exp(-a_i t)) dt,    A = sum of a over M,

computed here by the trapezoidal rule in log t, whose error falls exponentially for an integrand as smooth as this.

Shapes: S sets, n slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from blockdiff.noise import ExactCount, Noise

EXACT = 10  # largest n whose sets are all looked at
_STEP = 0.05
Biases = tuple[tuple[float, float], ...]


def biases_of(noise: Noise) -> Biases:
    """(beta, share) of the orders that training masks by; a noise that has none masks uniform sets, which is beta 0."""
    return tuple(sorted(noise.biases.items())) if isinstance(noise, ExactCount) else ((0.0, 1.0),)


def log_probability(masked: Tensor, beta: float) -> Tensor:
    """log P(M | n, k) of sets, bool [S, n] with k >= 1 masked slots each -> float64 [S]."""
    n = masked.shape[1]
    if beta == 0:
        count = masked.sum(1).double()
        return torch.lgamma(count + 1) + torch.lgamma(n - count + 1) - math.lgamma(n + 1)
    log_time = torch.arange(-40.0, beta * n + 10, _STEP, dtype=torch.float64)
    rate = torch.exp(-beta * torch.arange(n, dtype=torch.float64))
    revealed = torch.log(-torch.expm1(-rate[:, None] * log_time.exp())).clamp(min=-1e300)  # [n, times]
    total = (masked.double() @ rate)[:, None]
    density = total.log() + log_time - total * log_time.exp()
    return torch.logsumexp(density + (~masked).double() @ revealed, 1) + math.log(_STEP)


def trained_log_probability(biases: Biases, masked: Tensor) -> Tensor:
    """log P(M | n, k) under training's mixture of orders, bool [S, n] -> float64 [S]."""
    parts = [log_probability(masked, beta) + math.log(share) for beta, share in biases]
    return torch.logsumexp(torch.stack(parts), 0)


@lru_cache(maxsize=4096)
def largest_ratio(biases: Biases, asked: float, n: int, k: int) -> float:
    """Largest P(M) asked over P(M) trained of the sets of k of n slots, for an asked order with left bias `asked`.

    Up to `EXACT` slots every set is looked at. Beyond, this is an upper bound: against a single trained order the ratio
    is largest for the leftmost or the rightmost k slots (an order that leans more leaves the rightmost; enumerated in
    the tests up to 9 slots, not proved), and a mixture is at least each of its parts times its share.
    """
    if not 0 < k < n or biases == ((asked, 1.0),):
        return 1.0
    if n <= EXACT:
        sets = _rows(list(combinations(range(n), k)), n)
        return float((log_probability(sets, asked) - trained_log_probability(biases, sets)).max().exp())
    return min(extreme_ratio(beta, asked, n, k) / share for beta, share in biases)


def extreme_ratio(trained: float, asked: float, n: int, k: int) -> float:
    """P(M) asked over P(M) trained of the leftmost or the rightmost k of n slots, the larger of the two."""
    ends = _rows([tuple(range(k)), tuple(range(n - k, n))], n)
    return float((log_probability(ends, asked) - log_probability(ends, trained)).max().exp())


def order_gain(biases: Biases, sets: Sequence[tuple[bool, ...]]) -> float | None:
    """Mean over the sets of log [P(M | n, k) * C(n, k)] in nats: how much more often than in uniform order training
    masked what was met; 0 for a model trained in uniform order. None where no set leaves a choice."""
    gains = []
    for n in sorted({len(each) for each in sets}):
        masked = torch.tensor([each for each in sets if len(each) == n])
        count = masked.sum(1)
        masked = masked[(count > 0) & (count < n)]
        if len(masked):
            gains.append(trained_log_probability(biases, masked) - log_probability(masked, 0.0))
    return float(torch.cat(gains).mean()) if gains else None


def _rows(chosen: Sequence[tuple[int, ...]], n: int) -> Tensor:
    rows = torch.zeros(len(chosen), n, dtype=torch.bool)
    return rows.scatter(1, torch.tensor(chosen, dtype=torch.int64), True)
