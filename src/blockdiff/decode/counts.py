"""Counts: how many of the ranked positions are filled at a step.

Several counts in one policy fill what any of them would. Unless a count `may_wait`, at least the best position is
filled, so that every block ends. Shapes: R rows, n slots.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from blockdiff.decode.blocks import ORDER, OpenBlocks, View
from blockdiff.decode.parts import Part, fraction, positive
from blockdiff.decode.ranking import Ranking
from blockdiff.decode.remasking import Remasking, sigma
from blockdiff.decode.scores import change


class Count(Part, ABC):
    """may_wait: a step that fills nothing is part of the rule; never_waits: it fills something wherever it can;
    compares: it reads the score as a probability."""

    may_wait: ClassVar[bool] = False
    never_waits: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def number(self, view: View, ranking: Ranking) -> Tensor:
        """How many of the best, int64 [R]."""
        raise NotImplementedError

    def choose(self, view: View, ranking: Ranking) -> Tensor:
        """Positions to fill now, bool [R, n]."""
        return ranking.best(self.number(view, ranking))

    def possible(self, n: int) -> Tensor:
        """Which numbers of masks a step may find in a block of n that were masked at its opening: bool [n + 1]."""
        found = torch.ones(n + 1, dtype=torch.bool)
        found[0] = False
        return found


@dataclass(frozen=True)
class Fixed(Count):
    """The same number at every step."""

    count: int = 1
    name = "fixed"
    never_waits = True

    def __post_init__(self) -> None:
        positive(self, count=self.count)

    def number(self, view: View, ranking: Ranking) -> Tensor:
        return torch.full_like(ranking.number, self.count)

    def possible(self, n: int) -> Tensor:
        found = torch.zeros(n + 1, dtype=torch.bool)
        found[torch.arange(n, 0, -self.count)] = True
        return found


@dataclass(frozen=True)
class Everything(Count):
    """All that is eligible."""

    name = "everything"
    never_waits = True

    def number(self, view: View, ranking: Ranking) -> Tensor:
        return ranking.number

    def possible(self, n: int) -> Tensor:
        found = torch.zeros(n + 1, dtype=torch.bool)
        found[n] = n > 0
        return found


@dataclass(frozen=True)
class Even(Count):
    """The block's masks split evenly over `steps`, the remainder to the first ones (LLaDA, SDAR static)."""

    steps: int = 4
    name = "even"

    def __post_init__(self) -> None:
        positive(self, steps=self.steps)

    def number(self, view: View, ranking: Ranking) -> Tensor:
        opened, step = view.blocks.opened, view.blocks.step
        return opened // self.steps + (step <= opened % self.steps)

    def possible(self, n: int) -> Tensor:
        found, left, step = torch.zeros(n + 1, dtype=torch.bool), n, 0
        while left > 0:
            found[left] = True
            step += 1
            left -= max(n // self.steps + (step <= n % self.steps), 1)
        return found


@dataclass(frozen=True)
class Linear(Count):
    """int(masks * (1 - s/t)) on Dream's time grid from 1 to `eps`, all that is left at the last of `steps`."""

    steps: int = 8
    eps: float = 1e-3
    name = "linear"

    def __post_init__(self) -> None:
        positive(self, steps=self.steps, eps=self.eps)

    def number(self, view: View, ranking: Ranking) -> Tensor:
        done = (view.blocks.step.double() - 1) / self.steps
        t = 1 - done * (1 - self.eps)
        s = t - (1 - self.eps) / self.steps
        share = (ranking.number * (1 - s / t)).long()
        return torch.where(view.blocks.step >= self.steps, ranking.number, share)


@dataclass(frozen=True)
class Threshold(Count):
    """Every position whose score reaches a level (Fast-dLLM, arXiv 2505.22618)."""

    level: float = 0.9
    name = "threshold"
    compares = True

    def __post_init__(self) -> None:
        fraction(self, level=self.level)

    def number(self, view: View, ranking: Ranking) -> Tensor:
        return (ranking.eligible & (ranking.score >= self.level)).sum(-1)


@dataclass(frozen=True)
class Factor(Count):
    """The largest n with (n + 1) * (1 - c_n) < f, c_n the n-th best confidence (Fast-dLLM, section 3.3).

    For f = 1, if the chosen tokens' conditional probabilities are right and all above 1 - 1/(n + 1), filling them at
    once is filling the most probable of their joint distribution (theorem 1 there).
    """

    f: float = 1.0
    name = "factor"
    compares = True

    def __post_init__(self) -> None:
        positive(self, f=self.f)

    def number(self, view: View, ranking: Ranking) -> Tensor:
        n = torch.arange(1, ranking.score.shape[-1] + 1, device=ranking.score.device)
        holds = (n + 1) * (1 - ranking.sorted(ranking.score)) < self.f
        within = n <= ranking.number[:, None]
        return torch.where(holds & within, n, 0).amax(-1)


@dataclass(frozen=True)
class EntropyBudget(Count):
    """The longest ranked run with sum of entropies less the largest at most gamma (EB-sampler, arXiv 2505.24857).

    What is bounded is the information the chosen tokens share, which sampling them apart loses. own: subtract the last
    position's own entropy instead of the largest (DiffusionGemma; the same where entropy is the score).
    """

    gamma: float = 0.1
    own: bool = False
    name = "entropy_budget"

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"policy: entropy_budget: gamma {self.gamma} is negative; give 0 or more")

    def number(self, view: View, ranking: Ranking) -> Tensor:
        entropy = ranking.sorted(view.entropy.double())
        within = torch.arange(entropy.shape[-1], device=entropy.device) < ranking.number[:, None]
        entropy = torch.where(within, entropy, 0.0)
        largest = entropy if self.own else entropy.cummax(-1).values
        return ranking.leading(entropy.cumsum(-1) - largest <= self.gamma + 1e-12)


