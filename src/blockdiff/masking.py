"""Masking the tokens of ragged blocks: what a noise draw is, and the pure functions of uniform numbers that make one.

Everything is flat: `block` [N] names the block of each maskable token (ascending, from 0), so blocks of any lengths are
masked together by one sort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

from blockdiff.partitions import gauss_legendre


@dataclass(frozen=True)
class Corruption:
    """One noise draw over N maskable tokens.

    masked bool [N]; weight float64 [N] of the token's loss in the bound (meaningful where masked);
    count, size int64 [N]: masked tokens and all maskable tokens of the token's block.
    """

    masked: Tensor
    weight: Tensor
    count: Tensor
    size: Tensor


def systematic(count: int, generator: Generator, phase: float | None = None) -> Tensor:
    """`count` numbers in [0, 1) in equal steps, in random order: float64 [count], one in each of `count` equal strata.

    phase in [0, 1): where in its stratum each of them lies (None: drawn).
    """
    at = torch.rand((), dtype=torch.float64, generator=generator) if phase is None else phase
    return (torch.randperm(count, generator=generator).double() + at) / max(count, 1)


def complement(block: Tensor, draw: Corruption) -> Corruption:
    """The draw of exact counts that masks what `draw` leaves (Fast-dLLM v2, arXiv 2509.26328); a full mask stays full.

    Where k is uniform in 1..n so is the complement's count, so the mean of the two is as unbiased as each of them, and
    every token is masked in one of the two.
    """
    full = draw.count == draw.size
    masked = torch.where(full, draw.masked, ~draw.masked)
    count = torch.where(full, draw.size, draw.size - draw.count)
    return Corruption(masked, draw.size / count.double(), count, draw.size)


def rank_in_block(block: Tensor, key: Tensor) -> Tensor:
    """Rank of each token's key among the keys of its block, from 0: int64 [N]. block ascending, any real keys."""
    order = torch.argsort(key, stable=True)
    order = order[torch.argsort(block[order], stable=True)]
    before = torch.nn.functional.pad(torch.bincount(block), (1, 0)).cumsum(0)
    rank = torch.empty_like(block)
    rank[order] = torch.arange(len(block), device=block.device) - before[block]
    return rank


def place_in_block(block: Tensor) -> Tensor:
    """Place of each token among the maskable tokens of its block, from 0: int64 [N]. block ascending."""
    before = torch.nn.functional.pad(torch.bincount(block), (1, 0)).cumsum(0)
    return torch.arange(len(block), device=block.device) - before[block]


def subset(block: Tensor, index: int, left_bias: float = 0.0) -> Corruption:
    """The mask set number `index` (bit j: the block's j-th maskable token) in every block at once.

    Summed over index = 1 .. 2^n - 1, the weighted losses are exactly the bound of the sampler with that `left_bias`:
    the weight is P(exactly this set is left when k are) * a_i / sum of a over it, which is 1 / (k * C(n, k)) in uniform
    order, and zero in blocks too short to have that subset.
    """
    size = torch.bincount(block)
    place = place_in_block(block)
    masked = (torch.full_like(block, index) >> place.clamp(max=62)) & 1 == 1
    masked &= index < 2.0 ** size[block]
    count = torch.zeros_like(size).index_add(0, block, masked.long())
    left = torch.zeros(len(size), dtype=torch.float64, device=block.device)
    for n in size.unique().tolist():
        if index < 2**n:
            left[size == n] = float(left_masked(n, left_bias)[index])
    weight = left[block] * share_of_masked(block, masked, torch.full_like(left, left_bias))
    return Corruption(masked, weight, count[block], size[block])


@lru_cache(maxsize=64)
def left_masked(n: int, left_bias: float) -> Tensor:
    """P(exactly the set M is still masked when |M| tokens are) under the order with `left_bias`: float64 [2^n].

    Bit j of the index is slot j. P(full) = 1 and P(M) = sum over i not in M of P(M + i) a_i / sum of a over M + i.
    """
    chance = [0.0] * (2**n - 1) + [1.0]
    for larger in range(2**n - 1, 0, -1):  # a set before its subsets
        slots = [i for i in range(n) if larger >> i & 1]
        pull = [math.exp(-left_bias * (i - slots[0])) for i in slots]  # relative to the first: their sum is never 0
        for i, own in zip(slots, pull, strict=True):
            chance[larger ^ (1 << i)] += chance[larger] * own / sum(pull)
    return torch.tensor(chance, dtype=torch.float64)


