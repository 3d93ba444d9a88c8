"""Ratios of decoding speed, measured side by side.

Every way of decoding writes the same number of tokens after the same prompts, in turn, round after round; a ratio is
taken within a round, so what else the machine does falls on all of them alike. Reported are medians over the rounds and
their range. A first round is not counted: caches fill in it, and adaptive drafts learn how long to be.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from blockdiff.api import Model, documents_of
from blockdiff.decode import Sampling, named
from blockdiff.engine import Output, Request, can_draft_ahead, generate
from blockdiff.evaluate import judge_texts
from blockdiff.model import BlockDiffusionModel
from blockdiff.statistics import area_under_parallelism

AR, HUGGING_FACE = "ar", "hf generate"
Write = Callable[[Sequence[Request]], list[Output]]


@dataclass(frozen=True)
class Way:
    """One way of decoding: what it is called, and what it makes of an AR request. None: Hugging Face's own."""

    name: str
    change: Callable[[Request], Request] | None


@dataclass
class Timed:
    """What a way did: seconds of every round, and its outputs of the last."""

    seconds: list[float]
    outputs: list[Output]


def ways_of(model: Model, block_sizes: Sequence[int], policies: Sequence[str], lossless: bool) -> list[Way]:
    """AR, Hugging Face, and at every block size lossless decoding and the policies."""

    def of(**changes: Any) -> Callable[[Request], Request]:
        return lambda request: replace(request, **changes)

    ways = [Way(AR, of()), Way(HUGGING_FACE, None)]
    for size in block_sizes:
        drafts = ["auto", "policy", "ahead"] if can_draft_ahead(model) else ["policy"]
        for drafting in drafts if lossless else ():
            name = "lossless" if drafting == drafts[0] else f"lossless, {drafting}"
            changes = {"lossless": True, "adaptive": True, "policy": named("one_step"), "drafting": drafting}
            ways.append(Way(f"{name} b={size}", of(**changes, block_size=size)))
        ways += [Way(f"{text} b={size}", of(policy=named(text), block_size=size)) for text in policies]
    return ways


def bench_decode(
    model: Model,
    data: Path,
    *,
    block_sizes: Sequence[int] = (4, 8),
    policies: Sequence[str] = ("threshold(0.9)",),
    temperature: float = 0.0,
    batch: int = 1,
    prompts: int = 8,
    prompt_tokens: int = 16,
    new_tokens: int = 128,
    rounds: int = 5,
    lossless: bool = True,
    hugging_face: Any | None = None,
    judge: BlockDiffusionModel | None = None,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of every way: tokens a second, its ratio to our own AR decoding and to Hugging Face's `generate` (where its
    model is given), tokens per forward, accepted lengths, equality with the AR text, and the judge's view.

    Texts do not end early, so that all ways write equally many tokens. Raises ValueError where the data has no prompts
    that are long enough, or the model cannot do what is asked.
    """
    documents = [d for d in documents_of(model, data) if d.scored > prompt_tokens][:prompts]
    if not documents:
        raise ValueError(f"{data}: no text has more than {prompt_tokens} tokens; give shorter prompts")
    base = [
        Request(
            tuple(document.ids[:prompt_tokens].tolist()),
            new_tokens,
            1,
            sampling=Sampling(temperature),
            seed=seed + number,
            forbidden=(*model.control_ids, *model.end_ids),
        )
        for number, document in enumerate(documents)
    ]
    ways = [way for way in ways_of(model, block_sizes, policies, lossless) if way.change or hugging_face is not None]
    timed = {way.name: Timed([], []) for way in ways}
    for turn in range(rounds + 1):
        for number, way in enumerate(ways):
            began = time.perf_counter()
            outputs = _write(model, way, base, batch, hugging_face)
            if turn:
                timed[way.name].seconds.append(time.perf_counter() - began)
            timed[way.name].outputs = outputs
            if on_progress is not None:
                on_progress((turn * len(ways) + number + 1) / (len(ways) * (rounds + 1)))
    return [_row(way, timed, model, base, judge, temperature, batch) for way in ways]


def areas(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The area under quality over parallelism (`area_under_parallelism`) of the policies of every block size.

    The score of a way is how likely the judge finds a token of its texts, in percent of AR: 100 exp(NLL of AR - NLL).
    """
    judged = [row for row in rows if "judge_nll" in row and "tokens_per_forward" in row]
    base = next((row["judge_nll"] for row in judged if row["way"] == AR), None)
    if base is None:
        return {}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in judged:
        kind, _, size = row["way"].partition(" b=")
        if size and not kind.startswith("lossless"):
            score = 100 * math.exp(base - row["judge_nll"])
            points.setdefault(size, []).append((row["tokens_per_forward"], score))
    found = {size: area_under_parallelism(own, best=100.0) for size, own in points.items()}
    return {size: area for size, area in found.items() if area is not None}


