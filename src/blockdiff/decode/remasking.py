"""Revisers: what becomes of positions that are filled already (remasked, edited, renoised).

A reviser runs after the step's filling, on what was filled *before* the step, and never touches a given position.
Shapes: R rows, n slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from blockdiff.decode.blocks import FILLED, MASK, NOISE, REMASK, OpenBlocks, View
from blockdiff.decode.parts import Part, fraction, positive
from blockdiff.decode.ranking import Ranking

Remasking = Literal["cap", "rescale"]


def sigma(s: Tensor, t: Tensor, eta: float, kind: Remasking) -> Tensor:
    """The share of revealed positions that a step from t to s masks again, alpha = 1 - t (ReMDM, section 4)."""
    largest = (t.new_tensor(1.0)).minimum(s / (1 - t).clamp(min=1e-12))
    return largest.clamp(max=eta) if kind == "cap" else eta * largest


class Reviser(Part, ABC):
    """edits: it puts other tokens in place of filled ones, rather than masks."""

    edits: ClassVar[bool] = False
    everywhere = True

    @abstractmethod
    def __call__(self, view: View, after: OpenBlocks) -> OpenBlocks:
        """`view` as the step found the blocks, `after`: with its filling done."""

    def finished(self, view: View, after: OpenBlocks) -> Tensor:
        """Rows that are final, bool [R]."""
        return ~after.masked.any(1)


@dataclass(frozen=True)
class Remask(Reviser):
    """Masks revealed positions again with probability sigma at each of `steps` steps, together with `reverse` of the
    same numbers (ReMDM, arXiv 2503.00307). confident: instead of eta, a share of the largest sigma that is the softmax
    of -(probability when it was revealed) over the revealed positions, and none at masked ones (the paper's `conf`),
    so that `reverse` goes without eta."""

    steps: int = 32
    eta: float = 0.05
    kind: Remasking = "cap"
    confident: bool = False
    everywhere = False
    name = "remask"

    def __post_init__(self) -> None:
        positive(self, steps=self.steps)
        fraction(self, eta=self.eta)

    def __call__(self, view: View, after: OpenBlocks) -> OpenBlocks:
        blocks = view.blocks
        step = blocks.step.double()
        t = (1 - (step - 1) / self.steps).clamp(min=1 / self.steps)
        s = t - 1 / self.steps
        chance = sigma(s, t, 1.0 if self.confident else self.eta, self.kind)[:, None].expand_as(blocks.confidence)
        if self.confident:
            weight = torch.where(blocks.filled, (-blocks.confidence).exp(), 0.0)
            chance = chance * weight / weight.sum(1, keepdim=True).clamp(min=1e-300)
        again = blocks.filled & (blocks.uniform(REMASK) < chance)
        return replace(after, status=after.status.masked_fill(again, MASK))

    def finished(self, view: View, after: OpenBlocks) -> Tensor:
        return (view.blocks.step >= self.steps) & ~after.masked.any(1)


@dataclass(frozen=True)
class KeepTop(Reviser):
    """Keeps, over the whole block, the share step/steps of the positions that are surest of their token now, and masks
    the others again (top-k remasking: RemeDi, arXiv 2509.23653, with the model's probability in place of its head)."""

    steps: int = 8
    name = "keep_top"

    def __post_init__(self) -> None:
        positive(self, steps=self.steps)

    def __call__(self, view: View, after: OpenBlocks) -> OpenBlocks:
        keep = -(-view.blocks.opened * view.blocks.step // self.steps)
        ranking = Ranking.of(view.log_probability_of(after.ids.clamp(min=0)), after.filled)
        return replace(after, status=after.status.masked_fill(after.filled & ~ranking.best(keep), MASK))

    def finished(self, view: View, after: OpenBlocks) -> Tensor:
        return ~after.masked.any(1)


@dataclass(frozen=True)
class Edit(Reviser):
    """Replaces a filled token where the model now prefers another with probability above `level`; the block is final
    when no mask is left and nothing changed, or `post_steps` after its last mask (LLaDA2.1, arXiv 2602.08676)."""

    level: float = 0.9
    post_steps: int = 16
    name = "edit"
    edits = True

    def __post_init__(self) -> None:
        fraction(self, level=self.level)
        positive(self, post_steps=self.post_steps)

    def __call__(self, view: View, after: OpenBlocks) -> OpenBlocks:
        probability, token = view.top[0][..., 0].double(), view.top[1][..., 0]
        swap = view.blocks.filled & (token != after.ids) & (probability > self.level)
        return replace(
            after,
            ids=torch.where(swap, token, after.ids),
            edits=after.edits + swap.long(),
            filled_at=torch.where(swap, after.step[:, None], after.filled_at),
            confidence=torch.where(swap, probability, after.confidence),
            log_probability=torch.where(swap, probability.log(), after.log_probability),
        )

    def finished(self, view: View, after: OpenBlocks) -> Tensor:
        changed = (after.ids != view.blocks.ids).any(1) | view.masked.any(1)
        past = after.filled_at.masked_fill(after.edits > 0, 0).amax(1) + self.post_steps <= after.step
        return ~after.masked.any(1) & (~changed | past)


@dataclass(frozen=True)
class Renoise(Reviser):
    """Uniform state: what is not accepted becomes a fresh random token, acceptance lasts one step, and the block ends
    as the argmax of every position, once that stood still for a step with a mean entropy below `settled`, or after
    `steps` (DiffusionGemma's sampler in transformers 5.23). For models trained on uniform noise only."""

    settled: float = 0.005
    steps: int = 48
    name = "renoise"
    edits = True
    needs = frozenset({"uniform_state"})

    def __post_init__(self) -> None:
        positive(self, settled=self.settled, steps=self.steps)

    def __call__(self, view: View, after: OpenBlocks) -> OpenBlocks:
        vocabulary = view.logits.shape[-1]
        allowed = torch.isfinite(view.logits[0, 0]).nonzero()[:, 0] if vocabulary else None
        assert allowed is not None
        random = allowed[(view.blocks.uniform(NOISE) * len(allowed)).long()]
        open_slots = view.masked
        ids = torch.where(open_slots & ~after.filled, random, after.ids)
        done = self._settled(view)[:, None] & open_slots
        status = torch.where(open_slots, MASK, after.status)
        return replace(
            after,
            ids=torch.where(done, view.top[1][..., 0], ids),
            status=torch.where(done, FILLED, status),
        ).remember("argmax", view.top[1][..., 0])

    def _settled(self, view: View) -> Tensor:
        last = view.blocks.recalled("argmax", torch.full_like(view.tokens, -1))
        out_of_steps = view.blocks.step >= self.steps
        still = ((last == view.top[1][..., 0]) | ~view.masked).all(1)
        mean = torch.where(view.masked, view.entropy, 0.0).sum(1) / view.masked.sum(1).clamp(min=1)
        return out_of_steps | (still & (mean < self.settled))
