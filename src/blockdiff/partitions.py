"""Partitions of spans into blocks: drawing them, and counting exactly how often each block occurs.

Block starts are bool [S, length]; a table of configurations is float64 [length, length + 1], entry (p, w) the expected
number of blocks of w tokens after p tokens of the span.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def random_offsets(sizes: Tensor, generator: Generator) -> Tensor:
    return (torch.rand(len(sizes), dtype=torch.float64, generator=generator).to(sizes.device) * sizes).long()


def grids(sizes: Tensor, offsets: Tensor, width: int) -> Tensor:
    index = torch.arange(width, device=sizes.device)
    starts = (index[None] - offsets[:, None]) % sizes[:, None] == 0
    starts[:, 0] = True
    return starts


def geometric_draw(rate: Tensor, width: int, generator: Generator) -> Tensor:
    starts = torch.rand(len(rate), width, dtype=torch.float64, generator=generator) < rate
    starts[:, 0] = True
    return starts


def independent_draw(weights: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
    width = int(lengths.max())
    picks = torch.multinomial(weights, len(lengths) * width, replacement=True, generator=generator) + 1
    places = picks.view(len(lengths), width).cumsum(1).clamp(max=width).to(lengths.device)
    starts = torch.zeros(len(lengths), width + 1, dtype=torch.bool, device=lengths.device)
    starts.scatter_(1, places, True)
    starts[:, 0] = True
    return starts[:, :width]


def tabulate(starts: Tensor, weight: Tensor) -> Tensor:
    """Configuration table of given partitions: starts [K, length], each with its weight [K]."""
    length = starts.shape[1]
    row, place = starts.nonzero(as_tuple=True)
    end = torch.cat([place[1:], place.new_tensor([length])])
    end[torch.cat([row[1:] != row[:-1], torch.tensor([True])])] = length
    table = torch.zeros(length, length + 1, dtype=torch.float64)
    return table.index_put((place, end - place), weight[row], accumulate=True)


def random_offset_table(size: int, length: int) -> Tensor:
    offsets = torch.arange(size)
    starts = grids(torch.full((size,), size), offsets, length)
    return tabulate(starts, torch.full((size,), 1 / size, dtype=torch.float64))


def independent_lengths(weights: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Independent lengths: P(a block begins at p) [L], P(its length is w) and P(it is >= w) [L + 1]."""
    probability = torch.zeros(max(length, len(weights)) + 1, dtype=torch.float64)
    probability[1 : len(weights) + 1] = weights / weights.sum()
    at_least = probability.flip(0).cumsum(0).flip(0)
    begins = torch.zeros(length, dtype=torch.float64)
    begins[0] = 1
    for p in range(1, length):
        begins[p] = (begins[:p] * probability[1 : p + 1].flip(0)).sum()
    return begins, probability[: length + 1], at_least[: length + 1]


def geometric_lengths(rate: float, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for geometric lengths."""
    at_least = (1 - rate) ** (torch.arange(length + 1, dtype=torch.float64) - 1).clamp(min=0)
    begins = torch.full((length,), rate, dtype=torch.float64)
    begins[0] = 1
    return begins, rate * at_least, at_least


def cut_counts(begins: Tensor, probability: Tensor, at_least: Tensor) -> Tensor:
    """`cut_table` summed over p, without the table: float64 [L + 1]."""
    length = len(begins)
    before = torch.nn.functional.pad(begins.cumsum(0), (1, 0))  # expected blocks that begin before p
    size = torch.arange(1, length + 1)
    counts = torch.zeros(length + 1, dtype=torch.float64)
    counts[1:] = probability[1:] * before[length - size] + at_least[1:] * begins[length - size]
    return counts


def grid_counts(size: int, offset: int, length: int) -> Tensor:
    """Blocks of each size in a grid whose first block ends at `offset` (0: after `size`)."""
    counts = torch.zeros(length + 1, dtype=torch.float64)
    offset = min(offset, length)
    counts[offset] += 1
    whole, rest = divmod(length - offset, size)
    counts[min(size, length)] += whole
    counts[rest] += 1
    counts[0] = 0
    return counts


def cut_table(begins: Tensor, probability: Tensor, at_least: Tensor) -> Tensor:
    """begins [L], P(length = w) and P(length >= w) [L + 1] -> [L, L + 1], blocks cut at the span's end."""
    length = len(begins)
    room = length - torch.arange(length)[:, None]
    size = torch.arange(length + 1)[None]
    inside = torch.where(size < room, probability, torch.where(size == room, at_least, 0.0))
    return begins[:, None] * torch.where(size == 0, 0.0, inside)


def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the quadrature on [0, 1] (Golub & Welsch: eigenvalues of the Jacobi matrix)."""
    k = torch.arange(1, count, dtype=torch.float64)
    beta = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return (nodes + 1) / 2, vectors[0] ** 2
