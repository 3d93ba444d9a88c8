"""The one selector behind fixed, threshold, factor and entropy-bounded counts: positions ranked by their score.

One stable sort a step for all rows, whatever their counts; ties go to the left. Shapes: R rows, n slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """Eligible positions, best first.

    eligible bool [R, n]; score [R, n], -inf where not eligible; order [R, n]: slots by descending score; rank [R, n]:
    its inverse; number [R]: how many are eligible.
    """

    eligible: Tensor
    score: Tensor
    order: Tensor
    rank: Tensor

    @staticmethod
    def of(score: Tensor, eligible: Tensor) -> Ranking:
        # eligible slots first even where their own score is -inf
        score = torch.where(eligible, score.clamp(min=torch.finfo(score.dtype).min), -torch.inf)
        order = torch.argsort(score, dim=-1, descending=True, stable=True)
        places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
        return Ranking(eligible, score, order, torch.empty_like(order).scatter_(-1, order, places))

    @property
    def number(self) -> Tensor:
        return self.eligible.sum(-1)

    def best(self, count: Tensor) -> Tensor:
        """The `count` [R] best positions of each row, bool [R, n]."""
        return self.eligible & (self.rank < count[:, None])

    def sorted(self, values: Tensor) -> Tensor:
        """Values [R, n] in ranked order."""
        return values.gather(-1, self.order)

    def leading(self, holds: Tensor) -> Tensor:
        """How many of the best positions, without a gap, satisfy `holds` bool [R, n] (given in ranked order): [R]."""
        within = torch.arange(holds.shape[-1], device=holds.device) < self.number[:, None]
        return (holds & within).long().cumprod(-1).sum(-1)
