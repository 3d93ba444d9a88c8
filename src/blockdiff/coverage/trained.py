"""mu: how often training makes each call, computed exactly from its distributions.

Shapes: C cells, P tokens of the longest document, W tokens of the longest span.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blockdiff.coverage.order import Order, first_masked
from blockdiff.distributions import AR, Fixed, Full, LayoutDistribution
from blockdiff.noise import Noise
from blockdiff.objectives import Alignment
from blockdiff.partitions import grids

TOLERANCE = 1e-15  # a configuration with a smaller share of training's calls counts as never trained
MAX_SPANS = 64


class SpanShare(NamedTuple):
    """`scored` tokens in a row after `given` tokens of their document, and the share of the spans that are so."""

    given: int
    scored: int
    share: float


class Cell(NamedTuple):
    """A configuration: tokens before the block, tokens in it, masks among them."""

    before: int
    size: int
    masks: int


def histogram(spans: Iterable[tuple[int, int]], limit: int = MAX_SPANS) -> tuple[SpanShare, ...]:
    """Shares of (given, scored) pairs; beyond `limit` pairs each stands for its quantile group, of which it is the
    first, so lengths are rounded down. The pair that reaches furthest is kept exactly."""
    counts = Counter(spans)
    total = sum(counts.values())
    pairs = sorted(counts)
    if len(pairs) > limit:
        furthest = max(pairs, key=sum)
        rest = [pair for pair in pairs if pair != furthest]
        seen = [0, *accumulate(counts[pair] for pair in rest)]
        groups: Counter[tuple[int, int]] = Counter({furthest: counts[furthest]})
        first: dict[int, tuple[int, int]] = {}
        for pair, before in zip(rest, seen, strict=False):
            groups[first.setdefault(before * (limit - 1) // seen[-1], pair)] += counts[pair]
        counts, pairs = groups, sorted(groups)
    return tuple(SpanShare(*pair, counts[pair] / total) for pair in pairs)


def masks_of(alignment: Alignment, size: int) -> int:
    """Tokens of a block of `size` that decoding may find masked; 0 where the clean stream alone writes it."""
    if alignment.shift and size == 1:
        return 0
    return size - int(alignment.scoring().first_is_clean)


@dataclass(frozen=True)
class Trained:
    """mu: how often training makes each call.

    blocks float64 [P, W + 1]: expected blocks at (p, w) in a random span; reads float64 [P]: clean reads at p that come
    with them, beside those of the AR loss; spans: their lengths; tokens: scored tokens trained on in all (0: unknown).
    Nothing of the size of (p, w, k) is kept: `visits` computes the cells that it is asked for.
    """

    blocks: Tensor
    reads: Tensor
    spans: tuple[SpanShare, ...]
    noise: Noise
    alignment: Alignment
    ar_trained: bool
    tokens: int = 0

    @property
    def order(self) -> Order:
        """Which k of a block's masks are left when decoding could meet them."""
        return Order(self.noise.biases, lead=int(not self.alignment.is_bound))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(span.given + span.scored for span in self.spans)

    @property
    def spans_trained(self) -> float:
        """Spans that training went through in all, repetitions counted."""
        return self.tokens / sum(span.share * span.scored for span in self.spans)

    @cached_property
    def calls(self) -> float:
        """Expected calls of a span; draws that mask nothing are among them, and no cell."""
        noisy = self.blocks[:, 2:] if self.alignment.first_is_clean else self.blocks
        total = float(noisy.sum())
        if not self.alignment.seeded:  # there a read is a block of one token, counted already
            total += float(self.reads.sum())
        if self._reads_everywhere:
            total += sum(span.share * span.scored for span in self.spans)
        return total

    @cached_property
    def sizes(self) -> Tensor:
        """Block sizes that training has anywhere, ascending."""
        return self.blocks.amax(0).gt(TOLERANCE * self.calls).nonzero()[:, 0]

    def places(self, size: int) -> Tensor:
        """Where training has blocks of `size`, ascending."""
        if size >= self.blocks.shape[1]:
            return torch.zeros(0, dtype=torch.int64)
        return self.blocks[:, size].gt(TOLERANCE * self.calls).nonzero()[:, 0]

    def counts(self, size: int) -> Tensor:
        """Probability that decoding could meet the masks of a block of `size` with k masked: float64 [masks + 1]."""
        n = masks_of(self.alignment, size)
        if self.alignment.is_bound:
            return self.noise.count_probability(n)
        # `noisy` masks any of the `size` tokens; decoding meets only the draws whose first token is clean
        return (self.noise.count_probability(size) * (1 - _first_masked(self.noise, size)))[: n + 1]

    def visits(self, cells: Tensor) -> Tensor:
        """Expected calls of a span in each cell: cells int64 [C, 3] -> float64 [C]."""
        before, size, masks = cells.T
        read = masks == 0
        found = torch.zeros(len(cells), dtype=torch.float64)
        if bool(read.any()):
            found[read] = self._reads(before[read])
        inside = ~read & (before < self.blocks.shape[0]) & (size < self.blocks.shape[1])
        for w in size[inside].unique().tolist():
            here = inside & (size == w)
            counts = self.counts(w)
            known = masks[here].clamp(max=len(counts) - 1)
            found[here] = torch.where(known == masks[here], self.blocks[before[here], w] * counts[known], 0.0)
        return found

    def share(self, before: range, size: range) -> float:
        """Share of training's calls on blocks of these sizes at these places, whatever their masks."""
        block = self.blocks[before.start : before.stop, size.start : size.stop].sum()
        if self.alignment.shift and size.start <= 1:
            block -= self.blocks[before.start : before.stop, 1 : min(size.stop, 2)].sum()
            block += self._reads(torch.arange(before.start, max(before.start, min(before.stop, self.longest)))).sum()
        return float(block) / self.calls

    @property
    def _reads_everywhere(self) -> bool:
        """The AR loss reads every scored token of the clean stream, where decoding reads it too."""
        return self.ar_trained and self.alignment.shift

    def _reads(self, before: Tensor) -> Tensor:
        found = torch.where(before < len(self.reads), self.reads[before.clamp(max=len(self.reads) - 1)], 0.0)
        for given, scored, share in self.spans if self._reads_everywhere else ():
            found = found + share * ((before >= given) & (before < given + scored))
        return found


