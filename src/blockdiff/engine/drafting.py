"""Lossless decoding: a drafted block keeps only what the AR model would have written itself.

The clean pass that commits a block also gives, under a causal context, the AR logits at each of its positions. The AR
sampler's token at a position is a function of those logits and of the Gumbel noise of (request seed, absolute
position), the same noise that the draft was drawn with; so the draft is kept up to the first token that differs, and
the next block opens with the AR sampler's token in its place. Whatever drafted, the text is the one that block size 1
writes with the same seed, up to ties and rounding between passes of different shapes. Greedy is the case without noise.
(Coupled verification; DESIGN section 4 and arXiv 2408.07978.)

Drafts come from passes of their own, or `ahead`: where a block is seeded with the clean token before it, the verifying
pass can carry the next block's draft for every length that the verification may let through, as one noisy block each
(TiDAR, arXiv 2511.08923, on a model that was not trained for it). Then a token costs less than one pass.

Shapes: R rows, W slots of the widest open block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor

from blockdiff.decode import SamplingBatch, propose
from blockdiff.engine.request import Request
from blockdiff.model import BlockDiffusionModel


def can_draft_ahead(model: BlockDiffusionModel) -> bool:
    """Whether a draft can share the pass that verifies the one before it."""
    return model.spec.is_diffusion and model.spec.alignment.seeded


def check_lossless(model: BlockDiffusionModel, request: Request) -> None:
    """Refuse a model whose clean stream is no AR model: ValueError."""
    spec = model.spec
    alignment = spec.alignment.scoring()
    reasons = {
        f"its clean context is {spec.clean_context}": spec.clean_context != "context_causal",
        "its clean stream does not predict the next token (prediction same)": (
            not (alignment.first_is_clean or alignment.seeded)
        ),
        "its clean stream was not trained as an AR model (objective.ar_weight above 0, or a noisy adapter)": (
            not spec.ar_trained
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"lossless: {reason}, so there is no AR text to be equal to; decode without --lossless")
    if request.drafting == "ahead" and request.block_size > 1 and not can_draft_ahead(model):
        raise ValueError(
            "lossless: drafting ahead needs blocks that are seeded with the token before them (boundary seed)"
        )
    for asked, name in ((request.given, "infilling"), (request.constraint, "a constraint")):
        if asked:
            raise ValueError(f"lossless: {name} has no AR text to be equal to; decode without --lossless")


def agreed(logits: Tensor, ids: Tensor, noise: Tensor | None, used: Tensor, sampling: SamplingBatch) -> Tensor:
    """How many of a block's tokens the AR sampler writes too: int64 [R], at least 1.

    logits [R, W, V] of the clean pass (those at slot j predict slot j + 1), ids [R, W] the draft, noise
    [R, W - 1, V] of slots 1 and on, used [R, W] slots of the row's own block. The first token came from the AR
    logits already.
    """
    own = propose(logits[:, :-1], noise, sampling)
    same = (own == ids[:, 1:]) & used[:, 1:]
    return 1 + same.long().cumprod(1).sum(1)


Mode = Literal["ar", "policy", "ahead"]


@dataclass
class Learned:
    """What each mode brought on one model so far: decayed tokens and seconds, and the tokens that drafts kept."""

    kept: float
    rounds: int = 0
    best: Mode | None = None
    last_try: int = 0  # round in which another mode was last tried, and rounds until the next time
    patience: int = 96
    tokens: dict[Mode, float] = field(default_factory=dict)
    seconds: dict[Mode, float] = field(default_factory=dict)

    def rate(self, mode: Mode) -> float:
        """Tokens a second."""
        return self.tokens.get(mode, 0.0) / max(self.seconds.get(mode, 0.0), 1e-9)


_LEARNED: WeakKeyDictionary[BlockDiffusionModel, dict[Any, Learned]] = WeakKeyDictionary()


class Pace:
    """How adaptive lossless requests draft: not at all, by their policy or ahead, and how long.

    It follows what was measured on this model, in this call and the ones before it: the tokens that verifications let
    through say how long a draft should be (half as long again as what is kept, and two more), and the tokens a second
    of every mode which one goes on; another one is tried again more and more seldom. Only speed depends on it, never
    the text.
    """

    TRIAL, DECAY = 6, 0.95

    def __init__(self, limit: int, modes: Sequence[Mode], learned: Learned) -> None:
        self.limit, self.modes = limit, tuple(modes)
        self.learned = learned
        self.mode: Mode = learned.best or self.modes[0]
        self.mode = self._next()
        self._fresh = True
        self._seconds = 0.0

    @staticmethod
    def of(model: BlockDiffusionModel, key: Hashable, requests: Sequence[Request], before: Pace | None) -> Pace:
        """The pace of requests of one kind. What was learned is kept by kind (`key`), block size and number of them."""
        limit = max(request.block_size for request in requests)
        drafting = requests[0].drafting
        modes: list[Mode] = ["policy"] if drafting in ("policy", "auto") else []
        modes += ["ahead"] if drafting == "ahead" or (drafting == "auto" and can_draft_ahead(model)) else []
        learned = _LEARNED.setdefault(model, {}).setdefault(
            (limit, key, len(requests).bit_length()), Learned(float(limit))
        )
        return before if before is not None and before.learned is learned else Pace(limit, [*modes, "ar"], learned)

    @property
    def length(self) -> int:
        """Tokens of the next block, the certain first one included."""
        if self.mode == "ar":
            return 1
        return max(2, min(self.limit, math.ceil(1.5 * (self.learned.kept - 1)) + 2))

    def tick(self, kept: Sequence[int], seconds: float) -> None:
        """A pass of so many seconds, and the tokens that rows kept in it, where drafts were verified."""
        self._seconds += seconds
        if kept:
            self.note(sum(kept) / len(kept), self._seconds)
            self._seconds = 0.0

    def note(self, tokens: float, seconds: float) -> None:
        """A round: the tokens that a row kept on average, and the time it took."""
        mode, learned = self.mode, self.learned
        learned.rounds += 1
        if not self._fresh:  # a mode's first round opens with what the last one left
            learned.tokens[mode] = self.DECAY * learned.tokens.get(mode, 0.0) + tokens
            learned.seconds[mode] = self.DECAY * learned.seconds.get(mode, 0.0) + seconds
            if mode != "ar":
                learned.kept += 0.2 * (tokens - learned.kept)
        self.mode = self._next()
        self._fresh = self.mode != mode

    def _next(self) -> Mode:
        rounds = self.learned.rounds
        if rounds < self.TRIAL * len(self.modes):
            return self.modes[rounds // self.TRIAL]
        learned = self.learned
        since, tried = rounds - learned.last_try, self.TRIAL // 2 + 1
        if learned.best is not None and since < tried:
            return self.mode
        best = max(self.modes, key=learned.rate)
        if best != learned.best:
            learned.best, learned.patience, learned.last_try = best, 96, rounds - tried
        elif since >= learned.patience:
            learned.patience, learned.last_try = min(2 * learned.patience, 3072), rounds
            others = [mode for mode in self.modes if mode != best]
            return others[learned.patience.bit_length() % len(others)] if others else best
        return best
