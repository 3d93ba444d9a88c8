"""What a policy changes around the network: the logits it reads, and what masked positions are fed.

Shapes: R rows, n slots, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.decode.blocks import OpenBlocks, View
from blockdiff.decode.parts import Part, fraction, positive


class LogitChange(Part, ABC):
    """A change of the raw logits before anything is proposed or scored, [R, n, V] -> [R, n, V]."""

    everywhere = True

    @abstractmethod
    def __call__(self, blocks: OpenBlocks, logits: Tensor, unconditional: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Credit(LogitChange):
    """A token that keeps being the likeliest of its position gains credit: logits + scale * log(1 + C), where
    C <- decay * C, then C[argmax] += p_max^power at masked positions (dInfer, arXiv 2510.08666).

    C here is this step's own, updated before it is read, as in the published code. It is kept dense, [R, n, V].
    """

    scale: float = 0.7
    decay: float = 0.8
    power: float = 0.2
    name = "credit"

    def __post_init__(self) -> None:
        positive(self, scale=self.scale, power=self.power)
        fraction(self, decay=self.decay)

    def __call__(self, blocks: OpenBlocks, logits: Tensor, unconditional: Tensor | None) -> Tensor:
        return logits + self.scale * self._credit(blocks, logits).log1p()

    def _credit(self, blocks: OpenBlocks, logits: Tensor) -> Tensor:
        value, token = logits.max(-1, keepdim=True)
        gain = (value - logits.logsumexp(-1, keepdim=True)).exp() ** self.power * blocks.masked[..., None]
        return (blocks.recalled("credit", torch.zeros_like(logits)) * self.decay).scatter_add(-1, token, gain)

    def remember_raw(self, before: OpenBlocks, after: OpenBlocks, logits: Tensor) -> OpenBlocks:
        """The blocks after a step with the credit that the logits read before it leave."""
        return after.remember("credit", self._credit(before, logits))


@dataclass(frozen=True)
class Guidance(LogitChange):
    """Classifier-free guidance: l_u + (scale + 1) * (l - l_u), the unconditional branch reading a prompt of [MASK]
    (LLaDA, arXiv 2502.09992). It costs a second forward for every forward."""

    scale: float = 1.0
    name = "guidance"
    needs = frozenset({"unconditional"})

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"policy: guidance: scale {self.scale} is negative; give 0 (off) or more")

    def __call__(self, blocks: OpenBlocks, logits: Tensor, unconditional: Tensor | None) -> Tensor:
        assert unconditional is not None
        mixed = unconditional + (self.scale + 1) * (logits - unconditional)
        return torch.where(torch.isfinite(logits), mixed, logits)


@dataclass(frozen=True)
class Soft(Part):
    """Masked positions are fed (1 - w) * e_mask + w * sum of the last step's top tokens' embeddings, w = scale *
    sigmoid(steep * (-H - centre)), H the last step's entropy (soft-masked inputs, arXiv 2510.17206).

    The paper learns scale, steep and centre; these are its starting values with a scale that does something, and a
    model that was not trained so is only asked for more than it knows.
    """

    scale: float = 0.3
    steep: float = 10.0
    centre: float = -0.75
    top: int = 3
    everywhere = True
    name = "soft"

    def __post_init__(self) -> None:
        fraction(self, scale=self.scale)
        positive(self, top=self.top)

    def remember(self, view: View, blocks: OpenBlocks) -> OpenBlocks:
        value, token = view.log_probability.topk(min(self.top, view.logits.shape[-1]), dim=-1)
        weight = self.scale * torch.sigmoid(self.steep * (-view.entropy - self.centre))
        share = value.softmax(-1) * weight[..., None]
        return blocks.remember("soft_tokens", token).remember("soft_weights", share)

    @staticmethod
    def blend(blocks: OpenBlocks) -> tuple[Tensor, Tensor] | None:
        """Tokens and their weights [R, n, top], weights 0 at positions that are fed as they are; None at first."""
        if "soft_tokens" not in blocks.memory:
            return None
        fed = blocks.masked & (blocks.step > 0)[:, None]
        return blocks.memory["soft_tokens"], blocks.memory["soft_weights"] * fed[..., None]
