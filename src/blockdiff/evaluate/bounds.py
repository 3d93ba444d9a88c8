"""Bounds on the negative log-likelihood, at any block size and offset, with standard errors.

For a partition fixed in advance the blocks' bounds add up to a bound on -log p of a document. Monte Carlo draws use
exact counts (`noise.ExactCount`), stratified over the draws of each block. Every random number is a function of
(seed, document, position, draw): rows at different block sizes use common random numbers, a row does not depend on how
documents are batched, and differences between rows are paired by document.

`exact` enumerates the mask sets of small blocks instead (2^n - 1 passes): the bound without Monte Carlo error, and
beside it the exact negative log-likelihood of the sampler that reveals one uniformly random token at a time.

Standard errors are clustered by document: they cover which documents were drawn and, within them, the Monte Carlo noise
(`se_mc` is the latter alone). Documents longer than the trained length are scored in windows, each block of up to half
a window seeing at least half a window of context where there is that much, a longer one what is left of the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockdiff.data import Document, collate
from blockdiff.layout import Spans, TokenMap
from blockdiff.masking import Corruption, place_in_block, subset
from blockdiff.model import BlockDiffusionModel
from blockdiff.noise import ExactCount
from blockdiff.objectives import FIRST, Alignment, block_numbers, maskable, two_streams
from blockdiff.rng import uniform

_TOKEN, _BLOCK = 3, 4  # purposes of random numbers
MAX_EXACT = 10


@dataclass(frozen=True)
class BoundRow:
    """One measured bound, in nats per scored token.

    se: standard error, clustered by document (or by window where there is one document), None from a single cluster;
    se_mc: its Monte Carlo part (0 where there is none, None from a single draw). delta_nats: difference to the first
    row of the same call, paired by document, with its own standard error. nll_nats: exact NLL of the random-order
    sampler (`exact` only). draws: noise draws of each document (0: nothing was random). left_bias: of the reveal order.
    """

    block_size: int
    offset: int
    nats_per_token: float
    se: float | None
    se_mc: float | None
    ppl: float
    ppl_ci: tuple[float, float] | None
    delta_nats: float | None
    delta_se: float | None
    tokens: int
    documents: int
    estimator: str
    draws: int
    left_bias: float = 0.0
    nll_nats: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """A document, or a window of one: `origin` is the document's position of its first token, `head` the offset of its
    first block."""

    document: Document
    index: int
    origin: int
    head: int


def bound(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    *,
    offsets: Sequence[int] = (0,),
    draws: int = 8,
    exact: bool = False,
    left_bias: float = 0.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> list[BoundRow]:
    """Bounds of the documents at every block size and offset.

    An offset o shortens the first block to o tokens; a block size is measured at the offsets below it. left_bias is
    that of the reveal order (`noise.ExactCount`): each value is the bound of its own sampler. batch_tokens
    bounds the two-stream tokens of a pass (default: 8192, fewer for a large vocabulary). Raises ValueError for a block
    size or an offset that the documents or the model cannot have.
    """
    check_bound(model, documents, block_sizes, offsets, draws, exact)
    plan = [(size, offset) for size in block_sizes for offset in offsets if offset == 0 or offset < size]
    rows: list[BoundRow] = []
    first: tuple[Tensor, Tensor] | None = None
    room = batch_tokens or _room(model)
    was_training = model.training
    model.eval()
    for done, (size, offset) in enumerate(plan):
        pieces = list(windows(model, documents, size, offset))

        def report(part: float, done: int = done) -> None:
            if on_progress is not None:
                on_progress((done + part) / len(plan))

        measured = _Measurement(model, size, offset, draws, exact, seed, left_bias).run(pieces, room, report)
        sums, counts = measured.by_cluster(len(documents))
        if first is None:
            first = sums, counts
        rows.append(measured.row(sums, counts, first))
    model.train(was_training)
    return rows


def document_nll(model: BlockDiffusionModel, documents: Sequence[Document]) -> list[float]:
    """Summed negative log-likelihood in nats of each document at block size 1, where the bound is exact."""
    if not documents:
        return []
    check_bound(model, documents, [1])
    was_training = model.training
    model.eval()
    pieces = list(windows(model, documents, 1, 0))
    measured = _Measurement(model, 1, 0, 1, False, 0, 0.0).run(pieces, _room(model), lambda done: None)
    model.train(was_training)
    found = torch.zeros(len(documents), dtype=torch.float64)
    found.index_add_(0, torch.tensor([piece.index for piece in measured.pieces]), torch.cat(measured.totals, 1)[0])
    return [float(value) for value in found]


def unigram(train: Sequence[Document], documents: Sequence[Document], vocabulary: int) -> float:
    """Nats per scored token of the add-one unigram model of `train`: the score of knowing nothing but frequencies."""
    counts = np.ones(vocabulary)
    for document in train:
        np.add.at(counts, document.ids[~document.prompt], 1)
    surprise = -np.log(counts / counts.sum())
    scored = np.concatenate([document.ids[~document.prompt] for document in documents])
    return float(surprise[scored].mean())


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Mean per token of clustered sums, and its standard error (the ratio estimator's; None from one cluster)."""
    mean = float(sums.sum() / counts.sum())
    clusters = len(sums)
    if clusters < 2:
        return mean, None
    spread = ((sums - mean * counts) ** 2).sum() * clusters / (clusters - 1)
    return mean, float(spread.sqrt() / counts.sum())


