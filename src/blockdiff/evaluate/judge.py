"""Texts under a judge: how likely an AR model finds them, and beside it how varied they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff.data import Encoder
from blockdiff.evaluate.bounds import document_nll
from blockdiff.model import BlockDiffusionModel
from blockdiff.statistics import spread


@dataclass(frozen=True)
class Judged:
    """nll: nats per token of the judge's own tokens, with its standard error over texts; entropy: of the distribution
    of those tokens, in nats (a judge alone is pleased by a text that repeats itself); texts: those that are not blank.
    """

    nll: float
    se: float
    entropy: float
    texts: int


def tokenizer_of(judge: BlockDiffusionModel) -> PreTrainedTokenizerBase:
    """A judge's tokenizer; ValueError where it has none."""
    if judge.tokenizer is None:
        raise ValueError("the judge has no tokenizer: load it from a directory that holds one")
    return judge.tokenizer


def judge_texts(judge: BlockDiffusionModel, prompts: Sequence[str], texts: Sequence[str]) -> Judged | None:
    """Score texts that continue prompts; None where all are blank. A text that ran into its limit has no end that could
    be judged, so no text's end is."""
    encoder = Encoder(tokenizer_of(judge), end_id=None)
    documents = [
        encoder.completion(prompt, text, f"text {number}")
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        if text.strip()
    ]
    if not documents:
        return None
    tokens = Counter(token for document in documents for token in document.ids[~document.prompt].tolist())
    total = sum(tokens.values())
    entropy = -sum(count / total * math.log(count / total) for count in tokens.values())
    sums = document_nll(judge, documents)
    nll = sum(sums) / total
    counts = [int((~document.prompt).sum()) for document in documents]
    apart = [one - nll * count for one, count in zip(sums, counts, strict=True)]
    se = (spread(apart) or 0.0) * math.sqrt(len(documents)) / total
    return Judged(nll, se, entropy, len(documents))
