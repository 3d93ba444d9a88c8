"""Search over whole texts: particles, and a second stage that refines a draft."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff.engine.batch import Batch
from blockdiff.engine.request import Output, Request
from blockdiff.engine.stream import TextStream
from blockdiff.rng import uniform

_PARTICLE, _RESAMPLE, _REFINE = 10, 11, 13  # purposes of random numbers


@dataclass
class Search:
    """Requests as rows of a batch: one each, or several particles (self-rewarding SMC, arXiv 2602.01849).

    owner: the request of every row; weight: log-probability of what the row filled since it was last resampled.
    Particles that have ended are no longer resampled; the rest of a request are, when their effective number at a
    block's end is below half of them.
    """

    requests: list[Request]
    owner: list[int]
    weight: dict[int, float] = field(default_factory=dict)
    blocks: int = 0

    @staticmethod
    def of(requests: Sequence[Request]) -> Search:
        rows, owner = [], []
        for number, request in enumerate(requests):
            count = request.policy.search.count if request.policy.search else 1
            for particle in range(count):
                seed = request.seed if count == 1 else int(uniform(request.seed, particle, _PARTICLE) * 2**53)
                rows.append(replace(request, seed=seed))
                owner.append(number)
        return Search(rows, owner)

    @property
    def active(self) -> bool:
        return len(set(self.owner)) < len(self.owner)

    def resample(self, batch: Batch, outputs: list[Output], streams: list[TextStream]) -> None:
        """Replace unlikely particles by copies of likely ones; the copies differ in what they draw from now on."""
        self.blocks += 1
        rows = batch.rows.tolist()
        places: dict[int, list[int]] = {}
        for at, row in enumerate(rows):
            places.setdefault(self.owner[row], []).append(at)
        source, resampled = list(range(len(rows))), []
        for number, members in places.items():
            if self.requests[rows[members[0]]].policy.search is None or len(members) < 2:
                continue
            log_weight = torch.tensor(
                [sum(outputs[rows[at]].log_probabilities) - self.weight.get(rows[at], 0.0) for at in members],
                dtype=torch.float64,
            )
            weight = log_weight.softmax(0)
            if float(1 / weight.square().sum()) >= len(members) / 2:
                continue
            seed = self.requests[self.owner.index(number)].seed
            u = uniform(seed, self.blocks, torch.arange(len(members)), _RESAMPLE)
            picked = torch.searchsorted(weight.cumsum(0), u).clamp(max=len(members) - 1).tolist()
            for at, chosen in zip(members, sorted(picked), strict=True):
                source[at] = members[chosen]
            resampled += members
        if source == list(range(len(rows))):
            return
        copies = {at: (outputs[rows[at]], streams[rows[at]]) for at in set(source)}
        copies = {at: (copy.deepcopy(output), copy.copy(stream)) for at, (output, stream) in copies.items()}
        seeds = batch.seed.clone()
        batch.select(torch.tensor(source))
        batch.rows, batch.seed = torch.tensor(rows), seeds
        for at, row in enumerate(rows):
            output, stream = copies[source[at]]
            _overwrite(outputs[row], copy.deepcopy(output))
            streams[row] = copy.copy(stream)
        for at in resampled:
            self.weight[rows[at]] = sum(outputs[rows[at]].log_probabilities)

    def best(self, outputs: Sequence[Output]) -> list[Output]:
        """Of every request the row whose text has the highest summed log-probability.

        Particles share their passes, so forwards are those of the longest; positions are summed."""
        found: dict[int, list[Output]] = {}
        for owner, output in zip(self.owner, outputs, strict=True):
            found.setdefault(owner, []).append(output)
        best = []
        for number in sorted(found):
            chosen = max(found[number], key=lambda output: sum(output.log_probabilities))
            for name in ("denoise_forwards", "commit_forwards", "verify_forwards"):
                setattr(chosen, name, max(getattr(output, name) for output in found[number]))
            chosen.positions = sum(output.positions for output in found[number])
            best.append(chosen)
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


def _overwrite(output: Output, other: Output) -> None:
    for name in output.__dataclass_fields__:
        setattr(output, name, getattr(other, name))
