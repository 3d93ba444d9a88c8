"""Decoders without a model in the way: sources whose exact conditionals are the denoiser.

With an exact denoiser whatever separates a decoder's output law from the source is the decoder's own doing: filling
several positions at once, or choosing them by what they hold. (The distributional test of arXiv 2602.19619.)

Shapes: R rows, n positions, V symbols, K hidden states, N = V^n outcomes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from blockdiff.data import Document
from blockdiff.decode import MASK, OpenBlocks, Policy, Sampling, SamplingBatch, gumbel, propose
from blockdiff.distributions import Fixed
from blockdiff.layout import TokenMap
from blockdiff.masks import visible
from blockdiff.model import Spec
from blockdiff.objectives import Alignment


class Source(ABC):
    """A distribution over strings of n symbols, with the exact law of every position given any others."""

    symbols: int

    @abstractmethod
    def log_conditionals(self, ids: Tensor, known: Tensor) -> Tensor:
        """log P(x_i = v | the known positions), float64 [R, n, V]; ids int64 [R, n], known bool [R, n]."""

    @abstractmethod
    def law(self, n: int) -> Tensor:
        """Probabilities of all strings of n symbols in lexicographic order, float64 [N]."""


@dataclass(frozen=True)
class Table(Source):
    """A tabulated joint distribution: probability float64 [V] * n."""

    probability: Tensor

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.probability.shape[0]

    def law(self, n: int) -> Tensor:
        return self.probability.flatten()

    def log_conditionals(self, ids: Tensor, known: Tensor) -> Tensor:
        n, v = self.probability.dim(), self.symbols
        outcomes = torch.tensor(list(product(range(v), repeat=n)))
        fits = ((outcomes[None] == ids[:, None]) | ~known[:, None]).all(-1)  # [R, N]
        mass = fits * self.probability.flatten()
        marginals = torch.stack(
            [torch.stack([(mass * (outcomes[:, i] == s)).sum(1) for s in range(v)], 1) for i in range(n)], 1
        )
        return (marginals / marginals.sum(-1, keepdim=True)).log()


@dataclass(frozen=True)
class HiddenMarkov(Source):
    """A hidden Markov source: start float64 [K], move [K, K], emit [K, V], rows of each summing to 1."""

    start: Tensor
    move: Tensor
    emit: Tensor

    @staticmethod
    def random(states: int, symbols: int, seed: int, sharpness: float = 2.0) -> HiddenMarkov:
        """A random source; the sharper, the more its neighbours tell about one another."""
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, width: int) -> Tensor:
            return (torch.randn(count, width, generator=generator, dtype=torch.float64) * sharpness).softmax(-1)

        return HiddenMarkov(rows(1, states)[0], rows(states, states), rows(states, symbols))

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.emit.shape[1]

    def law(self, n: int) -> Tensor:
        forward = self.start[None]
        for at in range(n):
            joint = forward[:, :, None] * self.emit[None]
            forward = (joint.transpose(1, 2).reshape(-1, len(self.start))) @ (self.move if at < n - 1 else self._one())
        return forward.sum(-1)

    def _one(self) -> Tensor:
        return torch.ones(len(self.start), 1, dtype=torch.float64)

    def log_conditionals(self, ids: Tensor, known: Tensor) -> Tensor:
        n = ids.shape[1]
        seen = torch.where(known[..., None], self.emit.T[ids], 1.0)  # [R, n, K]: likelihood of what is known
        before = [self.start.expand(len(ids), -1)]
        for at in range(n - 1):
            before.append(_normalised((before[-1] * seen[:, at]) @ self.move))
        after = [torch.ones_like(before[0])]
        for at in range(n - 1, 0, -1):
            after.append(_normalised((after[-1] * seen[:, at]) @ self.move.T))
        after.reverse()
        state = torch.stack(before, 1) * torch.stack(after, 1)
        own = state[..., None] * self.emit
        law = own.sum(2)
        chosen = torch.zeros_like(law).scatter(-1, ids[..., None], 1.0)
        return torch.where(known[..., None], chosen, law / law.sum(-1, keepdim=True)).log()


@dataclass(frozen=True)
class Decoded:
    """Strings that a policy wrote: ids int64 [R, n], and the mean number of steps it took."""

    ids: Tensor
    steps: float


@torch.inference_mode()
def decode(source: Source, policy: Policy, n: int, rows: int, *, temperature: float = 1.0, seed: int = 0) -> Decoded:
    """Let a policy write `rows` strings of n symbols, each in one block, with the source as the denoiser."""
    place = torch.arange(n).expand(rows, -1)
    seeds = torch.arange(rows) + seed * 1_000_003
    blocks = OpenBlocks.open(torch.zeros(rows, n, dtype=torch.int64), torch.full((rows, n), MASK), place, seeds)
    noise = gumbel(seeds, place, source.symbols)
    settings = SamplingBatch.of([Sampling(temperature)])
    final, steps = torch.zeros(rows, dtype=torch.bool), 0
    while not bool(final.all()):
        logits = source.log_conditionals(blocks.ids, ~blocks.masked)
        if policy.reviser is not None:
            noise = gumbel(seeds, blocks.draws, source.symbols)
        after, done = policy.step(blocks, logits, partial(propose, noise=noise, settings=settings))
        steps += int((~final).sum())
        blocks = after.unless(final, blocks)
        final = final | done
    return Decoded(blocks.ids, steps / rows)


def outcome_share(ids: Tensor, symbols: int) -> Tensor:
    """How often each string came, float64 [N], in lexicographic order."""
    weight = symbols ** torch.arange(ids.shape[1] - 1, -1, -1)
    return torch.bincount((ids * weight).sum(1), minlength=symbols ** ids.shape[1]).double() / len(ids)


def total_variation(first: Tensor, second: Tensor) -> float:
    """Half the summed absolute difference of two laws."""
    return float((first - second).abs().sum() / 2)


def sampling_distance(law: Tensor, rows: int) -> float:
    """The total variation that `rows` independent draws of the law itself are expected to show, to first order."""
    return float((law * (1 - law) / rows).sqrt().sum() * (2 / torch.pi) ** 0.5 / 2)


def _normalised(weight: Tensor) -> Tensor:
    return weight / weight.sum(-1, keepdim=True)


class OracleModel(nn.Module):
    """A source in the place of a trained model, for `evaluate.bound`: its bounds are the source's own entropy.

    Symbols are tokens 0 .. V - 1, a document begins with token V (given), and token V + 1 is [MASK].
    """

    def __init__(self, source: Source, length: int, alignment: Alignment = Alignment("same")) -> None:  # noqa: B008
        super().__init__()
        self.source, self.length = source, length
        self.vocabulary = source.symbols + 2
        self.context_length = length + 1
        self.device = torch.device("cpu")
        self.spec = Spec(mask_id=source.symbols + 1, alignment=alignment, layout=Fixed(1), trained_length=length + 1)

    def forward(self, ids: Tensor, tokens: TokenMap, *, read: Tensor, target: Tensor) -> Tensor:
        """-log P(target | what the slot `read` sees), float64 [R], by the rule of visibility."""
        row, slot = read // ids.shape[1], read % ids.shape[1]
        sees = visible(tokens[row, slot][:, None], tokens[row], self.spec.clean_context)
        shown = ids[row]
        sees &= (shown < self.source.symbols) & (tokens.position[row] > 0)
        place = torch.where(sees, tokens.position[row] - 1, self.length)  # the rest falls into a column that is cut off
        known = torch.zeros(len(read), self.length + 1, dtype=torch.bool).scatter(1, place, sees)[:, :-1]
        found = torch.zeros(len(read), self.length + 1, dtype=torch.int64)
        found = found.scatter(1, place, torch.where(sees, shown, 0))[:, :-1]
        wanted = tokens.position[row, slot] - 1 + int(self.spec.alignment.shift)
        losses = self.source.log_conditionals(found, known)
        return -losses[torch.arange(len(read)), wanted, target]

    def document(self, ids: Tensor, name: str) -> Document:
        """A string of symbols [n] as a document."""
        given = np.zeros(len(ids) + 1, dtype=np.bool_)
        given[0] = True
        whole = np.concatenate([[self.source.symbols], ids.numpy()]).astype(np.int32)
        return Document(whole, given, name, len(ids))


def sample(source: Source, n: int, rows: int, seed: int) -> Tensor:
    """Independent strings of n symbols from the source's law: int64 [rows, n]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(source.law(n), rows, replacement=True, generator=generator)
    powers = source.symbols ** torch.arange(n - 1, -1, -1)
    return drawn[:, None] // powers % source.symbols


def entropy(source: Source, n: int) -> float:
    """Entropy of strings of n symbols, in nats."""
    law = source.law(n)
    return float(-(law * law.clamp(min=1e-300).log()).sum())
