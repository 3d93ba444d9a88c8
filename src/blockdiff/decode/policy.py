"""Policies: which masked positions of a block are filled at a step.

A policy scores the masked positions and fills the best ones; how many follows from a threshold or a fixed count. At
least one position is filled at every step, so every block ends. Positions are ranked by one stable sort, so ties go to
the left and no row needs a loop.

Shapes: R rows, n positions of the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """How a decoder picks positions.

    score        confidence: the probability of the proposed token under the raw softmax; random: a uniform order
    threshold    fill every position whose confidence reaches it (None: none beyond `per_step`)
    per_step     fill at least this many positions at each step, best first
    left_bias    of a random order (`noise.ExactCount`): slot i comes next with probability ~ exp(-left_bias * i)
    """

    score: Literal["confidence", "random"] = "confidence"
    threshold: float | None = 0.9
    per_step: int = 1
    left_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in ("confidence", "random"):
            raise ValueError(f"policy score {self.score!r} is unknown; known: confidence, random")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"policy threshold {self.threshold} is out of range; give a probability from 0 to 1")
        if self.score == "random" and self.threshold is not None:
            raise ValueError(
                f"policy threshold {self.threshold} is a confidence, and a random order has none: use None"
            )
        if self.per_step < 1:
            raise ValueError(f"policy per_step {self.per_step} fills nothing; give 1 or more")
        if not 0 <= self.left_bias < math.inf:
            raise ValueError(f"policy left_bias {self.left_bias} is out of range; give 0 (uniform order) or more")


POLICIES: dict[str, Policy] = {
    # Fast-dLLM, arXiv 2505.22618: all positions above a confidence, at least one
    "threshold": Policy("confidence", 0.9, 1),
    # LLaDA's low-confidence remasking, arXiv 2502.09992, as the fixed number of most confident positions a step
    "fixed_count": Policy("confidence", None, 2),
    # First-hitting sampler, arXiv 2409.02908 and BD3-LM 2503.09573: one uniformly random position a step, which is
    # ancestral sampling in continuous time, and the sampler whose likelihood the bound bounds
    "random_order": Policy("random", None, 1),
}


def random_order(u: Tensor, slot: Tensor, left_bias: Tensor) -> Tensor:
    """Scores [R, n] whose largest is a draw of the next position: u uniform [R, n], slot [1, n], left_bias [R].

    Gumbel keys on slot weights exp(-left_bias * slot), the order of `noise.ExactCount`.
    """
    return -((-u.log()).log() + left_bias[:, None] * slot)


def fill(score: Tensor, masked: Tensor, threshold: Tensor, per_step: Tensor) -> Tensor:
    """Positions to fill now, bool [R, n].

    score [R, n], masked [R, n] positions that may be filled, threshold [R] (inf: off), per_step [R].
    """
    score = torch.where(masked, score, -torch.inf)
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    sure = (score >= threshold[:, None]).sum(-1)
    count = torch.maximum(sure, per_step)
    return masked & (rank < count[:, None])
