"""What changes while training: the block size, the weight of the AR term, and noise that is learned on the way.

Everything here is a function of the training's progress or of the losses seen so far, and has a small state that is
saved with a checkpoint. The mathematics of a step does not know about it: a curriculum hands every step an ordinary
layout distribution and an ordinary noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from blockdiff.distributions import FORBID_EXTRA, AdaptiveMixture, LayoutDistribution, RandomOffset
from blockdiff.masking import Corruption, clipped, proposed_count
from blockdiff.noise import Clipped, LearnedCount, Noise, SearchedClip


@dataclass(frozen=True)
class Growth:
    """How the block size reaches that of the layout: only the layout changes, never the loss or the mask rule.

    shape   geometric: plateaus of equal length at start, start * ratio, ... until `until` of the steps (NBDiff,
            arXiv 2512.06776, eq. 3); wsd: up to `peak` in the first `until` of the steps, stable, and down to the
            layout's own size in the last `decay` of them (LLaDA 2.0, arXiv 2512.15745); random: every step draws one of
            those plateaus' sizes anew; annealed: the size stays, and attention inside a block becomes bidirectional
            bit by bit until `until` of the steps (`masks.Annealing`; the baseline of NBDiff's table 2).
    """

    shape: Literal["geometric", "wsd", "random", "annealed"] = "geometric"
    start: int = 1
    ratio: int = 2
    until: float = 0.6
    peak: int | None = None
    decay: float = 0.2

    __pydantic_config__ = FORBID_EXTRA

    def __post_init__(self) -> None:
        if self.shape not in ("geometric", "wsd", "random", "annealed"):
            raise ValueError(f"growth shape {self.shape!r} is unknown; known: geometric, wsd, random, annealed")
        if self.start < 1 or self.ratio < 2:
            raise ValueError("growth: start must be 1 or more and ratio 2 or more")
        if not 0 < self.until <= 1 or not 0 < self.decay <= 1:
            raise ValueError("growth: until and decay are shares of the steps, in (0, 1]")
        if self.shape == "wsd" and (self.peak is None or self.until + self.decay > 1):
            raise ValueError("growth wsd: give peak, the largest block size, and until + decay of at most 1")

    def sizes(self, largest: int) -> list[int]:
        """The plateaus up to `largest`: start, start * ratio, ..., largest."""
        found = [min(self.start, largest)]
        while found[-1] < largest:
            found.append(min(found[-1] * self.ratio, largest))
        return found

    def size(self, largest: int, progress: float, u: float) -> int:
        """Block size at `progress` in [0, 1) of a training that ends at `largest`; u in (0, 1) for `random`."""
        if self.shape == "random":
            sizes = self.sizes(largest)
            return sizes[int(u * len(sizes))]
        if self.shape == "geometric":
            sizes = self.sizes(largest)
            return sizes[min(int(progress / self.until * (len(sizes) - 1)), len(sizes) - 1)]
        assert self.peak is not None
        up = self.sizes(self.peak)
        if progress < self.until:
            return up[min(int(progress / self.until * len(up)), len(up) - 1)]
        down = [size for size in reversed(up) if size > largest] + [largest]
        at = (progress - (1 - self.decay)) / self.decay
        return down[min(int(max(at, 0.0) * len(down)), len(down) - 1)]

    def annealing(self, progress: float) -> float | None:
        """Share of a block's later tokens that are visible, where attention is what grows."""
        return min(progress / self.until, 1.0) if self.shape == "annealed" else None

    def layout(self, final: LayoutDistribution, progress: float, u: float) -> LayoutDistribution:
        """The layout distribution at `progress`: `final` with its size (or largest size) replaced.

        Raises ValueError for a layout that has no size to grow.
        """
        if self.shape == "annealed":
            return final
        names = {field.name for field in fields(final)}  # type: ignore[arg-type]
        key = next((name for name in ("size", "max_size") if name in names), None)
        if key is None:
            raise ValueError(f"growth: the layout {final.kind} has no block size that could grow; use fixed or another")
        size = self.size(getattr(final, key), progress, u)
        changes: dict[str, Any] = {key: size}
        if "atoms" in names:
            changes["atoms"] = {atom: share for atom, share in final.atoms.items() if atom <= size}  # type: ignore[attr-defined]
        return replace(final, **changes)  # type: ignore[type-var]


class Adaptive(ABC):
    """Noise that follows the training. State is JSON-ready."""

    @abstractmethod
    def noise(self) -> Noise:
        """The noise to use now."""

    @abstractmethod
    def observe(self, corruption: Corruption, losses: Tensor, block: Tensor) -> None:
        """Note a pass: losses [M] of the masked tokens, in order, of the blocks `block` [N]."""

    @abstractmethod
    def settle(self, total: Callable[[Tensor], Tensor]) -> None:
        """Learn from what was noted since the last call, a step; total(x) sums x over all processes."""

    def due(self, step: int) -> bool:
        """Whether `search` should be called before this step."""
        return False

    @abstractmethod
    def search(self, measure: Callable[[Noise], tuple[Tensor, Tensor]]) -> None:
        """Try candidates: measure(noise) -> (size [B], mean loss [B]) of the blocks of some held-out batches."""

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None: ...


def adaptive(noise: Noise) -> Adaptive | None:
    """The state that a noise needs while training, if it needs one."""
    if isinstance(noise, LearnedCount):
        return CountProposal(noise)
    return ClipSearch(noise) if isinstance(noise, SearchedClip) else None


class CountProposal(Adaptive):
    """Running second moments of a block's summed loss for every (n maskable, k masked), and the proposal they give."""

    LARGEST = 64  # longer blocks draw k uniformly

    def __init__(self, settings: LearnedCount) -> None:
        self.settings = settings
        shape = (self.LARGEST + 1, self.LARGEST + 1)
        self.moment = torch.zeros(shape, dtype=torch.float64)
        self.weight = torch.zeros(shape, dtype=torch.float64)
        self._noted = torch.zeros(2, *shape, dtype=torch.float64)  # squares and numbers of this step's blocks

    def kappa(self) -> Tensor:
        """Proposal [n, k]; uniform over 1..n where nothing was seen."""
        k = torch.arange(self.LARGEST + 1, dtype=torch.float64)
        inside = (k[None] >= 1) & (k[None] <= k[:, None])
        root = torch.where(self.weight > 0, self.moment / self.weight.clamp(min=1e-12), 0.0).sqrt()
        # a count not seen yet is given the loss per mask of those that were
        per_mask = (root / k.clamp(min=1)).sum(1, keepdim=True) / (self.weight > 0).sum(1, keepdim=True).clamp(min=1)
        root = torch.where(self.weight > 0, root, per_mask * k)
        best = torch.where(inside, root / k.clamp(min=1), 0.0)
        even = inside / inside.sum(1, keepdim=True).clamp(min=1)
        total = best.sum(1, keepdim=True)
        best = torch.where(total > 0, best / total.clamp(min=1e-300), even)
        return (1 - self.settings.floor) * best + self.settings.floor * even

    def noise(self) -> Noise:
        return _Proposed(self.kappa(), self.settings)

    def observe(self, corruption: Corruption, losses: Tensor, block: Tensor) -> None:
        size = torch.bincount(block)
        loss = torch.zeros(len(size), dtype=torch.float64, device=block.device)
        loss.index_add_(0, block[corruption.masked], losses.detach().double())
        count = torch.zeros_like(size).index_add(0, block, corruption.masked.long())
        known = (size <= self.LARGEST) & (count > 0)
        n, k, loss = size[known].cpu(), count[known].cpu(), loss[known].cpu()
        self._noted[0].index_put_((n, k), loss**2, accumulate=True)
        self._noted[1].index_put_((n, k), torch.ones_like(loss), accumulate=True)

    def settle(self, total: Callable[[Tensor], Tensor]) -> None:
        square, seen = total(self._noted)
        self._noted = torch.zeros_like(self._noted)
        kept = torch.where(seen > 0, self.settings.decay, 1.0)
        self.moment, self.weight = self.moment * kept + square, self.weight * kept + seen

    def search(self, measure: Callable[[Noise], tuple[Tensor, Tensor]]) -> None:
        raise NotImplementedError("a proposal learns from the training passes alone")

    def state(self) -> dict[str, Any]:
        return {"moment": self.moment.tolist(), "weight": self.weight.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        self.moment = torch.tensor(state["moment"], dtype=torch.float64)
        self.weight = torch.tensor(state["weight"], dtype=torch.float64)


class ClipSearch(Adaptive):
    """The best interval found for each block size; the whole range where none was searched yet."""

    def __init__(self, settings: SearchedClip) -> None:
        self.settings = settings
        self.best: dict[int, tuple[float, float]] = {}

    def noise(self) -> Noise:
        return _ClippedBySize(dict(self.best), self.settings)

    def observe(self, corruption: Corruption, losses: Tensor, block: Tensor) -> None:
        pass

    def settle(self, total: Callable[[Tensor], Tensor]) -> None:
        pass

    def due(self, step: int) -> bool:
        return step > 0 and step % self.settings.every == 0

    def search(self, measure: Callable[[Noise], tuple[Tensor, Tensor]]) -> None:
        spread: dict[int, list[tuple[float, tuple[float, float]]]] = {}
        for interval in self.settings.intervals:
            size, loss = measure(Clipped(*interval, redraw=self.settings.redraw))
            for n in size.unique().tolist():
                mine = loss[size == n]
                if len(mine) > 1:
                    spread.setdefault(int(n), []).append((float(mine.var()), interval))
        self.best.update({n: min(found)[1] for n, found in spread.items()})

    def state(self) -> dict[str, Any]:
        return {"best": {str(n): list(interval) for n, interval in self.best.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = {int(n): (float(low), float(high)) for n, (low, high) in state["best"].items()}


class ShareSearch:
    """The token shares of an adaptive mixture of layouts, moved to where the measured excess is.

    With excess e of a size (its held-out bound above its reference, at least 0) the shares are
    floor / number of sizes + (1 - floor) * e / sum of e. State is JSON-ready.
    """

    def __init__(self, settings: AdaptiveMixture) -> None:
        self.settings = settings
        self.shares = dict(settings.shares)
        self.history: list[tuple[int, dict[int, float]]] = []

    def layout(self) -> LayoutDistribution:
        """The layout distribution to use now."""
        return replace(self.settings, shares=self.shares)

    def due(self, step: int) -> bool:
        return step > 0 and step % self.settings.every == 0

    def search(self, step: int, measure: Callable[[LayoutDistribution], float]) -> None:
        """Measure every size on its own, measure(layout) -> nats per token, and move the shares."""
        bounds = {size: measure(RandomOffset(size)) for size in self.settings.sizes}
        least = bounds[self.settings.sizes[0]]
        excess = {size: max(b - self.settings.reference.get(size, least), 0.0) for size, b in bounds.items()}
        total, floor, even = sum(excess.values()), self.settings.floor, 1 / len(bounds)
        self.history.append((step, self.shares))
        self.shares = {
            size: floor * even + (1 - floor) * (part / total if total > 0 else even) for size, part in excess.items()
        }

    def trained(self, steps: int) -> AdaptiveMixture:
        """The distribution with the shares' mean over a training of so many steps."""
        spans = [*self.history, (steps, self.shares)]
        mean = dict.fromkeys(self.settings.sizes, 0.0)
        before = 0
        for end, shares in spans:
            for size in mean:
                mean[size] += shares[size] * (end - before) / steps
            before = end
        return replace(self.settings, shares=mean)

    def state(self) -> dict[str, Any]:
        return {"shares": list(self.shares.items()), "history": [[s, list(of.items())] for s, of in self.history]}

    def restore(self, state: dict[str, Any]) -> None:
        self.shares = {int(size): share for size, share in state["shares"]}
        self.history = [(step, {int(size): share for size, share in of}) for step, of in state["history"]]


class _Proposed(Noise):
    """Exact counts from a learned proposal."""

    kind = "learned_count"

    def __init__(self, kappa: Tensor, settings: LearnedCount) -> None:
        self.kappa, self.settings = kappa, settings

    @property
    def is_bound(self) -> bool:
        return True

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        return proposed_count(block, self.kappa.to(u_block), u_block, u_token)

    def count_probability(self, n: int) -> Tensor:
        return self.kappa[n, : n + 1] if n < len(self.kappa) else self.settings.count_probability(n)


class _ClippedBySize(Noise):
    """Clipped mask rates with an interval for each block size."""

    kind = "searched_clip"

    def __init__(self, best: dict[int, tuple[float, float]], settings: SearchedClip) -> None:
        self.best, self.settings = best, settings

    @property
    def is_bound(self) -> bool:
        return False

    def corrupt(self, block: Tensor, u_block: Tensor, u_token: Tensor) -> Corruption:
        size = torch.bincount(block, minlength=len(u_block))
        low, high = torch.full_like(u_block, 1e-3), torch.ones_like(u_block)
        for n, (least, most) in self.best.items():
            low, high = torch.where(size == n, least, low), torch.where(size == n, most, high)
        return clipped(block, low, high, u_block, u_token, redraw=self.settings.redraw)

    def count_probability(self, n: int) -> Tensor:
        low, high = self.best.get(n, (1e-3, 1.0))
        return Clipped(low, high, redraw=self.settings.redraw).count_probability(n)