def trained(
    layout: LayoutDistribution,
    noise: Noise,
    alignment: Alignment,
    spans: Sequence[SpanShare],
    *,
    ar_trained: bool = False,
    tokens: int = 0,
) -> Trained:
    """The calls that training with these settings makes over documents whose spans are distributed as `spans`."""
    if isinstance(layout, AR) and alignment.first_is_clean:  # no block has a mask, and the context may be very long
        none = torch.zeros(1, 2, dtype=torch.float64)
        return Trained(none, none[:, 0], tuple(spans), noise, alignment, True, tokens)
    blocks = _blocks(layout, spans)
    if not alignment.shift or (alignment.first_is_clean and ar_trained):  # the AR loss has the first tokens already
        reads = torch.zeros(len(blocks), dtype=torch.float64)
    elif alignment.first_is_clean:
        reads = blocks.sum(1)
    elif alignment.seeded:
        reads = blocks[:, 1] * noise.count_probability(1)[1]
    else:
        reads = _reads_of_span_starts(layout, noise, spans, len(blocks))
    return Trained(blocks, reads, tuple(spans), noise, alignment, ar_trained, tokens)


def _reads_of_span_starts(layout: LayoutDistribution, noise: Noise, spans: Sequence[SpanShare], places: int) -> Tensor:
    """Under the `noisy` boundary only a span's first token has no noisy slot before it: [P]."""
    reads = torch.zeros(places, dtype=torch.float64)
    for given, scored, share in spans:
        sizes = layout.configurations(scored)[0]
        for size in sizes.nonzero()[:, 0].tolist():
            reads[given] += share * sizes[size] * (noise.count_probability(size) @ _first_masked(noise, size))
    return reads


def _first_masked(noise: Noise, size: int) -> Tensor:
    """P(the first of `size` maskable tokens is masked | k of them are), k = 0..size: [size + 1]."""
    return first_masked(size, tuple(noise.biases.items()))


def _blocks(layout: LayoutDistribution, spans: Sequence[SpanShare]) -> Tensor:
    """Expected blocks at (p, w) in a random span, p counted from the beginning of its document: [P, W + 1]."""
    longest = max(span.scored for span in spans)
    if isinstance(layout, Fixed):  # no wider than its blocks: other projects' checkpoints are of 32,768 tokens and more
        table = torch.zeros(max(span.given for span in spans) + longest, min(layout.size, longest) + 1).double()
        for given, scored, share in spans:
            starts = grids(torch.tensor([layout.size]), torch.tensor([layout.offset]), scored)[0].nonzero()[:, 0]
            table[given + starts, starts.diff(append=torch.tensor([scored]))] += share
        return table
    table = torch.zeros(max(span.given for span in spans) + longest, longest + 1, dtype=torch.float64)
    if isinstance(layout, Full):
        for given, scored, share in spans:
            table[given, scored] += share
        return table
    # every other distribution draws a long span and cuts it, so the longest span's table holds those of all
    long = layout.configurations(longest)
    at_least = long.flip(1).cumsum(1).flip(1)
    for given in {span.given for span in spans}:
        lengths = torch.zeros(longest + 1, dtype=torch.float64)
        for scored, share in ((span.scored, span.share) for span in spans if span.given == given):
            lengths[scored] += share
            place = torch.arange(scored)
            table[given + place, scored - place] += share * at_least[place, scored - place]
        longer = F.pad(lengths.flip(0).cumsum(0).flip(0) - lengths, (0, longest))
        table[given : given + longest].addcmul_(long, longer.unfold(0, longest + 1, 1)[:longest])
    return table
