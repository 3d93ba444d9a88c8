"""Requests that take their steps together: rows of the same tensors.

Rows of one `Kind` share a policy, a constraint and a way of opening blocks, so a step of all that are denoised is one
call. Each row is at its own place: one is fed its prompt while others denoise or verify. A slot that a row does not use
belongs to no block.

Shapes: R rows, W slots of the widest open block, V vocabulary; r, d rows among them that something happens to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockdiff.decode import FILLED, FIXED, MASK, OUTSIDE, OpenBlocks, Policy, SamplingBatch, gumbel, propose
from blockdiff.decode.blocks import NOISE
from blockdiff.decode.inputs import Guidance
from blockdiff.decode.pieces import tokens_with
from blockdiff.engine.constraint import Constrained
from blockdiff.engine.drafting import Pace, agreed
from blockdiff.engine.entry import Entry, Phase
from blockdiff.engine.request import Request
from blockdiff.model import BlockDiffusionModel


@dataclass(frozen=True)
class Kind:
    """What rows of one group have in common. first_known: a block's first token comes from the AR logits before it.

    lag: final tokens that are written one block later. Under the seeded boundary a noisy block stands in the slot of
    the token before it, which is not to be seen beside it; a block-causal context would tear that token's block apart.
    """

    policy: Policy
    constraint: int
    forbidden: tuple[int, ...]
    stepwise: int
    lossless: bool
    drafting: str
    adaptive: bool
    sampled: bool
    first_known: bool
    lag: int

    @staticmethod
    def of(model: BlockDiffusionModel, request: Request) -> Kind:
        alignment = model.spec.alignment.scoring()
        alone = request.block_size == 1 and model.spec.alignment_of(1).first_is_clean
        known = alignment.first_is_clean or request.lossless or alone
        lags = alignment.seeded and not known and model.spec.clean_context == "context_causal"
        return Kind(
            request.policy,
            id(request.constraint),
            request.forbidden,
            request.stepwise,
            request.lossless,
            request.drafting if request.lossless else "policy",
            request.lossless and request.adaptive and request.block_size > 1,
            request.sampling.temperature > 0,
            known,
            int(lags),
        )

    @property
    def guided(self) -> bool:
        return "unconditional" in self.policy.needs


class Rows:
    """The rows of a kind, with their open blocks."""

    def __init__(self, model: BlockDiffusionModel, kind: Kind) -> None:
        self.model, self.kind, self.device = model, kind, model.device
        self.entries: list[Entry] = []
        self.alignment = model.spec.alignment.scoring()
        mask = () if model.spec.mask_id is None else (model.spec.mask_id,)
        self._forbidden = self.column([*kind.forbidden, *mask], torch.int64)
        self.blocks = self._blank(0, 1)
        self.last = self.column([], torch.int64)
        self.next_logits: Tensor | None = None
        self.noise: Tensor | None = None
        self.drafted: Tensor | None = None  # logits [R, w, V] of what was drafted ahead, after the next first token
        self.ready: list[int] = []  # how many tokens were drafted ahead for each row
        self._state: Tensor | None = None  # of the constraint: its states [R], and the tokens left
        self._left: Tensor | None = None
        self.pace: Pace | None = None
        self._token_ids: dict[tuple[str, ...], Tensor] = {}

    def column(self, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def index(self, rows: Sequence[int]) -> Tensor | slice:
        """Rows as an index; all of them without a copy."""
        return slice(None) if len(rows) == len(self.entries) else self.column(rows, torch.int64)

    # ---- membership

    def join(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.ready.append(0)
        self.blocks = self.blocks.joined(self._blank(1, self.blocks.ids.shape[1]))
        for name in ("next_logits", "noise", "drafted", "last", "_state", "_left"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, torch.cat([value, value.new_zeros((1, *value.shape[1:]))]))
        self._members_changed()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, in this order (a row may be kept twice)."""
        index = self.column(rows, torch.int64)
        self.entries = [self.entries[row] for row in rows]
        self.ready = [self.ready[row] for row in rows]
        self.blocks = self.blocks.select(index)
        for name in ("next_logits", "noise", "drafted", "last", "_state", "_left"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[index])
        self._members_changed()

    def _members_changed(self) -> None:
        requests = [entry.request for entry in self.entries]
        self.sampling = SamplingBatch.of([request.sampling for request in requests], self.device)
        self.seed = self.column([request.seed for request in requests], torch.int64)
        scales = [sum(p.scale for p in r.policy.logits if isinstance(p, Guidance)) for r in requests]
        self.guidance = self.column(scales, torch.float32)
        if self.kind.adaptive and requests:
            self.pace = Pace.of(self.model, self.kind, requests, self.pace)

    def _blank(self, rows: int, width: int) -> OpenBlocks:
        zeros = torch.zeros(rows, width, dtype=torch.int64, device=self.device)
        return OpenBlocks.open(zeros, zeros, zeros, zeros[:, 0])

    # ---- opening

    def width_ahead(self) -> int:
        """Tokens of a block drafted in the verifying pass, its first one included; 1: none is."""
        if not self.goes_ahead:
            return 1
        longest = max(entry.request.block_size for entry in self.entries)
        return longest if self.pace is None else min(longest, self.pace.length)

    @property
    def goes_ahead(self) -> bool:
        """Whether drafts ride in the verifying pass."""
        if not self.kind.lossless or self.kind.drafting == "policy":
            return False
        return self.kind.drafting == "ahead" or (self.pace is not None and self.pace.mode == "ahead")

    def next_size(self, row: int) -> int:
        """Tokens of a row's next block."""
        entry = self.entries[row]
        request = entry.request
        size = min(request.block_size, entry.context - len(entry.tokens))
        if self.pace is not None:
            size = min(size, self.pace.length)
        if self.goes_ahead or (self.kind.drafting == "auto" and self.ready[row]):
            size = min(size, 1 + self.ready[row])
        if request.constraint is not None or request.lossless:  # neither changes its text by a shorter block
            size = min(size, entry.room)
        return size

    def open(self, rows: list[int]) -> None:
        """Open the next block of these rows: masks, what is given, and a first token that the prefix decides."""
        entries = [self.entries[row] for row in rows]
        for row, entry in zip(rows, entries, strict=True):
            entry.size = self.next_size(row)
            entry.phase = Phase.DENOISE
        busy = (Phase.DENOISE, Phase.VERIFY)
        width = max(entry.size for entry in self.entries if entry.phase in busy)
        index = self.index(rows)
        slot = torch.arange(width, device=self.device)[None]
        place = self.column([len(entry.tokens) for entry in entries])[:, None] + slot
        used = slot < self.column([entry.size for entry in entries])[:, None]
        status, ids = torch.where(used, MASK, OUTSIDE), torch.zeros_like(place)
        if any(entry.request.given for entry in entries):
            known = self._given(entries, width)
            known = torch.where(used, known, -1)
            ids, status = torch.where(known >= 0, known, ids), torch.where(known >= 0, FIXED, status)
        blocks = OpenBlocks.open(ids, status, place, self.seed[index])
        noise = None
        if self.sampling.sampled:
            noise = gumbel(self.seed[index], place, self._vocabulary)
        if self.kind.constraint != id(None):
            self._constrain(entries, index)
        if self.kind.first_known:
            blocks = self._with_first(blocks, noise, index)
        if self.drafted is not None and any(self.ready[row] for row in rows):
            blocks = self._with_drafted(blocks, noise, index, [self.ready[row] for row in rows])
        for row in rows:
            self.ready[row] = 0
        if "uniform_state" in self.kind.policy.needs:
            random = (blocks.uniform(NOISE) * self._vocabulary).long()
            blocks = replace(blocks, ids=torch.where(blocks.masked, random, blocks.ids))
        self._place(index, replace(blocks, opened=blocks.masked.sum(1)), noise, entries)

    @property
    def _vocabulary(self) -> int:
        return self.model.vocabulary if self.next_logits is None else self.next_logits.shape[-1]

    def _place(self, index: Tensor | slice, blocks: OpenBlocks, noise: Tensor | None, entries: list[Entry]) -> None:
        last = self.column([entry.tokens[-1] for entry in entries])
        if isinstance(index, slice):
            self.blocks, self.noise, self.last = blocks, noise, last
            return
        width = blocks.ids.shape[1]
        self.blocks = self.blocks.widened(width).put_rows(index, blocks)
        self.last = self.last.index_copy(0, index, last)
        if noise is not None:
            whole = noise.new_zeros((len(self.entries), width, noise.shape[-1]))
            if self.noise is not None:
                shared = min(width, self.noise.shape[1])
                whole[:, :shared] = self.noise[:, :shared]
            self.noise = whole.index_copy_(0, index, noise)

    def _given(self, entries: list[Entry], width: int) -> Tensor:
        """Fixed tokens [r, W] of the blocks, -1 elsewhere."""
        rows = []
        for entry in entries:
            at = len(entry.output.tokens)
            own = [-1 if token is None else token for token in entry.request.given[at : at + width]]
            rows.append(own + [-1] * (width - len(own)))
        return self.column(rows)

    def _constrain(self, entries: list[Entry], index: Tensor | slice) -> None:
        automaton = entries[0].request.constraint
        assert automaton is not None
        found = Constrained.of(
            automaton,
            [entry.request for entry in entries],
            [entry.output for entry in entries],
            self.model.context_length,
            self.device,
        )
        if self._state is None or self._left is None:
            self._state, self._left = self.seed.clone(), self.seed.clone()
        self._state[index], self._left[index] = found.state.to(self._state.dtype), found.left

    def _with_first(self, blocks: OpenBlocks, noise: Tensor | None, index: Tensor | slice) -> OpenBlocks:
        """The first token of the blocks, from the AR logits before them, unless it is given."""
        assert self.next_logits is not None
        logits = self.next_logits[index][:, None]
        fill = blocks.status[:, 0] == MASK
        one = replace(blocks.cut(1), status=torch.where(fill[:, None], MASK, OUTSIDE))
        token = self.proposer(one, None if noise is None else noise[:, :1], index)(logits)
        probability = (logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)).double()
        return blocks.put(0, fill, token[:, 0], FIXED, probability[:, 0])

    def _with_drafted(
        self, blocks: OpenBlocks, noise: Tensor | None, index: Tensor | slice, ready: list[int]
    ) -> OpenBlocks:
        """What was drafted ahead, as tokens of the blocks."""
        assert self.drafted is not None
        logits = self.drafted[index][:, : blocks.ids.shape[1] - 1]
        count = logits.shape[1]
        if not count:
            return blocks
        tokens = propose(logits, None if noise is None else noise[:, 1 : 1 + count], self._settings(index))
        value = (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).double()
        have = self.column(ready)
        for j in range(count):
            fill = (have > j) & (blocks.status[:, j + 1] == MASK)
            blocks = blocks.put(j + 1, fill, tokens[:, j], FILLED, value[:, j])
        return blocks

    # ---- denoising

    def proposer(self, blocks: OpenBlocks, noise: Tensor | None, index: Tensor | slice) -> Callable[[Tensor], Tensor]:
        """How tokens are proposed for logits [r, n, V] of these rows, or [N, V] of their masked slots."""
        if noise is not None and self.kind.policy.reviser is not None:
            noise = gumbel(blocks.seed, blocks.draws, noise.shape[-1])
        settings = self._settings(index)
        constrained = None
        if self.kind.constraint != id(None):
            automaton = self.entries[0].request.constraint
            assert automaton is not None
            assert self._state is not None
            assert self._left is not None
            constrained = Constrained(automaton, self._state[index], self._left[index])

        def proposed(logits: Tensor) -> Tensor:
            if constrained is not None:
                return constrained.propose(logits, blocks, settings)
            if logits.dim() == 3:
                return propose(logits, noise, settings)
            if noise is None:
                return propose(logits, None, settings)
            own = settings.select(blocks.masked.nonzero()[:, 0])
            return propose(logits[:, None], noise[blocks.masked][:, None], own)[:, 0]

        return proposed

    def _settings(self, index: Tensor | slice) -> SamplingBatch:
        return self.sampling if isinstance(index, slice) else self.sampling.select(index)

    def step(
        self, rows: list[int], logits: Tensor, unconditional: Tensor | None, attention: Tensor | None
    ) -> list[int]:
        """One step of the policy in these rows, logits [d, W, V] or [N, V] of their masked slots (`reads_masked`);
        returns those whose blocks are final."""
        index = self.index(rows)
        blocks = self.blocks if isinstance(index, slice) else self.blocks.select(index)
        noise = None if self.noise is None else self.noise[index]
        after, final = self.kind.policy.step(
            blocks,
            logits,
            self.proposer(blocks, noise, index),
            unconditional=unconditional,
            attention=attention,
            token_ids=self._ids_of,
        )
        self.blocks = after if isinstance(index, slice) else self.blocks.put_rows(index, after)
        return [row for row, done in zip(rows, final.tolist(), strict=True) if done]

    @property
    def reads_masked(self) -> bool:
        """Whether the open blocks' logits are wanted at masked slots only."""
        return self.kind.policy.reads_masked and not self.kind.stepwise and self.kind.constraint == id(None)

    def allowed(self, logits: Tensor) -> Tensor:
        """Logits [..., V] without the tokens that may not be written (changed in place)."""
        return logits if not len(logits) else logits.index_fill_(-1, self._forbidden, -torch.inf)

    def _ids_of(self, strings: tuple[str, ...]) -> Tensor:
        """Tokens whose text holds one of the strings."""
        if strings not in self._token_ids:
            self._token_ids[strings] = self.column(tokens_with(self.model.tokenizer, strings))
        return self._token_ids[strings]

    # ---- after a block

    def put_next(self, rows: list[int], logits: Tensor) -> None:
        """The AR logits [r, V] after what these rows have written."""
        if len(rows) == len(self.entries):
            self.next_logits = logits
            return
        if self.next_logits is None:
            self.next_logits = logits.new_zeros((len(self.entries), logits.shape[-1]))
        self.next_logits = self.next_logits.index_copy(0, self.column(rows), logits)

    def verify(self, rows: list[int], logits: Tensor, ahead: Tensor | None) -> list[int]:
        """What the AR logits [r, W, V] of drafts let through: tokens kept of each row; the next logits are set.

        ahead [r, W, w, V]: logits of what was drafted for every length.
        """
        index = self.index(rows)
        ids = self.blocks.ids[index]
        noise = None if self.noise is None else self.noise[index][:, 1:]
        size = self.column([self.entries[row].size for row in rows])
        used = torch.arange(ids.shape[1], device=ids.device)[None] < size[:, None]
        kept = agreed(logits, ids, noise, used, self._settings(index))
        every = torch.arange(len(rows), device=ids.device)
        self.put_next(rows, logits[every, kept - 1])
        if ahead is not None:
            chosen = ahead[every, kept - 1]
            if len(rows) == len(self.entries):
                self.drafted = chosen
            else:
                width = max(chosen.shape[1], 0 if self.drafted is None else self.drafted.shape[1])
                whole = chosen.new_zeros((len(self.entries), width, chosen.shape[-1]))
                if self.drafted is not None:
                    whole[:, : self.drafted.shape[1]] = self.drafted
                whole[self.column(rows), : chosen.shape[1]] = chosen
                self.drafted = whole
            for row in rows:
                self.ready[row] = chosen.shape[1]
        return [int(count) for count in kept.tolist()]

    def delivered(self, rows: list[int], counts: Sequence[int]) -> list[int]:
        """Hand the first `counts` tokens of the open blocks to the outputs; returns the rows that go on."""
        index = self.index(rows)
        blocks = self.blocks
        columns = [c[index].tolist() for c in (blocks.ids, blocks.filled_at, blocks.log_probability, blocks.edits)]
        going = []
        for at, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if self.entries[row].deliver(*(column[at][:count] for column in columns)):
                going.append(row)
        return going
