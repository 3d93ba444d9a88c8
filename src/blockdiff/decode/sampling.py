"""Tokens from logits: temperature, top-k and top-p, by inverse transform in float64.

Low-precision Gumbel noise lowers the effective temperature (arXiv 2409.02908); here one uniform number in float64 picks
each token from the exact distribution. The number is a function of the request's seed and the token's absolute
position, not of the step: a position that is proposed again at a later step meets the same number, so a confidence
policy cannot re-roll a position until something likely comes up.

Shapes: R rows, n positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens. temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature {self.temperature} is out of range; give a number from 0 (greedy) to 100")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative; give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is out of range; give a number above 0 and at most 1 (off)")


@dataclass(frozen=True)
class SamplingBatch:
    """The settings of R rows as tensors [R, 1, 1]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    filtered: bool
    sampled: bool

    @staticmethod
    def of(settings: Sequence[Sampling], device: torch.device | str = "cpu") -> SamplingBatch:
        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None, None]

        return SamplingBatch(
            temperature=column([s.temperature for s in settings], torch.float64),
            top_k=column([s.top_k or 1 << 40 for s in settings], torch.int64),
            top_p=column([s.top_p for s in settings], torch.float64),
            filtered=any(s.top_k > 0 or s.top_p < 1 for s in settings),
            sampled=any(s.temperature > 0 for s in settings),
        )

    def select(self, rows: Tensor) -> SamplingBatch:
        return SamplingBatch(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.filtered, self.sampled)


def propose(logits: Tensor, u: Tensor, settings: SamplingBatch) -> tuple[Tensor, Tensor]:
    """A token for every position, and the raw probability of that token.

    logits [R, n, V], u [R, n] in (0, 1). Returns tokens int64 [R, n] and their probability [R, n] under the softmax of
    the logits as they are: after a temperature or a filter every choice would look certain.
    """
    greedy = logits.argmax(-1)
    tokens = greedy
    if settings.sampled:
        drawn = _draw(logits.double(), u, settings)
        tokens = torch.where(settings.temperature[..., 0] > 0, drawn, greedy)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return tokens, (chosen - logits.logsumexp(-1)).exp()


def _draw(logits: Tensor, u: Tensor, settings: SamplingBatch) -> Tensor:
    probability = (logits / settings.temperature.clamp(min=1e-6)).softmax(-1)
    if settings.filtered:
        ordered, order = torch.sort(probability, dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        rank = torch.arange(logits.shape[-1], device=logits.device)
        kept = (before < settings.top_p) & (rank < settings.top_k)
        # back in vocabulary order, so that a number picks the same token whether or not its neighbours filter
        probability = probability * torch.zeros_like(kept).scatter(-1, order, kept)
    cumulated = probability.cumsum(-1)
    target = u.to(cumulated.dtype)[..., None] * cumulated[..., -1:]
    return torch.searchsorted(cumulated, target, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
