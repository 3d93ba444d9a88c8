"""Scores: which masked position comes first (higher is earlier), and what changes a score.

Confidence is read off the raw softmax: after a temperature or a filter every choice would look certain.
Shapes: R rows, n slots, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from blockdiff.decode.blocks import JITTER, ORDER, OpenBlocks, View
from blockdiff.decode.parts import Part, positive


class Score(Part, ABC):
    """A base score, float [R, n]. probability: it lies between 0 and 1 and can be compared with a level."""

    probability: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, view: View) -> Tensor: ...


class Modifier(Part, ABC):
    """A change of a score, float [R, n] -> [R, n]. probability: a probability stays one."""

    probability: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, view: View, score: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Confidence(Score):
    """Probability of the proposed token (LLaDA, arXiv 2502.09992)."""

    name = "confidence"
    probability = True

    def __call__(self, view: View) -> Tensor:
        return view.chosen_log_probability.exp()


@dataclass(frozen=True)
class TopProbability(Score):
    """The largest probability, whatever was proposed (Dream `maskgit_plus`; Fast-dLLM at temperature 0)."""

    name = "top_probability"
    probability = True

    def __call__(self, view: View) -> Tensor:
        return view.top[0][..., 0].double()


@dataclass(frozen=True)
class Margin(Score):
    """The largest probability less the second (Dream `topk_margin`)."""

    name = "margin"
    probability = True

    def __call__(self, view: View) -> Tensor:
        two = view.top[0].double()
        return two[..., 0] - two[..., 1] if two.shape[-1] > 1 else two[..., 0]


@dataclass(frozen=True)
class Entropy(Score):
    """Negative entropy of the distribution in nats (Dream `entropy`; EB-sampler, arXiv 2505.24857)."""

    name = "entropy"

    def __call__(self, view: View) -> Tensor:
        return -view.entropy.double()


@dataclass(frozen=True)
class Random(Score):
    """A random order; left_bias b: slot i comes next with probability ~ exp(-b * i) (`noise.ExactCount`)."""

    left_bias: float = 0.0
    name = "random"

    def __post_init__(self) -> None:
        if not 0 <= self.left_bias < math.inf:
            raise ValueError(f"policy: random: left_bias {self.left_bias} is out of range; give 0 (uniform) or more")

    def __call__(self, view: View) -> Tensor:
        return random_order(view.blocks.uniform(ORDER), view.blocks.slot, self.left_bias)


@dataclass(frozen=True)
class Leftmost(Score):
    """Left to right (SDAR `sequential`)."""

    name = "leftmost"

    def __call__(self, view: View) -> Tensor:
        return -view.blocks.slot.double().expand(view.tokens.shape)


@dataclass(frozen=True)
class Attention(Score):
    """Positions that the block attends to most (Attn-Sampler, arXiv 2604.08564).

    The paper's aggregation is not public; ours: column sums of the last layer's attention, averaged over heads, with
    the open block as queries.
    """

    name = "attention"
    needs = frozenset({"attention"})

    def __call__(self, view: View) -> Tensor:
        assert view.attention is not None
        return view.attention.double()


@dataclass(frozen=True)
class Stability(Modifier):
    """Score times exp(-strength * KL(p_t || p_{t-1})): what still moves waits (SWD, arXiv 2604.17068).

    The paper penalises by the same divergence; its exact weighting is not public, and this one is ours. At a block's
    first step nothing has moved yet.
    """

    strength: float = 1.0
    everywhere = True
    name = "stability"

    def __post_init__(self) -> None:
        positive(self, strength=self.strength)

    def __call__(self, view: View, score: Tensor) -> Tensor:
        moved = change(view, first=0.0)
        weight = torch.exp(-self.strength * moved)
        return torch.where(score >= 0, score * weight, score / weight.clamp(min=1e-300))

    def remember(self, view: View, blocks: OpenBlocks) -> OpenBlocks:
        return blocks.remember("previous", view.log_probability)


@dataclass(frozen=True)
class Jitter(Modifier):
    """Positions drawn without replacement from softmax(score / temperature) (Dream `alg_temp`), by Gumbel keys."""

    temperature: float = 1.0
    name = "jitter"
    probability = False

    def __post_init__(self) -> None:
        positive(self, temperature=self.temperature)

    def __call__(self, view: View, score: Tensor) -> Tensor:
        return score / self.temperature - (-view.blocks.uniform(JITTER).log()).log()


@dataclass(frozen=True)
class LeftPrior(Modifier):
    """Score times exp(-decay * slot): the left first (the position prior of PC-Sampler, arXiv 2508.13021)."""

    decay: float = 0.1
    name = "left_prior"

    def __post_init__(self) -> None:
        positive(self, decay=self.decay)

    def __call__(self, view: View, score: Tensor) -> Tensor:
        weight = torch.exp(-self.decay * view.blocks.slot.double())
        return torch.where(score >= 0, score * weight, score / weight)


def random_order(u: Tensor, slot: Tensor, left_bias: float) -> Tensor:
    """Scores [R, n] whose largest is a draw of the next position: u uniform [R, n], slot [1, n].

    Gumbel keys on slot weights exp(-left_bias * slot), the order of `noise.ExactCount`.
    """
    return -((-u.log()).log() + left_bias * slot)


def change(view: View, first: float) -> Tensor:
    """KL(p_t || p_{t-1}) of every position in nats, float64 [R, n]; `first` at a block's first step."""
    previous = view.blocks.memory.get("previous")
    if previous is None:
        return torch.full(view.tokens.shape, first, dtype=torch.float64, device=view.tokens.device)
    now = view.log_probability
    gap = torch.where(torch.isfinite(now), now - previous, 0.0)
    moved = (now.exp() * gap).sum(-1).clamp(min=0).double()
    return torch.where(view.blocks.step[:, None] > 1, moved, first)
