"""One pass over many requests: their tokens side by side, each reading its own pages.

The tokens of a pass are packed without padding, clean ones before noisy ones, so every linear layer is one matrix
product over all requests. A `Segment` is a run of them that belong to one request and see the same: a part of a
prompt, a finished block that is committed, a draft that is verified, an open block that is denoised. Attention writes
the pack's keys and values into the pages at once, then reads each segment over its own.

Shapes: T tokens of the pass, H heads, G key/value heads, D head size, q tokens of a segment, k slots that it may see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from blockdiff.attention import Scores, eager_attention
from blockdiff.engine.pages import Pages, Table
from blockdiff.layout import TokenMap
from blockdiff.masks import AttentionSums, CleanContext, Visibility, narrower

Sees = Literal["all", "causal", "all but the seed", "map"]


@dataclass
class Segment:
    """Some tokens of a pass. They lie in the text's slots at .. at + count, and reach the slots before at + count.

    sees: all of those; those up to themselves; all but the one before `at`, which the first token stands for (a seeded
    block); or what the token map [1, q] says. attention: collects how much the segment looks at each of its tokens.
    """

    table: Table
    at: int
    count: int
    noisy: bool
    sees: Sees
    tokens: TokenMap | None = None
    attention: AttentionSums | None = None
    _seen: Visibility | None = None

    @property
    def reach(self) -> int:
        return self.at + self.count

    def mask(self, window: int | None, context: CleanContext, device: torch.device) -> Tensor | None:
        """Bool [1, 1, q, k], True = visible; None where everything is."""
        window = None if window is None or window >= self.reach else window
        if window is not None or self.sees == "map":
            return self.visibility(context, device).dense(window)
        if self.sees == "all" or (self.count == 1 and self.sees == "causal"):
            return None
        seen = torch.ones(self.count, self.reach, dtype=torch.bool, device=device)
        if self.sees == "causal":
            return seen.tril(self.at)[None, None]
        seen[:, self.at - 1] = False
        return seen[None, None]

    def visibility(self, context: CleanContext, device: torch.device) -> Visibility:
        """The segment under THE rule (`masks.visible`): what is cached is clean and lies before every block of now."""
        if self._seen is None:
            query = self.tokens if self.tokens is not None else self._map(device)
            cached = torch.arange(self.at, device=device)[None]
            no, old = torch.zeros_like(cached, dtype=torch.bool), torch.full_like(cached, -1)
            before = TokenMap(torch.zeros_like(cached), cached, old, torch.zeros_like(cached), no, no)
            key = TokenMap.cat(before, query)
            self._seen = Visibility(query, key, context, attention=self.attention)
        return self._seen

    def _map(self, device: torch.device) -> TokenMap:
        """A run of tokens: a noisy block, one clean block, or (causal) clean tokens that are blocks of their own."""
        start = self.at - (self.sees == "all but the seed")
        place = torch.arange(start, start + self.count, device=device)[None]
        no = torch.zeros_like(place, dtype=torch.bool)
        first = place if self.sees == "causal" else torch.full_like(place, start)
        return TokenMap(torch.zeros_like(place), place, first, first, no, ~no if self.noisy else no)


@dataclass(frozen=True)
class Stack:
    """What one call of attention reads: `rows` segments of `count` tokens each, packed from token `first` on.

    Keys lie in slots base .. base + reach of the memory, for each further row `stride` slots on; or (index) anywhere.
    """

    first: int
    count: int
    reach: int
    segments: Sequence[Segment]
    base: int = 0
    stride: int = 0
    index: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.segments)

    def of(self, memory: Tensor) -> Tensor:
        """Keys or values [rows, G, reach, D] out of [slots, G, D]."""
        if self.index is not None:
            return memory[self.index].transpose(0, 1)[None]
        if self.rows == 1:
            return memory[self.base : self.base + self.reach].transpose(0, 1)[None]
        slot, head, one = memory.stride()
        shape = (self.rows, memory.shape[1], self.reach, memory.shape[2])
        return memory.as_strided(shape, (self.stride * slot, head, slot, one), self.base * slot)

    def mask(self, window: int | None, context: CleanContext, device: torch.device) -> Tensor | None:
        """Bool [rows or 1, 1, q, reach]; None where everything is visible."""
        masks = [segment.mask(window, context, device) for segment in self.segments]
        if self.rows == 1:
            return masks[0]
        if all(
            mask is None and segment.reach == self.reach for mask, segment in zip(masks, self.segments, strict=True)
        ):
            return None
        whole = torch.zeros(self.rows, 1, self.count, self.reach, dtype=torch.bool, device=device)
        for row, (mask, segment) in enumerate(zip(masks, self.segments, strict=True)):
            whole[row, ..., : segment.reach] = True if mask is None else mask[0]
        return whole


@dataclass
class RaggedPass:
    """Who sees whom in a pass over pages, as the attention function of `blockdiff.attention` asks for it."""

    pages: Pages
    segments: Sequence[Segment]
    context: CleanContext
    device: torch.device
    cache_window: int | None = None
    slots: Tensor = field(init=False)
    _stacks: list[Stack] = field(init=False)
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        slots: list[int] = []
        self._stacks, first = [], 0
        for run in _runs(self.segments, self.pages):
            for segment in run:
                slots += self.pages.slots(segment.table, segment.at, segment.count)
            self._stacks.append(self._stack(run, first))
            first += sum(segment.count for segment in run)
        self.slots = torch.tensor(slots, device=self.device)

    def _stack(self, run: Sequence[Segment], first: int) -> Stack:
        lead, size = run[0], self.pages.size
        reach = max(segment.reach for segment in run)
        if not lead.table.run:
            index = torch.tensor(self.pages.slots(lead.table, 0, reach), device=self.device)
            return Stack(first, lead.count, reach, run, index=index)
        stride = (run[1].table.base - lead.table.base) * size if len(run) > 1 else 0
        return Stack(first, lead.count, reach, run, lead.table.base * size, stride)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """query [1, H, T, D], key and value [1, G, T, D] -> [1, H, T, D]; keys and values go to the pages first."""
        if self.cache_window is not None:
            scores = replace(scores, window=narrower(scores.window, self.cache_window))
        keys, values = self.pages.write(layer, self.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        parts = []
        for number, stack in enumerate(self._stacks):
            own = query[:, :, stack.first : stack.first + stack.rows * stack.count]
            k, v = stack.of(keys), stack.of(values)
            if scores.plain and stack.segments[0].attention is None:
                parts.append(self._fused(number, own, k, v, scores))
            else:
                parts += self._explicit(stack, own, k, v, scores)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _fused(self, number: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """One call of attention for all rows of a stack."""
        stack, name = self._stacks[number], (number, scores.window)
        if name not in self._masks:
            self._masks[name] = stack.mask(scores.window, self.context, self.device)
        if stack.rows > 1:
            query = query[0].unflatten(1, (stack.rows, stack.count)).transpose(0, 1)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self._masks[name], scale=scores.scale, enable_gqa=grouped
        )
        return out if stack.rows == 1 else out.transpose(0, 1).flatten(1, 2)[None]

    def _explicit(self, stack: Stack, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> list[Tensor]:
        """Attention that no fused kernel has, segment by segment."""
        parts = []
        for row, segment in enumerate(stack.segments):
            own = query[:, :, row * segment.count : (row + 1) * segment.count]
            k, v = (memory[row : row + 1, :, : segment.reach] for memory in (key, value))
            seen = segment.visibility(self.context, self.device)
            parts.append(
                eager_attention(own, k, v, seen, scores.window, scores.scale, 0.0, scores.softcap, scores.sinks)
            )
        return parts


def _runs(segments: Sequence[Segment], pages: Pages) -> list[list[Segment]]:
    """Successive segments that one call can read: of one size, whose pages lie at equal distances in the memory."""
    runs: list[list[Segment]] = []
    for segment in segments:
        run = runs[-1] if runs else []
        if run and _joins(run, segment, pages):
            run.append(segment)
        else:
            runs.append([segment])
    return runs


def _joins(run: list[Segment], segment: Segment, pages: Pages) -> bool:
    last = run[-1]
    if segment.count != last.count or (segment.attention is None) != (last.attention is None):
        return False
    if not (segment.table.run and last.table.run):
        return False
    step = segment.table.base - last.table.base
    if step <= 0 or (len(run) > 1 and step != run[1].table.base - run[0].table.base):
        return False
    reach = max(segment.reach, *(other.reach for other in run))
    return segment.table.base * pages.size + reach <= pages.count * pages.size
