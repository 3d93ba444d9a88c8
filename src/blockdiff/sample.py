"""Documents sampled from a model, as data for experiments whose entropy is known.

Kept are the documents that end within the length, are not blank, and whose text encodes to exactly the sampled tokens:
then a reader of the file scores what was sampled. The rule looks at one document at a time, so what is kept are
independent draws from p(x) / Z, Z the kept share of the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdiff.api import Model, documents_of
from blockdiff.data import Document
from blockdiff.decode import POLICIES, Sampling
from blockdiff.engine import Output, Request, generate
from blockdiff.evaluate import document_nll
from blockdiff.evaluate.windows import window_length
from blockdiff.files import write_lines
from blockdiff.rng import uniform

_DOCUMENT = 6  # purpose of random numbers


@dataclass(frozen=True)
class Sampled:
    """What was drawn: documents, those written, those left out by reason, scored tokens and their mean NLL in nats."""

    documents: int
    written: int
    without_end: int
    not_reencoded: int
    tokens: int
    nats_per_token: float | None

    def words(self) -> str:
        mean = "" if self.nats_per_token is None else f", {self.nats_per_token:.4f} nats per token"
        return (
            f"{self.written} of {self.documents} documents written, {self.tokens} tokens{mean}; left out: "
            f"{self.without_end} without an end within the length, {self.not_reencoded} blank or whose text encodes to "
            "other tokens"
        )


def sample_documents(
    model: Model,
    documents: int,
    file: Path,
    *,
    block_size: int = 1,
    max_new_tokens: int | None = None,
    batch: int = 64,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> Sampled:
    """Sample documents at temperature 1 from the full distribution, from the beginning token, and write those kept.

    Rows are {"text", "n", "nll"}: n predicted tokens, the end token included, and their summed NLL in nats under the
    same model at block size 1. Document i is a function of (seed, i), whatever the batch; a larger block size draws by
    the random-order sampler. The file is written whole or not at all. Raises ValueError for a file that exists, an
    unknown ending, or a model without a beginning token.
    """
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{file}: give a file that ends in .jsonl or .jsonl.gz")
    if file.exists():
        raise ValueError(f"{file} exists already; remove it, or give another file")
    prompt = tuple(model.encode(""))
    room = window_length(model) - len(prompt)
    if not prompt:
        raise ValueError("the tokenizer puts no beginning token before a text, so there is nothing to sample from")
    if max_new_tokens is not None and not 1 <= max_new_tokens <= room:
        raise ValueError(f"{max_new_tokens} new tokens are not possible: the model scores 1 to {room} at once")
    kept: list[tuple[str, Document]] = []
    ended = 0
    for start in range(0, documents, batch):
        requests = [
            Request(
                prompt=prompt,
                max_new_tokens=max_new_tokens or room,
                block_size=block_size,
                policy=POLICIES["first_hitting"],
                sampling=Sampling(temperature=1.0),
                seed=int(uniform(seed, number, _DOCUMENT) * 2**53),
                end_ids=model.end_ids,
            )
            for number in range(start, min(start + batch, documents))
        ]
        whole = [output for output in generate(model, requests) if output.finish_reason == "end"]
        ended += len(whole)
        kept += [(output.text, found) for output in whole if (found := _document(model, prompt, output)) is not None]
        if on_progress is not None:
            on_progress(min(start + batch, documents) / documents)
    nll = document_nll(model, [document for _, document in kept])
    rows: list[dict[str, Any]] = [
        {"text": text, "n": document.scored, "nll": value} for (text, document), value in zip(kept, nll, strict=True)
    ]
    write_lines(file, rows)
    tokens = sum(row["n"] for row in rows)
    return Sampled(
        documents=documents,
        written=len(rows),
        without_end=documents - ended,
        not_reencoded=ended - len(rows),
        tokens=tokens,
        nats_per_token=sum(nll) / tokens if tokens else None,
    )


def _document(model: Model, prompt: tuple[int, ...], output: Output) -> Document | None:
    """The output as a reader of its text will see it, or None where that is not what was sampled."""
    if not output.text.strip():
        return None
    document = documents_of(model, [output.text])[0]
    return document if document.ids.tolist() == [*prompt, *output.tokens] else None
