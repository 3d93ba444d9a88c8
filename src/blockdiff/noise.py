"""Noise: which tokens of each block are masked, and the weight that makes the masked losses a bound.

For a block of n tokens, with CE_i(M) the loss of token i when the set M is masked, the bound (NELBO) is

    sum over k = 1..n of (1/k) * mean over |M| = k of sum_{i in M} CE_i(M)                                  (*)

which is the continuous-time NELBO of absorbing diffusion (BD3-LM, arXiv 2503.09573, eq. 8 and 9) because the integral
of t^(k-1) (1-t)^(n-k) over [0, 1] is 1 / (k * C(n, k)). Two ways to estimate it:

exact count (default)   k ~ U{1..n}, exactly k random tokens masked, weight n/k. Unbiased for (*), no empty draws, no
                        1/t spikes; a block of one token is always masked with weight 1, which is the AR loss.
Bernoulli(t)            t ~ U(t_min, 1), each token masked with probability m(t), weight m'(t)/m(t): the literature's
                        estimator, kept for comparison. `clipped` draws the rate from [low, high]: it is not a bound.

Everything is ragged and flat: `block` [N] names the block of each maskable token (ascending, from 0), so blocks of any
lengths are masked together by one sort.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from blockdiff.distributions import FORBID_EXTRA, gauss_legendre


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

    @abstractmethod
    def count_probability(self, n: int) -> Tensor:
        """Probability that k of a block's n maskable tokens are masked, k = 0..n: float64 [n + 1], sum 1."""

    def draw(self, block: Tensor, generator: Generator) -> Corruption:
        """One draw, noise levels stratified over all blocks of the batch and shuffled among them."""
        u_token = torch.rand(len(block), dtype=torch.float64, generator=generator).to(block.device)
        u_block = stratified(_number_of(block), generator).to(block.device)
        return self.corrupt(block, u_block, u_token)


@dataclass(frozen=True)
class ExactCount(Noise):
    """k uniform in 1..n, then exactly k random tokens of the block; weight n/k."""

    kind: Literal["exact_count"] = "exact_count"

    @property
    def is_bound(self) -> bool:
        return True

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        size = torch.bincount(block, minlength=len(u_block))
        count = torch.minimum((u_block * size).long() + 1, size)
        masked = rank_in_block(block, u_token) < count[block]
        size, count = size[block], count[block]
        return Corruption(masked, size / count.double(), count, size)

    def count_probability(self, n: int) -> Tensor:
        probability = torch.full((n + 1,), 1 / max(n, 1), dtype=torch.float64)
        probability[0] = float(n == 0)
        return probability


@dataclass(frozen=True)
class Bernoulli(Noise):
    """t uniform in (t_min, 1), every token masked with probability m(t); weight m'(t)/m(t).

    schedules (BD3-LM appendix C): linear m = t; log_linear m = (1 - 1e-3) t, which is MDLM's total noise
    -log(1 - (1 - eps) t) written as a mask rate; cosine m = 1 - cos(pi t / 2).
    The part of the integral below `t_min` is left out, as in the published code; with t_min = 0 the estimate is
    unbiased but its variance is infinite.
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
        return True

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

    def count_probability(self, n: int) -> Tensor:
        u, weight = _levels(n)
        return weight @ _binomial(n, self.mask_rate(self.t_min + (1 - self.t_min) * u))


@dataclass(frozen=True)
class Clipped(Noise):
    """Mask rate uniform in [low, high], weight 1/rate: BD3-LM's low-variance training loss. Not a bound."""

    low: float
    high: float
    kind: Literal["clipped"] = "clipped"

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(f"noise clipped: [{self.low}, {self.high}] must satisfy 0 < low <= high <= 1")

    @property
    def is_bound(self) -> bool:
        return False

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        rate = self.low + (self.high - self.low) * u_block
        return _independent(block, rate, 1 / rate, u_token)

    def count_probability(self, n: int) -> Tensor:
        u, weight = _levels(n)
        return weight @ _binomial(n, self.low + (self.high - self.low) * u)


AnyNoise = ExactCount | Bernoulli | Clipped
NOISES: dict[str, type[Noise]] = {"exact_count": ExactCount, "bernoulli": Bernoulli, "clipped": Clipped}


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


def rank_in_block(block: Tensor, key: Tensor) -> Tensor:
    """Rank of each token's key among the keys of its block, from 0: int64 [N]. block ascending, keys in (0, 1)."""
    order = torch.argsort(block + key, stable=True)
    before = torch.nn.functional.pad(torch.bincount(block), (1, 0)).cumsum(0)
    rank = torch.empty_like(block)
    rank[order] = torch.arange(len(block), device=block.device) - before[block]
    return rank


def subset(block: Tensor, index: int) -> Corruption:
    """The mask set number `index` (bit j: the block's j-th maskable token) in every block at once.

    Summed over index = 1 .. 2^n - 1, the weighted losses are exactly (*): the weight is 1 / (k * C(n, k)), and zero
    in blocks too short to have that subset.
    """
    size = torch.bincount(block)
    place = rank_in_block(block, torch.full(block.shape, 0.5, dtype=torch.float64, device=block.device))
    masked = (torch.full_like(block, index) >> place.clamp(max=62)) & 1 == 1
    count = torch.zeros_like(size).index_add(0, block, masked.long())
    k, n = count[block].double(), size[block].double()
    ways = torch.exp(torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)).round()
    exists = index < 2.0**n
    weight = torch.where(exists & (k > 0), 1 / (k * ways).clamp(min=1), 0.0)
    return Corruption(masked & exists, weight, count[block], size[block])


def _independent(block: Tensor, rate: Tensor, weight: Tensor, u_token: Tensor) -> Corruption:
    masked = u_token < rate[block]
    size = torch.bincount(block, minlength=len(rate))
    count = torch.zeros_like(size).index_add(0, block, masked.long())
    return Corruption(masked, weight[block], count[block], size[block])


def _levels(n: int) -> tuple[Tensor, Tensor]:
    """Quadrature over u_block: exact for polynomials of degree n (rates linear in u) while n is below about 1000."""
    return gauss_legendre(min(n // 2 + 32, 512))


def _binomial(n: int, rate: Tensor) -> Tensor:
    """Probability of k successes in n trials at each rate [R]: float64 [R, n + 1]."""
    k, trials = torch.arange(n + 1, dtype=torch.float64), torch.tensor(float(n), dtype=torch.float64)
    ways = torch.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    rate = rate[:, None]
    return torch.exp(ways + torch.xlogy(k, rate) + torch.xlogy(n - k, 1 - rate))


def _number_of(block: Tensor) -> int:
    return int(block[-1]) + 1 if len(block) else 0
