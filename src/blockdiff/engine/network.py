"""The network of a pass, without what Python adds to it.

At one token a pass most of the time of a small model goes into running Python: modules, hooks and keyword arguments of
some fifty small operations a layer. `torch.jit.trace` records those operations once, from transformers' own code, and
replays them without; the numbers are the same bit for bit. A trace is only good where the path through the code does
not depend on the numbers (a mixture of experts' does), which tracing itself reports; then, where the record does not
give what the code gives, and off the CPU, the code runs as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockdiff.attention import PagedVisibility
from blockdiff.engine.pages import Pages, Table
from blockdiff.engine.ragged import Piece, RaggedPass
from blockdiff.model import BlockDiffusionModel, Streams

WARM_UP = 24  # passes of a model before recording pays
_library = torch.library.Library("blockdiff", "DEF")
_library.define(
    "ragged_attention(Tensor query, Tensor key, Tensor value, int layer, int? window, float scale, float? softcap, "
    "Tensor? sinks) -> Tensor"
)


class _Current:
    """The pass that is running: a recorded operation can carry numbers and tensors, but no object."""

    seen: ClassVar[PagedVisibility | None] = None


def _ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    assert _Current.seen is not None
    return _Current.seen.attend(layer, query, key, value, window, scale, softcap, sinks)


_library.impl("ragged_attention", _ragged_attention, "CPU")


class _Recorded:
    """Stands for every pass in the record."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        out: Tensor = torch.ops.blockdiff.ragged_attention(query, key, value, layer, window, scale, softcap, sinks)
        return out


class _Pass(nn.Module):
    """What is recorded. The clean tokens are counted by the length of a tensor: a plain number would be recorded."""

    def __init__(self, model: BlockDiffusionModel, streams: Streams) -> None:
        super().__init__()
        self.model, self.streams = model, streams

    def forward(self, ids: Tensor, position: Tensor, read: Tensor, clean: Tensor) -> Tensor:
        return self.model.read_rows(ids, position, read, _Recorded(), self.streams, clean.shape[0])


@contextmanager
def prepared(model: BlockDiffusionModel) -> Iterator[None]:
    """A model as decoding wants it: in evaluation mode, adapters summed up, weights laid out for few tokens."""
    was_training = model.training
    model.eval()
    if model.adapter is not None:
        model.adapter.prepare()
    if model.device.type == "cpu" and model.dtype is torch.float32:
        _lay_out(model)
    try:
        yield
    finally:
        model.train(was_training)


def _lay_out(model: BlockDiffusionModel) -> None:
    """Weights of linear layers column by column, same numbers under the same shapes: a product of few tokens with them
    takes a third less time on a CPU, whose library would otherwise turn them round in every call."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.is_contiguous() and min(module.weight.shape) > 1:
            module.weight.data = module.weight.data.t().contiguous().t()


class Network:
    """Runs passes of a model; one for each model (`Network.of`), so that recordings are kept."""

    _known: ClassVar[WeakKeyDictionary[BlockDiffusionModel, Network]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.passes = 0
        self._records: dict[Any, Any] = {}

    @classmethod
    def of(cls, model: BlockDiffusionModel) -> Network:
        return cls._known.setdefault(model, cls())

    def run(
        self,
        model: BlockDiffusionModel,
        seen: RaggedPass,
        ids: Tensor,
        position: Tensor,
        read: Tensor,
        clean: int,
        blend: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits [R, V] at the slots `read` of the pack, of which the first `clean` tokens are clean ones."""
        self.passes += 1
        streams: Streams = "noisy" if clean == 0 else "clean" if clean == len(ids) else "both"
        record = None
        if blend is None and self.passes > WARM_UP and ids.device.type == "cpu":
            record = self._record(model, streams)
        if record is None:
            return model.read_rows(ids, position, read, seen, streams, clean, blend)
        _Current.seen = seen
        try:
            logits: Tensor = record(ids, position, read, ids[:clean])
        finally:
            _Current.seen = None
        return logits

    @staticmethod
    def _dtype(model: BlockDiffusionModel) -> torch.dtype:
        weight = model.backbone.get_input_embeddings().weight  # `model.dtype` asks every parameter
        assert isinstance(weight, Tensor)
        return weight.dtype

    def _record(self, model: BlockDiffusionModel, streams: Streams) -> Any:
        frozen = model.adapter is not None and model.adapter.frozen
        key = (streams if frozen else "noisy", model.adapter.version if model.adapter else None, self._dtype(model))
        if key not in self._records:
            self._records = {k: v for k, v in self._records.items() if k[1:] == key[1:]}
            self._records[key] = _recorded(model, streams)
        return self._records[key]


@torch.inference_mode()
def _recorded(model: BlockDiffusionModel, streams: Streams) -> Any:
    """The record of a model's pass; None where there can be none."""
    examples = [_example(model, streams, count) for count in (5, 3, 1 if streams != "both" else 2)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated names
            warnings.simplefilter("error", torch.jit._trace.TracerWarning)
            _Current.seen = examples[0][0]
            record = torch.jit.trace(_Pass(model, streams).eval(), examples[0][1], check_trace=False)
        for seen, inputs in examples:
            _Current.seen = seen
            if not torch.equal(record(*inputs), _plain(model, seen, inputs, streams)):
                return None
    except Exception:  # whatever keeps a model from being recorded, it runs without
        return None
    finally:
        _Current.seen = None
    return record


def _plain(model: BlockDiffusionModel, seen: RaggedPass, inputs: tuple[Tensor, ...], streams: Streams) -> Tensor:
    ids, position, read, clean = inputs
    return model.read_rows(ids, position, read, seen, streams, len(clean))


def _example(model: BlockDiffusionModel, streams: Streams, count: int) -> tuple[RaggedPass, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(model.vocabulary, (count,), generator=generator)
    clean = {"clean": count, "noisy": 0, "both": count // 2}[streams]
    pages = Pages(4)
    table = Table()
    pages.reserve(table, count)
    runs = [(0, clean, False), (clean, count - clean, True)]
    pieces = [Piece(table, at, size, noisy, "all" if noisy else "causal") for at, size, noisy in runs if size]
    seen = RaggedPass(pages, pieces, model.spec.clean_context, ids.device)
    return seen, (ids, torch.arange(count), torch.arange(0, count, 2), ids[:clean])
