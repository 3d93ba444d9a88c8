"""Two models on the same documents: paired differences, with a bootstrap over documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockdiff.data import Document
from blockdiff.evaluate.bounds import check_bound, document_values, estimator_of, scored_bytes
from blockdiff.model import BlockDiffusionModel
from blockdiff.shards import ALONE, Split

RESAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """This model minus the other on the same documents, each at its block size: below 0, this one is better.

    bits_per_byte, each model's over the bytes that it scores (a tokenizer without a beginning token gives a text's
    first token), with the 95 % interval of `resamples` bootstraps over documents (percentiles; None from one document,
    too narrow from fewer than 20);
    nats_per_token likewise, where both models cut every document into the same number of tokens. below: share of the
    resamples in which this model has fewer bits per byte. value, other_value: what was compared of each (`bounds`): a
    bound below the other's exact NLL shows a better model, a bound below a bound does not. offset, other_offset: of the
    grid that each was trained on (`Spec.offset_of`).
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
    value: str
    other_value: str
    offset: int = 0
    other_offset: int = 0

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
    split: Split = ALONE,
    on_progress: Callable[[float], None] | None = None,
) -> list[Comparison]:
    """Compare bounds at every block size, each model's on the grid that it was trained on; an autoregressive `other` is
    always at block size 1.

    documents and other_documents are the same texts, as each model's tokenizer cuts them. Raises ValueError where they
    are not, and what `bound` raises. split: as `bound`.
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
        nats, value = document_values(model, documents, size, estimator, split)
        other_nats, other_value = document_values(other, other_documents, other_size, estimator, split)
        found = _compared(size, other_size, (nats, other_nats), documents, other_documents)
        offsets = model.spec.offset_of(size), other.spec.offset_of(other_size)
        rows.append(replace(found, value=value, other_value=other_value, offset=offsets[0], other_offset=offsets[1]))
        if on_progress is not None:
            on_progress((number + 1) / len(block_sizes))
    return rows


def _compared(
    size: int,
    other_size: int,
    nats: tuple[Tensor, Tensor],
    documents: Sequence[Document],
    others: Sequence[Document],
) -> Comparison:
    text, other_text = (_numbers([one.text_bytes or 0 for one in both]) for both in (documents, others))
    tokens = _numbers([one.scored for one in documents])
    alike = all(a.scored == b.scored for a, b in zip(documents, others, strict=True))
    apart = nats[0] - nats[1]
    draws = [bootstrap(own / math.log(2), counts) for own, counts in zip(nats, (text, other_text), strict=True)]
    bits = None if draws[0] is None or draws[1] is None else draws[0] - draws[1]  # of the same documents, draw by draw
    return Comparison(
        block_size=size,
        other_block_size=other_size,
        bits_per_byte=float(nats[0].sum() / text.sum() - nats[1].sum() / other_text.sum()) / math.log(2),
        bits_ci=interval(bits),
        nats_per_token=float(apart.sum() / tokens.sum()) if alike else None,
        nats_ci=interval(bootstrap(apart, tokens)) if alike else None,
        below=None if bits is None else float((bits < 0).double().mean()),
        documents=len(documents),
        resamples=RESAMPLES,
        value="bound",
        other_value="bound",
    )


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bootstrap(sums: Tensor, counts: Tensor, seed: int = 0) -> Tensor | None:
    """Sum over sum of resampled documents, [RESAMPLES]: sums and counts [documents]. None from a single document.

    The same seed draws the same documents.
    """
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
