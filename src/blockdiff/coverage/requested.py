"""pi: the calls that a decoder or an evaluation asks for.

Shapes: C cells, B kinds of blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.coverage.trained import masks_of
from blockdiff.decode import Policy
from blockdiff.objectives import Alignment


@dataclass(frozen=True)
class Calls:
    """The calls asked for: cells int64 [C, 3], distinct rows (p, w, k) in ascending order; times float64 [C]."""

    cells: Tensor
    times: Tensor

    @property
    def total(self) -> float:
        return float(self.times.sum())

    @staticmethod
    def cat(parts: Sequence[Calls]) -> Calls:
        """All calls of several requests."""
        return _calls(torch.cat([part.cells for part in parts]), torch.cat([part.times for part in parts]))


def decode_calls(
    alignment: Alignment, policy: Policy, *, prompt: int, block_size: int, new_tokens: int, context: int
) -> Calls:
    """A dry run of decoding `new_tokens` after a prompt of `prompt` tokens, the last block cut where the context ends.

    With a fixed number of tokens a step the masks left are known: n, n - per_step, ... A threshold may ask for any
    number that `per_step` allows, and each is counted once.
    """
    if block_size < 1 or new_tokens < 1 or prompt < 1:
        raise ValueError(
            f"a prompt of {prompt} tokens, block size {block_size}, {new_tokens} new tokens: give 1 or more"
        )
    blocks = [
        (place, min(block_size, context - place))
        for place in range(prompt, min(prompt + new_tokens, context), block_size)
    ]
    if not blocks:
        raise ValueError(f"the prompt has {prompt} tokens and the model's context holds {context}: shorten the prompt")

    def asked(n: int) -> Tensor:
        times = torch.zeros(n + 1, dtype=torch.float64)
        if policy.threshold is None:
            times[torch.arange(n, 0, -policy.per_step)] = 1
        else:
            times[1 : n - policy.per_step + 1] = 1
            times[n] = 1
        return times

    return _of_blocks(alignment, torch.tensor(blocks), torch.ones(len(blocks), dtype=torch.float64), asked)


def grid_calls(alignment: Alignment, spans: Mapping[tuple[int, int, int], int], block_size: int) -> Calls:
    """An evaluation on a grid: one call for each block, every number of masks equally often.

    spans: how many there are of (given tokens before, scored tokens, tokens of the shortened first block).
    """
    places = []
    for (given, scored, head), count in spans.items():
        place = torch.arange(scored)
        starts = place[(place - head) % block_size == 0]
        edges = torch.cat([torch.zeros(1), starts[starts > 0], torch.tensor([scored])]).long()
        rows = torch.stack([given + edges[:-1], edges.diff(), torch.full_like(edges[1:], count)], 1)
        places.append(rows)
    found = torch.cat(places)
    blocks, times = _sum(found[:, :2], found[:, 2].double())

    def asked(n: int) -> Tensor:
        return torch.tensor([0.0] + [1 / n] * n, dtype=torch.float64)

    return _of_blocks(alignment, blocks, times, asked)


def traced_calls(
    alignment: Alignment, *, prompt: int, block_size: int, context: int, blocks: Sequence[int], steps: Sequence[int]
) -> Calls:
    """The calls that an output was made with: its `blocks` (tokens delivered of each) and `steps` (of each token).

    Of a block that ended early only the first call is known, and only that is counted.
    """
    seen: Counter[tuple[int, int, int]] = Counter()
    at = 0
    for delivered in blocks:
        size = min(block_size, context - prompt - at)
        filled = steps[at : at + delivered]
        n = masks_of(alignment, size)
        if n < size:
            seen[prompt + at, 1, 0] += 1
        last = max(filled, default=0) if delivered == size else 1
        for step in range(1, last + 1) if n else ():
            seen[prompt + at, size, n if step == 1 else sum(step <= s for s in filled)] += 1
        at += delivered
    cells = torch.tensor(list(seen), dtype=torch.int64).view(-1, 3)
    return _calls(cells, torch.tensor(list(seen.values()), dtype=torch.float64))


def _of_blocks(alignment: Alignment, blocks: Tensor, times: Tensor, asked: Callable[[int], Tensor]) -> Calls:
    """The calls of blocks int64 [B, 2] (p, w), each `times` [B]; asked(n): calls of a block of n masks at k = 0..n."""
    cells, counts = [], []
    for size in blocks[:, 1].unique().tolist():
        here = blocks[:, 1] == size
        place, often = blocks[here, 0], times[here]
        n = masks_of(alignment, size)
        if n < size:
            cells.append(torch.stack([place, torch.ones_like(place), torch.zeros_like(place)], 1))
            counts.append(often)
        if n:
            k = asked(n).nonzero()[:, 0]
            row = [place.repeat_interleave(len(k)), torch.full((len(place) * len(k),), size), k.repeat(len(place))]
            cells.append(torch.stack(row, 1))
            counts.append((often[:, None] * asked(n)[k]).flatten())
    return _calls(torch.cat(cells), torch.cat(counts))


def _calls(cells: Tensor, times: Tensor) -> Calls:
    return Calls(*_sum(cells, times))


def _sum(rows: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, ascending, and the sum of `times` over the equal ones."""
    distinct, which = rows.unique(dim=0, return_inverse=True)
    return distinct, torch.zeros(len(distinct), dtype=torch.float64).index_add(0, which, times)
