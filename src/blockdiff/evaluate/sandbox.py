"""Programs that a model wrote, run one by one in subprocesses with limits.

A guard rail, and not a security boundary: it stops what a model writes by accident (endless loops, memory, files, an
early exit), and much of what it might write on purpose, as far as the system grants it (`Ran.layers` says how far).
For code that somebody may have prepared, use a virtual machine.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_JAIL = Path(__file__).with_name("jail.py")
_VERDICT = 65536  # bytes of a verdict at most
_START = 60  # seconds for the interpreter to start, on a machine that is busy


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of the clock and of the processor, bytes of memory and of a file, open files. It may
    start no processes, reads an empty standard input, and what it prints is thrown away."""

    seconds: int = 5
    memory: int = 1 << 30
    file: int = 1 << 20
    files: int = 32


@dataclass(frozen=True)
class Ran:
    """How a program ended: passed (it ran to its last line), failed (with its error), exited (before its last line),
    timeout, or killed. layers: what protected the machine from it."""

    outcome: str
    error: str = ""
    layers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run_programs(programs: Sequence[str], limits: Limits = Limits()) -> list[Ran]:
    """Run programs, as many at once as there are processors."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=available) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


def run_program(program: str, limits: Limits = Limits()) -> Ran:
    """Run one program in a folder of its own, in an isolated interpreter without environment variables.

    That it ran to its end is said by a sentinel, random for each run: a program that exits before is not passed. Raises
    OSError where no program can be run at all.
    """
    sentinel = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="blockdiff-", ignore_cleanup_errors=True) as folder:
        order = {"program": program, "sentinel": sentinel, "folder": folder, **asdict(limits)}
        listen, verdict = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_JAIL), str(verdict)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(verdict,),
            cwd=folder,
            env={},
            start_new_session=True,
        )
        os.close(verdict)
        try:
            said = _listen(process, json.dumps(order).encode(), listen, limits.seconds)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its leader is not waited for yet, so the group is there
            process.wait()
            os.close(listen)
    return _verdict(said, sentinel)


def _listen(process: subprocess.Popen[bytes], order: bytes, listen: int, seconds: float) -> bytes:
    """What is said until the pipe closes, or the program's time is over; OSError where it could not begin."""
    assert process.stdin is not None
    said = b""
    deadline = time.monotonic() + _START
    try:
        process.stdin.write(order)
        process.stdin.close()
        while len(said) < _VERDICT and select.select([listen], [], [], max(deadline - time.monotonic(), 0))[0]:
            part = os.read(listen, _VERDICT)
            if not part:
                break
            if b"\n" not in said:  # the first line says that the program begins
                deadline = time.monotonic() + seconds
            said += part
        else:
            said += b'{"outcome": "timeout"}'
    except BrokenPipeError:
        pass
    if b"\n" not in said:
        raise OSError(f"the sandbox could not start; see why with {sys.executable} -I -S {_JAIL} 2 < /dev/null")
    return said


def _verdict(said: bytes, sentinel: str) -> Ran:
    found: dict[str, Any] = {}
    for line in said.splitlines():
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):  # the program itself wrote to the pipe
            return Ran("failed", "wrote to the judge's pipe")
    layers = tuple(found.get("layers", ()))
    if found.get("outcome") == "passed" and found.get("sentinel") != sentinel:
        return Ran("failed", "wrote to the judge's pipe", layers)
    return Ran(str(found.get("outcome", "killed")), str(found.get("error", "")), layers)
