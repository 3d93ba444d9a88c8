"""A training pass: draw a layout and noise for a batch, run the two streams, score them; and how that changes.

What trains and what measures gradients draw through the same `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from blockdiff.ablations import noisy_prefix, visible_suffix, with_suffix
from blockdiff.curriculum import Growth
from blockdiff.distributions import LayoutDistribution
from blockdiff.draws import Draws
from blockdiff.layout import Spans, TokenMap
from blockdiff.masking import Corruption, complement
from blockdiff.masks import Annealing
from blockdiff.noise import Noise
from blockdiff.objectives import (
    Alignment,
    Terms,
    Weighting,
    block_numbers,
    maskable,
    one_active,
    score,
    two_streams,
)

Active = Literal["all", "one"]
Observe = Callable[[Corruption, Tensor, Tensor], None]


@dataclass(frozen=True)
class Objective:
    """What a step draws and what it minimises.

    draws: noise draws that share one clean pass; complementary: two of them, of which the second masks what the first
    leaves. active: every block of a document in one pass, or one random block (`objectives.one_active`).
    bidirectional: share of a block's later tokens that a noisy token sees (`masks.Annealing`; None: all of them).
    prefix_noise: share of the answers' tokens that the clean stream shows masked; suffix_visible: the active block sees
    what follows it, this share of it unmasked (None: it sees nothing). Both are `ablations`. apart: the clean stream in
    a pass of its own, before the noisy one.
    """

    layout: LayoutDistribution
    noise: Noise
    weighting: Weighting = "nelbo"
    ar_weight: float = 0.0
    draws: int = 1
    complementary: bool = False
    active: Active = "all"
    bidirectional: float | None = None
    prefix_noise: float = 0.0
    suffix_visible: float | None = None
    apart: bool = False

    def is_bound(self, alignment: Alignment) -> bool:
        """Whether the blocks' loss is, in expectation, a bound on the negative log-likelihood."""
        ablated = self.bidirectional is not None or self.prefix_noise > 0 or self.suffix_visible is not None
        return self.weighting == "nelbo" and self.noise.is_bound and alignment.is_bound and not ablated

    def terms(
        self,
        model: Callable[..., Tensor],
        batch: dict[str, Tensor],
        alignment: Alignment,
        mask_id: int,
        seed: int,
        observe: Observe | None = None,
    ) -> Terms:
        """Draw a layout and noise for a batch (`data.collate`'s) and score it, in one pass (or `apart`).

        What is drawn for a row is a function of `seed` and of its number in batch["row"] [B] (absent: 0..B-1).
        `observe(corruption, losses, block)` receives the losses of a draw's masked tokens, and every token's block.
        """
        ids, doc, prompt = batch["input_ids"], batch["doc"], batch["prompt"]
        draws = Draws.of(seed, batch.get("row", torch.arange(len(ids))))
        spans = Spans.of(doc, prompt)
        tokens = TokenMap.build(doc, prompt, spans.place(draws.starts(self.layout, spans).to(doc.device)))
        documents = int(doc.max()) + 1
        denoised, blocks = tokens, torch.ones((), device=doc.device)
        noisy_ids, clean_ids, annealing = ids, ids, None
        if self.active == "one":
            denoised, blocks = one_active(tokens, draws.documents(doc))
        if self.suffix_visible is not None:
            denoised, suffix = with_suffix(tokens, denoised)
            noisy_ids = visible_suffix(ids, suffix, self.suffix_visible, mask_id, draws.tokens(doc).to(ids.device))
        if self.prefix_noise > 0:
            clean_ids = noisy_prefix(ids, tokens, self.prefix_noise, mask_id, draws.tokens(doc).to(ids.device))
        if self.bidirectional is not None:
            annealing = Annealing(self.bidirectional, (draws.documents(doc) * 2**53).long().to(doc.device))
        can = maskable(denoised, alignment)
        block = block_numbers(denoised, can)
        corruptions = self._noise(block, can.nonzero()[:, 0], draws)
        stream = two_streams(
            ids,
            denoised,
            corruptions,
            alignment,
            mask_id,
            weighting=self.weighting,
            with_ar=self.ar_weight > 0,
            shown=(noisy_ids, clean_ids),
        )
        reads = stream.reads
        losses = model(
            stream.ids,
            stream.tokens,
            read=reads.index,
            target=reads.target,
            annealing=annealing,
            apart=self.apart,
        )
        if observe is not None:
            at = 0
            for draw in corruptions:
                count = int(draw.masked.sum())
                observe(draw, losses[at : at + count], block)
                at += count
        terms = score(losses, reads, tokens, documents)
        return replace(terms, blocks=terms.blocks * blocks, ar=terms.ar * blocks)

    def _noise(self, block: Tensor, row: Tensor, draws: Draws) -> list[Corruption]:
        u_block, u_token = (
            u.to(block.device) for u in draws.noise(block, row, 1 if self.complementary else self.draws)
        )
        found = self.noise.draws(block, u_block, u_token)
        return [found[0], complement(block, found[0])] if self.complementary else found


@dataclass(frozen=True)
class Schedule:
    """How the objective changes with the progress of a training: growing blocks, and the AR weight at the end."""

    growth: Growth | None = None
    ar_weight_end: float | None = None

    def at(self, objective: Objective, progress: float, u: float) -> Objective:
        """The objective at `progress` in [0, 1]; u in (0, 1) for what is drawn at each step."""
        if self.growth is not None:
            layout, bidirectional = self.growth.layout(objective.layout, progress, u), self.growth.annealing(progress)
            objective = replace(objective, layout=layout, bidirectional=bidirectional)
        if self.ar_weight_end is not None:
            weight = objective.ar_weight + (self.ar_weight_end - objective.ar_weight) * progress
            objective = replace(objective, ar_weight=weight)
        return objective
