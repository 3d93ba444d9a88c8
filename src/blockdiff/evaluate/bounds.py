"""Bounds on the negative log-likelihood, at any block size and offset, with standard errors.

For a partition fixed in advance the blocks' bounds add up to a bound on -log p of a document. `scoring` says how they
are estimated. Rows at different block sizes use common random numbers, a row does not depend on how documents are
batched, and differences between rows are paired by document.

What is scored: every token but the given ones (prompts, and of a plain text its first token: the beginning token
where the tokenizer adds one), with the end token that closes a document. Bits per byte divide the same nats by the
UTF-8 bytes of the scored text, so that models of different tokenizers compare.

Standard errors are clustered by document: they cover which documents were drawn and, within them, the Monte Carlo noise
(`se_mc` is the latter alone). 95 % intervals are Student's, of one degree of freedom fewer than clusters. Documents
longer than the trained length are scored in windows, each block of up to half a window seeing at least half a window of
context where there is that much, a longer one what is left of the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockdiff.data import Document
from blockdiff.evaluate.scoring import Estimator, TokenScores, score_tokens
from blockdiff.evaluate.windows import room, window_length, windows
from blockdiff.model import BlockDiffusionModel
from blockdiff.shards import ALONE, Split
from blockdiff.statistics import t_quantile

MAX_EXACT = 10


@dataclass(frozen=True)
class BoundRow:
    """One measured bound, in nats per scored token.

    se: standard error, clustered by document (or by window where there is one document), None from a single cluster;
    se_mc: its Monte Carlo part (0 where there is none, None from a single draw), from above: exact counts are
    stratified over the draws, which their sample variance does not know. delta_nats: difference to the first
    row of the same call, paired by document, with its own standard error. estimator: exact_count, exact or orders
    (`scoring`); draws: noise draws or orders of each document (0: nothing was random). left_bias: of the reveal order.
    nll_nats: exact NLL of the sampler with that order (`exact` only). tightened_nats: the bound of the mean likelihood
    of all orders (`orders` only). bits_per_byte: of text_bytes bytes (None where some document's are unknown). grid:
    the offset at which blocks of this size were trained (`Spec.offset_of`).
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
    nll_se: float | None = None
    tightened_nats: float | None = None
    tightened_se: float | None = None
    text_bytes: int | None = None
    bits_per_byte: float | None = None
    grid: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bound(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    *,
    offsets: Sequence[int] | None = None,
    draws: int = 8,
    exact: bool = False,
    orders: int = 0,
    left_bias: float = 0.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    split: Split = ALONE,
    on_progress: Callable[[float], None] | None = None,
) -> list[BoundRow]:
    """Bounds of the documents at every block size and offset.

    An offset o shortens the first block to o tokens; a block size is measured at the offsets below it, and where none
    are given on the grid that it was trained on (`Spec.offset_of`). exact enumerates the mask sets of small blocks,
    orders draws so many chains instead of `draws` exact counts. left_bias is that of the reveal order
    (`noise.ExactCount`): each value is the bound of its own sampler. batch_tokens bounds the two-stream tokens of a
    pass (default: 8192, fewer for a large vocabulary). split: the processes that share the passes and all get the rows.
    Raises ValueError for a block size or an offset that the documents or the model cannot have.
    """
    check_bound(model, documents, block_sizes, offsets, draws, exact, orders)
    plan = grids(model, block_sizes, offsets)
    estimator = estimator_of(draws, exact, orders, left_bias, seed)
    rows: list[BoundRow] = []
    first: tuple[Tensor, Tensor] | None = None
    for done, (size, offset) in enumerate(plan):

        def report(part: float, done: int = done) -> None:
            if on_progress is not None:
                on_progress((done + part) / len(plan))

        pieces = list(windows(documents, size, offset, window_length(model)))
        scores = score_tokens(model, pieces, size, estimator, batch_tokens or room(model), report, split)
        clusters = scores.clusters()
        sums, counts = scores.by(clusters, int(clusters.max()) + 1)
        first = first or (sums, counts)
        row = _row(scores, size, offset, estimator, documents, (sums, counts), first)
        rows.append(replace(row, grid=model.spec.offset_of(size)))
    return rows


def grids(
    model: BlockDiffusionModel, block_sizes: Sequence[int], offsets: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """The block sizes and offsets that `bound` measures."""
    if offsets is None:
        return [(size, model.spec.offset_of(size)) for size in block_sizes]
    return [(size, offset) for size in block_sizes for offset in offsets if offset == 0 or offset < size]


def estimator_of(draws: int, exact: bool, orders: int, left_bias: float, seed: int) -> Estimator:
    """The estimator that the options of `bound` name."""
    if exact:
        return Estimator("exact", 1, left_bias, seed)
    return Estimator("orders" if orders else "exact_count", orders or draws, left_bias, seed)


def document_nats(model: BlockDiffusionModel, documents: Sequence[Document], size: int, estimator: Estimator) -> Tensor:
    """Estimates of each document's bound in nats: float64 [draws, documents] (one row where nothing is drawn)."""
    scores = _scored(model, documents, size, estimator)
    return scores.by(scores.document, len(documents))[0]


def document_values(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    size: int,
    estimator: Estimator,
    split: Split = ALONE,
) -> tuple[Tensor, str]:
    """The sharpest value of each document in nats, float64 [documents], and its name: the exact NLL (`exact`, and where
    nothing is random), the tightened bound (`orders`), or the bound."""
    scores = _scored(model, documents, size, estimator, split)
    values, name = scores.nats.mean(0), "bound"
    if not scores.drawn:
        exact = scores.exact_nll()
        values, name = values if exact is None else exact, "exact NLL"
    elif estimator.kind == "orders":
        values, name = scores.tightened(), "tightened bound"
    return torch.zeros(len(documents), dtype=torch.float64).index_add_(0, scores.document, values), name


def _scored(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    size: int,
    estimator: Estimator,
    split: Split = ALONE,
) -> TokenScores:
    pieces = list(windows(documents, size, model.spec.offset_of(size), window_length(model)))
    return score_tokens(model, pieces, size, estimator, room(model), split=split)


def document_nll(model: BlockDiffusionModel, documents: Sequence[Document]) -> list[float]:
    """Summed negative log-likelihood in nats of each document at block size 1, where the bound is exact."""
    if not documents:
        return []
    check_bound(model, documents, [1])
    return [float(value) for value in document_nats(model, documents, 1, Estimator())[0]]


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


def monte_carlo_error(sums: Tensor, counts: Tensor) -> float | None:
    """Standard error of the mean per token that comes from the draws [D, clusters] alone, as if they were independent
    (stratified ones err less); None from a single draw."""
    return float((sums.var(0) / len(sums)).sum().sqrt() / counts.sum()) if len(sums) > 1 else None


def scored_bytes(documents: Sequence[Document]) -> int | None:
    """UTF-8 bytes of the text that is scored; None where a document does not know its own."""
    known = [document.text_bytes for document in documents if document.text_bytes is not None]
    return (sum(known) or None) if len(known) == len(documents) else None


def _row(
    scores: TokenScores,
    size: int,
    offset: int,
    estimator: Estimator,
    documents: Sequence[Document],
    sums: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
) -> BoundRow:
    (drawn, counts), (first_drawn, _) = sums, first
    mean, se = ratio(drawn.mean(0), counts)
    delta, delta_se = None, None
    if first_drawn.shape[1] == drawn.shape[1]:
        delta, delta_se = ratio(drawn.mean(0) - first_drawn.mean(0), counts)
    exact = scores.exact_nll() if estimator.kind == "exact" else None
    if estimator.kind == "exact" and exact is None:  # nothing was random: the bound is the likelihood
        exact = scores.nats[0]
    tightened = scores.tightened() if estimator.kind == "orders" and scores.drawn else None
    size_in_bytes = scored_bytes(documents)
    half = None if se is None else t_quantile(0.975, len(counts) - 1) * se
    return BoundRow(
        block_size=size,
        offset=offset,
        nats_per_token=mean,
        se=se,
        se_mc=monte_carlo_error(drawn, counts) if scores.drawn else 0.0,
        ppl=math.exp(mean),
        ppl_ci=None if half is None else (math.exp(mean - half), math.exp(mean + half)),
        delta_nats=delta,
        delta_se=delta_se,
        tokens=int(counts.sum()),
        documents=len(scores.document.unique()),
        estimator=estimator.kind if scores.drawn else "exact",
        draws=len(drawn) if scores.drawn else 0,
        left_bias=estimator.left_bias,
        nll_nats=None if exact is None else _clustered(exact, scores)[0],
        nll_se=None if exact is None else _clustered(exact, scores)[1],
        tightened_nats=None if tightened is None else _clustered(tightened, scores)[0],
        tightened_se=None if tightened is None else _clustered(tightened, scores)[1],
        text_bytes=size_in_bytes,
        bits_per_byte=None if size_in_bytes is None else mean * float(counts.sum()) / size_in_bytes / math.log(2),
    )


def _clustered(nats: Tensor, scores: TokenScores) -> tuple[float, float | None]:
    """Mean per token of other losses [T] of the same tokens, and its standard error."""
    clusters = scores.clusters()
    counts = torch.bincount(clusters).double()
    return ratio(torch.zeros_like(counts).index_add_(0, clusters, nats), counts)


def check_bound(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    offsets: Sequence[int] | None = None,
    draws: int = 1,
    exact: bool = False,
    orders: int = 0,
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
    if not block_sizes or (offsets is not None and (not offsets or min(offsets) < 0)):
        raise ValueError("give at least one block size, and offsets of 0 or more")
    if offsets is not None and max(offsets) and max(offsets) >= max(block_sizes):
        raise ValueError(f"offset {max(offsets)} shortens no block: give offsets below the largest block size")
    if draws < 1:
        raise ValueError(f"draws is {draws}; give 1 or more")
    if orders < 0 or (orders and exact):
        raise ValueError(f"orders is {orders}; give 1 or more, and not with exact, which counts every order")
