"""A model's own continuations, as data to train its drafts on.

What lossless decoding needs from the noisy stream is the AR model's own next tokens, greedy or sampled, rather than
those of some corpus: so the AR model writes them, after real beginnings. With a frozen adapter the AR model itself
stays as it is, whatever the text. (Self-distillation, as the drafters of speculative decoding are trained.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdiff.api import Model, documents_of
from blockdiff.decode import Sampling
from blockdiff.engine import Request, generate
from blockdiff.files import write_lines
from blockdiff.rng import uniform

_BEGINNING = 12  # purpose of random numbers


@dataclass(frozen=True)
class OwnText:
    """documents written, and how many tokens the model wrote in them."""

    documents: int
    tokens: int


def own_text(
    model: Model,
    data: Path,
    file: Path,
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    documents: int | None = None,
    max_new_tokens: int = 192,
    beginning: tuple[int, int] = (8, 48),
    batch: int = 64,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> OwnText:
    """Continue the beginnings of `documents` texts of a data file at every temperature, and write rows {"text"}.

    A beginning is between the two numbers of tokens long, drawn anew for every text. The file is written whole or
    not at all. Raises ValueError for a file that exists or has an unknown ending.
    """
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{file}: give a file that ends in .jsonl or .jsonl.gz")
    if file.exists():
        raise ValueError(f"{file} exists already; remove it, or give another file")
    if not temperatures or max_new_tokens < 1 or not 1 <= beginning[0] <= beginning[1]:
        raise ValueError("own text: give a temperature, 1 or more new tokens, and a beginning of 1 token or more")
    sources = documents_of(model, data)[:documents]
    room = model.context_length - max_new_tokens
    if room < 1:
        raise ValueError(f"{max_new_tokens} new tokens leave no room for a beginning in {model.context_length}")
    jobs: list[tuple[float, int]] = [(t, number) for number in range(len(sources)) for t in temperatures]
    rows: list[dict[str, Any]] = []
    tokens = 0
    tokenizer = model.tokenizer
    assert tokenizer is not None
    for start in range(0, len(jobs), batch):
        requests = []
        for temperature, number in jobs[start : start + batch]:
            low, high = beginning
            cut = low + int(uniform(seed, number, int(temperature * 1000), _BEGINNING) * (high - low + 1))
            requests.append(
                Request(
                    prompt=tuple(sources[number].ids[: min(cut, room)].tolist()),
                    max_new_tokens=max_new_tokens,
                    block_size=1,
                    sampling=Sampling(temperature),
                    seed=int(uniform(seed, number, int(temperature * 1000)) * 2**53),
                    end_ids=model.end_ids,
                    forbidden=model.control_ids,
                )
            )
        for request, output in zip(requests, generate(model, requests), strict=True):
            whole = [*request.prompt, *(t for t in output.tokens if t not in model.end_ids)]
            rows.append({"text": tokenizer.decode(whole, skip_special_tokens=True)})
            tokens += len(output.tokens)
        if on_progress is not None:
            on_progress(min(start + batch, len(jobs)) / len(jobs))
    write_lines(file, rows)
    return OwnText(len(rows), tokens)
