"""Losses of every scored token under every draw: what bounds, curves over positions and comparisons are made of.

Three estimators of the same bound (`noise`, equation *):

    exact_count   draws of exact counts, stratified over the draws of each block
    exact         every mask set of a block, 2^n - 1 passes: no Monte Carlo error, and the exact likelihood beside it
    orders        chains: a reveal order drawn for every block, n passes that score each token once. Their mean is the
                  bound; -log of their mean likelihood is a tighter one (a likelihood averaged over orders, as IWAE's,
                  arXiv 1509.00519, is over samples; exp of an exact-count estimate is no unbiased likelihood)

Every random number is a function of (seed, document, position, draw), whatever shares a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from blockdiff.data import collate
from blockdiff.evaluate.exact import RandomOrder
from blockdiff.evaluate.windows import Window, batches
from blockdiff.layout import Spans, TokenMap
from blockdiff.masking import Corruption, place_in_block, rank_in_block, subset
from blockdiff.model import BlockDiffusionModel
from blockdiff.noise import ExactCount
from blockdiff.objectives import FIRST, block_numbers, maskable, two_streams
from blockdiff.rng import uniform
from blockdiff.shards import ALONE, Split

_TOKEN, _BLOCK = 3, 4  # purposes of random numbers
Kind = Literal["exact_count", "exact", "orders"]


@dataclass(frozen=True)
class Estimator:
    """How a bound is computed: its kind, draws (orders of `orders`; one where nothing is drawn), left bias of the
    reveal order, seed."""

    kind: Kind = "exact_count"
    draws: int = 8
    left_bias: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class TokenScores:
    """T scored tokens, in the order of documents and positions.

    nats float64 [D, T]: row d's sum over a document is an estimate of its bound (D draws; 1 where nothing was drawn).
    document, position (in the document), window and block int64 [T]; blocks are numbered from 0. nll [blocks]: exact
    -log p of each block (`exact` alone).
    """

    nats: Tensor
    document: Tensor
    position: Tensor
    window: Tensor
    block: Tensor
    drawn: bool
    nll: Tensor | None = None

    def by(self, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Sums [D, groups] and token counts [groups], by the group number of each token (below 0: left out)."""
        kept = group >= 0
        sums = torch.zeros(len(self.nats), groups, dtype=torch.float64)
        sums.index_add_(1, group[kept], self.nats[:, kept])
        return sums, torch.bincount(group[kept], minlength=groups).double()

    def clusters(self) -> Tensor:
        """The cluster of each token [T]: its document, or its window where there is one document."""
        several = bool((self.document != self.document[0]).any())
        return self.document if several else self.window

    def exact_nll(self) -> Tensor | None:
        """`nll` shared out evenly over each block's tokens [T]: for sums over clusters."""
        return None if self.nll is None else (self.nll / torch.bincount(self.block))[self.block]

    def tightened(self) -> Tensor:
        """-log of the mean likelihood of D chains of each block, shared out evenly over its tokens [T]."""
        blocks = int(self.block.max()) + 1
        sums = torch.zeros(len(self.nats), blocks, dtype=torch.float64).index_add_(1, self.block, self.nats)
        found = math.log(len(sums)) - torch.logsumexp(-sums, 0)
        return (found / torch.bincount(self.block))[self.block]


@torch.inference_mode()
def score_tokens(
    model: BlockDiffusionModel,
    pieces: Sequence[Window],
    size: int,
    estimator: Estimator,
    batch_tokens: int,
    report: Callable[[float], None] = lambda done: None,
    split: Split = ALONE,
) -> TokenScores:
    """Score windows in blocks of `size`; batch_tokens bounds the two-stream tokens of a pass.

    The processes of a split share the batches, which are the same for any number of them, and so is every loss.
    """
    was_training = model.training
    model.eval()
    scoring = _Scoring(model, size, estimator)
    todo = list(batches(pieces, batch_tokens))
    ends = list(accumulate(sum(len(piece.document) for piece in batch) for batch in todo))

    def score(number: int) -> TokenScores:
        found = scoring.batch(todo[number])
        report(ends[number] / ends[-1])
        return found

    parts = split.map(score, len(todo))
    model.train(was_training)
    return _joined(parts)


@dataclass(frozen=True)
class _Pass:
    """One pass: what it masks, the row of `nats` it adds to, whether it counts the tokens that the clean stream alone
    predicts, and the masked tokens whose losses it needs (None: all)."""

    corruption: Corruption
    row: int
    firsts: bool
    wanted: Tensor | None = None


