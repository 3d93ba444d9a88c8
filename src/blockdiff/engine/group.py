"""Rows that take their steps together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blockdiff.decode import OpenBlocks, Policy
from blockdiff.engine.constraint import Constrained


@dataclass
class Group:
    """Rows that share a policy and a constraint. rows int64 (None: all of the batch); final bool: blocks done."""

    policy: Policy
    rows: Tensor | None
    blocks: OpenBlocks
    final: Tensor
    constrained: Constrained | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This group's rows of a tensor of the whole batch."""
        return tensor if self.rows is None else tensor[self.rows]
