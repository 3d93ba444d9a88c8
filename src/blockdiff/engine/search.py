"""Search over whole texts: particles, and a second stage that refines a draft."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff.engine.entry import Entry
from blockdiff.engine.pages import OutOfPages, Pages, Table
from blockdiff.engine.request import Output, Request
from blockdiff.engine.stream import TextStream
from blockdiff.rng import uniform

_PARTICLE, _RESAMPLE, _REFINE = 10, 11, 13  # purposes of random numbers


def particles(request: Request) -> list[Request]:
    """The request itself, or its particles (self-rewarding SMC, arXiv 2602.01849), which differ in their seeds."""
    if request.policy.search is None:
        return [request]
    count = request.policy.search.count
    return [replace(request, seed=int(uniform(request.seed, at, _PARTICLE) * 2**53)) for at in range(count)]


def resample(live: Sequence[Entry], seed: int, blocks: int, pages: Pages) -> bool:
    """Replace unlikely particles by copies of likely ones, when their effective number is below half of them.

    live: those that have not ended, all at the end of a block, their `blocks`-th together. A weight is the probability
    of what a particle filled since it was last resampled; copies differ in what they draw from now on. True where there
    was no room for all pages: some of the particles have none then.
    """
    if len(live) < 2:
        return False
    log_weight = torch.tensor(
        [sum(entry.output.log_probabilities) - entry.counted for entry in live], dtype=torch.float64
    )
    weight = log_weight.softmax(0)
    if float(1 / weight.square().sum()) >= len(live) / 2:
        return False
    u = uniform(seed, blocks, torch.arange(len(live)), _RESAMPLE)
    picked = torch.searchsorted(weight.cumsum(0), u).clamp(max=len(live) - 1).tolist()
    before = [(list(entry.tokens), entry.output, entry.stream, entry.table, entry.shadow) for entry in live]
    after = [(live[at], before[source], at == source) for at, source in enumerate(sorted(picked))]
    old = [before[at] for at, source in enumerate(sorted(picked)) if at != source]
    without = False
    for entry, (tokens, output, stream, table, shadow), same in after:
        if not same:
            entry.tokens, entry.output, entry.stream = list(tokens), copy.deepcopy(output), copy.copy(stream)
            entry.table, entry.shadow = Table(), None if shadow is None else Table()
            try:
                entry.table = pages.fork(table, len(tokens))
                entry.shadow = None if shadow is None else pages.fork(shadow, len(tokens))
            except OutOfPages:
                without = True
    for *_, table, shadow in old:
        pages.release(table)
        if shadow is not None:
            pages.release(shadow)
    for entry in live:
        entry.counted = sum(entry.output.log_probabilities)
    return without


def best_of(outputs: Sequence[Output]) -> Output:
    """The output whose text has the highest summed log-probability.

    Particles share their passes, so forwards are those of the longest; positions are summed."""
    best = max(outputs, key=lambda output: sum(output.log_probabilities))
    for name in ("denoise_forwards", "commit_forwards", "verify_forwards"):
        setattr(best, name, max(getattr(output, name) for output in outputs))
    best.positions = sum(output.positions for output in outputs)
    return best


def refinement(request: Request, draft: Output) -> Request:
    """The second stage of draft-then-refine: the least sure share of the draft's tokens masked, in one block.

    The block opens with a token that stays: one drawn from what precedes it could not see what follows.
    """
    assert request.policy.refine is not None
    lead = request.prompt[-1:] if len(request.prompt) > 1 else ()
    last = len(draft.tokens) - (draft.finish_reason == "end")
    open_to = range(0 if lead else 1, last)
    count = round(request.policy.refine.share * len(open_to))
    holes = set(sorted(open_to, key=lambda at: (draft.log_probabilities[at], at))[:count])
    given = (*lead, *(None if at in holes else token for at, token in enumerate(draft.tokens)))
    return replace(
        request,
        prompt=request.prompt[: len(request.prompt) - len(lead)],
        given=given,
        max_new_tokens=len(given),
        block_size=len(given),
        policy=replace(request.policy, refine=None, planner=None),
        seed=int(uniform(request.seed, _REFINE) * 2**53),  # a second draw with the first one's noise is none
        stop=(),
        end_ids=(),
        forbidden=tuple(dict.fromkeys((*request.forbidden, *request.end_ids))),
    )


def refined(tokenizer: PreTrainedTokenizerBase, request: Request, draft: Output, second: Output) -> Output:
    """The draft with the second stage's tokens; forwards of both are counted, steps are the draft's."""
    lead = len(second.tokens) - len(draft.tokens)
    tokens, holes = second.tokens[lead:], [step > 0 for step in second.steps[lead:]]
    stream = TextStream(tokenizer, request.prompt, request.stop)
    ended = draft.finish_reason == "end"
    cut = next((n for n in range(1, len(tokens) + 1) if request.stop and stream.feed(tokens[:n])), None)
    if cut is None:
        stream.feed(tokens[:-1] if ended else tokens)
    both = zip(draft.log_probabilities, second.log_probabilities[lead:], holes, strict=True)
    return replace(
        draft,
        text=stream.text,
        tokens=tokens[:cut],
        steps=draft.steps[:cut],
        log_probabilities=[new if hole else old for old, new, hole in both][:cut],
        blocks=draft.blocks if cut is None else [cut],
        finish_reason=draft.finish_reason if cut is None else "stop",
        denoise_forwards=draft.denoise_forwards + second.denoise_forwards,
        positions=draft.positions + second.positions,
        edits=sum(old != new for old, new in zip(draft.tokens, tokens, strict=True)),
    )
