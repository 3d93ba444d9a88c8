"""The order axis of a configuration: which k of a block's n masks are left, and how likely a reveal order leaves them.

A *set* M is a bool row over the n tokens of a block that decoding may find masked, True where still masked. Orders are
those of `noise.ExactCount`: slot i is revealed at the ring of an exponential clock of rate a_i = exp(-beta * i).
Shapes: S sets, n slots, Y nodes of a quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

NODES = 128
DEPTH = 40.0  # the integrand is cut where it is this many nats below its largest value
ROOM = 2**22  # numbers held at once


@dataclass(frozen=True)
class Order:
    """P(M | n, k), the same for every k of a mixture because a block's beta is drawn apart from its k.

    biases: every beta with its share; lead: slots before the n, of which only draws with all of them clean are met
    (the `noisy` boundary masks a block's first token in training and finds it clean in decoding).
    """

    biases: Mapping[float, float]
    lead: int = 0

    @property
    def is_uniform(self) -> bool:
        """Every set of k is equally likely."""
        return set(self.biases) == {0.0}

    def log_probability(self, sets: Tensor) -> Tensor:
        """log P(M | n, |M|) of bool [S, n]: float64 [S], without underflow; 0 where all or none are masked."""
        sets = F.pad(sets, (self.lead, 0))
        parts = [math.log(share) + set_log_probability(sets, beta) for beta, share in self.biases.items()]
        found = torch.stack(parts).logsumexp(0)
        if self.lead:
            clean = 1 - first_masked(sets.shape[1], tuple(self.biases.items()))
            found = found - clean[sets.sum(1)].log()
        return found.clamp(max=0)


def set_log_probability(sets: Tensor, beta: float) -> Tensor:
    """log P(M | n, |M|) under one order, for bool [S, n]: float64 [S].

    M is left if all other clocks ring before the first of M, which rings at rate A = sum of a over M:
    P(M) = integral over x > 0 of exp(-x) * prod over i not in M of (1 - exp(-x a_i / A)).
    """
    count, n = sets.sum(1), sets.shape[1]
    if not beta:
        return -log_ways(n, count)
    slot = -beta * torch.arange(n, dtype=torch.float64)
    pull = slot - torch.where(sets, slot, -torch.inf).logsumexp(1, keepdim=True)
    parts = max(1, ROOM // (max(n, 1) * NODES))
    found = torch.cat([_integral(*rows) for rows in zip(pull.split(parts), (~sets).split(parts), strict=True)])
    return torch.where((count == 0) | (count == n), 0.0, found.clamp(max=0))


def log_ways(n: int, count: Tensor) -> Tensor:
    """log C(n, k) for each k: float64."""
    k, total = count.double(), torch.tensor(float(n), dtype=torch.float64)
    return torch.lgamma(total + 1) - torch.lgamma(k + 1) - torch.lgamma(total - k + 1)


@lru_cache(maxsize=256)
def first_masked(n: int, biases: tuple[tuple[float, float], ...]) -> Tensor:
    """P(slot 0 is masked | k of n are), k = 0..n: float64 [n + 1].

    At x, when slot 0's clock rings, slot i has not with probability exp(-x a_i); it is among the last k if fewer than k
    others have not.
    """
    y = torch.linspace(-DEPTH, math.log(DEPTH) + 1, 2048, dtype=torch.float64)
    x, weight = y.exp(), torch.exp(y - y.exp()) * (y[1] - y[0])
    found = torch.zeros(n + 1, dtype=torch.float64)
    for beta, share in biases:
        if not beta:
            found += share * torch.arange(n + 1, dtype=torch.float64) / max(n, 1)
            continue
        later = torch.zeros(len(y), n, dtype=torch.float64)
        later[:, 0] = 1
        for i in range(1, n):
            stays = torch.exp(-x * math.exp(-beta * i))[:, None]
            later = later * (1 - stays) + F.pad(later, (1, -1)) * stays
        found[1:] += share * (weight @ later.cumsum(1))
    return found.clamp(max=1)


def _integral(pull: Tensor, revealed: Tensor) -> Tensor:
    """log of the integral over x of exp(-x) prod (1 - exp(-x exp(pull))) over `revealed`, both [S, n]: [S].

    In y = log x the integrand is log-concave and analytic: the trapezoid rule between the points where it has fallen
    by DEPTH is exact to rounding.
    """

    def log_f(y: Tensor) -> Tensor:
        u = y[:, :, None] + pull[:, None]
        rung = torch.where(u < -DEPTH, u, (-torch.expm1(-u.exp())).log())
        return y - y.exp() + torch.where(revealed[:, None], rung, 0.0).sum(2)

    def rises(y: Tensor) -> Tensor:
        z = (y[:, None] + pull).exp().clamp(1e-300, 700)
        return 1 - y.exp() + torch.where(revealed, z / torch.expm1(z), 0.0).sum(1) > 0

    def high(y: Tensor) -> Tensor:
        return log_f(y[:, None])[:, 0] > lowest

    most = revealed.sum(1).double() + 1  # the peak lies between x = 1 and this
    peak = _bisect(rises, torch.zeros_like(most), most.log())
    lowest = log_f(peak[:, None])[:, 0] - DEPTH
    left = _bisect(high, peak, torch.full_like(peak, -DEPTH - 5))
    right = _bisect(high, peak, (most + 13 * most.sqrt() + 61).log())
    step = (right - left) / (NODES - 1)
    nodes = left[:, None] + step[:, None] * torch.arange(NODES)
    return log_f(nodes).logsumexp(1) + step.log()


def _bisect(holds: Callable[[Tensor], Tensor], inside: Tensor, outside: Tensor) -> Tensor:
    """A point just outside of where `holds`, between a point inside and one outside, for each row [S]."""
    for _ in range(14):
        middle = (inside + outside) / 2
        yes = holds(middle)
        inside, outside = torch.where(yes, middle, inside), torch.where(yes, outside, middle)
    return outside
