"""The open blocks: what a policy reads and changes at a step.

The status of every position is explicit and never read off its token: a prompt may spell the [MASK] literally.

Shapes: R rows, n slots of the widest open block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockdiff.rng import uniform

OUTSIDE, FIXED, MASK, FILLED = 0, 1, 2, 3  # not of this row's block; given; still masked; filled by the policy
# purposes of random numbers: the second key, so that numbers of two purposes never have the same keys
TOKEN, ORDER, REMASK, NOISE, JITTER = 1, 2, 7, 8, 9


@dataclass(frozen=True)
class OpenBlocks:
    """R blocks while they fill.

    ids, status, filled_at (step that filled a position, 0: none), edits [R, n] int64; confidence and log_probability
    [R, n] float64: of a filled token when it was filled, under the raw softmax. place [R, n]: absolute positions;
    seed [R]; step [R]: steps taken; opened [R]: masks at the opening; visits [R, n]: how often a
    position was masked again. memory: what parts keep from step to step, tensors
    with R rows; a row whose first step this is has nothing in it yet (`recalled`).
    """

    ids: Tensor
    status: Tensor
    place: Tensor
    seed: Tensor
    filled_at: Tensor
    edits: Tensor
    confidence: Tensor
    log_probability: Tensor
    step: Tensor
    opened: Tensor
    visits: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def open(ids: Tensor, status: Tensor, place: Tensor, seed: Tensor) -> OpenBlocks:
        """Blocks before their first step."""
        zeros = torch.zeros_like(ids)
        unknown = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        opened = (status == MASK).sum(1)
        return OpenBlocks(
            ids, status, place, seed, zeros, zeros, unknown, unknown, torch.zeros_like(opened), opened, zeros
        )

    @staticmethod
    def cat(parts: Sequence[OpenBlocks]) -> OpenBlocks:
        """The rows of all parts, without what they remember."""
        both: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in _ROWWISE}
        return OpenBlocks(**both)

    @property
    def masked(self) -> Tensor:
        return self.status == MASK

    @property
    def filled(self) -> Tensor:
        return self.status == FILLED

    @property
    def inside(self) -> Tensor:
        """Slots of the row's own block, bool [R, n]."""
        return self.status != OUTSIDE

    @property
    def slot(self) -> Tensor:
        """Slot numbers [1, n]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None]

    @property
    def draws(self) -> Tensor:
        """What the noise of a position's token is keyed by, int64 [R, n]: its place, and a new key for every time that
        it was masked again. A second draw with the first one's noise would not be a draw."""
        return self.place + (self.visits << 40)

    def uniform(self, purpose: int) -> Tensor:
        """Numbers in (0, 1), float64 [R, n]: a function of seed, absolute position, step and purpose."""
        return uniform(self.seed[:, None], purpose, self.place, self.step[:, None])

    def remember(self, name: str, value: Tensor) -> OpenBlocks:
        return replace(self, memory={**self.memory, name: value})

    def recalled(self, name: str, blank: Tensor) -> Tensor:
        """What a part remembered under this name at the step before, during a step; `blank` in rows at their first."""
        value = self.memory.get(name)
        if value is None:
            return blank
        return torch.where(self.step.view(-1, *[1] * (value.dim() - 1)) > 1, value, blank)

    def keep(self, name: str, other: OpenBlocks) -> OpenBlocks:
        """With another state of the same blocks in memory."""
        return replace(self, memory={**self.memory, **{f"{name}.{f}": getattr(other, f) for f in _ROWWISE}})

    def recall(self, name: str) -> OpenBlocks:
        """The state that was kept under this name."""
        kept: dict[str, Any] = {f: self.memory[f"{name}.{f}"] for f in _ROWWISE}
        return OpenBlocks(**kept)

    def select(self, rows: Tensor) -> OpenBlocks:
        """These rows, in this order."""
        return OpenBlocks(
            **{name: getattr(self, name)[rows] for name in _ROWWISE},
            memory={name: value[rows] for name, value in self.memory.items()},
        )

    def cut(self, width: int) -> OpenBlocks:
        """The first `width` slots."""
        narrow = {name: getattr(self, name)[:, :width] for name in _SLOTWISE}
        return replace(self, **narrow, memory={})

    def widened(self, width: int) -> OpenBlocks:
        """With `width` slots: cut, or with slots that belong to no block."""
        change = width - self.ids.shape[1]
        if change == 0:
            return self

        def fitted(value: Tensor) -> Tensor:
            return F.pad(value, (0, 0) * (value.dim() - 2) + (0, change))

        slotwise = {name: fitted(getattr(self, name)) for name in _SLOTWISE}
        return replace(
            self, **slotwise, memory={name: fitted(v) if v.dim() > 1 else v for name, v in self.memory.items()}
        )

    def put_rows(self, rows: Tensor, other: OpenBlocks) -> OpenBlocks:
        """With the blocks of `other` in these rows [r]; what it remembers goes along, what it does not stays."""
        rowwise = {name: getattr(self, name).index_copy(0, rows, getattr(other, name)) for name in _ROWWISE}
        memory = dict(self.memory)
        for name, value in other.memory.items():
            whole = memory.get(name)
            if whole is None:
                whole = value.new_zeros((len(self.step), *value.shape[1:]))
            memory[name] = whole.index_copy(0, rows, value)
        return OpenBlocks(**rowwise, memory=memory)

    def joined(self, other: OpenBlocks) -> OpenBlocks:
        """These rows and those of another, with what both remember; blank where only one does."""
        names = {**self.memory, **other.memory}
        memory = {}
        for name in names:
            mine, theirs = self.memory.get(name), other.memory.get(name)
            like = theirs if mine is None else mine
            assert like is not None
            mine = like.new_zeros((len(self.step), *like.shape[1:])) if mine is None else mine
            theirs = like.new_zeros((len(other.step), *like.shape[1:])) if theirs is None else theirs
            memory[name] = torch.cat([mine, theirs])
        return replace(OpenBlocks.cat([self, other]), memory=memory)

    def put(self, slot: int, rows: Tensor, tokens: Tensor, status: int, log_probability: Tensor) -> OpenBlocks:
        """With tokens [R] in one slot of the rows bool [R]."""
        here = torch.zeros_like(self.ids, dtype=torch.bool)
        here[:, slot] = rows
        return replace(
            self,
            ids=torch.where(here, tokens[:, None], self.ids),
            status=torch.where(here, status, self.status),
            confidence=torch.where(here, log_probability.exp()[:, None], self.confidence),
            log_probability=torch.where(here, log_probability[:, None], self.log_probability),
        )

    def unless(self, rows: Tensor, other: OpenBlocks) -> OpenBlocks:
        """These blocks, but those of `other` in the rows bool [R]. What parts remember stays as it is here."""
        if not bool(rows.any()):
            return self
        both = {
            name: torch.where(
                rows.view(-1, *[1] * (getattr(self, name).dim() - 1)), getattr(other, name), getattr(self, name)
            )
            for name in _ROWWISE
        }
        return OpenBlocks(**both, memory=self.memory)

    def shrink(self, size: Tensor) -> OpenBlocks:
        """Blocks cut to the sizes [R]: what lies beyond belongs to them no more."""
        outside = self.slot >= size[:, None]
        status = self.status.masked_fill(outside, OUTSIDE)
        return replace(self, status=status, opened=torch.where(self.step == 1, (status == MASK).sum(1), self.opened))


