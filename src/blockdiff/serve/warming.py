"""Before the first request: what is made at first use, and how many threads a pass should have."""

from __future__ import annotations

import os
import time

import torch

from blockdiff.decode import POLICIES
from blockdiff.engine import Engine, Request
from blockdiff.model import BlockDiffusionModel
from blockdiff.runtime import available_processors


def warm_up(engine: Engine, threads: int = 0) -> int:
    """Write a few tokens in the thread that will run the engine, and set its number of threads; returns it.

    With 0 threads (and no OMP_NUM_THREADS) one and all processors are timed: the event loop needs a processor too, and
    on a small model two threads that wait for each other are slower than one.
    """
    _write(engine)
    told = threads or (torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 0)
    candidates = [told] if told else sorted({1, available_processors()})
    seconds = {}
    for count in candidates:
        torch.set_num_threads(count)
        seconds[count] = min(_write(engine) for _ in range(3)) if len(candidates) > 1 else 0.0
    best = min(seconds, key=lambda count: seconds[count])
    torch.set_num_threads(best)
    return best


def trial(model: BlockDiffusionModel) -> Request:
    """A text of two blocks, as every server must have room for."""
    size = model.spec.default_block_size
    room = max(min(2 * size, model.context_length - 1), 1)
    prompt = (model.end_ids or (0,))[:1]
    return Request(prompt=prompt, max_new_tokens=room, block_size=size, policy=POLICIES["one_step"])


def _write(engine: Engine) -> float:
    """Seconds for the trial."""
    began = time.perf_counter()
    engine.add(trial(engine.model))
    while engine.busy:
        engine.step()
    return time.perf_counter() - began