@dataclass(frozen=True)
class Prefix(Count):
    """The leading run of masked positions whose score exceeds a level (SDLM, arXiv 2509.24007)."""

    level: float = 0.9
    name = "prefix"
    compares = True

    def __post_init__(self) -> None:
        fraction(self, level=self.level)

    def choose(self, view: View, ranking: Ranking) -> Tensor:
        going = ~ranking.eligible | (ranking.score > self.level)
        first = ranking.eligible & (ranking.eligible.long().cumsum(-1) == 1)
        return ranking.eligible & (going.long().cumprod(-1) > 0) | first


@dataclass(frozen=True)
class RunBest(Count):
    """The best position of every maximal run of masks, where its score exceeds a level (dInfer, arXiv 2510.08666)."""

    level: float = 0.4
    name = "run_best"
    compares = True

    def __post_init__(self) -> None:
        fraction(self, level=self.level)

    def choose(self, view: View, ranking: Ranking) -> Tensor:
        eligible = ranking.eligible
        before = torch.cat([torch.zeros_like(eligible[:, :1]), eligible[:, :-1]], 1)
        run = (eligible & ~before).long().cumsum(-1)
        width = eligible.shape[1]
        rank = torch.where(eligible, ranking.rank, width)
        best = torch.full((len(run), width + 1), width, device=run.device, dtype=rank.dtype)
        best = best.scatter_reduce(1, run, rank, "amin")
        return eligible & (rank == best.gather(1, run)) & (ranking.score > self.level)


@dataclass(frozen=True)
class Stable(Count):
    """Positions that are sure and have stopped moving: score above `level` and KL(p_t || p_{t-1}) below `kl` for the
    last `steps` steps (KLASS, arXiv 2511.05664)."""

    level: float = 0.9
    kl: float = 0.01
    steps: int = 2
    everywhere = True
    name = "stable"
    compares = True

    def __post_init__(self) -> None:
        fraction(self, level=self.level)
        positive(self, kl=self.kl, steps=self.steps)

    def choose(self, view: View, ranking: Ranking) -> Tensor:
        return ranking.eligible & (ranking.score > self.level) & (self._streak(view) >= self.steps)

    def remember(self, view: View, blocks: OpenBlocks) -> OpenBlocks:
        return blocks.remember("streak", self._streak(view)).remember("previous", view.log_probability)

    def _streak(self, view: View) -> Tensor:
        """Steps in a row that a position has stood still, int64 [R, n]."""
        before = view.blocks.recalled("streak", torch.zeros_like(view.tokens))
        return torch.where(change(view, first=torch.inf) < self.kl, before + 1, 0)


@dataclass(frozen=True)
class AboveMean(Count):
    """Scores at least `deviations` standard deviations above the mean of the eligible: our reading of Attn-Sampler's
    dynamic threshold (arXiv 2604.08564), whose formula is not public."""

    deviations: float = 1.0
    name = "above_mean"

    def number(self, view: View, ranking: Ranking) -> Tensor:
        count = ranking.number.clamp(min=1)[:, None]
        score = torch.where(ranking.eligible, ranking.score, 0.0)
        mean = score.sum(-1, keepdim=True) / count
        spread = (torch.where(ranking.eligible, score - mean, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
        return (ranking.eligible & (ranking.score >= mean + self.deviations * spread)).sum(-1)


@dataclass(frozen=True)
class Reverse(Count):
    """Ancestral sampling in `steps` equal steps of t from 1 to 0: each masked position is revealed with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), alpha = 1 - t, whatever the others do (MDLM, arXiv 2406.07524;
    with remasking sigma, ReMDM, arXiv 2503.00307). All that is left is revealed at the last step.
    """

    steps: int = 32
    eta: float = 0.0
    kind: Remasking = "cap"
    name = "reverse"
    may_wait = True

    def __post_init__(self) -> None:
        positive(self, steps=self.steps)
        fraction(self, eta=self.eta)

    def choose(self, view: View, ranking: Ranking) -> Tensor:
        step = view.blocks.step.double()
        t = (1 - (step - 1) / self.steps).clamp(min=1 / self.steps)
        s = t - 1 / self.steps
        remasked = sigma(s, t, self.eta, self.kind)
        reveal = ((1 - s) - (1 - remasked) * (1 - t)) / t
        return ranking.eligible & (view.blocks.uniform(ORDER) < reveal[:, None])


@dataclass(frozen=True)
class Spaced(Count):
    """All positions on a grid whose spacing shrinks from step to step: at step t every floor(n / base^t)-th slot of the
    block (DUS, arXiv 2506.19037). The order does not look at the model at all."""

    base: int = 2
    name = "spaced"

    def __post_init__(self) -> None:
        if self.base < 2:
            raise ValueError(f"policy: spaced: base {self.base} spreads nothing; give 2 or more")

    def choose(self, view: View, ranking: Ranking) -> Tensor:
        length = view.blocks.inside.sum(1)
        spacing = (length / float(self.base) ** view.blocks.step.double()).long().clamp(min=1)
        on_grid = ranking.eligible & (view.blocks.slot % spacing[:, None] == 0)
        # a grid whose slots are all filled would waste its step: take the next finer one
        waiting = ranking.number.gt(0) & ~on_grid.any(1)
        finer = (spacing // self.base).clamp(min=1)
        return torch.where(waiting[:, None], ranking.eligible & (view.blocks.slot % finer[:, None] == 0), on_grid)
