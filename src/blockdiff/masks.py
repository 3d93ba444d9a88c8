"""Visibility: the one rule of who sees whom, and its renderings for each attention implementation.

Input of a two-stream pass is [noisy ; clean], both with their positions in the document. A query sees a key only in
its own document, and:

    noisy -> noisy   same block
    noisy -> clean   key position < start of the query's block
    clean -> clean   context_causal: key position <= query position;  block_causal: key block <= query block
    clean -> noisy   never

(BD3-LM, arXiv 2503.09573, section 3.2 and appendix B.6, for any block lengths; context_causal is NBDiff's mask,
arXiv 2512.06776, appendix A.) A layer with a sliding window also drops keys `window` or more positions behind the
query. An `Annealing` hides part of a block's later noisy tokens, as a baseline that trains causal attention into
bidirectional attention.

Shapes: B rows, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from blockdiff.layout import TokenMap
from blockdiff.rng import uniform

CleanContext = Literal["context_causal", "block_causal"]
CLEAN_CONTEXTS = ("context_causal", "block_causal")
TILE = 128


@dataclass(frozen=True)
class Annealing:
    """Attention on its way from causal to bidirectional (DiffuLLaMA, arXiv 2410.17891), inside noisy blocks.

    A noisy query sees every earlier noisy token of its block, and each later one with probability `share`, drawn anew
    for every pair of tokens of a document; `keys` int64 [documents] tell one draw from another. Only what is masked
    anyway is hidden, so nothing leaks.
    """

    share: float
    keys: Tensor

    def keeps(self, query: TokenMap, key: TokenMap) -> Tensor:
        """Which pairs of a block stay visible to each other, elementwise."""
        drawn = uniform(self.keys[query.doc.clamp(min=0)], query.position, key.position) < self.share
        return drawn | (key.position <= query.position)


def visible(
    query: TokenMap,
    key: TokenMap,
    clean_context: CleanContext,
    window: int | None = None,
    annealing: Annealing | None = None,
) -> Tensor:
    """THE rule, elementwise: `query` and `key` are token maps whose tensors broadcast against each other."""
    own_block = key.noisy & (query.block == key.block)
    if annealing is not None:
        own_block = own_block & annealing.keeps(query, key)
    earlier = ~key.noisy & (key.position < query.start)
    if clean_context == "context_causal":
        clean = ~key.noisy & (key.position <= query.position)
    else:
        clean = ~key.noisy & (key.block <= query.block)
    allowed = (query.doc == key.doc) & torch.where(query.noisy, own_block | earlier, clean)
    if window is not None:
        allowed = allowed & (query.position - key.position < window)
    return allowed


def narrower(window: int | None, other: int | None) -> int | None:
    """The smaller of two sliding windows; None is none."""
    return min((w for w in (window, other) if w is not None), default=None)


@dataclass
class AttentionSums:
    """Collects how much the queries of a pass look at each of its own tokens: total float [B, Q], of the last layer
    that ran, averaged over heads."""

    total: Tensor | None = None

    def add(self, probability: Tensor) -> None:
        """probability [B, H, Q, K] of a layer, the pass's own tokens last."""
        queries = probability.shape[2]
        self.total = probability[..., -queries:].mean(1).sum(1)


class KeysTaken(Exception):
    """A layer has given its keys and values, which is all that was wanted of it."""


@dataclass
class KeysAndValues:
    """Takes the keys and values [B, G, K, D] of the first layer that runs (which ends there, with `KeysTaken`) and
    holds them for queries that come later."""

    key: Tensor | None = None
    value: Tensor | None = None

    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Hold a layer's keys and values, or give those held in their place."""
        if self.key is None or self.value is None:
            self.key, self.value = key, value
            raise KeysTaken
        return self.key, self.value


@dataclass(frozen=True)
class Tile:
    """Some queries, the ranges of keys that any of them sees, and their mask.

    mask [B, 1, queries, keys], or [1, ...] where all rows see alike; None: everybody sees everything, or, in a `causal`
    tile, the queries are the keys and each sees itself and those before it.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None
    causal: bool = False
    _cache: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as what is added to scores: 0 where visible, -inf elsewhere."""
        if self.mask is None:
            return None
        if dtype not in self._cache:
            zero = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._cache[dtype] = zero.masked_fill_(~self.mask, -torch.inf)
        return self._cache[dtype]


