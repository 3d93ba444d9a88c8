"""Noise: which tokens of each block are masked, and the weight that makes the masked losses a bound.

For a block of n tokens, with CE_i(M) the loss of token i when the set M is masked, the bound (NELBO) is

    sum over k = 1..n of (1/k) * mean over |M| = k of sum_{i in M} CE_i(M)                                  (*)

which is the continuous-time NELBO of absorbing diffusion (BD3-LM, arXiv 2503.09573, eq. 8 and 9) because the integral
of t^(k-1) (1-t)^(n-k) over [0, 1] is 1 / (k * C(n, k)). Two ways to estimate it:

exact count (default)   k ~ U{1..n}, exactly k random tokens masked, weight n/k. Unbiased for (*), no empty draws, no
                        1/t spikes; a block of one token is always masked with weight 1, which is the AR loss.
Bernoulli(t)            t ~ U(t_min, 1), each token masked with probability m(t), weight m'(t)/m(t): the literature's
                        estimator, kept for comparison. `clipped` draws the rate from [low, high]: it is not a bound.

Reveal order. The exact-count estimate bounds the sampler that reveals a block's tokens in uniformly random order.
`left_bias` beta > 0 is another sampler: of the tokens still masked, slot i is revealed next with probability
proportional to exp(-beta * i) (a Plackett-Luce order). With k ~ U{1..n} tokens still masked and weight
n * a_i / sum of a over the masked, the estimate is a bound on the likelihood of *that* sampler; beta = 0 is (*), and
beta -> infinity is left to right, the AR order. (Ours; proved in tests by enumeration.)

Everything is ragged and flat: `block` [N] names the block of each maskable token (ascending, from 0), so blocks of any
lengths are masked together by one sort.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from blockdiff.distributions import FORBID_EXTRA


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


class Noise(ABC):
    """A way of corrupting blocks, as a pure function of uniform numbers."""

    kind: str
    __pydantic_config__ = FORBID_EXTRA

    @property
    @abstractmethod
    def is_bound(self) -> bool:
        """Whether the weighted loss is, in expectation, the NELBO."""

    @abstractmethod
    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        """block [N] ascending from 0; u_block [number of blocks] and u_token [N] uniform in (0, 1), float64."""

    def draw(self, block: Tensor, generator: Generator) -> Corruption:
        """One draw, noise levels stratified over all blocks of the batch and shuffled among them."""
        return self.draws(block, generator, 1)[0]

    def draws(self, block: Tensor, generator: Generator, count: int) -> list[Corruption]:
        """Several draws of the same blocks; a noise level moves by 1/count from one to the next (antithetic)."""
        u_token = torch.rand(count, len(block), dtype=torch.float64, generator=generator).to(block.device)
        u_block = stratified(_number_of(block), generator).to(block.device)
        return [self.corrupt(block, (u_block + i / count) % 1.0, u_token[i]) for i in range(count)]


@dataclass(frozen=True)
class ExactCount(Noise):
    """k uniform in 1..n, then exactly k tokens of the block, those that a random order reveals last.

    left_bias: beta of the order; a mapping {beta: share} draws one for every block (blocks do not see one another's
    noise, so this is a mixture per document with less variance).
    """

    left_bias: float | dict[float, float] = 0.0
    kind: Literal["exact_count"] = "exact_count"

    def __post_init__(self) -> None:
        if isinstance(self.left_bias, dict):
            shares = {float(beta): float(share) for beta, share in self.left_bias.items()}
            if not shares or min(shares.values()) <= 0:
                raise ValueError(f"noise exact_count: left_bias {self.left_bias} needs positive shares, one for a beta")
            total = sum(shares.values())
            object.__setattr__(self, "left_bias", {beta: share / total for beta, share in shares.items()})
        if any(not 0 <= beta < math.inf for beta in self.biases):
            raise ValueError(f"noise exact_count: left_bias {self.left_bias} must be 0 (uniform order) or more")

    @property
    def biases(self) -> dict[float, float]:
        """Every beta with its share."""
        return self.left_bias if isinstance(self.left_bias, dict) else {float(self.left_bias): 1.0}

    @property
    def is_bound(self) -> bool:
        return True

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        beta, u_block = self._biases_of(u_block)
        size = torch.bincount(block, minlength=len(u_block))
        count = torch.minimum((u_block * size).long() + 1, size)
        return _last_revealed(block, count, beta, u_token)

    def _biases_of(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """A beta for each number in (0, 1), and the number stretched back from the beta's stratum to (0, 1)."""
        betas = torch.tensor(list(self.biases), dtype=torch.float64, device=u.device)
        shares = torch.tensor(list(self.biases.values()), dtype=torch.float64, device=u.device)
        above = shares.cumsum(0)
        which = torch.searchsorted(above, u, right=True).clamp(max=len(betas) - 1)
        return betas[which], ((u - (above - shares)[which]) / shares[which]).clamp(0, 1)


