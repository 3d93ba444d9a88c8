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
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from blockdiff.distributions import FORBID_EXTRA
from blockdiff.masking import Corruption, binomial, clipped, independent, last_revealed, levels, number_of, systematic


class Noise(ABC):
    """A way of corrupting blocks, as a pure function of uniform numbers."""

    kind: str
    __pydantic_config__ = FORBID_EXTRA

    @property
    @abstractmethod
    def is_bound(self) -> bool:
        """Whether the weighted loss is, in expectation, the NELBO."""

    @property
    def biases(self) -> dict[float, float]:
        """The left biases of the orders that reveal what is left unmasked, with their shares, whatever the count.

        {0: 1}: given the count every set is equally likely.
        """
        return {0.0: 1.0}

    @abstractmethod
    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        """block [N] ascending from 0; u_block [number of blocks] and u_token [N] uniform in (0, 1), float64."""

    @abstractmethod
    def count_probability(self, n: int) -> Tensor:
        """Probability that k of a block's n maskable tokens are masked, k = 0..n: float64 [n + 1], sum 1."""

    def draw(self, block: Tensor, generator: Generator) -> Corruption:
        """One draw, noise levels spread evenly over the blocks and shuffled among them."""
        u_token = torch.rand(1, len(block), dtype=torch.float64, generator=generator).to(block.device)
        return self.draws(block, systematic(number_of(block), generator).to(block.device), u_token)[0]

    def draws(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> list[Corruption]:
        """A draw for each row of u_token [draws, N]; a noise level moves by 1/draws from one to the next
        (antithetic). block and u_block as in `corrupt`."""
        count = len(u_token)
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
            total = 1.0 if abs(total - 1) < 1e-9 else total  # what was normalised once stays as it is
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
        return last_revealed(block, count, beta, u_token)

    def _biases_of(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """A beta for each number in (0, 1), and the number stretched back from the beta's stratum to (0, 1)."""
        betas = torch.tensor(list(self.biases), dtype=torch.float64, device=u.device)
        shares = torch.tensor(list(self.biases.values()), dtype=torch.float64, device=u.device)
        above = shares.cumsum(0)
        which = torch.searchsorted(above, u, right=True).clamp(max=len(betas) - 1)
        return betas[which], ((u - (above - shares)[which]) / shares[which]).clamp(0, 1)

    def count_probability(self, n: int) -> Tensor:
        probability = torch.full((n + 1,), 1 / max(n, 1), dtype=torch.float64)
        probability[0] = float(n == 0)
        return probability


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
        return independent(block, self.mask_rate(t), self.rate_weight(t), u_token)

    def count_probability(self, n: int) -> Tensor:
        u, weight = levels(n)
        return weight @ binomial(n, self.mask_rate(self.t_min + (1 - self.t_min) * u))


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

    def count_probability(self, n: int) -> Tensor:
        u, weight = levels(n)
        chance = binomial(n, self.low + (self.high - self.low) * u)
        if self.redraw:
            k = torch.arange(n + 1)
            kept = torch.where((k >= self.low * n - 1e-9) & (k <= self.high * n + 1e-9), chance, 0.0)
            total = kept.sum(1, keepdim=True)
            chance = torch.where(total > 0, kept / total.clamp(min=1e-300), chance)
        return weight @ chance


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

    def count_probability(self, n: int) -> Tensor:
        """That of the whole range: which interval was found is not part of the description. Redrawn masks keep to the
        interval, so the counts at its far end may never have been trained, and count as not trained."""
        probability = Clipped(1e-3, 1.0).count_probability(n)
        if self.redraw:
            k = torch.arange(n + 1)
            probability = torch.where(k <= max(self.widths) * n, probability, 0.0)
        return probability / probability.sum()


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

    def count_probability(self, n: int) -> Tensor:
        """Uniform: the proposal of `floor` keeps the support, and what was learned is not part of the description."""
        return ExactCount().count_probability(n)


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
