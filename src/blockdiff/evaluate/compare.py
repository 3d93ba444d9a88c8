"""Two models on the same documents: paired differences, with a bootstrap over documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blockdiff.data import Document
from blockdiff.evaluate.bounds import check_bound, document_nats, estimator_of, scored_bytes
from blockdiff.model import BlockDiffusionModel

RESAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """This model minus the other on the same documents, each at its block size: below 0, this one is better.

    bits_per_byte with its 95 % interval (percentiles of `resamples` bootstraps over documents; None from one document);
    nats_per_token likewise, where both models cut every document into the same number of tokens. below: share of the
    resamples in which this model is better.
    """

    block_size: int
    other_block_size: int
    bits_per_byte: float
    bits_ci: tuple[float, float] | None
    nats_per_token: float | None
    nats_ci: tuple[float, float] | None
    below: float | None
    documents: int
    resamples: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    model: BlockDiffusionModel,
    other: BlockDiffusionModel,
    documents: Sequence[Document],
    other_documents: Sequence[Document],
    block_sizes: Sequence[int],
    *,
    draws: int = 8,
    exact: bool = False,
    orders: int = 0,
    left_bias: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> list[Comparison]:
    """Compare bounds at every block size; an autoregressive `other` is always at block size 1.

    documents and other_documents are the same texts, as each model's tokenizer cuts them. Raises ValueError where they
    are not, and what `bound` raises.
    """
    if len(documents) != len(other_documents):
        raise ValueError(
            f"{len(documents)} documents for one model, {len(other_documents)} for the other: give the same"
        )
    sizes = (scored_bytes(documents), scored_bytes(other_documents))
    if sizes[0] is None or sizes[1] is None:
        raise ValueError("a document does not know how many bytes of text it scores: compare whole texts")
    check_bound(model, documents, block_sizes, draws=draws, exact=exact, orders=orders)
    rows = []
    for number, size in enumerate(block_sizes):
        other_size = size if other.spec.is_diffusion else 1
        check_bound(other, other_documents, [other_size], draws=draws, exact=exact, orders=orders)
        estimator = estimator_of(draws, exact, orders, left_bias, seed)
        nats = document_nats(model, documents, size, estimator).mean(0)
        other_nats = document_nats(other, other_documents, other_size, estimator).mean(0)
        rows.append(_compared(size, other_size, nats - other_nats, documents, other_documents))
        if on_progress is not None:
            on_progress((number + 1) / len(block_sizes))
    return rows


def _compared(
    size: int, other_size: int, nats: Tensor, documents: Sequence[Document], others: Sequence[Document]
) -> Comparison:
    text = torch.tensor([document.text_bytes for document in documents], dtype=torch.float64)
    tokens = torch.tensor([document.scored for document in documents], dtype=torch.float64)
    alike = all(a.scored == b.scored for a, b in zip(documents, others, strict=True))
    draws = bootstrap(nats / math.log(2), text)
    return Comparison(
        block_size=size,
        other_block_size=other_size,
        bits_per_byte=float(nats.sum() / text.sum()) / math.log(2),
        bits_ci=None if draws is None else interval(draws),
        nats_per_token=float(nats.sum() / tokens.sum()) if alike else None,
        nats_ci=None if draws is None or not alike else interval(bootstrap(nats, tokens)),
        below=None if draws is None else float((draws < 0).double().mean()),
        documents=len(documents),
        resamples=RESAMPLES,
    )


def bootstrap(sums: Tensor, counts: Tensor, seed: int = 0) -> Tensor | None:
    """Sum over sum of resampled documents, [RESAMPLES]: sums and counts [documents]. None from a single document."""
    if len(sums) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(sums), (len(sums),), generator=generator)
        found.append(sums[drawn].sum() / counts[drawn].sum())
    return torch.stack(found)


def interval(values: Tensor | None) -> tuple[float, float] | None:
    """The middle 95 % of values."""
    if values is None:
        return None
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