@dataclass(frozen=True)
class Bernoulli(Noise):
    """t uniform in (t_min, 1), every token masked with probability m(t); weight m'(t)/m(t).

    schedules (BD3-LM appendix C): linear m = t; log_linear m = (1 - 1e-3) t, which is MDLM's total noise
    -log(1 - (1 - eps) t) written as a mask rate; cosine m = 1 - cos(pi t / 2).
    The part of the integral below `t_min` is left out, as in the published code, so the estimate lies below the bound
    by about that share; with t_min = 0 it is unbiased but its variance is infinite. log_linear never masks everything.
    """

    schedule: Literal["linear", "cosine", "log_linear"] = "linear"
    t_min: float = 1e-3
    kind: Literal["bernoulli"] = "bernoulli"

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine", "log_linear"):
            raise ValueError(f"noise schedule {self.schedule!r} is unknown; known: linear, cosine, log_linear")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"noise bernoulli: t_min {self.t_min} must lie in [0, 1)")

    @property
    def is_bound(self) -> bool:
        return self.t_min == 0 and self.schedule != "log_linear"

    def mask_rate(self, t: Tensor) -> Tensor:
        """m(t), the probability that a token is masked."""
        if self.schedule == "cosine":
            return 1 - torch.cos(math.pi / 2 * t)
        return t * (1 - 1e-3) if self.schedule == "log_linear" else t

    def rate_weight(self, t: Tensor) -> Tensor:
        """m'(t)/m(t), the weight of a masked token's loss."""
        if self.schedule == "cosine":
            return math.pi / 2 * torch.sin(math.pi / 2 * t) / self.mask_rate(t)
        return 1 / t

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        t = self.t_min + (1 - self.t_min) * u_block
        return _independent(block, self.mask_rate(t), self.rate_weight(t), u_token)


@dataclass(frozen=True)
class Clipped(Noise):
    """Mask rate uniform in [low, high], weight 1/rate: BD3-LM's low-variance training loss. Not a bound.

    redraw: masks are redrawn until the masked fraction of the block lies in [low, high] too, as BD3-LM's training
    scripts do (a block with no such count is left as it was drawn). Then a block is never fully masked unless high is
    1, although decoding begins every block so.
    """

    low: float
    high: float
    redraw: bool = False
    kind: Literal["clipped"] = "clipped"

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(f"noise clipped: [{self.low}, {self.high}] must satisfy 0 < low <= high <= 1")

    @property
    def is_bound(self) -> bool:
        return False

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        low, high = torch.full_like(u_block, self.low), torch.full_like(u_block, self.high)
        return clipped(block, low, high, u_block, u_token, redraw=self.redraw)


@dataclass(frozen=True)
class SearchedClip(Noise):
    """Clipped mask rates whose interval is searched while training, for each block size (BD3-LM, section 5.2).

    Every `every` steps the intervals of the given `widths`, slid by 0.05, and the whole range are tried on `batches`
    validation batches; training goes on with the one under which blocks' mean losses vary least. Until the first
    search, and in `corrupt` itself, the whole range is used.
    """

    every: int = 500
    widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    batches: int = 2
    redraw: bool = False
    kind: Literal["searched_clip"] = "searched_clip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.every < 1 or self.batches < 1:
            raise ValueError("noise searched_clip: every and batches must be 1 or more")
        if not self.widths or not all(0 < width < 1 for width in self.widths):
            raise ValueError(f"noise searched_clip: widths {self.widths} must lie in (0, 1)")

    @property
    def is_bound(self) -> bool:
        return False

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """The candidates: the whole range first."""
        slid = [(step * 0.05, step * 0.05 + width) for width in self.widths for step in range(20)]
        return [
            (1e-3, 1.0),
            *((max(low, 1e-3), min(round(high, 6), 1.0)) for low, high in slid if high <= 1 + 1e-9),
        ]

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        return Clipped(1e-3, 1.0).corrupt(block, u_block, u_token)


