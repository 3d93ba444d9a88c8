"""Batch generation that is killed and resumed, under torchrun and over Ray Data, against one undisturbed process.

    python benchmarks/killed.py runs/demo/checkpoint --rows 2000 --json killed.json

Two processes of torchrun are killed (SIGKILL, all at the same moment) twice and resumed. Over a local Ray one of two
actors is killed, and then the process that drives it, after which all that it started must end by itself; and it is
resumed. Every row must be answered exactly once, and the bytes must be those of one process that nobody disturbed. Exit
code 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from blockdiff.files import write_json, write_lines
from blockdiff.runtime import record

WORDS = ("the", "cat", "sat", "on", "a", "mat", "one", "red", "dog", "ate", "two", "hats", "and", "we", "ran")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
RAY = ("--ray", "local", "--actors", "2")
_PATIENCE = 300  # seconds


@dataclass(frozen=True)
class Run:
    """A way to answer the same rows: how Python is started and what the command adds."""

    model: Path
    rows: Path
    output: Path
    seed: int
    launcher: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def start(self) -> psutil.Popen:
        sampling = ("--temperature", "0.9", "--seed", str(self.seed), "--max-new-tokens", "16", "--block-size", "4")
        given = ("--input", self.rows, "--output", self.output, "--batch", "2", *sampling, *self.options)
        command = [sys.executable, *self.launcher, "-m", "blockdiff", "generate", self.model, *given]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return psutil.Popen([str(part) for part in command], **quiet, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def finish(self) -> float:
        """Seconds that it took. Raises RuntimeError where it failed."""
        began = time.perf_counter()
        if (code := self.start().wait()) != 0:
            raise RuntimeError(f"{self.launcher or 'python'} {self.options}: exit code {code}")
        return time.perf_counter() - began

    def parts(self) -> int:
        return len(list((self.output / "parts").glob("part-*.jsonl")))

    def _reach(self, parts: int, process: psutil.Popen) -> None:
        """Wait for so many parts."""
        deadline = time.monotonic() + _PATIENCE
        while self.parts() < parts:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it ended, or {_PATIENCE} s went by, before {parts} parts were there")
            time.sleep(0.01)

    def kill(self, at: int, whole: bool) -> int:
        """Kill it once so many parts are there: the whole tree; or one actor half-way, which must come back, and then
        the root, whose descendants must end by themselves. Returns the parts that it left."""
        process = self.start()
        if not whole:
            self._reach(at // 2, process)
            next(one for one in process.children(recursive=True) if "_Actor" in one.name() + str(one.cmdline())).kill()
        self._reach(at, process)
        family = process.children(recursive=True)
        for one in (process, *family) if whole else (process,):
            one.kill()
        process.wait()
        _gone(family)
        if (self.output / "answers.jsonl").exists():
            raise RuntimeError("it was done before it was killed")
        return self.parts()


def _gone(family: list[psutil.Process]) -> None:
    """Wait for all of them to end; Ray's agents look for their dead node for a minute first."""
    if alive := psutil.wait_procs(family, timeout=150)[1]:
        raise RuntimeError(f"still there long after the kill: {alive}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = measured(asked.model.absolute(), Path(folder), asked.rows, asked.seed)
    for row in rows:
        print(
            f"{row['way']}: {row['rows']} rows, killed with {row['killed_at']} of {row['parts']} parts there, "
            f"{row['seconds']:.1f} s to resume; answered once: {row['once']}, equal bytes: {row['equal']}"
        )
    if asked.json is not None:
        write_json(asked.json, record("killed", asked.seed, model=str(asked.model), rows=rows))
    return 0 if all(row["once"] and row["equal"] for row in rows) else 1


def measured(model: Path, folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """A row for the undisturbed process, for torchrun and for Ray."""
    prompts = [" ".join(WORDS[(number + i * 3) % len(WORDS)] for i in range(1 + number % 7)) for number in range(count)]
    file = folder / "rows.jsonl"
    write_lines(file, ({"prompt": prompt} for prompt in prompts))
    single = Run(model, file, folder / "single", seed)
    spread = Run(model, file, folder / "torchrun", seed, launcher=TORCHRUN)
    ray = Run(model, file, folder / "ray", seed, options=RAY)
    rows, seconds = [], single.finish()
    parts = single.parts()
    rows.append(_row("one process", single, single, [], seconds, count))
    killed = [spread.kill(at, whole=True) for at in (parts // 5, parts // 2)]
    rows.append(_row("torchrun, 2 processes", spread, single, killed, spread.finish(), count))
    killed = [ray.kill(parts // 4, whole=False)]
    rows.append(_row("Ray Data, 2 actors", ray, single, killed, ray.finish(), count))
    return rows


def _row(way: str, run: Run, single: Run, killed: list[int], seconds: float, count: int) -> dict[str, Any]:
    contents, expected = ((one.output / "answers.jsonl").read_bytes() for one in (run, single))
    answers = [json.loads(line) for line in contents.splitlines()]
    return {
        "way": way,
        "rows": count,
        "parts": run.parts(),
        "killed_at": killed,
        "seconds": seconds,
        "once": [answer["row"] for answer in answers] == list(range(count)) and all("text" in row for row in answers),
        "equal": contents == expected,
    }


if __name__ == "__main__":
    sys.exit(main())
