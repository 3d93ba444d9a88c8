"""Lossless decoding: a drafted block keeps only what the AR model would have written itself.

The clean pass that commits a block also gives, under a causal context, the AR logits at each of its positions. The AR
sampler's token at a position is a function of those logits and of one uniform number of (request seed, absolute
position), the same number that the draft was drawn with; so the draft is kept up to the first token that differs, and
the next block opens with the AR sampler's token in its place. Whatever drafted, the text is the one that block size 1
writes with the same seed, up to ties and rounding between passes of different shapes. Greedy is the case without noise.
(Coupled verification; the exact-match acceptance of speculative decoding with shared randomness.)

Shapes: R rows, W slots of the widest open block, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from blockdiff.decode import SamplingBatch, propose
from blockdiff.model import BlockDiffusionModel


def check_lossless(model: BlockDiffusionModel) -> None:
    """Refuse a model whose clean stream is no AR model: ValueError."""
    spec = model.spec
    reasons = {
        f"its clean context is {spec.clean_context}": spec.clean_context != "context_causal",
        "its blocks do not open with a token of the clean stream (prediction shift, boundary clean)": (
            not spec.alignment.scoring().first_is_clean
        ),
        "its clean stream was not trained as an AR model (objective.ar_weight above 0, or a noisy adapter)": (
            not spec.ar_trained
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"lossless: {reason}, so there is no AR text to be equal to; decode without --lossless")


def agreed(logits: Tensor, ids: Tensor, u: Tensor, used: Tensor, sampling: SamplingBatch) -> Tensor:
    """How many of a block's tokens the AR sampler writes too: int64 [R], at least 1.

    logits [R, W, V] of the clean pass (those at slot j predict slot j + 1), ids and u [R, W] the draft and its uniform
    numbers, used [R, W] slots of the row's own block. The first token came from the AR logits already.
    """
    own, _ = propose(logits[:, :-1], u[:, 1:], sampling)
    same = (own == ids[:, 1:]) & used[:, 1:]
    return 1 + same.long().cumprod(1).sum(1)
