"""What becomes of a model beyond the length it was trained on: NLL, texts and caches, a bin of that length at a time.

Documents are cut into stretches of times * length + 1 tokens, the first of which is given; bin j holds positions
j * length + 1 .. (j + 1) * length. Every way is scored with its whole past in sight (`full`), and with a sliding-window
cache: no token looks back further than `length`, in any layer (`BlockDiffusionModel.cache_window`). One block over the
whole text has no cache; under the window it is decoded in blocks of `length`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blockdiff.data import Document
from blockdiff.decode import Sampling, named
from blockdiff.engine import Output, Request, generate_batches
from blockdiff.evaluate.bounds import monte_carlo_error, ratio
from blockdiff.evaluate.compare import interval
from blockdiff.evaluate.diversity import repeated
from blockdiff.evaluate.judge import judge_texts
from blockdiff.evaluate.plan import Cache, LengthPlan, Texts, Way
from blockdiff.evaluate.scoring import Estimator, score_tokens
from blockdiff.evaluate.windows import room, windows
from blockdiff.layout import TokenMap
from blockdiff.model import BlockDiffusionModel, Past
from blockdiff.statistics import spread, t_quantile

_WORDS = {True: "holds", False: "does not hold", None: "is not decided"}
_CHUNK = 64  # clean tokens that are committed at once where nothing else says how many


@dataclass(frozen=True)
class BinRow:
    """One bin of one way and cache, in nats per token: standard errors as in `BoundRow`, clustered by document.

    variance: over draws of a document's estimated nats per token in this bin, mean over documents (None from one draw,
    0 where nothing is drawn). Compare it between bins and ways of one file: draws are stratified against one another.
    """

    way: str
    block_size: int
    cache: Cache
    bin: int
    start: int
    end: int
    nats_per_token: float
    se: float | None
    se_mc: float | None
    variance: float | None
    tokens: int
    documents: int


@dataclass(frozen=True)
class ChunkRow:
    """A chunk of `length` tokens (chunk 0: without the prompt) of the `texts` written ones that reach its end: the
    judge's NLL given the chunk before it, the entropy of its tokens under all texts, and the share of its four-word
    runs that it holds twice."""

    way: str
    cache: Cache
    chunk: int
    start: int
    end: int
    judge_nll: float
    judge_nll_se: float
    entropy: float
    repeated_4grams: float | None
    texts: int


@dataclass(frozen=True)
class LengthsRow:
    """How long the written texts became, in tokens: until their end, or the most there could be (`unended` of them)."""

    way: str
    cache: Cache
    mean: float
    sd: float | None
    median: float
    p90: float
    unended: int
    texts: int
    histogram: list[tuple[int, int]]


@dataclass(frozen=True)
class DifferenceRow:
    """Largest absolute difference between a block's logits over cached keys and over none, at a bin's beginning."""

    way: str
    cache: Cache
    bin: int
    max_abs_difference: float


@dataclass(frozen=True)
class Verdict:
    """Whether the criterion held: True, False, or None where an interval does not say.

    difference: last bin minus bin 1, paired by document, with its standard error. entropy: of the last chunk's tokens
    over chunk 1's, in the texts that reach the end, with the 95 % interval of a bootstrap over them (None: fewer than
    two do).
    """

    way: str
    cache: Cache
    held: bool | None
    difference: float
    se: float | None
    entropy: float | None
    entropy_ci: tuple[float, float] | None
    says: str


def stretches(documents: Sequence[Document], tokens: int, limit: int | None) -> list[Document]:
    """Pieces of exactly tokens + 1 tokens, the first one given. Raises ValueError where no document is long enough."""
    found = []
    for document in documents:
        for start in range(0, len(document) - tokens, tokens):
            ids = document.ids[start : start + tokens + 1]
            prompt = document.prompt[start : start + tokens + 1].copy()
            prompt[:] = False
            prompt[0] = True
            found.append(Document(ids, prompt, f"{document.name}+{start}"))
    if len(found[:limit]) < 2:
        longest = max((len(document) for document in documents), default=0)
        raise ValueError(
            f"{len(found)} stretch of {tokens + 1} tokens in the data (its longest document has {longest}), two are "
            "needed: give longer texts (`blockdiff data pack`) or a smaller length or times"
        )
    return found[:limit]


@contextmanager
def cache_of(model: BlockDiffusionModel, window: int | None) -> Iterator[None]:
    """Within, the model looks back `window` tokens at most."""
    before, model.cache_window = model.cache_window, window
    try:
        yield
    finally:
        model.cache_window = before


def measure_way(
    plan: LengthPlan,
    label: str,
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    judge: BlockDiffusionModel | None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """All rows of one way, as `eval length` writes them: rows, texts, lengths, differences, verdicts.

    Raises ValueError for a model that cannot address so many positions, or cannot decode the way's blocks.
    """
    way, tokens = plan.ways[label], plan.times * plan.length
    pieces = stretches(documents, tokens, plan.documents)
    check_length(plan, label, model)
    found: dict[str, list[Any]] = {"rows": [], "texts": [], "lengths": [], "differences": [], "verdicts": []}
    for done, cache in enumerate(plan.caches):
        size = way.size_over(tokens if cache == "full" else plan.length)
        with cache_of(model, plan.length if cache == "window" else None):
            rows, apart = _bins(plan, label, model, pieces, size, cache)
            found["rows"] += rows
            if size < plan.length:
                found["differences"] += _differences(plan, label, model, pieces[0], size, cache)
            on_progress((done + 0.5) / len(plan.caches))
            wholes: list[tuple[int, ...]] = []
            if plan.texts is not None and judge is not None:
                outputs = _write(plan, plan.texts, way, model, pieces, size)
                found["lengths"].append(_lengths(plan, label, outputs, cache))
                wholes = _wholes(plan.texts, pieces, outputs)
                found["texts"] += _chunks(plan, plan.texts, label, model, judge, wholes, cache)
        if cache == plan.criterion.cache:
            found["verdicts"].append(_verdict(plan, label, apart, len(pieces), wholes))
        on_progress((done + 1) / len(plan.caches))
    return {name: [asdict(row) for row in rows] for name, rows in found.items()}


def check_length(plan: LengthPlan, label: str, model: BlockDiffusionModel) -> None:
    """Raise ValueError for a model that cannot address so many positions, or cannot decode the way's blocks."""
    way, tokens = plan.ways[label], plan.times * plan.length + 1
    if tokens > model.context_length:
        raise ValueError(f"ways.{label}: {tokens} tokens, but the model addresses {model.context_length}: lower times")
    if way.block_size != 1 and not model.spec.is_diffusion:
        raise ValueError(f"ways.{label}: {way.model} is autoregressive; give block_size 1")


