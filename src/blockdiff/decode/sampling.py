"""Tokens from logits: temperature, top-k and top-p, by the Gumbel-max trick in float64.

A token is argmax(log p + g) with Gumbel noise g, one number for every (request seed, absolute position, token). It does
not depend on the step: a position that is proposed again meets the same noise, so a confidence policy cannot
re-roll a position until something likely comes up. And because it is shared, two distributions p and q draw the same
token with probability at least (1 - TV) / (1 + TV) (arXiv 2408.07978), which is what lossless decoding lives on; one
uniform number through both inverse distribution functions does far worse. Low-precision Gumbel noise lowers the
effective temperature (arXiv 2409.02908), hence float64.

Shapes: R rows, n positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.decode.blocks import TOKEN
from blockdiff.rng import uniform


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


def gumbel(seed: Tensor, place: Tensor, vocabulary: int) -> Tensor:
    """The noise of positions place [R, n] in requests with these seeds [R]: float64 [R, n, V]."""
    tokens = torch.arange(vocabulary, device=place.device)
    return -(-uniform(seed[:, None, None], TOKEN, place[..., None], tokens).log()).log()


def propose(logits: Tensor, noise: Tensor | None, settings: SamplingBatch) -> Tensor:
    """A token for every position, int64 [R, n]: logits [R, n, V], noise [R, n, V] (None where nobody samples)."""
    greedy = logits.max(-1).indices  # three times as fast as argmax on a CPU, and the first of equals as well
    if noise is None or not settings.sampled:
        return greedy
    scaled = logits.double() / settings.temperature.clamp(min=1e-6)
    if settings.filtered:
        scaled = torch.where(_kept(scaled, settings), scaled, -torch.inf)
    return torch.where(settings.temperature[..., 0] > 0, (scaled + noise).max(-1).indices, greedy)


def log_law(logits: Tensor, settings: SamplingBatch) -> Tensor:
    """Log-probabilities that `propose` samples from, float64 [R, n, V]; at temperature 0 all on the likeliest token."""
    scaled = logits.double() / settings.temperature.clamp(min=1e-6)
    if settings.filtered:
        scaled = torch.where(_kept(scaled, settings), scaled, -torch.inf)
    return scaled.log_softmax(-1)


def _kept(scaled: Tensor, settings: SamplingBatch) -> Tensor:
    """Tokens that top-k and top-p leave, bool [R, n, V]; the likeliest always."""
    ordered, order = torch.sort(scaled.softmax(-1), dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    kept = (before < settings.top_p) & (rank < settings.top_k)
    return torch.zeros_like(kept).scatter(-1, order, kept)
