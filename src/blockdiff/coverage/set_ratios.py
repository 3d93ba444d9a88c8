"""How much rarer training leaves the sets that a reveal order leaves: pi(M | n, k) / mu(M | n, k).

Shapes: C cells, S sets, n slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from blockdiff.coverage.order import Order
from blockdiff.masking import last_revealed

ENUMERATED = 1024  # sets of one (n, k) that are gone through; of more a sample is drawn
DRAWN = 128
LARGE_RATIO = 10.0  # from which on the order is worth a sentence


@dataclass(frozen=True)
class SetRatios:
    """The ratios of one (n, k).

    log_ratio float64 [S] ascending; below [S + 1]: share of pi's sets among the first 0..S of them; largest: log of the
    largest ratio, the true one if `exact`.
    """

    log_ratio: Tensor
    below: Tensor
    largest: float
    exact: bool

    def share_above(self, bar: Tensor) -> Tensor:
        """Share of pi's sets whose log ratio exceeds each bar [C]."""
        return 1 - self.below[torch.searchsorted(self.log_ratio, bar, right=True)]


SAME = SetRatios(torch.zeros(1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64), 0.0, True)


def set_ratios(pi: Order, mu: Order, n: int, k: int) -> SetRatios:
    """The ratios of all sets, or (more than ENUMERATED) of sets drawn from pi with a fixed seed.

    Then the largest is that of the drawn sets and of the two ends, the k leftmost and the k rightmost slots. It is
    exact if one of the two orders is uniform: P(M) of an order with beta > 0 grows with every masked slot that moves
    right, so one end has the most and the other the least. (Proof: let M hold i and not j > i, u be the last ring of
    the other clocks outside of M and v the first of those inside. M is left if T_j < T_i, T_j < v and T_i > u; with i
    and j exchanged, if T_i < T_j, T_i < v and T_j > u; the density of (T_i, T_j) at a point of the second is larger
    than at its mirror image by exp((a_i - a_j) |T_i - T_j|) > 1.) The same holds if mu mixes beta with the uniform
    order. Between two other orders the ends need not be extreme: at n = 24, k = 2 and beta 1.5, 1.6 they are not.
    """
    if not 0 < k < n or pi == mu or (pi.is_uniform and mu.is_uniform):
        return SAME
    if math.comb(n, k) <= ENUMERATED:
        tried = sets = every_set(n, k)
        share = pi.log_probability(sets).exp()
        exact = True
    else:
        sets = draw_sets(pi, n, k)
        share = torch.ones(len(sets), dtype=torch.float64)
        slot = torch.arange(n)
        tried = torch.cat([torch.stack([slot < k, slot >= n - k]), sets])
        mixed_in = pi.lead == mu.lead and len(pi.biases) == 1 and mu.biases.keys() <= {0.0, *pi.biases}
        exact = pi.is_uniform or mu.is_uniform or mixed_in
    ratio = pi.log_probability(tried) - mu.log_probability(tried)
    order = ratio[-len(sets) :].argsort()
    below = F.pad(share[order].cumsum(0), (1, 0))
    return SetRatios(ratio[-len(sets) :][order], below / below[-1], float(ratio.max()), exact)


def every_set(n: int, k: int) -> Tensor:
    """All sets of k of n slots: bool [C(n, k), n]."""
    slots = torch.tensor(list(combinations(range(n), k)))
    return torch.zeros(len(slots), n, dtype=torch.bool).scatter_(1, slots, True)


