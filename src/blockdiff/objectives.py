"""Objectives: from a batch and its noise to one two-stream pass, and from logits to sums and counts per document.

The same code trains and evaluates, so the number that is trained and the number that is reported cannot diverge.

How logits line up with tokens is the model's `Alignment`:

    same            logits at i predict token i. Every token of a block may be masked.
    shift, clean    logits at i-1 predict token i, as AR checkpoints do. A block's first token is read from the clean
                    stream, exactly as decoding takes it from the commit pass, and is never masked. A block's bound is
                    its AR term plus the exact-count sum over the other n-1 tokens.
    shift, seed     the noisy block begins one token earlier, with the clean token before the block in its first slot
                    (SDLM, arXiv 2509.24007): all n tokens are predicted, in any order.
    shift, noisy    a block's first token is read from the noisy stream, the last slot of the block before it
                    (Fast-dLLM v2, arXiv 2509.26328). Parity only: decoding never uses that prediction, so it is no
                    bound.

With `clean` and `seed`, blocks of one token are exactly the AR model. DESIGN section 4; adaptation of NBDiff,
arXiv 2512.06776, appendix A.

Shapes: B rows, L clean tokens a row, N noisy slots a row, R reads (rows of logits), D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from blockdiff.cross_entropy import cross_entropy
from blockdiff.layout import TokenMap
from blockdiff.masking import Corruption

Prediction = Literal["same", "shift"]
Boundary = Literal["clean", "seed", "noisy"]
Weighting = Literal["nelbo", "ce"] | list[float]
MASKED, FIRST, AUXILIARY = 0, 1, 2


@dataclass(frozen=True)
class Alignment:
    """How a model's logits line up with tokens (a property of the checkpoint, never of a policy)."""

    prediction: Prediction = "shift"
    boundary: Boundary = "clean"

    def __post_init__(self) -> None:
        if self.prediction not in ("same", "shift"):
            raise ValueError(f"prediction {self.prediction!r} is unknown; known: same, shift")
        if self.boundary not in ("clean", "seed", "noisy"):
            raise ValueError(f"boundary {self.boundary!r} is unknown; known: clean, seed, noisy")

    @property
    def shift(self) -> bool:
        return self.prediction == "shift"

    @property
    def first_is_clean(self) -> bool:
        """A block's first token is predicted by the clean stream and never masked."""
        return self.shift and self.boundary == "clean"

    @property
    def seeded(self) -> bool:
        """The noisy block's first slot holds the clean token before the block."""
        return self.shift and self.boundary == "seed"

    @property
    def is_bound(self) -> bool:
        return not (self.shift and self.boundary == "noisy")

    def scoring(self) -> Alignment:
        """The alignment under which this model is decoded, and therefore scored: `noisy` models decode as `clean`."""
        return self if self.is_bound else Alignment("shift", "clean")


@dataclass(frozen=True)
class Reads:
    """Rows of logits that a loss reads.

    index [R] slot of the two-stream input, flattened over rows; target [R] token id; weight [R] float64;
    doc [R] document; kind [R]: MASKED (a masked token), FIRST (a block's first token, read from the clean stream) or
    AUXILIARY (the AR term, not part of the bound). Masked reads come first, draw by draw, in the order of the masked
    tokens (under the `noisy` boundary those read from the clean stream come after the others).
    """

    index: Tensor
    target: Tensor
    weight: Tensor
    doc: Tensor
    kind: Tensor


@dataclass(frozen=True)
class TwoStreams:
    """The input of one pass, [noisy ; clean] (only clean where no block has a noisy slot), and what to read from it."""

    ids: Tensor
    tokens: TokenMap
    reads: Reads


@dataclass(frozen=True)
class Terms:
    """Losses as sums and counts per document, never as a bare mean: tensors [D].

    blocks  sum of the blocks' weighted losses, in nats (their bound, where weighting, noise and alignment make it one);
            tokens: how many tokens it covers
    ar      sum of the auxiliary AR losses; ar_tokens: how many tokens they cover
    """

    blocks: Tensor
    tokens: Tensor
    ar: Tensor
    ar_tokens: Tensor

    def loss(self, total_tokens: Tensor | float, ar_weight: float) -> Tensor:
        """The training loss: (blocks + ar_weight * AR term) / tokens of the whole optimizer step."""
        return (self.blocks.sum() + ar_weight * self.ar.sum()) / total_tokens


def maskable(tokens: TokenMap, alignment: Alignment) -> Tensor:
    """Tokens that noise may mask, bool [B, L]: scored, and not first in a block that decoding opens with it known."""
    return tokens.scored & ~(tokens.is_block_start & alignment.first_is_clean)


