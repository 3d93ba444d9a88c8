"""The machine and the record of a run: threads, versions, and the one shape of JSON results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch


def use_available_threads() -> int:
    """Let torch use the processors this process may run on (OMP_NUM_THREADS, where set, wins); returns their number."""
    if "OMP_NUM_THREADS" not in os.environ:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(available)
    return torch.get_num_threads()


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("blockdiff", "torch", "transformers", "tokenizers")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def record(command: str, seed: int, **contents: Any) -> dict[str, Any]:
    """A JSON result: what ran, with which seed, versions and threads, and its contents (usually `rows`)."""
    return {
        "command": command,
        "seed": seed,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        **contents,
    }


def quiet_libraries() -> None:
    """Silence the progress bars and advice that transformers and datasets print on their own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