class _Measurement:
    """One (block size, offset): passes over batches of pieces, and sums per draw and piece."""

    def __init__(
        self,
        model: BlockDiffusionModel,
        size: int,
        offset: int,
        draws: int,
        exact: bool,
        seed: int,
        left_bias: float,
    ) -> None:
        self.model, self.size, self.offset, self.seed, self.exact = model, size, offset, seed, exact
        self.noise = ExactCount(left_bias)
        self.left_bias = left_bias
        self.alignment: Alignment = model.spec.alignment_of(size)
        noisy = size - int(self.alignment.first_is_clean)
        self.noiseless = noisy <= 1  # a single place is always masked: nothing is random
        self.passes = 1 if self.noiseless else (2**noisy - 1 if exact else draws)
        self.pieces: list[Window] = []
        self.totals: list[Tensor] = []  # [passes, pieces of the batch]
        self.nll: list[Tensor] = []
        self.counts: list[Tensor] = []

    @torch.inference_mode()
    def run(self, pieces: list[Window], batch_tokens: int, report: Callable[[float], None]) -> _Measurement:
        total = sum(len(piece.document) for piece in pieces)
        seen = 0
        for batch in _batches(pieces, batch_tokens):
            self._batch(batch)
            seen += sum(len(piece.document) for piece in batch)
            report(seen / total)
        return self

    def _batch(self, pieces: list[Window]) -> None:
        data = collate([[piece.document] for piece in pieces])
        device = self.model.device
        ids, doc, prompt = (data[name].to(device) for name in ("input_ids", "doc", "prompt"))
        spans = Spans.of(doc, prompt)
        head = torch.tensor([piece.head for piece in pieces], device=device)
        tokens = TokenMap.build(doc, prompt, (spans.offset - head[:, None]) % self.size == 0)
        can = maskable(tokens, self.alignment)
        block = block_numbers(tokens, can)
        keys = self._keys(pieces, tokens, can, block)
        sums = torch.zeros(self.passes, len(pieces), dtype=torch.float64)
        enumeration = None
        if self.exact and not self.noiseless:
            enumeration = _RandomOrder(block, tokens.doc[can], len(pieces), self.left_bias)
        for number in range(self.passes):
            corruption = self._corruption(block, keys, number)
            stream = two_streams(ids, tokens, corruption, self.alignment, self.model.spec.mask_id or 0)
            losses = self.model(stream.ids, stream.tokens, read=stream.reads.index, target=stream.reads.target)
            weight = stream.reads.weight
            firsts = stream.reads.kind == FIRST
            if self.exact and number > 0:  # first tokens are the same in every pass
                weight = torch.where(firsts, 0.0, weight)
            sums[number].index_add_(0, stream.reads.doc.cpu(), (losses.double() * weight).cpu())
            if enumeration is not None:
                enumeration.note(corruption, losses[: int(corruption.masked.sum())])
                if number == 0:
                    enumeration.add_firsts(losses[firsts], stream.reads.doc[firsts])
        if enumeration is not None:
            self.nll.append(enumeration.nll())
        self.pieces += pieces
        self.totals.append(sums)
        self.counts.append(torch.tensor([piece.document.scored for piece in pieces], dtype=torch.float64))

    def _keys(self, pieces: list[Window], tokens: TokenMap, can: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """(document, position in it) of every maskable token, and of every block's first maskable token."""
        index = torch.tensor([piece.index for piece in pieces], device=tokens.doc.device)
        origin = torch.tensor([piece.origin for piece in pieces], device=tokens.doc.device)
        document = index[:, None].expand_as(can)[can]
        position = (tokens.position + origin[:, None])[can]
        return document, position

    def _corruption(self, block: Tensor, keys: tuple[Tensor, Tensor], number: int) -> Corruption:
        if self.exact and not self.noiseless:
            return subset(block, number + 1, self.left_bias)
        document, position = keys
        first = torch.ones_like(block, dtype=torch.bool)
        first[1:] = block[1:] != block[:-1]
        u_token = uniform(self.seed, document, position, number, _TOKEN)
        # one uniform number for each block, moved by 1/draws from draw to draw: each draw is uniform, together they
        # are stratified
        u_block = (uniform(self.seed, document[first], position[first], _BLOCK) + number / self.passes) % 1.0
        return self.noise.corrupt(block, u_block, u_token)

    def by_cluster(self, documents: int) -> tuple[Tensor, Tensor]:
        """Sums [draws, clusters] and token counts [clusters]: clusters are documents, or windows of a single one."""
        totals, counts = torch.cat(self.totals, 1), torch.cat(self.counts)
        if self.exact:
            totals = totals.sum(0, keepdim=True)
        order = torch.tensor([piece.index for piece in self.pieces])
        if documents == 1:
            order = torch.tensor([piece.origin for piece in self.pieces]).argsort().argsort()
            documents = len(self.pieces)
        sums = torch.zeros(len(totals), documents, dtype=torch.float64).index_add_(1, order, totals)
        return sums, torch.zeros(documents, dtype=torch.float64).index_add_(0, order, counts)

    def row(self, sums: Tensor, counts: Tensor, first: tuple[Tensor, Tensor]) -> BoundRow:
        mean, se = ratio(sums.mean(0), counts)
        delta, delta_se = None, None
        if first[0].shape[1] == sums.shape[1]:
            delta, delta_se = ratio(sums.mean(0) - first[0].mean(0), counts)
        random = not (self.exact or self.noiseless)
        se_mc = 0.0 if not random else None
        if random and len(sums) > 1:
            se_mc = float((sums.var(0) / len(sums)).sum().sqrt() / counts.sum())
        return BoundRow(
            block_size=self.size,
            offset=self.offset,
            nats_per_token=mean,
            se=se,
            se_mc=se_mc,
            ppl=math.exp(mean),
            ppl_ci=None if se is None else (math.exp(mean - 1.96 * se), math.exp(mean + 1.96 * se)),
            delta_nats=delta,
            delta_se=delta_se,
            tokens=int(counts.sum()),
            documents=len({piece.index for piece in self.pieces}),
            estimator="exact_count" if random else "exact",
            draws=len(sums) if random else 0,
            left_bias=self.left_bias,
            nll_nats=float(torch.cat(self.nll).sum() / counts.sum()) if self.nll else None,
        )


class _RandomOrder:
    """Exact NLL of the random-order sampler for all blocks of a batch at once, from the enumerated losses.

    log P(S) = logsumexp over i in S of [log P(S - i) + log f(x_i | x_{S - i}) + log P(i is next)], S the revealed set,
    with P(i is next) = a_i / sum of a over what is masked, a_i = exp(-left_bias * slot).
    """

    def __init__(self, block: Tensor, doc: Tensor, documents: int, left_bias: float) -> None:
        self.block, self.documents, self.left_bias = block, documents, left_bias
        self.size = torch.bincount(block)
        self.place = place_in_block(block)
        self.widest = int(self.size.max()) if len(block) else 0
        shape = (len(self.size), 2**self.widest, self.widest)
        self.losses = torch.zeros(shape, dtype=torch.float64, device=block.device)
        self.doc_of_block = torch.zeros_like(self.size).index_copy(0, block, doc) if len(block) else self.size
        self.firsts = torch.zeros(documents, dtype=torch.float64)

    def note(self, corruption: Corruption, losses: Tensor) -> None:
        """Losses of the masked tokens of one enumerated mask set."""
        masked = corruption.masked
        block, place = self.block[masked], self.place[masked]
        which = torch.zeros_like(self.size).index_add(0, block, torch.ones_like(place) << place)
        self.losses[block, which[block], place] = losses.double()

    def add_firsts(self, losses: Tensor, doc: Tensor) -> None:
        """First tokens that the clean stream predicts: part of the same likelihood."""
        self.firsts.index_add_(0, doc.cpu(), losses.double().cpu())

    def nll(self) -> Tensor:
        """-log p summed over the blocks of each document: [documents]."""
        full = (1 << self.size) - 1
        rows = torch.arange(len(self.size), device=self.block.device)
        slot = torch.arange(self.widest, device=self.block.device)
        pull = torch.where(slot < self.size[:, None], -self.left_bias * slot.double(), -torch.inf)
        log_p = torch.full(self.losses.shape[:2], -torch.inf, dtype=torch.float64, device=self.block.device)
        log_p[:, 0] = 0
        for known in range(1, 2**self.widest):
            members = [i for i in range(self.widest) if known >> i & 1]
            ways = []
            for i in members:
                before = known ^ (1 << i)
                masked = pull.masked_fill((before >> slot) & 1 == 1, -torch.inf)
                next_is_i = pull[:, i] - masked.logsumexp(1)
                ways.append(log_p[:, before] - self.losses[rows, full & ~before, i] + next_is_i)
            log_p[:, known] = torch.logsumexp(torch.stack(ways), 0)
        done = -log_p[rows, full]
        return self.firsts + torch.zeros(self.documents, dtype=torch.float64).index_add_(
            0, self.doc_of_block.cpu(), done.cpu()
        )


def windows(model: BlockDiffusionModel, documents: Sequence[Document], size: int, offset: int) -> Iterator[Window]:
    """What is scored at once: documents up to the trained length; longer ones in windows that advance by about half."""
    length = window_length(model)
    for index, document in enumerate(documents):
        if len(document) <= length:
            yield Window(document, index, 0, offset)
            continue
        given = int(np.argmin(document.prompt))  # where the first scored token stands
        advance = max(length // 2 // size, 1)  # blocks of a window that are scored
        begin, head = given, offset
        while begin < len(document):
            blocks = advance
            if begin == given:  # the first window fills up, with at least one token of context
                blocks = min(max((length - given - head) // size, advance), (length - 1 - head) // size)
            end = min(begin + head + blocks * size, len(document))
            origin = max(0, end - length)
            prompt = document.prompt[origin:end].copy()
            prompt[: begin - origin] = True
            if not prompt.all():
                yield Window(Document(document.ids[origin:end], prompt, document.name), index, origin, head)
            begin, head = end, 0


def window_length(model: BlockDiffusionModel) -> int:
    """Tokens that the model sees at once when it is scored: what it was trained on, as far as it can address them."""
    return min(model.spec.trained_length or model.context_length, model.context_length)


def _room(model: BlockDiffusionModel) -> int:
    """Two-stream tokens of a pass: their logits stay below a quarter of a billion numbers."""
    return min(8192, 2**28 // model.vocabulary)


def _batches(pieces: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Pieces of similar length together, at most `batch_tokens` of two-stream input in a batch."""
    batch: list[Window] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.document)):
        if batch and 2 * len(piece.document) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def check_bound(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    offsets: Sequence[int] = (0,),
    draws: int = 1,
    exact: bool = False,
) -> None:
    """Raise ValueError for what `bound` could not measure."""
    if not documents:
        raise ValueError("there are no documents to score")
    longest = max(document.scored for document in documents)
    first_clean = model.spec.alignment.scoring().first_is_clean
    for size in block_sizes:
        if size < 1:
            raise ValueError(f"block size {size} is not possible; give 1 or more")
        if size > longest:
            raise ValueError(f"block size {size} is longer than the data: the longest document scores {longest} tokens")
        if size >= window_length(model):
            raise ValueError(
                f"block size {size} does not fit the {window_length(model)} tokens that the model was trained on"
            )
        if size > 1 and not model.spec.is_diffusion:
            raise ValueError(
                f"block size {size}: this is an autoregressive checkpoint without a [MASK], which can be "
                "scored at block size 1 only; adapt it with `blockdiff train --init` first"
            )
        if exact and size - int(first_clean) > MAX_EXACT:
            raise ValueError(
                f"exact: block size {size} needs 2^{size - int(first_clean)} - 1 passes; give at most "
                f"{MAX_EXACT + int(first_clean)}, or leave --exact out"
            )
    if not block_sizes or any(offset < 0 for offset in offsets) or not offsets:
        raise ValueError("give at least one block size, and offsets of 0 or more")
    if max(offsets) and max(offsets) >= max(block_sizes):
        raise ValueError(f"offset {max(offsets)} shortens no block: give offsets below the largest block size")
    if draws < 1:
        raise ValueError(f"draws is {draws}; give 1 or more")