def block_numbers(tokens: TokenMap, chosen: Tensor) -> Tensor:
    """Number of the block of each chosen token, ascending from 0 through the batch: int64 [number chosen]."""
    rows = torch.arange(tokens.shape[0], device=tokens.doc.device)[:, None] * (tokens.shape[1] + 1)
    return torch.unique_consecutive((tokens.block + rows)[chosen], return_inverse=True)[1]


def one_active(tokens: TokenMap, u: Tensor) -> tuple[TokenMap, Tensor]:
    """One block of every document left to be denoised, the others' tokens given; and how many blocks each has [D].

    u [D] uniform in (0, 1) chooses. With the loss times the number of blocks this is Blockwise SFT's estimate
    (arXiv 2508.19529) of what all blocks together give: in a block-structured model a block's loss does not depend on
    whether others are denoised beside it.
    """
    scored = tokens.scored
    number = block_numbers(tokens, scored)
    doc = tokens.doc[scored]
    doc_of_block = torch.zeros(int(number.max()) + 1, dtype=torch.int64, device=doc.device).index_copy(0, number, doc)
    blocks = torch.bincount(doc_of_block, minlength=len(u))
    chosen = blocks.cumsum(0) - blocks + (u.to(doc.device) * blocks).long()
    active = torch.zeros_like(scored)
    active[scored] = number == chosen[doc]
    return replace(tokens, prompt=tokens.prompt | ~active), blocks


def two_streams(
    ids: Tensor,
    tokens: TokenMap,
    corruption: Corruption | Sequence[Corruption],
    alignment: Alignment,
    mask_id: int,
    *,
    weighting: Weighting = "nelbo",
    with_ar: bool = False,
    shown: tuple[Tensor, Tensor] | None = None,
) -> TwoStreams:
    """Build the pass for noise draws over the batch's maskable tokens.

    ids [B, L], tokens its clean-stream map, corruption over `maskable(tokens, alignment)` in row order. Several draws
    share one clean stream, [noisy ; noisy ; ... ; clean], and the loss is their mean. `with_ar` adds the AR term: the
    clean stream predicts every scored token that the bound does not already read there. `shown` [B, L] are the ids that
    the noisy (before masking) and the clean stream show, where an ablation has them differ from the targets `ids`.
    """
    noisy_ids, clean_ids = (ids, ids) if shown is None else shown
    if alignment.shift and bool((tokens.scored & (tokens.position == 0)).any()):
        raise ValueError("a document's first token cannot be scored under shift: give every document a prompt token")
    can = maskable(tokens, alignment)
    source, noisy = _noisy_stream(tokens, alignment)
    denoised = noisy.scored & ~(noisy.is_block_start & alignment.seeded)
    draws = [corruption] if isinstance(corruption, Corruption) else list(corruption)
    hidden: list[tuple[Tensor, Tensor]] = []
    parts_ids, parts_map = [], []
    for number, draw in enumerate(draws):
        masked = torch.zeros_like(can)
        masked[can] = draw.masked
        weight = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        weight[can] = _weights(draw, weighting) / len(draws)
        hidden.append((masked, weight))
        parts_ids.append(noisy_ids.gather(1, source).masked_fill(masked.gather(1, source) & denoised, mask_id))
        # a block number of its own for each draw, so that draws do not see one another
        parts_map.append(replace(noisy, block=noisy.block + number * (ids.shape[1] + 1)))
    return TwoStreams(
        ids=torch.cat([*parts_ids, clean_ids], 1),
        tokens=TokenMap.cat(*parts_map, tokens),
        reads=_reads(ids, tokens, hidden, source, noisy, alignment, with_ar),
    )


def token_losses(logits: Tensor, reads: Reads) -> Tensor:
    """Cross-entropy of every read, unweighted, in at least float32: logits [R, V] -> [R]."""
    return cross_entropy(logits, reads.target)


def score(losses: Tensor, reads: Reads, tokens: TokenMap, documents: int) -> Terms:
    """Terms of a batch: losses [R] of the reads (`token_losses`); tokens its clean-stream map; documents numbered
    0..D-1 in it."""
    loss = losses * reads.weight.to(losses.dtype)
    zero = torch.zeros(documents, dtype=loss.dtype, device=loss.device)
    count = torch.zeros(documents, dtype=torch.int64, device=loss.device)
    auxiliary = reads.kind == AUXILIARY
    main = ~auxiliary
    scored = tokens.doc[tokens.scored]
    return Terms(
        blocks=zero.index_add(0, reads.doc[main], loss[main]),
        tokens=count.index_add(0, scored, torch.ones_like(scored)),
        ar=zero.index_add(0, reads.doc[auxiliary], loss[auxiliary]),
        ar_tokens=count.index_add(0, reads.doc[auxiliary], torch.ones_like(reads.doc[auxiliary])),
    )


