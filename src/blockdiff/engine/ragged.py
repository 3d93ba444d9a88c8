"""One pass over many requests: their tokens side by side, each reading its own pages.

The tokens of a pass are packed without padding, clean ones before noisy ones, so every linear layer is one matrix
product over all requests. A `Piece` is a run of them that belong to one request and see the same: a part of a prompt, a
finished block that is committed, a draft that is verified, an open block that is denoised. Attention writes the pack's
keys and values into the pages at once, then reads each piece over its own.

Shapes: T tokens of the pass, H heads, G key/value heads, D head size, q tokens of a piece, k slots that it may see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from blockdiff.attention import eager_attention
from blockdiff.engine.pages import Pages, Table
from blockdiff.layout import TokenMap
from blockdiff.masks import AttentionSums, CleanContext, Visibility

Sees = Literal["all", "causal", "all but the seed", "map"]


@dataclass
class Piece:
    """Some tokens of a pass. They lie in the text's slots at .. at + count, and reach the slots before at + count.

    sees: all of those; those up to themselves; all but the one before `at`, which the first token stands for (a seeded
    block); or what the token map [1, q] says. attention: collects how much the piece looks at each of its tokens.
    """

    table: Table
    at: int
    count: int
    noisy: bool
    sees: Sees
    tokens: TokenMap | None = None
    attention: AttentionSums | None = None
    _masks: dict[object, Tensor | None] = field(default_factory=dict, repr=False)
    _seen: Visibility | None = None

    @property
    def reach(self) -> int:
        return self.at + self.count

    def mask(self, window: int | None, context: CleanContext, device: torch.device) -> Tensor | None:
        """Bool [1, 1, q, k], True = visible; None where everything is."""
        name = None if window is None or window >= self.reach else window
        if name not in self._masks:
            self._masks[name] = self._mask(name, context, device)
        return self._masks[name]

    def _mask(self, window: int | None, context: CleanContext, device: torch.device) -> Tensor | None:
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
        """The piece under THE rule (`masks.visible`): what is cached is clean and lies before every block of now."""
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
class Reading:
    """What one call of attention reads: `rows` pieces of `count` tokens each, packed from token `first` on.

    Keys lie in slots base .. base + reach of the memory, for each further row `stride` slots on; or (index) anywhere.
    """

    first: int
    count: int
    reach: int
    pieces: Sequence[Piece]
    base: int = 0
    stride: int = 0
    index: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.pieces)

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
        masks = [piece.mask(window, context, device) for piece in self.pieces]
        if self.rows == 1:
            return masks[0]
        if all(mask is None and piece.reach == self.reach for mask, piece in zip(masks, self.pieces, strict=True)):
            return None
        whole = torch.zeros(self.rows, 1, self.count, self.reach, dtype=torch.bool, device=device)
        for row, (mask, piece) in enumerate(zip(masks, self.pieces, strict=True)):
            whole[row, ..., : piece.reach] = True if mask is None else mask[0]
        return whole


@dataclass
class RaggedPass:
    """Who sees whom in a pass over pages, as the attention function of `blockdiff.attention` asks for it."""

    pages: Pages
    pieces: Sequence[Piece]
    context: CleanContext
    device: torch.device
    slots: Tensor = field(init=False)
    _readings: list[Reading] = field(init=False)
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        slots: list[int] = []
        self._readings, first = [], 0
        for run in _runs(self.pieces, self.pages):
            for piece in run:
                slots += self.pages.slots(piece.table, piece.at, piece.count)
            self._readings.append(self._reading(run, first))
            first += sum(piece.count for piece in run)
        self.slots = torch.tensor(slots, device=self.device)

    def _reading(self, run: Sequence[Piece], first: int) -> Reading:
        lead, size = run[0], self.pages.size
        reach = max(piece.reach for piece in run)
        if not lead.table.run:
            index = torch.tensor(self.pages.slots(lead.table, 0, reach), device=self.device)
            return Reading(first, lead.count, reach, run, index=index)
        stride = (run[1].table.base - lead.table.base) * size if len(run) > 1 else 0
        return Reading(first, lead.count, reach, run, lead.table.base * size, stride)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [1, H, T, D], key and value [1, G, T, D] -> [1, H, T, D]; keys and values go to the pages first."""
        keys, values = self.pages.write(layer, self.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        plain = softcap is None and sinks is None
        parts = []
        for number, reading in enumerate(self._readings):
            own = query[:, :, reading.first : reading.first + reading.rows * reading.count]
            if plain and reading.pieces[0].attention is None:
                parts.append(self._fused(number, reading, own, keys, values, window, scale))
            else:
                parts += self._explicit(reading, own, keys, values, window, scale, softcap, sinks)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _fused(
        self,
        number: int,
        reading: Reading,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """One call of attention for all rows of a reading."""
        name = (number, window)
        if name not in self._masks:
            self._masks[name] = reading.mask(window, self.context, self.device)
        if reading.rows > 1:
            query = query[0].unflatten(1, (reading.rows, reading.count)).transpose(0, 1)
        k, v = reading.of(keys), reading.of(values)
        grouped = query.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(query, k, v, attn_mask=self._masks[name], scale=scale, enable_gqa=grouped)
        return out if reading.rows == 1 else out.transpose(0, 1).flatten(1, 2)[None]

    def _explicit(
        self,
        reading: Reading,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> list[Tensor]:
        """Attention that no fused kernel has, piece by piece."""
        k, v, parts = reading.of(keys), reading.of(values), []
        for row, piece in enumerate(reading.pieces):
            own = query[:, :, row * piece.count : (row + 1) * piece.count]
            reached = slice(0, piece.reach)
            seen = piece.visibility(self.context, self.device)
            parts.append(
                eager_attention(
                    own,
                    k[row : row + 1, :, reached],
                    v[row : row + 1, :, reached],
                    seen,
                    window,
                    scale,
                    0.0,
                    softcap,
                    sinks,
                )
            )
        return parts


def _runs(pieces: Sequence[Piece], pages: Pages) -> list[list[Piece]]:
    """Successive pieces that one call can read: of one size, whose pages lie at equal distances in the memory."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        run = runs[-1] if runs else []
        if run and _joins(run, piece, pages):
            run.append(piece)
        else:
            runs.append([piece])
    return runs


def _joins(run: list[Piece], piece: Piece, pages: Pages) -> bool:
    last = run[-1]
    if piece.count != last.count or (piece.attention is None) != (last.attention is None):
        return False
    if not (piece.table.run and last.table.run):
        return False
    step = piece.table.base - last.table.base
    if step <= 0 or (len(run) > 1 and step != run[1].table.base - run[0].table.base):
        return False
    reach = max(piece.reach, *(other.reach for other in run))
    return piece.table.base * pages.size + reach <= pages.count * pages.size
