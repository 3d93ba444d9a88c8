"""What training gets wrong on purpose: states that block decoding never visits, to measure what they cost.

Blockwise SFT (arXiv 2508.19529) names two of them, a noisy prefix and a visible suffix. The third is its own setting:
the suffix hidden behind masks, as many as the true answer has tokens, so that their number tells its length.

Shapes: B rows, L clean tokens a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from blockdiff.layout import TokenMap


def noisy_prefix(ids: Tensor, tokens: TokenMap, share: float, mask_id: int, u: Tensor) -> Tensor:
    """The clean stream's ids [B, L] with this share of the answers' tokens masked; prompts stay as they are.
    u [B, L] uniform in (0, 1)."""
    hidden = u < share
    return ids.masked_fill(hidden & tokens.scored, mask_id)


def with_suffix(tokens: TokenMap, denoised: TokenMap) -> tuple[TokenMap, Tensor]:
    """The one active block of every document widened by all that follows it, and which tokens those are [B, L].

    tokens is the whole layout, denoised what `objectives.one_active` left of it. The block sees the suffix in its own
    noisy stream; through the clean stream it would see itself there.
    """
    active = denoised.scored
    documents = int(tokens.doc.max()) + 1
    doc = tokens.doc.clamp(min=0)

    def of_active(value: Tensor) -> Tensor:
        """A value of the active block's tokens, for every token of its document."""
        found = torch.full((documents,), -1, dtype=torch.int64, device=value.device)
        return found.index_copy(0, doc[active], value[active])[doc]

    block, start = of_active(tokens.block), of_active(tokens.start)
    suffix = (tokens.doc >= 0) & (block >= 0) & (tokens.block > block)
    widened = replace(
        denoised,
        block=torch.where(suffix, block, denoised.block),
        start=torch.where(suffix, start, denoised.start),
        prompt=denoised.prompt | suffix,
    )
    return widened, suffix


def visible_suffix(ids: Tensor, suffix: Tensor, share: float, mask_id: int, u: Tensor) -> Tensor:
    """The noisy stream's ids [B, L] with this share of the suffix's tokens left visible and the others masked.
    u [B, L] uniform in (0, 1)."""
    shown = u < share
    return ids.masked_fill(suffix & ~shown, mask_id)