def draw_sets(order: Order, n: int, k: int) -> Tensor:
    """Sets of k that an order without `lead` leaves, DRAWN or fewer of long blocks, always the same: bool [S, n]."""
    count = max(8, min(DRAWN, 2**18 // n**2))
    generator = torch.Generator().manual_seed(0)
    betas = torch.tensor(list(order.biases), dtype=torch.float64)
    shares = torch.tensor(list(order.biases.values()), dtype=torch.float64)
    beta = betas[torch.multinomial(shares, count, replacement=True, generator=generator)]
    block = torch.arange(count).repeat_interleave(n)
    u = torch.rand(count * n, dtype=torch.float64, generator=generator)
    return last_revealed(block, torch.full((count,), k), beta, u).masked.view(count, n)


@dataclass(frozen=True)
class SetsAsked:
    """The sets asked for in C cells: kinds int64 [K, 2], their (n, k); tables of each; which int64 [C], the cell's.

    asked: the order asked for, None where it is unknown (then all ratios are 1).
    """

    asked: Order | None
    trained: Order
    kinds: Tensor
    tables: tuple[SetRatios, ...]
    which: Tensor

    @classmethod
    def of(cls, asked: Order | None, trained: Order, n: Tensor, k: Tensor) -> SetsAsked:
        """Cells with n tokens that may be masked and k that are, both int64 [C]."""
        kinds, which = torch.stack([n.long(), k], 1).unique(dim=0, return_inverse=True)
        tables = tuple(SAME if asked is None else set_ratios(asked, trained, *kind) for kind in kinds.tolist())
        return cls(asked, trained, kinds, tables, which)

    @property
    def largest(self) -> Tensor:
        """Log of the largest ratio in each cell: float64 [C]."""
        return torch.tensor([table.largest for table in self.tables], dtype=torch.float64)[self.which]

    @property
    def ratio(self) -> float | None:
        """The largest ratio; None without an order or cells."""
        if self.asked is None or not self.tables:
            return None
        return self.exp(max(table.largest for table in self.tables))

    @property
    def exact(self) -> bool | None:
        """Whether every largest ratio is exact; None without an order or cells."""
        if self.asked is None or not self.tables:
            return None
        return all(table.exact for table in self.tables)

    @property
    def sentence(self) -> str | None:
        """What is rare, where the ratio is LARGE_RATIO or more."""
        if self.asked is None or self.ratio is None or self.ratio < LARGE_RATIO:
            return None
        n, k = self.kinds[max(range(len(self.tables)), key=lambda number: self.tables[number].largest)].tolist()
        times = f"{self.ratio:,.0f}" if self.ratio < 1e6 else f"{self.ratio:.0e}"
        return (
            f"with {k} of {n} tokens masked, sets that {_named(self.asked)} leaves are up to {times} times rarer in "
            f"training ({_named(self.trained)})"
        )

    def share_above(self, bar: Tensor) -> Tensor:
        """Share of each cell's sets whose log ratio exceeds the cell's bar: [C] -> [C]."""
        found = torch.zeros_like(bar)
        for number, table in enumerate(self.tables):
            mine = self.which == number
            found[mine] = table.share_above(bar[mine])
        return found

    def quantile(self, log_ratio: Tensor, weight: Tensor, level: float) -> float:
        """Smallest ratio of a cell and its set that at least `level` of the weight does not exceed, by bisection.

        log_ratio and weight [C] are those of the cells alone.
        """
        low = float(log_ratio.min()) + min(float(table.log_ratio[0]) for table in self.tables) - 1
        high = float((log_ratio + self.largest).max())
        for _ in range(64):
            middle = (low + high) / 2
            above = float(weight @ self.share_above(middle - log_ratio) / weight.sum())
            low, high = (low, middle) if above <= 1 - level + 1e-12 else (middle, high)
        return self.exp(high)

    @staticmethod
    def exp(log_ratio: float) -> float:
        """The ratio, at most exp(700), so that it stays a number."""
        return math.exp(min(log_ratio, 700.0))


def _named(order: Order) -> str:
    if order.is_uniform:
        return "a uniform order"
    if len(order.biases) == 1:
        return f"an order of left_bias {next(iter(order.biases)):g}"
    return "orders of left_bias " + ", ".join(f"{beta:g} ({share:.0%})" for beta, share in order.biases.items())
