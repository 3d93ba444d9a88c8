"""The directory of a training run: what lies where, whether a run may begin or go on in it, and on what.

A run directory holds config.yaml (fully resolved), plan.yaml, metrics.jsonl, results/*.json, checkpoint/ (the finished
model), trainer/ (resumable checkpoints) and report.html.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from pydantic import ValidationError

from blockdiff.budget import Budget
from blockdiff.config import ConfigError, RunConfig
from blockdiff.data import PackedRows
from blockdiff.files import write_text
from blockdiff.trainer import last_checkpoint

_ROOM = ("rows", "gradient_checkpointing", "keep")  # of a pass and on the disk; `plan.yaml` keeps the step


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files."""

    path: Path
    CLEARED: ClassVar = ("trainer", "results", "figures", "checkpoint")

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer"

    @property
    def plan(self) -> Path:
        return self.path / "plan.yaml"

    def result(self, name: str) -> Path:
        return self.path / "results" / f"{name}.json"

    def difference(self, config: RunConfig) -> str | None:
        """The first key, dotted, whose value here differs from `config`'s; None where none does.

        Where the run lies (`output`) is no difference: a run may have been moved. Nor is what a machine has room for.
        Keys that an older version did not know had their defaults.
        """
        saved, now = yaml.safe_load(self.config.read_text()), yaml.safe_load(config.dump())
        with suppress(ValidationError):  # a file that is no configuration any more differs as it stands
            saved = yaml.safe_load(RunConfig.model_validate(saved).dump())
        return _difference(_lasting(saved), _lasting(now), "")

    def clear(self) -> None:
        """Remove what an earlier run left, so that nothing of it is taken for the new one's."""
        for name in self.CLEARED:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("metrics.jsonl", self.plan.name, "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def resumable(self, config: RunConfig, resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, if there is one and it is asked for. Touches nothing."""
        found = last_checkpoint(self.trainer)
        if resume:
            if self.config.exists() and (key := self.difference(config)):
                raise ConfigError(
                    f"--resume: {key} differs from {self.config}; a resumed run must keep its configuration"
                )
            if found is None and self.checkpoint.exists():
                raise ConfigError(
                    f"--resume: {self.path} is finished; use {self.checkpoint}, or start anew with --overwrite"
                )
            return found
        if (self.checkpoint.exists() or found) and not overwrite:
            raise ConfigError(
                f"output: {self.path} already holds a run; go on with --resume, start anew with --overwrite, "
                "or set another output"
            )
        start = config.model.init
        above = [] if start is None else [Path(start).resolve(), *Path(start).resolve().parents]
        if any((self.path / name).resolve() in above for name in self.CLEARED):
            raise ConfigError(f"model.init: {start} lies where a new run in {self.path} clears; set another output")
        return None

    def open(self, config: RunConfig, *, fresh: bool) -> None:
        """Make the run directory, emptied of an earlier run if this one is new."""
        try:
            if fresh:
                self.clear()
            self.trainer.mkdir(parents=True, exist_ok=True)
            for left in self.trainer.glob(".saving-*"):  # of a run that was killed while it saved
                shutil.rmtree(left, ignore_errors=True)
            write_text(self.config, config.dump())
        except OSError as error:
            raise ConfigError(f"output: cannot write to {self.path}: {error.strerror or error}") from error

    def check_data(self, config: RunConfig, rows: PackedRows) -> None:
        """Refuse to go on with a run on other rows than it began with."""
        if self.plan.exists() and Budget.read(self.plan).data not in ("", rows.checksum()):
            raise ConfigError(
                f"--resume: data.train: {config.data.train} gives other rows than {self.path} began with; "
                "put them back, or start anew with --overwrite"
            )

    def check_shared(self, processes: PartialState) -> None:
        """Refuse machines that do not see one run directory. All processes take part."""
        (name,) = broadcast_object_list([f".meeting-{uuid4().hex}"])
        if processes.is_main_process:
            (self.path / name).touch()
        processes.wait_for_everyone()
        met = (self.path / name).exists()
        processes.wait_for_everyone()
        if processes.is_main_process:
            (self.path / name).unlink()
        if not met:
            raise ConfigError(
                f"output: {self.path} is not shared by all machines of this run; put it where all can write"
            )


def _lasting(tree: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration must stay as it was while a run goes on."""
    train = {key: value for key, value in (tree.get("train") or {}).items() if key not in _ROOM}
    return {**tree, "output": "", "train": train}


def _difference(saved: object, now: object, place: str) -> str | None:
    if isinstance(saved, dict) and isinstance(now, dict):
        found = (_difference(saved.get(key), now.get(key), f"{place}.{key}".lstrip(".")) for key in {**saved, **now})
        return next((key for key in found if key), None)
    return None if saved == now else place