def _bins(
    plan: LengthPlan, label: str, model: BlockDiffusionModel, pieces: Sequence[Document], size: int, cache: Cache
) -> tuple[list[BinRow], tuple[float, float | None]]:
    """Rows of all bins, and the last bin's mean minus bin 1's with its standard error."""
    whole = list(windows(pieces, size, 0, plan.times * plan.length + 1))
    scores = score_tokens(model, whole, size, Estimator(draws=plan.draws, seed=plan.seed), room(model))
    number = (scores.position - 1) // plan.length
    sums, counts = scores.by(scores.document * plan.times + number, len(pieces) * plan.times)
    sums, counts = sums.unflatten(1, (len(pieces), plan.times)), counts.unflatten(0, (len(pieces), plan.times))
    rows = []
    for at in range(plan.times):
        mean, se = ratio(sums[:, :, at].mean(0), counts[:, at])
        per_token = sums[:, :, at] / counts[:, at]
        rows.append(
            BinRow(
                way=label,
                block_size=size,
                cache=cache,
                bin=at,
                start=at * plan.length,
                end=(at + 1) * plan.length,
                nats_per_token=mean,
                se=se,
                se_mc=monte_carlo_error(sums[:, :, at], counts[:, at]) if scores.drawn else 0.0,
                variance=_variance(per_token) if scores.drawn else 0.0,
                tokens=int(counts[:, at].sum()),
                documents=len(pieces),
            )
        )
    return rows, ratio((sums[:, :, -1] - sums[:, :, 1]).mean(0), counts[:, -1])


