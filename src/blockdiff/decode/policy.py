"""A policy: the parts of a decoder put together, and its one step.

    change the logits - propose tokens - plan the block's end - restrict - score - count - fill - revise

Almost every published decoder of masked diffusion models is this loop with other parts (`decode.registry`). A step is
pure tensor functions of rows and slots: no loop over rows, nothing read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from blockdiff.decode.blocks import FILLED, MaskedView, OpenBlocks, View
from blockdiff.decode.counts import Count, Everything, Fixed, Reverse, Threshold
from blockdiff.decode.inputs import Credit, LogitChange, Soft
from blockdiff.decode.parts import Part, fraction
from blockdiff.decode.ranking import Ranking
from blockdiff.decode.regions import Planner, Region
from blockdiff.decode.remasking import Remask, Reviser
from blockdiff.decode.scores import Confidence, Modifier, Random, Score

Propose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Particles(Part):
    """Self-rewarding sequential Monte Carlo (arXiv 2602.01849): `count` copies of a request, weighted by the
    probability of what they fill, resampled at block ends when their effective number falls below half; the likeliest
    is returned. Needs a temperature above 0."""

    count: int = 4
    name = "particles"

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"policy: particles: count {self.count} searches nothing; give 2 or more")


@dataclass(frozen=True)
class Refine(Part):
    """Draft, then refine (Diffusion in Diffusion, arXiv 2601.13599): when the text is done, the `share` of its tokens
    that were least sure when they were filled are masked again and denoised in one block over the whole text."""

    share: float = 0.25
    name = "refine"

    def __post_init__(self) -> None:
        fraction(self, share=self.share)


@dataclass(frozen=True)
class Policy:
    """How a decoder picks positions and tokens. `decode.expression` writes one as text.

    score: the order of positions, changed by `modifiers`; counts: how many are filled at a step, the largest of them;
    region: where; logits: changes before anything is read; soft: what masked positions are fed; planner: where
    blocks end; reviser: what happens to filled positions; search, refine: wrappers around whole texts.
    max_steps fills all that is left.
    """

    score: Score = Confidence()  # noqa: RUF009 - frozen, here and below
    counts: tuple[Count, ...] = (Threshold(0.9),)
    modifiers: tuple[Modifier, ...] = ()
    region: Region | None = None
    logits: tuple[LogitChange, ...] = ()
    soft: Soft | None = None
    planner: Planner | None = None
    reviser: Reviser | None = None
    search: Particles | None = None
    refine: Refine | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))
        if not self.counts:
            raise ValueError("policy: no count says how many positions a step fills; add one, e.g. fixed(1)")
        compared = [count.name for count in self.counts if count.compares]
        blurred = [self.score.name] * (not self.score.probability)
        blurred += [modifier.name for modifier in self.modifiers if not modifier.probability]
        if compared and blurred:
            raise ValueError(
                f"policy: {compared[0]} compares probabilities, and {blurred[0]} gives none; score by confidence, "
                "top_probability or margin, or count with fixed(n)"
            )
        steps = {count.steps for count in self.counts if isinstance(count, Reverse)}
        if isinstance(self.reviser, Remask) and steps != {self.reviser.steps}:
            raise ValueError(
                f"policy: remask({self.reviser.steps}) goes with reverse({self.reviser.steps}), on one clock"
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"policy: max_steps {self.max_steps} allows no step; give 1 or more")

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        optional = (self.region, self.soft, self.planner, self.reviser, self.search, self.refine)
        present = tuple(part for part in optional if part is not None)
        return (self.score, *self.modifiers, *self.counts, *self.logits, *present)

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the engine must supply beyond logits."""
        return frozenset().union(*(part.needs for part in self.parts))

    @cached_property
    def reads_masked(self) -> bool:
        """Whether the logits of masked positions are all that a step reads."""
        return not any(part.everywhere for part in self.parts)

    @property
    def final_once_filled(self) -> bool:
        """Whether a filled token stays."""
        return self.reviser is None and self.search is None and self.refine is None

    @property
    def left_bias(self) -> float | None:
        """Of the reveal order where that does not depend on the model; None where it does."""
        plain = self.region is None and not self.modifiers and self.reviser is None
        return self.score.left_bias if isinstance(self.score, Random) and plain else None

    def possible(self, n: int) -> Tensor:
        """Which numbers of masks a step may find in a block that opened with n: bool [n + 1]."""
        if len(self.counts) == 1 and self.region is None and self.reviser is None and self.planner is None:
            return self.counts[0].possible(n)
        most = max((c.count for c in self.counts if isinstance(c, Fixed)), default=1)
        found = torch.zeros(n + 1, dtype=torch.bool)
        found[1 : n + 1 - most if self.region is None and self.reviser is None else n + 1] = True
        found[n] = n > 0
        return found

    def __str__(self) -> str:
        steps = [] if self.max_steps is None else [f"max_steps({self.max_steps})"]
        return " + ".join([str(part) for part in self.parts] + steps)

    def step(
        self,
        blocks: OpenBlocks,
        logits: Tensor,
        propose: Propose,
        *,
        unconditional: Tensor | None = None,
        attention: Tensor | None = None,
        token_ids: Callable[[tuple[str, ...]], Tensor] | None = None,
    ) -> tuple[OpenBlocks, Tensor]:
        """The blocks after one step, and which rows are final now, bool [R].

        logits [R, n, V] of the blocks as they stand, or [N, V] of their masked positions alone, row by row (where
        the policy `reads_masked`); propose: tokens [R, n] or [N] for logits.
        """
        blocks = replace(blocks, step=blocks.step + 1)
        credited: list[tuple[Credit, Tensor]] = []
        for change in self.logits:
            credited += [(change, logits)] if isinstance(change, Credit) else []
            logits = change(blocks, logits, unconditional)
        if logits.dim() == 2:
            view: View = MaskedView.of(blocks, logits, propose(logits), attention)
        else:
            view = View(blocks, logits, propose(logits), attention, token_ids)
        if self.planner is not None:
            size = blocks.inside.sum(1)
            blocks = blocks.shrink(torch.where(blocks.step == 1, self.planner(view), size))
            view = View(blocks, logits, view.tokens, attention, token_ids)
        after = _filled(view, self._chosen(view))
        finished = ~after.masked.any(1)
        if self.reviser is not None:
            last = blocks.step >= (self.max_steps or 1 << 40)
            revised = self.reviser(view, after)
            revised = replace(revised, visits=after.visits + (blocks.filled & revised.masked).long())
            finished = last | self.reviser.finished(view, revised)
            after = replace(revised.unless(last, after), memory=revised.memory)
        for part in self.parts:
            after = part.remember(view, after)
        for credit, read in credited:
            after = credit.remember_raw(blocks, after, read)
        return after, finished

    def _chosen(self, view: View) -> Tensor:
        """Positions to fill now, bool [R, n]."""
        eligible = view.masked if self.region is None else self.region(view)
        score = self.score(view)
        for modifier in self.modifiers:
            score = modifier(view, score)
        ranking = Ranking.of(score, eligible)
        chosen = self.counts[0].choose(view, ranking)
        for count in self.counts[1:]:
            chosen = chosen | count.choose(view, ranking)
        if not any(count.may_wait or count.never_waits for count in self.counts):
            chosen = chosen | ranking.best((~chosen.any(1)).long())
        if self.max_steps is not None:
            chosen = torch.where((view.blocks.step >= self.max_steps)[:, None], view.masked, chosen)
        return chosen


def _filled(view: View, chosen: Tensor) -> OpenBlocks:
    blocks, probability = view.blocks, view.chosen_log_probability
    return replace(
        blocks,
        ids=torch.where(chosen, view.tokens, blocks.ids),
        status=torch.where(chosen, FILLED, blocks.status),
        filled_at=torch.where(chosen, blocks.step[:, None], blocks.filled_at),
        confidence=torch.where(chosen, probability.exp(), blocks.confidence),
        log_probability=torch.where(chosen, probability, blocks.log_probability),
    )


def one_step() -> Policy:
    """The whole block at once: the draft that lossless decoding makes unless told otherwise."""
    return Policy(counts=(Everything(),))