def last_revealed(block: Tensor, count: Tensor, beta: Tensor, u_token: Tensor) -> Corruption:
    """Mask the `count` [blocks] tokens that a Plackett-Luce order with `beta` [blocks] reveals last.

    The order is an exponential race: slot i comes after -log(u_i) / a_i.
    """
    wait = (-u_token.log()).log() + beta[block] * place_in_block(block)
    masked = rank_in_block(block, -wait) < count[block]
    size = torch.bincount(block, minlength=len(count))[block]
    return Corruption(masked, size * share_of_masked(block, masked, beta), count[block], size)


def share_of_masked(block: Tensor, masked: Tensor, beta: Tensor) -> Tensor:
    """a_i / sum of a over the masked tokens of the block, for masked tokens i (0 for others): float64 [N]."""
    place = place_in_block(block)
    first = torch.full_like(beta, torch.inf).scatter_reduce(
        0, block, torch.where(masked, place.double(), torch.inf), "amin"
    )
    pull = torch.where(masked, torch.exp(-beta[block] * (place - first[block])), 0.0)
    total = torch.zeros_like(beta).index_add(0, block, pull)
    return pull / total[block].clamp(min=1e-300)


def proposed_count(block: Tensor, kappa: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
    """Exact counts drawn from kappa [N_max + 1, N_max + 1] (row n: probability of k = 0..n); weight 1 / (k kappa(k)).

    Blocks of more than N_max maskable tokens draw k uniformly.
    """
    size = torch.bincount(block, minlength=len(u_block))
    rows = kappa[size.clamp(max=len(kappa) - 1)]
    drawn = torch.searchsorted(rows.cumsum(1), u_block[:, None], right=True)[:, 0]
    known = size < len(kappa)
    count = torch.where(known, drawn, (u_block * size).long() + 1).clamp(min=1).minimum(size)
    chance = torch.where(known, rows.gather(1, count[:, None].clamp(max=len(kappa) - 1))[:, 0], 1 / size.double())
    masked = rank_in_block(block, u_token) < count[block]
    weight = 1 / (count * chance).clamp(min=1e-12)
    return Corruption(masked, weight[block], count[block], size[block])


def clipped(block: Tensor, low: Tensor, high: Tensor, u_block: Tensor, u_token: Tensor, *, redraw: bool) -> Corruption:
    """Mask rates uniform in [low, high] of each block, weight 1/rate; `redraw` as in `Clipped`."""
    rate = low + (high - low) * u_block
    free = independent(block, rate, 1 / rate, u_token)
    if not redraw or not len(block):
        return free
    # Given its count a mask set is uniform: so draw the count from the binomial cut to the interval, then the set.
    size = torch.bincount(block, minlength=len(u_block))
    k = torch.arange(int(size.max()) + 1, dtype=torch.float64, device=block.device)
    n, p = size[:, None].double(), rate[:, None].clamp(1e-12, 1 - 1e-12)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
    chance = torch.where(k <= n, (ways + k * p.log() + (n - k) * torch.log1p(-p)).exp(), 0.0)
    chance = torch.where((k >= low[:, None] * n - 1e-9) & (k <= high[:, None] * n + 1e-9), chance, 0.0)
    possible = chance.sum(1) > 0
    below = chance.cumsum(1) / chance.sum(1, keepdim=True).clamp(min=1e-300)
    # the largest of n uniform numbers to the n-th power is uniform, and independent of their ranks
    largest = torch.zeros_like(u_block).scatter_reduce(0, block, u_token, "amax")
    u_count = largest ** size.double()
    count = torch.searchsorted(below, u_count[:, None], right=True)[:, 0].minimum(size)
    masked = torch.where(possible[block], rank_in_block(block, u_token) < count[block], free.masked)
    count = torch.zeros_like(size).index_add(0, block, masked.long())
    return Corruption(masked, free.weight, count[block], size[block])


def independent(block: Tensor, rate: Tensor, weight: Tensor, u_token: Tensor) -> Corruption:
    masked = u_token < rate[block]
    size = torch.bincount(block, minlength=len(rate))
    count = torch.zeros_like(size).index_add(0, block, masked.long())
    return Corruption(masked, weight[block], count[block], size[block])


def levels(n: int) -> tuple[Tensor, Tensor]:
    """Quadrature over u_block: exact for polynomials of degree n (rates linear in u) while n is below about 1000."""
    return gauss_legendre(min(n // 2 + 32, 512))


def binomial(n: int, rate: Tensor) -> Tensor:
    """Probability of k successes in n trials at each rate [R]: float64 [R, n + 1]."""
    k, trials = torch.arange(n + 1, dtype=torch.float64), torch.tensor(float(n), dtype=torch.float64)
    ways = torch.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    rate = rate[:, None]
    return torch.exp(ways + torch.xlogy(k, rate) + torch.xlogy(n - k, 1 - rate))


def number_of(block: Tensor) -> int:
    return int(block[-1]) + 1 if len(block) else 0