@dataclass
class _Scoring:
    model: BlockDiffusionModel
    size: int
    estimator: Estimator

    def __post_init__(self) -> None:
        self.alignment = self.model.spec.alignment_of(self.size)
        self.noisy = self.size - int(self.alignment.first_is_clean)
        self.noiseless = self.noisy <= 1  # a single place is always masked: nothing is random
        self.kind = "exact_count" if self.noiseless else self.estimator.kind
        self.rows = 1 if self.noiseless or self.kind == "exact" else self.estimator.draws

    def batch(self, pieces: list[Window]) -> TokenScores:
        data = collate([[piece.document] for piece in pieces])
        device = self.model.device
        ids, doc, prompt = (data[name].to(device) for name in ("input_ids", "doc", "prompt"))
        spans = Spans.of(doc, prompt)
        head = torch.tensor([piece.head for piece in pieces], device=device)
        tokens = TokenMap.build(doc, prompt, (spans.offset - head[:, None]) % self.size == 0)
        can = maskable(tokens, self.alignment)
        block = block_numbers(tokens, can)
        index = torch.tensor([piece.index for piece in pieces], device=device)[:, None].expand_as(ids)
        place = tokens.position + torch.tensor([piece.origin for piece in pieces], device=device)[:, None]
        slots, firsts = can.flatten().nonzero()[:, 0], (tokens.scored & ~can).flatten().nonzero()[:, 0]
        nats = torch.zeros(self.rows, ids.numel(), dtype=torch.float64, device=device)
        exact = RandomOrder(block, self.estimator.left_bias) if self.kind == "exact" else None
        for one in self._passes(block, index[can], place[can]):
            stream = two_streams(ids, tokens, one.corruption, self.alignment, self.model.spec.mask_id or 0)
            reads = stream.reads
            at = torch.cat([slots[one.corruption.masked], firsts])
            wanted = (reads.kind != FIRST) | one.firsts
            if one.wanted is not None:
                wanted[: int(one.corruption.masked.sum())] = one.wanted[one.corruption.masked]
            losses = self.model(
                stream.ids, stream.tokens, read=reads.index[wanted], target=reads.target[wanted]
            ).double()
            if exact is not None:
                exact.note(one.corruption, losses[: int(one.corruption.masked.sum())])
            nats[one.row].index_add_(0, at[wanted], losses * reads.weight[wanted])
        return self._kept(nats, tokens, index, place, exact, can)

    def _passes(self, block: Tensor, document: Tensor, position: Tensor) -> Iterator[_Pass]:
        """All passes over the maskable tokens [N] with their blocks, documents and positions."""
        seed, bias = self.estimator.seed, self.estimator.left_bias
        if self.kind == "exact":
            for number in range(2**self.noisy - 1):
                yield _Pass(subset(block, number + 1, bias), 0, number == 0)
            return
        if self.kind == "orders":
            size = torch.bincount(block)[block]
            for row in range(self.rows):
                u = uniform(seed, document, position, row, _TOKEN)
                rank = rank_in_block(block, (-u.log()).log() + bias * place_in_block(block))
                for step in range(int(rank.max()) + 1 if len(rank) else 1):
                    masked, now = rank >= step, rank == step
                    yield _Pass(Corruption(masked, now.double(), size - step, size), row, step == 0, now)
            return
        first = torch.ones_like(block, dtype=torch.bool)
        first[1:] = block[1:] != block[:-1]
        for row in range(self.rows):
            u_token = uniform(seed, document, position, row, _TOKEN)
            # one uniform number for each block, moved by 1/draws from draw to draw: each draw is uniform, together they
            # are stratified
            u_block = (uniform(seed, document[first], position[first], _BLOCK) + row / self.rows) % 1.0
            yield _Pass(ExactCount(bias).corrupt(block, u_block, u_token), row, True)

    def _kept(
        self, nats: Tensor, tokens: TokenMap, index: Tensor, place: Tensor, exact: RandomOrder | None, can: Tensor
    ) -> TokenScores:
        scored = tokens.scored
        block = block_numbers(tokens, scored)
        nll = None
        if exact is not None:  # blocks with nothing to mask, and first tokens, are what the clean stream makes them
            nll = torch.zeros(int(block.max()) + 1, dtype=torch.float64, device=block.device)
            of_first = ~can[scored]
            nll.index_add_(0, block[of_first], nats[0, scored.flatten()][of_first])
            nll[block[can[scored]].unique_consecutive()] += exact.nll()
        window = torch.arange(len(scored), device=block.device)[:, None].expand_as(scored)
        return TokenScores(
            nats=nats[:, scored.flatten()].cpu(),
            document=index[scored].cpu(),
            position=place[scored].cpu(),
            window=window[scored].cpu(),
            block=block.cpu(),
            drawn=self.kind != "exact" and not self.noiseless,
            nll=None if nll is None else nll.cpu(),
        )


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    """All batches, ordered by document and position."""
    blocks = torch.tensor([0, *(int(part.block.max()) + 1 for part in parts)]).cumsum(0)
    rows = torch.tensor([0, *(int(part.window.max()) + 1 for part in parts)]).cumsum(0)
    document = torch.cat([part.document for part in parts])
    position = torch.cat([part.position for part in parts])
    order = torch.argsort(document * (int(position.max()) + 1) + position)
    window = torch.cat([part.window + start for part, start in zip(parts, rows.tolist(), strict=False)])[order]
    block = torch.cat([part.block + start for part, start in zip(parts, blocks.tolist(), strict=False)])[order]
    nll = None if parts[0].nll is None else torch.cat([part.nll for part in parts if part.nll is not None])
    kept, numbered = torch.unique_consecutive(block, return_inverse=True)
    return replace(
        parts[0],
        nats=torch.cat([part.nats for part in parts], 1)[:, order],
        document=document[order],
        position=position[order],
        window=torch.unique_consecutive(window, return_inverse=True)[1],
        block=numbered,
        nll=None if nll is None else nll[kept],
    )
