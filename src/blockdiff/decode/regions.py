"""Where a policy may fill (eligibility), and where a block ends (planning). Shapes: R rows, n slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.decode.blocks import View
from blockdiff.decode.parts import Part, positive


class Region(Part, ABC):
    """Which masked positions may be filled now, bool [R, n]."""

    @abstractmethod
    def __call__(self, view: View) -> Tensor: ...


@dataclass(frozen=True)
class SubBlocks(Region):
    """Sub-blocks of `size` slots, filled left to right inside one block (NBDiff, arXiv 2512.06776; Fast-dLLM v2)."""

    size: int = 4
    name = "subblocks"

    def __post_init__(self) -> None:
        positive(self, size=self.size)

    def __call__(self, view: View) -> Tensor:
        part = view.blocks.slot // self.size
        first = torch.where(view.masked, part, 1 << 40).amin(1, keepdim=True)
        return view.masked & (part == first)


@dataclass(frozen=True)
class LeftRun(Region):
    """The leftmost maximal run of masks."""

    name = "left_run"

    def __call__(self, view: View) -> Tensor:
        masked = view.masked
        before = torch.cat([torch.zeros_like(masked[:, :1]), masked[:, :-1]], 1)
        return masked & ((masked & ~before).long().cumsum(1) == 1)


class Planner(Part, ABC):
    """Where a block ends, from the first pass over a whole block of masks: its length, int64 [R], 1 or more.

    The boundary is a function of what came before the block, so every block's tokens are drawn after it is settled.
    """

    everywhere = True

    @abstractmethod
    def __call__(self, view: View) -> Tensor: ...


@dataclass(frozen=True)
class Delimiter(Planner):
    """The block ends at the surest delimiter among the positions whose likeliest token is one, if it is surer than
    `level`, else at its full size (AdaBlock, arXiv 2509.26432)."""

    level: float = 0.3
    delimiters: tuple[str, ...] = ("\n",)
    name = "delimiter"

    def __call__(self, view: View) -> Tensor:
        assert view.token_ids is not None
        probability, token = view.top[0][..., 0], view.top[1][..., 0]
        ids = view.token_ids(self.delimiters)
        ends = view.masked & torch.isin(token, ids.to(token.device)) & (probability >= self.level)
        best = torch.where(ends, probability, -1.0).argmax(1)
        size = view.blocks.inside.sum(1)
        return torch.where(ends.any(1), best + 1, size)


@dataclass(frozen=True)
class EntropyShift(Planner):
    """The block ends before the largest rise of entropy between neighbours, if it exceeds `rise` nats: the beginning of
    a new constituent (Swordsman, 2026). The paper's formula is not public; this rule is ours."""

    rise: float = 1.0
    smallest: int = 2
    name = "entropy_shift"

    def __post_init__(self) -> None:
        positive(self, smallest=self.smallest)

    def __call__(self, view: View) -> Tensor:
        entropy, masked = view.entropy.double(), view.masked
        both = masked[:, 1:] & masked[:, :-1] & (view.blocks.slot[:, 1:] >= self.smallest)
        size = view.blocks.inside.sum(1)
        if both.shape[1] == 0:
            return size
        jump = torch.where(both, entropy[:, 1:] - entropy[:, :-1], -torch.inf)
        largest, at = jump.max(1)
        return torch.where(largest > self.rise, at + 1, size)
