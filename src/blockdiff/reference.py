"""The slow truth: what every fast path must equal. Short, one block at a time, no cache, no packing, no batching.

A model is here any function `denoise(ids, positions, sees) -> logits`: ids [T] (ints), positions [T], sees [T, T]
(True: the row's token may look at the column's token), logits [T, V]. The [MASK] column must be -inf.

A block of a document is described by `Block`: the clean tokens before it, and its own tokens. All losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from math import comb, exp, log
from typing import Any

import torch
from torch import Tensor

from blockdiff.cross_entropy import cross_entropy
from blockdiff.layout import Layout, TokenMap
from blockdiff.masks import CleanContext, visible
from blockdiff.objectives import Alignment

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# (logits [n, V], masked places, position of the block's first token, step) -> {place: token} to fill now
Choose = Callable[[Tensor, list[int], int, int], dict[int, int]]


@dataclass(frozen=True)
class Block:
    """One block to be denoised: `prefix` clean tokens, fallen into `parts` (for a block-causal clean context)."""

    prefix: tuple[int, ...]
    parts: tuple[int, ...]
    tokens: tuple[int, ...]


def textbook(network: Callable[..., Any], clean_context: CleanContext, mask_id: int | None) -> Callable[..., Tensor]:
    """A network under the textbook two-stream step, called as `BlockDiffusionModel` is when it trains.

    One dense mask [B, 1, T, T] is handed to the network's own attention, and every slot has its logits (BD3-LM's way,
    arXiv 2503.09573, and that of the public implementations). For networks without sliding windows, whose attention
    takes a boolean mask (transformers' `sdpa`). Both streams are in one pass, asked for `apart` or not.
    """

    def losses(
        ids: Tensor,
        tokens: TokenMap,
        *,
        read: Tensor,
        target: Tensor,
        annealing: Any = None,
        apart: bool = False,
    ) -> Tensor:
        sees = visible(tokens[:, :, None], tokens[:, None, :], clean_context, annealing=annealing)[:, None]
        output = network(input_ids=ids, position_ids=tokens.position, attention_mask=sees, use_cache=False)
        logits = output.logits
        if mask_id is not None:
            logits = logits.index_fill(-1, torch.tensor([mask_id], device=ids.device), -torch.inf)
        return cross_entropy(logits.flatten(0, 1)[read], target)

    return losses


def blocks(ids: Sequence[int], layout: Layout) -> Iterator[Block]:
    """The blocks of a document; prompt tokens are parts of one token each."""
    at, parts = layout.prompt, (1,) * layout.prompt
    for size in layout.blocks:
        yield Block(tuple(ids[:at]), parts, tuple(ids[at : at + size]))
        at, parts = at + size, (*parts, size)


@dataclass(frozen=True)
class Reference:
    """The reference computations for one model and its conventions."""

    denoise: Denoise
    mask_id: int
    alignment: Alignment = Alignment()  # noqa: RUF009 - frozen
    clean_context: CleanContext = "context_causal"
    left_bias: float = 0.0  # of the reveal order; 0: uniform

    def losses(self, block: Block, masked: Sequence[int]) -> dict[int, Tensor]:
        """-log f of each masked place (0 = the block's first token), given the prefix and the unmasked tokens."""
        logits = self.block_logits(block, masked)
        return {i: -torch.log_softmax(logits[i], -1)[block.tokens[i]] for i in masked}

    def block_logits(self, block: Block, masked: Sequence[int]) -> Tensor:
        """Logits [n, V], row i predicting the block's token i, with the places `masked` hidden."""
        size, before = len(block.tokens), len(block.prefix)
        shown = [self.mask_id if i in masked else token for i, token in enumerate(block.tokens)]
        if self.alignment.seeded:  # the block begins one token earlier, with the last clean token in its first slot
            shown, first = [block.prefix[-1], *shown[:-1]], before - 1
        else:
            first = before
        ids = torch.tensor([*block.prefix, *shown])
        positions = torch.cat([torch.arange(before), torch.arange(first, first + size)])
        sees = torch.zeros(before + size, before + size, dtype=torch.bool)
        for q in range(before):
            for k in range(before):
                sees[q, k] = self._clean_sees(block.parts, q, k)
        sees[before:, :first] = True
        sees[before:, before:] = True
        logits = self.denoise(ids, positions, sees)
        if self.alignment.seeded or not self.alignment.shift:
            return logits[before:]
        return torch.cat([self.next_logits(block.prefix, block.parts)[None], logits[before:-1]])

    def next_logits(self, prefix: Sequence[int], parts: Sequence[int]) -> Tensor:
        """Logits [V] of the token after a clean prefix, from the clean stream alone (the AR reading)."""
        count = len(prefix)
        sees = torch.zeros(count, count, dtype=torch.bool)
        for q in range(count):
            for k in range(count):
                sees[q, k] = self._clean_sees(parts, q, k)
        return self.denoise(torch.tensor(prefix), torch.arange(count), sees)[-1]

    def places(self, block: Block) -> list[int]:
        """Places of the block that noise may mask: all, but the first where it is known before denoising begins."""
        return list(range(1 if self.alignment.first_is_clean else 0, len(block.tokens)))

    def first_loss(self, block: Block) -> Tensor | float:
        """The AR term of a block's first token, where that token is not denoised."""
        if not self.alignment.first_is_clean:
            return 0.0
        return -torch.log_softmax(self.next_logits(block.prefix, block.parts), -1)[block.tokens[0]]

    def nelbo(self, block: Block) -> Tensor:
        """The block's bound by enumeration: sum over k of (1/k) mean over |M| = k of the masked losses."""
        if self.left_bias:
            return self.order_average(block)
        places = self.places(block)
        total = torch.zeros((), dtype=torch.float64) + self.first_loss(block)
        for k in range(1, len(places) + 1):
            for masked in combinations(places, k):
                loss = sum(self.losses(block, masked).values(), torch.zeros(()))
                total = total + loss / (k * comb(len(places), k))
        return total

    def order_average(self, block: Block) -> Tensor:
        """The same bound, from its definition: the mean over reveal orders of the chain's loss."""
        places = self.places(block)
        total = torch.zeros((), dtype=torch.float64) + self.first_loss(block)
        for order in permutations(places):
            chance, loss = 1.0, torch.zeros((), dtype=torch.float64)
            for at, i in enumerate(order):
                chance *= self.reveal_chance(i, order[at:])
                loss = loss + self.losses(block, order[at:])[i]
            total = total + chance * loss
        return total

    def reveal_chance(self, i: int, masked: Sequence[int]) -> float:
        """P(place i is revealed next): proportional to exp(-left_bias * i) among the masked places."""
        return exp(-self.left_bias * i) / sum(exp(-self.left_bias * j) for j in masked)

    def random_order_nll(self, block: Block) -> Tensor:
        """Exact -log p of the sampler that reveals one random token after another, by `reveal_chance`.

        P(S) = sum over i in S of P(S - i) f(x_i | x_{S - i}) P(i is next), with S the revealed set.
        """
        places = self.places(block)
        count = len(places)
        log_p: dict[frozenset[int], Tensor] = {frozenset(): torch.zeros((), dtype=torch.float64)}
        for revealed in range(count):
            reached: dict[frozenset[int], list[Tensor]] = {}
            for known in map(frozenset, combinations(places, revealed)):
                masked = [i for i in places if i not in known]
                for i, loss in self.losses(block, masked).items():
                    step = log_p[known] - loss + log(self.reveal_chance(i, masked))
                    reached.setdefault(known | {i}, []).append(step)
            log_p.update({known: torch.logsumexp(torch.stack(ways), 0) for known, ways in reached.items()})
        return self.first_loss(block) - log_p[frozenset(places)]

    def document(self, ids: Sequence[int], layout: Layout, measure: Callable[[Block], Tensor]) -> Tensor:
        """A block's measure (`nelbo`, `random_order_nll`) summed over a document."""
        return torch.stack([measure(block) for block in blocks(ids, layout)]).sum()

    def generate(self, prompt: Sequence[int], sizes: Sequence[int], choose: Choose) -> list[int]:
        """Decode block after block, recomputing everything at every step; `choose` says what to fill."""
        ids, parts = list(prompt), (1,) * len(prompt)
        for size in sizes:
            block, start = Block(tuple(ids), parts, (self.mask_id,) * size), len(ids)
            masked = list(range(size))
            step = 0 if self.alignment.first_is_clean else 1
            while masked:
                ready = masked if step else [0]  # a first token known from the prefix comes before any denoising
                chosen = choose(self.block_logits(block, masked), ready, start, step)
                block = replace(block, tokens=tuple(chosen.get(i, token) for i, token in enumerate(block.tokens)))
                masked = [i for i in masked if i not in chosen]
                step += 1
            ids, parts = [*ids, *block.tokens], (*parts, size)
        return ids[len(prompt) :]

    def _clean_sees(self, parts: Sequence[int], query: int, key: int) -> bool:
        if self.clean_context == "context_causal":
            return key <= query
        part = [number for number, size in enumerate(parts) for _ in range(size)]
        return part[key] <= part[query]
