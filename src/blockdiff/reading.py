"""Only what is read is computed: the head runs on rows whose logits somebody reads, and so does the last layer.

Of the last decoder layer the other rows give keys and values alone. A hook first runs the layer until its attention has
them and stops there; then the layer goes on with the read rows, whose queries meet those keys. This knows nothing of
any architecture: where a layer or what follows it does not allow it, `probe` finds logits that differ (or an error) and
the layer runs whole. The same hook on the head finds out whether the logits are exactly the head's output.

Shapes: B rows, T tokens of the pass, R rows of logits that are read, S slots of a row that are read (at most).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockdiff.masks import KeysAndValues, KeysTaken, Visibility

_WORTH = 0.8  # share of the rows that are read above which the layer runs whole


@dataclass(frozen=True)
class ReadSlots:
    """Which slots of a pass are read: slots [B, S] of each row (shorter rows repeat a slot), and where in the
    flattened [B * S] each of the reads lies, index [R]."""

    slots: Tensor
    index: Tensor

    @staticmethod
    def of(read: Tensor, rows: int, length: int) -> ReadSlots:
        """read [R]: indices into the flattened [rows * length] tokens, in any order, repeated or not."""
        chosen, inverse = read.unique(return_inverse=True)
        row = chosen // length
        count = torch.bincount(row, minlength=rows)
        place = torch.arange(len(chosen), device=read.device) - (count.cumsum(0) - count)[row]
        width = max(int(count.max()), 1)
        slots = torch.zeros(rows, width, dtype=torch.int64, device=read.device)
        slots[row, place] = chosen % length
        return ReadSlots(slots, (row * width + place)[inverse])


class Reading:
    """Hooks on the head and on the last layer of a network, and what they were found able to do.

    narrows: the last layer may run for read rows alone. plain_head: the logits are the head's output and nothing else.
    Both are False until `probe` has seen them hold.
    """

    def __init__(self, backbone: PreTrainedModel, head: nn.Module) -> None:
        self.narrows = self.plain_head = False
        self.head = head
        self.last_layer = _last_layer(backbone)
        self._read: Tensor | None = None
        self._slots: Tensor | None = None
        self._stop = False
        self._hidden: Tensor | None = None
        head.register_forward_pre_hook(self._before_head)
        if self.last_layer is not None:
            self.last_layer.register_forward_pre_hook(self._before_last_layer, with_kwargs=True)

    @contextmanager
    def only(self, read: Tensor | None, shape: torch.Size, *, narrow: bool, stop: bool = False) -> Iterator[None]:
        """Within, a pass over `shape` = [B, T] tokens gives logits [1, R, V] of the rows `read` alone (None: all).

        narrow: so does the last layer, where that pays; stop: the head gets no rows, and `hidden` has them.
        """
        if narrow and self.narrows and read is not None and read.numel():
            found = ReadSlots.of(read, *shape)
            if found.slots.shape[1] <= _WORTH * shape[1]:
                self._slots, read = found.slots, found.index
        self._read, self._stop = read, stop
        try:
            yield
        finally:
            self._read = self._slots = self._hidden = None
            self._stop = False

    @property
    def hidden(self) -> Tensor:
        """The read rows that the head was kept from, [R, H]."""
        assert self._hidden is not None
        return self._hidden

    def _before_head(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._read is None:
            return None
        hidden, *rest = inputs
        rows = hidden.flatten(0, 1)[self._read]
        if self._stop:
            self._hidden, rows = rows, rows[:0]
        return (rows[None], *rest)

    def _before_last_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._slots is None:
            return None
        slots, seen = self._slots, kwargs["visibility"]
        assert isinstance(seen, Visibility)
        held = KeysAndValues()
        with suppress(KeysTaken):
            layer.forward(*args, **{**kwargs, "visibility": seen.holding(held)})
        narrowed = seen.holding(held, slots)
        batch, length = seen.query.shape
        args, kwargs = (_take(values, slots, batch, length) for values in (args, kwargs))
        return args, {**kwargs, "visibility": narrowed}


def _take(values: Any, slots: Tensor, batch: int, length: int) -> Any:
    """The slots [B, S] of every tensor [B or 1, T, ...] within nested arguments."""
    if isinstance(values, dict):
        return {name: _take(value, slots, batch, length) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_take(value, slots, batch, length) for value in values)
    if not isinstance(values, Tensor) or values.ndim < 2 or values.shape[1] != length:
        return values
    if values.shape[0] not in (1, batch):
        return values
    rows = torch.arange(batch, device=slots.device)[:, None] if values.shape[0] == batch else 0
    return values[rows, slots]


def _last_layer(backbone: PreTrainedModel) -> nn.Module | None:
    """The last element of the one list of modules that has an attention layer, numbered, in each of its elements."""
    count = int(getattr(backbone.config.get_text_config(decoder=True), "num_hidden_layers", 0))
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    last = [
        stack[-1] for stack in stacks if any(getattr(m, "layer_idx", None) == count - 1 for m in stack[-1].modules())
    ]
    return last[0] if len(last) == 1 else None
