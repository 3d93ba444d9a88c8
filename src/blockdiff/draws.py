"""What a training pass draws, row by row.

Every number is a function of (seed, the row's number in the training stream), never of the rows that share its batch:
so a run draws the same layouts and noise on one process or on many, in one pass or accumulated over several.

Noise levels are spread evenly all the same: within a row they are systematic (equal steps, at one phase), and the
phase of row r is the fractional part of r / golden ratio, whose runs of consecutive rows fill (0, 1) evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from blockdiff.distributions import LayoutDistribution
from blockdiff.layout import Spans
from blockdiff.masking import systematic
from blockdiff.rng import uniform

_ROW, _PHASE = 5, 7  # purposes of random numbers
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch; each method draws the next ones of every row. Results lie on the CPU.

    generators: one for each row; phases: where in its step a row's noise levels lie, in [0, 1).
    """

    generators: Sequence[Generator]
    phases: Sequence[float]

    @staticmethod
    def of(seed: int, rows: Tensor) -> Draws:
        """rows int64 [B]: the rows' numbers."""
        keys = (uniform(seed, rows.cpu(), _ROW) * 2**53).long().tolist()
        start = float(uniform(seed, _PHASE))
        phases = ((rows.cpu().double() * _GOLDEN + start) % 1.0).tolist()
        return Draws([Generator().manual_seed(key) for key in keys], phases)

    def starts(self, layout: LayoutDistribution, spans: Spans) -> Tensor:
        """Block starts for the spans of the batch, bool [S, longest span]."""
        counts = ((spans.offset == 0) & (spans.span >= 0)).sum(1).tolist()
        parts = [
            layout.draw(lengths, generator)
            for lengths, generator in zip(spans.lengths.cpu().split(counts), self.generators, strict=True)
            if len(lengths)
        ]
        out = torch.zeros(sum(counts), max((part.shape[1] for part in parts), default=0), dtype=torch.bool)
        at = 0
        for part in parts:
            out[at : at + len(part), : part.shape[1]] = part
            at += len(part)
        return out

    def documents(self, doc: Tensor) -> Tensor:
        """A number in (0, 1) for every document, float64 [D]; doc [B, T] numbers them in the order of the rows."""
        counts = [len(row[row >= 0].unique()) for row in doc.cpu()]
        return torch.cat([_rand(count, generator) for count, generator in zip(counts, self.generators, strict=True)])

    def tokens(self, doc: Tensor) -> Tensor:
        """A number in (0, 1) for every token, float64 [B, T]; padding (doc -1) draws nothing and holds 1."""
        there = doc.cpu() >= 0
        out = torch.ones(doc.shape, dtype=torch.float64)
        for row, generator in enumerate(self.generators):
            out[row, there[row]] = _rand(int(there[row].sum()), generator)
        return out

    def noise(self, block: Tensor, row: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Numbers for `count` noise draws of the maskable tokens: for their blocks [blocks], and for each token
        [count, N]. block [N] as `Noise.corrupt` takes it, row [N] the row of each token, ascending."""
        block, row = block.cpu(), row.cpu()
        sizes = torch.bincount(row, minlength=len(self.generators)).tolist()
        of_block, of_token = [], []
        for mine, generator, phase in zip(block.split(sizes), self.generators, self.phases, strict=True):
            of_token.append(torch.rand(count, len(mine), dtype=torch.float64, generator=generator))
            blocks = int(mine[-1] - mine[0]) + 1 if len(mine) else 0
            of_block.append(systematic(blocks, generator, phase))
        return torch.cat(of_block), torch.cat(of_token, 1)


def _rand(count: int, generator: Generator) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=generator)