@dataclass(frozen=True)
class Visibility:
    """Who sees whom in one forward pass: queries [B, Q], keys [B, K] (cached tokens first, then the queries' own).

    Rendered once for each window and shared by all layers. Nothing here is ever handed to a model's own mask
    handling: the attention function of `blockdiff.attention` picks the rendering it needs, so a boolean mask can
    never be *added* to scores, and a sliding window is never lost. `cache_window`: the mask of a sliding-window
    cache, in every layer that has no narrower one of its own.
    """

    query: TokenMap
    key: TokenMap
    clean_context: CleanContext
    windows: dict[int, int | None] = field(default_factory=dict, repr=False, compare=False)
    annealing: Annealing | None = None
    attention: AttentionSums | None = None
    cache_window: int | None = None
    held: KeysAndValues | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def note_layer(self, layer: int | None, window: int | None) -> None:
        """Called by the attention function: layer `layer` saw this mask, with its own sliding window."""
        if layer is not None:
            self.windows[layer] = window

    def holding(self, held: KeysAndValues, slots: Tensor | None = None) -> Visibility:
        """The same rule for a layer whose keys and values come from `held`, its queries being `slots` [B, S] alone."""
        query = self.query if slots is None else self.query.take(slots)
        return replace(self, query=query, held=held, _cache={})

    def dense(self, window: int | None = None) -> Tensor:
        """Boolean mask [B, 1, Q, K], True = visible: the reading of `scaled_dot_product_attention`."""
        window = narrower(window, self.cache_window)
        return self._once(("dense", window), lambda: self._rows(slice(None), window)[:, None])

    def additive(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Additive mask [B, 1, Q, K]: 0 where visible, -inf elsewhere (eager attention adds its mask to the scores)."""
        zero = torch.zeros((), dtype=dtype, device=self.query.doc.device)
        return self._once(("additive", dtype, window), lambda: torch.where(self.dense(window), zero, -torch.inf))

    def tiles(self, window: int | None = None) -> list[Tile]:
        """The mask in tiles of queries, each with only the keys that some query of the tile sees.

        A two-stream pass sees about a quarter of its key pairs; the tiles never touch the rest, and no Q x K mask
        exists as a whole.
        """
        window = narrower(window, self.cache_window)
        return self._once(("tiles", window), lambda: self._tiles(window))

    def block_mask(self, window: int | None = None) -> Any:
        """FlexAttention BlockMask of the same rule."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, keys = self.key.shape

        def build() -> Any:
            return create_block_mask(
                self.mask_mod(window), batch, None, self._queries, keys, device=self.query.doc.device
            )

        return self._once(("flex", window), build)

    def mask_mod(self, window: int | None = None) -> Any:
        """The rule as FlexAttention's index function (batch, head, query, key) -> bool."""
        query, key, context, annealing = self.query, self.key, self.clean_context, self.annealing
        window = narrower(window, self.cache_window)

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return visible(query[b, q], key[b, k], context, window, annealing)

        return rule

    def draw(self, row: int = 0) -> str:
        """The mask of one row as text: a line for each query, a mark for each visible key."""
        allowed = self.dense()[row, 0]
        streams = [("noisy", self.key.noisy[row]), ("clean", ~self.key.noisy[row])]
        present = [(name, member.nonzero()[:, 0]) for name, member in streams if bool(member.any())]
        width = len(str(int(self.key.position[row].max()))) + 1
        margin = " " * (7 + width)
        lines = [
            margin + "  ".join(name.ljust(width * len(columns)) for name, columns in present).rstrip(),
            margin + "  ".join("".join(f"{self.key.position[row, c]:>{width}}" for c in cs) for _, cs in present),
        ]
        previous = None
        for q in range(self._queries):
            stream = "noisy" if self.query.noisy[row, q] else "clean"
            if previous is not None and previous != (stream, int(self.query.block[row, q])) and stream == "noisy":
                lines.append("")
            if previous is not None and previous[0] != stream:
                lines.append("")
            previous = (stream, int(self.query.block[row, q]))
            marks = "  ".join("".join(f"{'■' if allowed[q, c] else '·':>{width}}" for c in cs) for _, cs in present)
            lines.append(f"{stream} {self.query.position[row, q]:>{width}} {marks}")
        return "\n".join(lines)

    @property
    def _queries(self) -> int:
        return self.query.shape[1]

    def _once(self, name: Any, build: Any) -> Any:
        if name not in self._cache:
            self._cache[name] = build()
        return self._cache[name]

    def _rows(self, queries: slice, window: int | None) -> Tensor:
        query, key = self.query[:, queries, None], self.key[:, None, :]
        return visible(query, key, self.clean_context, window, self.annealing)

    def _tiles(self, window: int | None) -> list[Tile]:
        alike = self._rows_are_alike()
        query, key = (self.query[:1], self.key[:1]) if alike else (self.query, self.key)
        first = self._queries if window is not None else self._causal_from(query)
        masked = [self._tile(query, key, slice(at, min(at + TILE, first)), window) for at in range(0, first, TILE)]
        if first == self._queries:
            return masked
        clean = slice(first, self._queries)
        return [*masked, Tile(clean, (clean,), None, causal=True)]

    def _rows_are_alike(self) -> bool:
        """Whether all rows are one row with other document numbers."""
        if self.annealing is not None:
            return False
        for tokens in (self.query, self.key):
            doc = torch.where(tokens.doc >= 0, tokens.doc - self.key.doc[:, :1], -1)
            parts = (doc, tokens.position, tokens.block, tokens.start, tokens.noisy)
            if any(bool((part != part[:1]).any()) for part in parts):
                return False
        return True

    def _causal_from(self, query: TokenMap) -> int:
        """The first query of the clean stream where that is, in every row, one document from its first token on whose
        tokens see it causally, and nothing cached; the number of queries where it is not."""
        nowhere = self._queries
        clean = ~query.noisy
        first = int(query.noisy.sum(1).max())
        span = query[:, first:]
        if self.clean_context != "context_causal" or first == nowhere or not bool(clean[:, first:].all()):
            return nowhere
        if bool(clean[:, :first].any()) or self.key is not self.query:
            return nowhere
        place = torch.arange(nowhere - first, device=span.doc.device)
        one = (span.doc == span.doc[:, :1]) & (span.position == place)
        return first if bool(one.all()) else nowhere

    def _tile(self, query: TokenMap, key: TokenMap, queries: slice, window: int | None) -> Tile:
        query = query[:, queries]
        candidates = _candidates(query, key)
        near = key[:, candidates]
        allowed = visible(query[:, :, None], near[:, None, :], self.clean_context, window, self.annealing)
        used = allowed.any(0).any(0)
        allowed, seen = allowed[:, :, used], candidates[used]
        jumps = (seen[1:] - seen[:-1] > TILE // 2).nonzero()[:, 0].tolist()
        firsts = seen[[0, *(j + 1 for j in jumps)]].tolist()
        lasts = seen[[*jumps, len(seen) - 1]].tolist()
        keys = tuple(slice(first, last + 1) for first, last in zip(firsts, lasts, strict=True))
        columns = torch.cat([torch.arange(ks.start, ks.stop, device=seen.device) for ks in keys])
        if len(columns) > len(seen):  # keys between two seen ones, which nobody sees
            mask = allowed.new_zeros(*allowed.shape[:2], len(columns))
            mask[:, :, torch.searchsorted(columns, seen)] = allowed
            allowed = mask
        return Tile(queries, keys, None if bool(allowed.all()) else allowed[:, None].contiguous())


def _candidates(query: TokenMap, key: TokenMap) -> Tensor:
    """Columns of the keys that some query may see, by comparisons with the queries' extremes alone: int64 [C]."""
    low, high = query.doc.amin(1, keepdim=True), query.doc.amax(1, keepdim=True)
    block = (key.block >= query.block.amin(1, keepdim=True)) & (key.block <= query.block.amax(1, keepdim=True))
    behind = key.position <= query.position.amax(1, keepdim=True)
    fits = torch.where(key.noisy, block, behind | block | (low != high))
    return ((key.doc >= low) & (key.doc <= high) & fits).any(0).nonzero()[:, 0]