_SLOTWISE = ("ids", "status", "place", "filled_at", "edits", "confidence", "log_probability", "visits")
_ROWWISE = tuple(name for name in OpenBlocks.__dataclass_fields__ if name != "memory")


@dataclass(frozen=True)
class View:
    """A step as the parts of a policy see it. What no part asks for is never computed.

    logits [R, n, V] raw, the [MASK] at -inf; tokens int64 [R, n] proposed; attention [R, n]: how much the block's
    queries look at each slot, where the policy asked for it; token_ids: the tokens whose text is one of some strings.
    """

    blocks: OpenBlocks
    logits: Tensor
    tokens: Tensor
    attention: Tensor | None = None
    token_ids: Callable[[tuple[str, ...]], Tensor] | None = None

    @cached_property
    def log_probability(self) -> Tensor:
        """Log of the raw softmax, float [R, n, V]."""
        return self.logits.log_softmax(-1)

    @cached_property
    def chosen_log_probability(self) -> Tensor:
        """Of the proposed tokens [R, n], float64."""
        return self.log_probability_of(self.tokens)

    def log_probability_of(self, tokens: Tensor) -> Tensor:
        """Raw log-probability of tokens [R, n], float64."""
        chosen = self.logits.gather(-1, tokens[..., None])[..., 0]
        return (chosen - self.logits.logsumexp(-1)).double()

    @cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        """The two largest probabilities [R, n, 2], and their tokens."""
        value, token = self.logits.topk(min(2, self.logits.shape[-1]), dim=-1)
        return (value - self.logits.logsumexp(-1, keepdim=True)).exp(), token

    @cached_property
    def entropy(self) -> Tensor:
        """Of the raw softmax in nats [R, n]."""
        log_p = self.log_probability
        return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)

    @property
    def masked(self) -> Tensor:
        return self.blocks.masked


@dataclass(frozen=True)
class MaskedView(View):
    """A view of the masked positions alone, row by row: logits [N, V] and the proposed tokens `drawn` [N] of them, and
    where they lie in the flattened blocks, at [N]. What is read of other positions is 0."""

    drawn: Tensor = field(kw_only=True)
    at: Tensor = field(kw_only=True)

    @staticmethod
    def of(blocks: OpenBlocks, logits: Tensor, drawn: Tensor, attention: Tensor | None) -> MaskedView:
        at = blocks.masked.flatten().nonzero()[:, 0]
        tokens = torch.zeros_like(blocks.ids).flatten().index_copy_(0, at, drawn).view(blocks.ids.shape)
        return MaskedView(blocks, logits, tokens, attention, drawn=drawn, at=at)

    @cached_property
    def chosen_log_probability(self) -> Tensor:
        return self._spread((self.logits.gather(-1, self.drawn[:, None])[:, 0] - self._logsumexp).double())

    @cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        value, token = self.logits.topk(min(2, self.logits.shape[-1]), dim=-1)
        return self._spread((value - self._logsumexp[:, None]).exp()), self._spread(token)

    @cached_property
    def entropy(self) -> Tensor:
        log_p = self.logits - self._logsumexp[:, None]
        return self._spread(-(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1))

    @cached_property
    def _logsumexp(self) -> Tensor:
        return self.logits.logsumexp(-1)

    def _spread(self, values: Tensor) -> Tensor:
        """Values [N, ...] of the masked positions as [R, n, ...]."""
        shape = self.blocks.ids.shape
        whole = values.new_zeros((shape.numel(), *values.shape[1:]))
        return whole.index_copy_(0, self.at, values).view(*shape, *values.shape[1:])
