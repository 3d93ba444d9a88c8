"""pi: the calls that a decoder or an evaluation asks for.

Shapes: C cells, B kinds of blocks, S sets of masked tokens, n tokens of a block that may be masked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blockdiff.coverage.order import Order
from blockdiff.coverage.trained import masks_of
from blockdiff.decode import Policy
from blockdiff.objectives import Alignment


@dataclass(frozen=True)
class Calls:
    """The calls asked for: cells int64 [C, 3], distinct rows (p, w, k) in ascending order; times float64 [C].

    left_bias: of the order that reveals a block's tokens, which says which k are masked; None where the order is the
    model's own choice. sets: the masked sets themselves where they are known, bool [S, n] for every n, one row a call.
    """

    cells: Tensor
    times: Tensor
    left_bias: float | None = None
    sets: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return float(self.times.sum())

    @property
    def order(self) -> Order | None:
        """Which k of a block's masks are left, where that is known."""
        return None if self.left_bias is None else Order({self.left_bias: 1.0})

    @staticmethod
    def cat(parts: Sequence[Calls]) -> Calls:
        """All calls of several requests; raises ValueError where their orders differ."""
        biases = {part.left_bias for part in parts}
        if len(biases) > 1:
            raise ValueError(f"calls of different reveal orders (left_bias {biases}): compare them one by one")
        cells, times = _sum(torch.cat([part.cells for part in parts]), torch.cat([part.times for part in parts]))
        sizes = {n for part in parts for n in part.sets}
        sets = {n: torch.cat([part.sets[n] for part in parts if n in part.sets]) for n in sorted(sizes)}
        return Calls(cells, times, biases.pop(), sets)


def decode_calls(
    alignment: Alignment, policy: Policy, *, prompt: int, block_size: int, new_tokens: int, context: int
) -> Calls:
    """A dry run of decoding `new_tokens` after a prompt of `prompt` tokens, the last block cut where the context ends.

    Where a policy's counts are fixed the masks left are known; else every number that it may find is counted once. The
    order is known where it does not depend on the model.
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
        return policy.possible(n).double()

    calls = _of_blocks(alignment, torch.tensor(blocks), torch.ones(len(blocks), dtype=torch.float64), asked)
    return replace(calls, left_bias=policy.left_bias)


def grid_calls(
    alignment: Alignment, spans: Mapping[tuple[int, int, int], int], block_size: int, left_bias: float = 0.0
) -> Calls:
    """An evaluation on a grid: one call for each block, every number of masks equally often.

    spans: how many there are of (given tokens before, scored tokens, tokens of the shortened first block); left_bias:
    of the order whose bound is measured.
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

    return replace(_of_blocks(alignment, blocks, times, asked), left_bias=left_bias)


def traced_calls(
    alignment: Alignment, *, prompt: int, block_size: int, context: int, blocks: Sequence[int], steps: Sequence[int]
) -> Calls:
    """The calls that an output was made with: its `blocks` (tokens delivered of each) and `steps` (of each token).

    The steps tell which tokens were masked at each call. Of a block that ended early only the first call is known, and
    only that is counted.
    """
    seen: Counter[tuple[int, int, int]] = Counter()
    sets: dict[int, list[Tensor]] = {}
    at = 0
    for delivered in blocks:
        size = min(block_size, context - prompt - at)
        filled = steps[at : at + delivered]
        n = masks_of(alignment, size)
        if n < size:
            seen[prompt + at, 1, 0] += 1
        last = max(filled, default=0) if delivered == size else 1
        masked = torch.ones(min(last, 1), n, dtype=torch.bool)
        if last > 1:
            masked = torch.tensor(filled[size - n :]) >= torch.arange(1, last + 1)[:, None]
        if n:
            seen.update((prompt + at, size, k) for k in masked.sum(1).tolist())
            sets.setdefault(n, []).append(masked)
        at += delivered
    cells = torch.tensor(list(seen), dtype=torch.int64).view(-1, 3)
    calls = _calls(cells, torch.tensor(list(seen.values()), dtype=torch.float64))
    return replace(calls, sets={n: torch.cat(rows) for n, rows in sets.items()})


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
