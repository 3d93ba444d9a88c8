"""Peak memory of a piece of work, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from blockdiff.runtime import keep_freed_memory


def peak_memory(build: Callable[..., Callable[[], None]], *arguments: Any) -> tuple[float, float]:
    """The highest memory in MB while `build(*arguments)()` runs, all of it and above what was there once it was built.

    Resident memory as Linux counts it; on CUDA, memory allocated there. `build` is a module's own function.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), build, arguments).result()


def _peak(threads: int, build: Callable[..., Callable[[], None]], arguments: tuple[Any, ...]) -> tuple[float, float]:
    torch.set_num_threads(threads)
    keep_freed_memory()
    run = build(*arguments)
    if torch.cuda.is_available():
        built = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        built = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
    return peak / 1e6, (peak - built) / 1e6


def _resident(name: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at most (VmHWM), as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