def _variance(per_token: Tensor) -> float | None:
    return float(per_token.var(0).mean()) if len(per_token) > 1 else None


@torch.inference_mode()
def _differences(
    plan: LengthPlan, label: str, model: BlockDiffusionModel, piece: Document, size: int, cache: Cache
) -> list[DifferenceRow]:
    """A block of masks (an AR model: the next tokens) at each bin's beginning, after a cache written block by block."""
    ids = torch.from_numpy(piece.ids.astype("int64"))[None].to(model.device)
    prompt = torch.from_numpy(piece.prompt)[None].to(model.device)
    place = torch.arange(ids.shape[1], device=model.device)[None]
    tokens = TokenMap.build(torch.zeros_like(ids), prompt, (place - 1) % size == 0)
    past, written, rows = Past(), 0, []
    was_training = model.training
    model.eval()
    for at in range(plan.times):
        start = 1 + -(-at * plan.length // size) * size
        while written < start:  # the given token, then whole blocks
            end = 1 if written == 0 else min(start, written + max(size, _CHUNK // size * size))
            model(ids[:, written:end], tokens[:, written:end], read=place[0, :1], past=past, keep=True)
            written = end
        block = slice(start, min(start + size, ids.shape[1]))
        shown, own = ids[:, block], tokens[:, block]
        if model.spec.mask_id is not None:
            shown, own = torch.full_like(shown, model.spec.mask_id), own.as_noisy()
        whole = TokenMap.cat(own, tokens[:, :start])
        read = torch.arange(shown.shape[1], device=model.device)
        uncached = model(torch.cat([shown, ids[:, :start]], 1), whole, read=read)
        cached = model(shown, own, read=read, past=past)
        apart = (cached - uncached)[uncached.isfinite()].abs().max()
        rows.append(DifferenceRow(label, cache, at, float(apart)))
    model.train(was_training)
    return rows


def _write(
    plan: LengthPlan, texts: Texts, way: Way, model: BlockDiffusionModel, pieces: Sequence[Document], size: int
) -> list[Output]:
    """Texts of up to times * length tokens, prompt included, that go on from the stretches' beginnings."""
    requests = [
        Request(
            prompt=tuple(pieces[number % len(pieces)].ids[: texts.prompt_tokens].tolist()),
            max_new_tokens=plan.times * plan.length - texts.prompt_tokens,
            block_size=min(size, plan.times * plan.length - texts.prompt_tokens),
            policy=named(way.policy),
            sampling=Sampling(texts.temperature),
            seed=plan.seed + number,
            end_ids=model.end_ids,
            forbidden=model.control_ids,
        )
        for number in range(texts.count)
    ]
    return generate_batches(model, requests, texts.batch)


def _wholes(texts: Texts, pieces: Sequence[Document], outputs: Sequence[Output]) -> list[tuple[int, ...]]:
    """The prompts and what was written after them, as tokens."""
    prompts = [pieces[number % len(pieces)].ids[: texts.prompt_tokens].tolist() for number in range(len(outputs))]
    return [(*prompt, *output.tokens) for prompt, output in zip(prompts, outputs, strict=True)]


def _chunks(
    plan: LengthPlan,
    texts: Texts,
    label: str,
    model: BlockDiffusionModel,
    judge: BlockDiffusionModel,
    wholes: Sequence[tuple[int, ...]],
    cache: Cache,
) -> list[ChunkRow]:
    rows = []
    for chunk in range(plan.times):
        start, end = chunk * plan.length, (chunk + 1) * plan.length
        first = max(start, texts.prompt_tokens)
        long = [ids for ids in wholes if len(ids) >= end]
        before = [_text(model, ids[max(0, first - plan.length) : first]) for ids in long]
        written = [_text(model, ids[first:end]) for ids in long]
        judged = judge_texts(judge, before, written)
        if judged is not None:
            again = repeated(written)
            rows.append(
                ChunkRow(label, cache, chunk, start, end, judged.nll, judged.se, judged.entropy, again, judged.texts)
            )
    return rows


def _text(model: BlockDiffusionModel, ids: Sequence[int]) -> str:
    """Tokens as the text that a judge reads: without those that are none of it."""
    assert model.tokenizer is not None
    return str(model.tokenizer.decode(list(ids), skip_special_tokens=True))


def _lengths(plan: LengthPlan, label: str, outputs: Sequence[Output], cache: Cache) -> LengthsRow:
    sizes = sorted(len(output.tokens) for output in outputs)
    quantiles = torch.quantile(torch.tensor(sizes, dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64))
    starts = range(0, plan.times * plan.length, plan.length)
    return LengthsRow(
        way=label,
        cache=cache,
        mean=sum(sizes) / len(sizes),
        sd=spread(sizes),
        median=float(quantiles[0]),
        p90=float(quantiles[1]),
        unended=sum(output.finish_reason == "length" for output in outputs),
        texts=len(outputs),
        histogram=[(start, sum(start < size <= start + plan.length for size in sizes)) for start in starts],
    )


def _verdict(
    plan: LengthPlan,
    label: str,
    apart: tuple[float, float | None],
    documents: int,
    wholes: Sequence[tuple[int, ...]],
) -> Verdict:
    criterion = plan.criterion
    difference, se = apart
    half = t_quantile(0.975, documents - 1) * (se or 0.0)
    held = _decided(difference + half <= criterion.below, difference - half > criterion.below)
    says = f"NLL of the last bin at most {criterion.below} nats above bin 1: {_WORDS[held]}"
    says += f" ({difference:+.4f} ± {half:.4f})"
    entropy, ci = None, None
    if plan.texts is not None:
        says += f"; entropy of the last chunk at least {criterion.entropy:.0%} of chunk 1's: "
        entropy, ci = _entropy_kept(plan, wholes)
        kept = None if ci is None else _decided(ci[0] >= criterion.entropy, ci[1] < criterion.entropy)
        says += _WORDS[kept] + (" (fewer than two texts reach it)" if ci is None else f" ({ci[0]:.1%} to {ci[1]:.1%})")
        held = False if held is False or kept is False else held and kept
    return Verdict(label, criterion.cache, held, difference, se, entropy, ci, says)


def _decided(holds: bool, fails: bool) -> bool | None:
    return True if holds else False if fails else None


def _entropy_kept(
    plan: LengthPlan, wholes: Sequence[tuple[int, ...]]
) -> tuple[float | None, tuple[float, float] | None]:
    """Entropy of the last chunk's tokens over chunk 1's, as many tokens of the same texts; bootstrapped over texts."""
    length, tokens = plan.length, plan.times * plan.length
    pairs = [(ids[length : 2 * length], ids[tokens - length : tokens]) for ids in wholes if len(ids) >= tokens]
    if len(pairs) < 2:
        return None, None

    def ratio_of(chosen: Sequence[int]) -> float:
        early, late = (Counter(token for at in chosen for token in pairs[at][side]) for side in (0, 1))
        return _entropy(late) / max(_entropy(early), 1e-9)

    generator = torch.Generator().manual_seed(plan.seed)
    draws = [ratio_of(torch.randint(len(pairs), (len(pairs),), generator=generator).tolist()) for _ in range(200)]
    return ratio_of(range(len(pairs))), interval(torch.tensor(draws, dtype=torch.float64))


def _entropy(counts: Counter[int]) -> float:
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())
