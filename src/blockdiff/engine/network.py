"""The network of a pass, without what Python adds to it.

At one token a pass most of the time of a small model goes into running Python: modules, hooks and keyword arguments of
some fifty small operations a layer. `torch.jit.trace` records those operations once, from transformers' own code, and
replays them without; the numbers are the same bit for bit. A trace is only good where the path through the code does
not depend on the numbers (a mixture of experts' does), which tracing itself reports; then, where the record does not
give what the code gives, and off the CPU, the code runs as it is.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockdiff.attention import PagedVisibility, Scores
from blockdiff.engine.pack import Pack
from blockdiff.engine.pages import Pages, Table
from blockdiff.engine.ragged import RaggedPass, Segment
from blockdiff.model import BlockDiffusionModel, Streams

WARM_UP = 24  # passes of a model before recording pays
LAID_OUT = 250_000_000  # weights of linear layers that are kept a second time, laid out for products of few tokens
_library = torch.library.Library("blockdiff", "DEF")
_library.define(
    "ragged_attention(Tensor query, Tensor key, Tensor value, int layer, int? window, float scale, float? softcap, "
    "Tensor? sinks) -> Tensor"
)


class _Current(threading.local):
    """The pass that this thread runs: a recorded operation can carry numbers and tensors, but no object."""

    seen: PagedVisibility | None = None


_current = _Current()


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
    assert _current.seen is not None
    return _current.seen.attend(layer, query, key, value, Scores(scale, window, softcap, sinks))


_library.impl("ragged_attention", _ragged_attention, "CPU")


class _Recorded:
    """Stands for every pass in the record."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        how = (scores.window, scores.scale, scores.softcap, scores.sinks)
        out: Tensor = torch.ops.blockdiff.ragged_attention(query, key, value, layer, *how)
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
    """A model as decoding wants it: in evaluation mode, adapters summed up, records of other weights forgotten."""
    was_training = model.training
    model.eval()
    if model.adapter is not None:
        model.adapter.prepare()
    Network.of(model).refresh(model)
    try:
        yield
    finally:
        model.train(was_training)


class Network:
    """Runs passes of a model; one for each model (`Network.of`), so that recordings are kept."""

    _known: ClassVar[WeakKeyDictionary[BlockDiffusionModel, Network]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.passes = 0
        self._records: dict[Streams, Any] = {}
        self._of: tuple[Any, ...] = ()
        self._laid_out: dict[int, nn.Parameter] | None = None

    @classmethod
    def of(cls, model: BlockDiffusionModel) -> Network:
        return cls._known.setdefault(model, cls())

    def refresh(self, model: BlockDiffusionModel) -> None:
        """Forget what was recorded of other weights or another structure."""
        found = _fingerprint(model)
        if found != self._of:
            self._of, self._records = found, {}
            self._laid_out = {} if _worth_laying_out(model) else None

    def run(self, model: BlockDiffusionModel, pack: Pack) -> Tensor:
        """Logits [R, V] at the slots that the pack reads."""
        self.passes += 1
        record = None
        ready = self.passes > WARM_UP or self._laid_out is not None
        if pack.blend is None and ready and pack.ids.device.type == "cpu":
            record = self._record(model, pack.streams)
        if record is None:
            return model.read_rows(pack.ids, pack.position, pack.read, pack.seen, pack.streams, pack.clean, pack.blend)
        _current.seen = pack.seen
        try:
            logits: Tensor = record(pack.ids, pack.position, pack.read, pack.ids[: pack.clean])
        finally:
            _current.seen = None
        return logits

    def _record(self, model: BlockDiffusionModel, streams: Streams) -> Any:
        frozen = model.adapter is not None and model.adapter.frozen
        name: Streams = streams if frozen else "noisy"
        if name not in self._records:
            self._records[name] = _recorded(model, streams, self._laid_out)
        return self._records[name]


def _fingerprint(model: BlockDiffusionModel) -> tuple[Any, ...]:
    """What a record depends on: which tensors, how often they were changed, and what hangs on the modules."""
    tensors = [(id(t), t.data_ptr(), t.dtype, _version(t)) for t in (*model.parameters(), *model.buffers())]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return (*tensors, *hooks, model.adapter.version if model.adapter else None)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _worth_laying_out(model: BlockDiffusionModel) -> bool:
    """A second copy of the linear layers, column by column, is worth its memory where they are small."""
    size = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return model.device.type == "cpu" and model.dtype is torch.float32 and size <= LAID_OUT


@contextmanager
def _laid_out(model: BlockDiffusionModel, copies: dict[int, nn.Parameter] | None) -> Iterator[None]:
    """Within, linear layers have their weights column by column: the same numbers under the same shapes.

    A product of few tokens with them takes a third less time on a CPU, whose library would otherwise turn them round in
    every call. The model's own weights stay as they are.
    """
    held = []
    for module in model.modules() if copies is not None else ():
        if isinstance(module, nn.Linear) and min(module.weight.shape) > 1:
            assert copies is not None
            weight = module._parameters["weight"]
            assert weight is not None
            if id(weight) not in copies:
                copies[id(weight)] = nn.Parameter(weight.detach().t().contiguous().t(), requires_grad=False)
            held.append((module, weight))
            module._parameters["weight"] = copies[id(weight)]
    try:
        yield
    finally:
        for module, weight in held:
            module._parameters["weight"] = weight


@contextmanager
def _unheard() -> Iterator[None]:
    """Tracing asks modules for all that they have, and transformers warns of a loss that nobody computes."""
    log = logging.getLogger("transformers.modeling_utils")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@torch.inference_mode()
def _recorded(model: BlockDiffusionModel, streams: Streams, copies: dict[int, nn.Parameter] | None) -> Any:
    """The record of a model's pass; None where there can be none."""
    examples = [_example(model, streams, count) for count in (5, 3, 1 if streams != "both" else 2)]
    try:
        with warnings.catch_warnings(), _unheard(), _laid_out(model, copies):
            warnings.simplefilter("ignore")  # of deprecated names
            warnings.simplefilter("error", torch.jit._trace.TracerWarning)
            _current.seen = examples[0][0]
            record = torch.jit.trace(_Pass(model, streams).eval(), examples[0][1], check_trace=False)
            for seen, inputs in examples:
                _current.seen = seen
                if not torch.equal(record(*inputs), _plain(model, seen, inputs, streams)):
                    return None
    except Exception:  # whatever keeps a model from being recorded, it runs without
        return None
    finally:
        _current.seen = None
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
    segments = [Segment(table, at, size, noisy, "all" if noisy else "causal") for at, size, noisy in runs if size]
    seen = RaggedPass(pages, segments, model.spec.clean_context, ids.device)
    return seen, (ids, torch.arange(count), torch.arange(0, count, 2), ids[:clean])