def _weights(corruption: Corruption, weighting: Weighting) -> Tensor:
    if weighting == "nelbo":
        return corruption.weight
    if weighting == "ce":
        return torch.ones_like(corruption.weight)
    table = torch.tensor([0.0, *weighting], dtype=torch.float64, device=corruption.weight.device)
    return table[corruption.count.clamp(max=len(table) - 1)] * corruption.weight


def _noisy_stream(tokens: TokenMap, alignment: Alignment) -> tuple[Tensor, TokenMap]:
    """Which clean tokens have a noisy slot, packed to the left: source [B, N] and the slots' map [B, N].

    Blocks with nothing to mask have no slots, so a prompt costs nothing and an AR layout has no noisy stream at all.
    """
    noisy = tokens.as_noisy()
    if alignment.seeded:
        noisy = _seeded(noisy)
        present = noisy.scored
    else:
        present = _in_blocks_with(maskable(tokens, alignment), tokens)
    slots = int(present.sum(1).max())
    source = torch.argsort((~present).to(torch.int8), dim=1, stable=True)[:, :slots]
    noisy = noisy.take(source)
    absent = torch.arange(slots, device=source.device)[None] >= present.sum(1, keepdim=True)
    return source, TokenMap(
        doc=noisy.doc.masked_fill(absent, -1),
        position=noisy.position,
        block=noisy.block,
        start=noisy.start,
        prompt=noisy.prompt,
        noisy=noisy.noisy,
    )


def _seeded(noisy: TokenMap) -> TokenMap:
    """Slot i of the stream stands for token i + 1: its block is that token's, beginning one token earlier."""
    following = noisy.map(lambda tensor: torch.cat([tensor[:, 1:], tensor[:, -1:]], 1))
    last = torch.zeros_like(noisy.prompt)
    last[:, -1] = True
    leads = (following.doc == noisy.doc) & ~last
    return TokenMap(
        doc=noisy.doc,
        position=noisy.position,
        block=following.block,
        start=following.start - 1,
        prompt=~leads | following.prompt,
        noisy=noisy.noisy,
    )


def _in_blocks_with(chosen: Tensor, tokens: TokenMap) -> Tensor:
    """Tokens whose block holds at least one chosen token: bool [B, L]."""
    held = torch.zeros(tokens.shape[0], tokens.shape[1] + 1, dtype=torch.int64, device=chosen.device)
    held.scatter_add_(1, tokens.block, chosen.long())
    return held.gather(1, tokens.block) > 0


def _reads(
    ids: Tensor,
    tokens: TokenMap,
    hidden: list[tuple[Tensor, Tensor]],
    source: Tensor,
    noisy: TokenMap,
    alignment: Alignment,
    with_ar: bool,
) -> Reads:
    """What to read for the draws `hidden`, each (masked, weight) [B, L]."""
    rows, length = ids.shape
    slots = source.shape[1]
    clean = len(hidden) * slots  # slot at which the clean stream begins
    row = torch.arange(rows, device=ids.device)[:, None].expand_as(ids) * (clean + length)
    place = torch.arange(length, device=ids.device).expand_as(ids)
    # slot of each clean token in a noisy stream (meaningful where it has one)
    slot = torch.zeros_like(ids)
    slot.scatter_(1, source, torch.arange(slots, device=ids.device).expand_as(source))
    has_slot = torch.zeros_like(tokens.prompt)
    has_slot.scatter_(1, source, noisy.doc >= 0)

    before = (place - 1).clamp(min=0)
    from_clean = row + clean + before
    parts = []
    for number, (masked, weight) in enumerate(hidden):
        from_noisy = row + number * slots + (slot.gather(1, before) if alignment.shift else slot)
        # under the `noisy` boundary a span's first token has no noisy slot before it and is read from the clean stream
        readable = has_slot.gather(1, before) & (tokens.position > 0) if alignment.shift else torch.ones_like(masked)
        parts += [
            (from_noisy, masked & readable, weight, MASKED),
            (from_clean, masked & ~readable, weight, MASKED),
        ]
    firsts = tokens.scored & tokens.is_block_start & alignment.first_is_clean
    one = torch.ones_like(hidden[0][1])
    parts.append((from_clean, firsts, one, FIRST))
    if with_ar:
        parts.append((from_clean, tokens.scored & ~firsts & (tokens.position > 0), one, AUXILIARY))
    return Reads(
        index=torch.cat([index[chosen] for index, chosen, _, _ in parts]),
        target=torch.cat([ids[chosen] for _, chosen, _, _ in parts]),
        weight=torch.cat([w[chosen] for _, chosen, w, _ in parts]),
        doc=torch.cat([tokens.doc[chosen] for _, chosen, _, _ in parts]),
        kind=torch.cat([torch.full_like(ids[chosen], kind) for _, chosen, _, kind in parts]),
    )