@dataclass(frozen=True)
class LearnedCount(Noise):
    """Exact counts whose proposal over k is learned while training: kappa(k) ~ sqrt(E[l_k^2]) / k, weight 1/(k kappa).

    l_k is a block's summed loss with k masks; this kappa has the least variance of the loss. A share `floor` stays
    uniform, so that every count keeps its support and the estimate its unbiasedness. In `corrupt` itself, before
    anything is learned, k is uniform.
    """

    floor: float = 0.2
    decay: float = 0.98
    kind: Literal["learned_count"] = "learned_count"

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1 or not 0 <= self.decay < 1:
            raise ValueError("noise learned_count: floor must lie in (0, 1] and decay in [0, 1)")

    @property
    def is_bound(self) -> bool:
        return True

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        return ExactCount().corrupt(block, u_block, u_token)


AnyNoise = ExactCount | LearnedCount | Bernoulli | Clipped | SearchedClip
NOISES: dict[str, type[Noise]] = {
    str(cls.__dataclass_fields__["kind"].default): cls
    for cls in (ExactCount, LearnedCount, Bernoulli, Clipped, SearchedClip)
}


def from_dict(spec: dict[str, Any]) -> Noise:
    """The noise that `to_dict` described; raises ValueError for an unknown kind."""
    if spec.get("kind") not in NOISES:
        raise ValueError(f"noise kind {spec.get('kind')!r} is unknown; known: {', '.join(NOISES)}")
    return NOISES[spec["kind"]](**spec)


def to_dict(noise: Noise) -> dict[str, Any]:
    """A JSON-ready description of the noise, read back by `from_dict`."""
    assert is_dataclass(noise)
    return asdict(noise)


def stratified(count: int, generator: Generator) -> Tensor:
    """`count` numbers in (0, 1), one in each of `count` equal strata, in random order: float64 [count]."""
    jitter = torch.rand(count, dtype=torch.float64, generator=generator)
    return (torch.randperm(count, generator=generator) + jitter) / max(count, 1)


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
    weight = left[block] * _share_of_masked(block, masked, torch.full_like(left, left_bias))
    return Corruption(masked, weight, count[block], size[block])


@lru_cache(maxsize=64)
def left_masked(n: int, left_bias: float) -> Tensor:
    """P(exactly the set M is still masked when |M| tokens are) under the order with `left_bias`: float64 [2^n].

    Bit j of the index is slot j. P(full) = 1 and P(M) = sum over i not in M of P(M + i) a_i / sum of a over M + i.
    """
    pull = [math.exp(-left_bias * slot) for slot in range(n)]
    chance = [0.0] * (2**n - 1) + [1.0]
    for larger in range(2**n - 1, 0, -1):  # a set before its subsets
        slots = [i for i in range(n) if larger >> i & 1]
        total = sum(pull[i] for i in slots)
        for i in slots:
            chance[larger ^ (1 << i)] += chance[larger] * pull[i] / total
    return torch.tensor(chance, dtype=torch.float64)


def _last_revealed(block: Tensor, count: Tensor, beta: Tensor, u_token: Tensor) -> Corruption:
    """Mask the `count` [blocks] tokens that a Plackett-Luce order with `beta` [blocks] reveals last.

    The order is an exponential race: slot i comes after -log(u_i) / a_i.
    """
    wait = (-u_token.log()).log() + beta[block] * place_in_block(block)
    masked = rank_in_block(block, -wait) < count[block]
    size = torch.bincount(block, minlength=len(count))[block]
    return Corruption(masked, size * _share_of_masked(block, masked, beta), count[block], size)


def _share_of_masked(block: Tensor, masked: Tensor, beta: Tensor) -> Tensor:
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
    free = _independent(block, rate, 1 / rate, u_token)
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


def _independent(block: Tensor, rate: Tensor, weight: Tensor, u_token: Tensor) -> Corruption:
    masked = u_token < rate[block]
    size = torch.bincount(block, minlength=len(rate))
    count = torch.zeros_like(size).index_add(0, block, masked.long())
    return Corruption(masked, weight[block], count[block], size[block])


def _number_of(block: Tensor) -> int:
    return int(block[-1]) + 1 if len(block) else 0
