"""Exact likelihood of the random-order sampler, from the losses of every mask set of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdiff.masking import Corruption, place_in_block


class RandomOrder:
    """-log p of all blocks of a batch at once, from the enumerated losses.

    log P(S) = logsumexp over i in S of [log P(S - i) + log f(x_i | x_{S - i}) + log P(i is next)], S the revealed set,
    with P(i is next) = a_i / sum of a over what is masked, a_i = exp(-left_bias * slot).
    """

    def __init__(self, block: Tensor, left_bias: float) -> None:
        self.block, self.left_bias = block, left_bias
        self.size = torch.bincount(block)
        self.place = place_in_block(block)
        self.widest = int(self.size.max()) if len(block) else 0
        shape = (len(self.size), 2**self.widest, self.widest)
        self.losses = torch.zeros(shape, dtype=torch.float64, device=block.device)

    def note(self, corruption: Corruption, losses: Tensor) -> None:
        """Losses of the masked tokens of one enumerated mask set."""
        masked = corruption.masked
        block, place = self.block[masked], self.place[masked]
        which = torch.zeros_like(self.size).index_add(0, block, torch.ones_like(place) << place)
        self.losses[block, which[block], place] = losses.double()

    def nll(self) -> Tensor:
        """-log p of each block: float64 [blocks]."""
        full = (1 << self.size) - 1
        rows = torch.arange(len(self.size), device=self.block.device)
        slot = torch.arange(self.widest, device=self.block.device)
        pull = torch.where(slot < self.size[:, None], -self.left_bias * slot.double(), -torch.inf)
        log_p = torch.full(self.losses.shape[:2], -torch.inf, dtype=torch.float64, device=self.block.device)
        log_p[:, 0] = 0
        for known in range(1, 2**self.widest):
            members = [i for i in range(self.widest) if known >> i & 1]
            ways = []
            for i in members:
                before = known ^ (1 << i)
                masked = pull.masked_fill((before >> slot) & 1 == 1, -torch.inf)
                next_is_i = pull[:, i] - masked.logsumexp(1)
                ways.append(log_p[:, before] - self.losses[rows, full & ~before, i] + next_is_i)
            log_p[:, known] = torch.logsumexp(torch.stack(ways), 0)
        return -log_p[rows, full]
