"""What every layout distribution is, and how one of the user's own takes part in configurations and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Generator, Tensor

FORBID_EXTRA = {"extra": "forbid"}  # read by pydantic, which is not imported here


class LayoutDistribution(ABC):
    """Draws block starts for spans, and knows its own table of configurations."""

    kind: str
    __pydantic_config__ = FORBID_EXTRA

    @abstractmethod
    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        """Block starts, bool [S, max(lengths)], for spans of the given lengths [S]; a span's entry 0 is always True."""

    @abstractmethod
    def configurations(self, length: int) -> Tensor:
        """Expected number of blocks at (p, w) in a span of `length` tokens: float64 [length, length + 1]."""

    @property
    def largest_named(self) -> int:
        """The largest block size that the distribution names (1 where it names none)."""
        return 1

    def support(self, length: int) -> Tensor:
        """Configurations (p, w) that occur in a span of `length` tokens: bool [length, length + 1]."""
        return self.configurations(length) > 0

    def block_counts(self, length: int) -> Tensor:
        """Expected number of blocks of each size in a span of `length` tokens: float64 [length + 1]."""
        return self.configurations(length).sum(0)

    def token_share(self, length: int) -> Tensor:
        """Share of the tokens of a span of `length` that lie in blocks of each size: float64 [length + 1], sum 1."""
        return self.block_counts(length) * torch.arange(length + 1, dtype=torch.float64) / length


# A user's own distributions by the name that configurations and checkpoints call them.
OWN_LAYOUTS: dict[str, type[LayoutDistribution]] = {}


@dataclass(frozen=True)
class Own(LayoutDistribution):
    """A distribution that is no part of the library: `name` in `OWN_LAYOUTS`, made with `settings`.

    A program that trains with it, or reads a checkpoint that was trained with it, registers the class first; nothing
    is ever imported because a file names it. Raises ValueError for a name that is not registered, or for settings
    that the class does not take: it is tried out on a short span.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: Literal["own"] = "own"

    def __post_init__(self) -> None:
        if self.name not in OWN_LAYOUTS:
            known = f"registered are {', '.join(OWN_LAYOUTS)}" if OWN_LAYOUTS else "none is registered"
            raise ValueError(
                f"layout own: no distribution is called {self.name!r} in this program ({known}); put its class into "
                "blockdiff.own_layouts.OWN_LAYOUTS first"
            )
        try:
            self._try_out()
        except Exception as error:  # whatever the user's class raises, before anything is trained or replaced
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"layout own: {self.name} does not take these settings ({reason})") from error

    def _try_out(self) -> None:
        largest = self.distribution.largest_named
        if not isinstance(largest, int):
            raise TypeError(f"its largest block size would be {largest!r}")
        length = min(max(largest, 1), 64) + 1
        starts = self.distribution.draw(torch.tensor([length, 1]), Generator().manual_seed(0))
        if starts.shape != (2, length) or starts.dtype != torch.bool or not starts[:, 0].all():
            raise TypeError(f"draw gives no block starts, bool [2, {length}] that begin with True")
        table = self.distribution.configurations(length)
        if table.shape != (length, length + 1):
            raise TypeError(f"configurations gives no table [{length}, {length + 1}]")

    @cached_property
    def distribution(self) -> LayoutDistribution:
        return OWN_LAYOUTS[self.name](**self.settings)

    @property
    def largest_named(self) -> int:
        return self.distribution.largest_named

    def draw(self, lengths: Tensor, generator: Generator) -> Tensor:
        return self.distribution.draw(lengths, generator)

    def configurations(self, length: int) -> Tensor:
        return self.distribution.configurations(length)

    def support(self, length: int) -> Tensor:
        return self.distribution.support(length)

    def block_counts(self, length: int) -> Tensor:
        return self.distribution.block_counts(length)

    def token_share(self, length: int) -> Tensor:
        return self.distribution.token_share(length)
