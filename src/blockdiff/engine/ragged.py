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


@dataclass
class RaggedPass:
    """Who sees whom in a pass over pages, as the attention function of `blockdiff.attention` asks for it."""

    pages: Pages
    pieces: Sequence[Piece]
    context: CleanContext
    device: torch.device
    slots: Tensor = field(init=False)
    _gathered: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        slots: list[int] = []
        self._gathered = []
        for piece in self.pieces:
            slots += self.pages.slots(piece.table, piece.at, piece.count)
            index = None
            if not piece.table.run:
                index = torch.tensor(self.pages.slots(piece.table, 0, piece.reach), device=self.device)
            self._gathered.append(index)
        self.slots = torch.tensor(slots, device=self.device)

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
        plain, parts, first = softcap is None and sinks is None, [], 0
        grouped = query.shape[1] != key.shape[1]
        for piece, index in zip(self.pieces, self._gathered, strict=True):
            own = query[:, :, first : first + piece.count]
            first += piece.count
            if index is None:
                start = piece.table.base * self.pages.size
                k, v = keys[start : start + piece.reach], values[start : start + piece.reach]
            else:
                k, v = keys[index], values[index]
            k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
            if plain and piece.attention is None:
                mask = piece.mask(window, self.context, self.device)
                parts.append(F.scaled_dot_product_attention(own, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped))
            else:
                seen = piece.visibility(self.context, self.device)
                parts.append(eager_attention(own, k, v, seen, window, scale, 0.0, softcap, sinks))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
