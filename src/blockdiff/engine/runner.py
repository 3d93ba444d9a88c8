"""Requests in, outputs out: the engine run until it is done.

prefill   the prompts, read into the pages of clean keys and values
open      a block of masks (its first token already known where the model reads it from the prefix)
denoise   a pass over the open blocks only; the policies fill positions; what is written stays as it was
commit    a clean pass over the finished blocks writes their keys and values
verify    the same pass, for lossless requests, says first how much of the block stays (`engine.drafting`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from blockdiff.engine.checks import check
from blockdiff.engine.engine import Engine
from blockdiff.engine.entry import OnStep
from blockdiff.engine.limits import Limits, limits_for
from blockdiff.engine.network import prepared
from blockdiff.engine.request import Output, Request
from blockdiff.model import BlockDiffusionModel

OnText = Callable[[int, str], None]


def generate_batches(model: BlockDiffusionModel, requests: Sequence[Request], batch: int) -> list[Output]:
    """Continue every request, `batch` of them at once: the same outputs in less memory. Raises as `generate` does."""
    outputs: list[Output] = []
    for first in range(0, len(requests), batch):
        outputs += generate(model, requests[first : first + batch])
    return outputs


@torch.inference_mode()
def generate(
    model: BlockDiffusionModel,
    requests: Sequence[Request],
    *,
    on_text: OnText | None = None,
    on_step: OnStep | None = None,
    limits: Limits = Limits(pages=0),  # noqa: B008 - frozen
) -> list[Output]:
    """Continue every request. `on_text(request, piece)` receives final text only, piece by piece: the pieces of a
    request joined are its output's text. `on_step` receives open blocks as they fill.

    limits: what the engine may use; with 0 pages it gets as many as all the requests at once need.
    Raises ValueError for a request the model cannot serve, before any work is done.
    """
    for request in requests:
        check(model, request)
    if not requests:
        return []
    engine = Engine(model, limits if limits.pages else limits_for(model, requests, limits))
    with prepared(model):
        jobs = [
            engine.add(request, None if on_text is None else partial(on_text, number), on_step)
            for number, request in enumerate(requests)
        ]
        while engine.busy:
            engine.step()
    return [job.output for job in jobs if job.output is not None]