def _write(model: Model, way: Way, base: Sequence[Request], batch: int, hugging_face: Any | None) -> list[Output]:
    outputs: list[Output] = []
    for start in range(0, len(base), batch):
        part = base[start : start + batch]
        if way.change is None:
            outputs += _hugging_face(hugging_face, part)
        else:
            outputs += generate(model, [way.change(request) for request in part])
    return outputs


def _hugging_face(network: Any, requests: Sequence[Request]) -> list[Output]:
    """The same weights under transformers' own `generate`, with its cache; greedy or sampled with its own numbers."""
    ids = torch.tensor([request.prompt for request in requests], device=network.device)
    new, sampling = requests[0].max_new_tokens, requests[0].sampling
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
    with torch.inference_mode():
        written = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how
        )
    return [Output(tokens=row[ids.shape[1] :].tolist()) for row in written]


def _row(
    way: Way,
    timed: dict[str, Timed],
    model: Model,
    base: Sequence[Request],
    judge: BlockDiffusionModel | None,
    temperature: float,
    batch: int,
) -> dict[str, Any]:
    own = timed[way.name]
    tokens = sum(len(output.tokens) for output in own.outputs)
    row: dict[str, Any] = {
        "way": way.name,
        "temperature": temperature,
        "batch": batch,
        "tokens": tokens,
        "rounds": len(own.seconds),
        "tokens_per_second": median(tokens / seconds for seconds in own.seconds),
        "ratio_to_ar": _ratio(timed[AR].seconds, own.seconds),
        "ratio_to_hf": _ratio(timed[HUGGING_FACE].seconds, own.seconds) if HUGGING_FACE in timed else None,
        "equal_to_ar": sum(a.tokens == b.tokens for a, b in zip(own.outputs, timed[AR].outputs, strict=True))
        / len(base),
    }
    if way.change is not None:
        row |= _work(own.outputs, tokens)
    if judge is not None:
        tokenizer = model.tokenizer
        assert tokenizer is not None
        prompts = [tokenizer.decode(list(r.prompt), skip_special_tokens=True) for r in base]
        wholes = [
            tokenizer.decode([*r.prompt, *o.tokens], skip_special_tokens=True)
            for r, o in zip(base, own.outputs, strict=True)
        ]
        texts = [whole.removeprefix(prompt) for whole, prompt in zip(wholes, prompts, strict=True)]
        judged = judge_texts(judge, prompts, texts)
        if judged is not None:
            row |= {"judge_nll": judged.nll, "judge_nll_se": judged.se, "judged_entropy": judged.entropy}
    return row


def _work(outputs: Sequence[Output], tokens: int) -> dict[str, Any]:
    forwards = {name: sum(getattr(o, f"{name}_forwards") for o in outputs) for name in ("denoise", "commit", "verify")}
    accepted: Counter[int] = Counter()
    steps: Counter[int] = Counter()
    for output in outputs:
        accepted.update(output.accepted)
        steps.update(output.steps_per_block)
    total = sum(forwards.values())
    return {
        **{f"{name}_forwards": count for name, count in forwards.items()},
        "tokens_per_forward": tokens / max(total, 1),
        "tokens_per_denoise": tokens / forwards["denoise"] if forwards["denoise"] else None,
        "tokens_per_verify": tokens / forwards["verify"] if forwards["verify"] else None,
        "positions_per_token": sum(output.positions for output in outputs) / tokens,
        "accepted": {str(size): accepted[size] for size in sorted(accepted)},
        "steps_per_block": {str(size): steps[size] for size in sorted(steps)},
    }


def _ratio(baseline: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(baseline, own, strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
