"""How long a training is and how wide its steps are: what is fixed when a run begins and kept when it is resumed.

The rows of an optimizer step are the run's, not the machine's: however many processes share them, however few fit into
a pass, a step is the same step.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import yaml

from blockdiff.config import ConfigError, RunConfig
from blockdiff.data import PackedRows, collate
from blockdiff.files import write_text
from blockdiff.model import BlockDiffusionModel
from blockdiff.passes import Objective


@dataclass(frozen=True)
class Budget:
    """steps: optimizer steps of the run; rows: rows of each of them, over all passes and processes; data: checksum of
    the rows that it draws from ("": of none)."""

    steps: int
    rows: int
    data: str = ""

    @staticmethod
    def read(path: Path) -> Budget:
        """What `write` wrote. Raises ConfigError for a run of a version that did not keep the rows of a step."""
        tree = yaml.safe_load(path.read_text())
        if "rows" not in tree:
            raise ConfigError(f"{path}: of an older version, whose noise was another; start anew with --overwrite")
        return Budget(int(tree["steps"]), int(tree["rows"]), str(tree.get("data", "")))

    def write(self, path: Path) -> None:
        write_text(path, yaml.safe_dump(asdict(self)))

    def passes(self, most: int, processes: int) -> tuple[int, int]:
        """Rows of a pass, at most `most`, and passes of a step, on each of so many processes.

        Raises ConfigError where the rows do not divide over the processes.
        """
        mine, left = divmod(self.rows, processes)
        if left or not mine:
            fitting = ", ".join(str(n) for n in range(1, min(self.rows, 64) + 1) if self.rows % n == 0)
            raise ConfigError(
                f"train: {self.rows} rows a step do not divide over {processes} processes; start {fitting} of them, or "
                "begin a run with another train.global_rows"
            )
        rows = max(n for n in range(1, min(most, mine) + 1) if mine % n == 0)
        return rows, mine // rows


def step_rows(config: RunConfig, processes: int) -> int:
    """Rows of an optimizer step that begins on so many processes."""
    train = config.train
    return train.global_rows or train.rows * train.accumulation * processes


def plan(
    config: RunConfig, bridge: BlockDiffusionModel, objective: Objective, rows: PackedRows, processes: int
) -> Budget:
    """The budget of a new run. One in minutes is measured, on this process and with the gradients thrown away."""
    wide, train, data = step_rows(config, processes), config.train, rows.checksum()
    if train.steps is not None:
        return Budget(train.steps, wide, data)
    if train.tokens is not None:
        return Budget(max(1, round(train.tokens / (wide * rows.tokens / len(rows)))), wide, data)
    assert train.minutes is not None
    at_once, passes = Budget(1, wide).passes(train.rows, processes)
    seconds = passes * _seconds_per_pass(at_once, bridge, objective, rows)
    return Budget(max(1, int(train.minutes * 60 / seconds)), wide, data)


def _seconds_per_pass(count: int, bridge: BlockDiffusionModel, objective: Objective, rows: PackedRows) -> float:
    times = []
    spec = bridge.spec
    for trial in range(5):
        batch = collate([rows[(trial * count + i) % len(rows)] for i in range(count)])
        batch = {name: tensor.to(bridge.device) for name, tensor in batch.items()}
        began = time.perf_counter()
        terms = objective.terms(bridge, batch, spec.alignment, spec.mask_id or 0, trial)
        torch.autograd.backward(terms.loss(terms.tokens.sum(), objective.ar_weight))
        times.append(time.perf_counter() - began)
    bridge.zero_grad()
    return median(times[1:]) * 1.1  # the optimizer's share
