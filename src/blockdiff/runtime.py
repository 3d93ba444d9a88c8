"""The machine and the record of a run: threads, versions, and the one shape of JSON results."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for `mallopt`


def available_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_available_threads() -> int:
    """Let torch use the processors this process may run on (OMP_NUM_THREADS, where set, wins); returns their number."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_processors())
    return torch.get_num_threads()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available


def keep_freed_memory() -> None:
    """Have the C library keep what a training step frees, for the next step.

    Blocks above 32 MB are otherwise given back and asked for anew at every use, each page zeroed by the kernel: a third
    of the time of a step whose activations are that large. No effect beyond glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


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
    """A JSON result: what ran (and its command line), with which seed, versions and threads, and its contents (usually
    `rows`)."""
    return {
        "command": command,
        "invocation": _invocation(),
        "seed": seed,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        **contents,
    }


def _invocation() -> str | None:
    """The command line, where this process is one of ours."""
    name = Path(sys.argv[0])
    ours = name.name == "blockdiff" or (name.name == "__main__.py" and name.parent.name == "blockdiff")
    return shlex.join(["blockdiff", *sys.argv[1:]]) if ours else None


def quiet_libraries() -> None:
    """Silence the progress bars and advice that transformers and datasets print on their own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
