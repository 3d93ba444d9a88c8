"""Run an experiment: train what is not trained, measure what is not measured, and go on after a failure.

The state of a run is read from its directory and nothing else, so an experiment that was killed goes on where it was,
and several processes may share one (`--only`).
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from blockdiff.config import ConfigError, nearest
from blockdiff.experiment.measures import check_measures, measure
from blockdiff.experiment.plan import Evaluate, Experiment, Run
from blockdiff.files import write_json, write_text
from blockdiff.runtime import record
from blockdiff.trainer import last_checkpoint
from blockdiff.training import train

RESULT = "experiment"
Say = Callable[[str], None]


def run_experiment(
    experiment: Experiment,
    runs: Sequence[Run],
    *,
    only: Sequence[str] = (),
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> dict[str, str]:
    """Bring every run (of the settings in `only`, if given) to its end; returns {run: error} of those that failed.

    A finished run is left as it is, an unfinished one goes on from its last checkpoint, and one that fails leaves its
    traceback in error.txt of its directory. Raises, before anything is trained, ConfigError where a run was made with
    another configuration, unless `overwrite` says to train it anew, and what reading the questions or the judge raises.
    """
    for label in only:
        if label not in experiment.settings:
            raise ConfigError(f"--only {label}: no such setting; {nearest(label, experiment.settings)}")
    chosen = [run for run in runs if not only or run.setting in only]
    for run in chosen:
        if not overwrite and (key := difference(run)):
            raise ConfigError(
                f"{run.directory.path}: was trained with another {key}; train it anew with --overwrite, or give the "
                "experiment another output"
            )
    if any(measured(run, experiment.evaluate) is None for run in chosen):
        check_measures(experiment.evaluate)
    failed: dict[str, str] = {}
    for number, run in enumerate(chosen, 1):
        try:
            _finish(run, experiment.evaluate, f"[{number}/{len(chosen)}] {run.name}", say)
        except Exception as error:  # whatever a run dies of, the others' hours are not lost with it
            failed[run.name] = " ".join(f"{type(error).__name__}: {error}".split())
            with suppress(OSError):  # such as the full disk that it died of
                write_text(_trace(run), traceback.format_exc())
            say(f"[{number}/{len(chosen)}] {run.name}: failed: {failed[run.name]}")
    return failed


def difference(run: Run) -> str | None:
    """The key in which a run's directory differs from what the experiment now asks for, if it holds a run at all."""
    return run.directory.difference(run.config) if run.directory.config.exists() else None


def measured(run: Run, evaluate: Evaluate) -> dict[str, Any] | None:
    """The saved measurement of a run, or None where there is none of this configuration and this evaluation."""
    file = run.directory.result(RESULT)
    if not file.exists() or difference(run):
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    if any("measure" not in row for row in result["rows"]):  # an older version's
        return None
    return result if result["evaluate"] == evaluate.model_dump(mode="json") else None


def _finish(run: Run, evaluate: Evaluate, title: str, say: Say) -> None:
    if measured(run, evaluate) is not None:
        say(f"{title}: done before")
        return
    began = time.perf_counter()
    if not run.directory.checkpoint.exists() or difference(run):
        going_on = last_checkpoint(run.directory.trainer) is not None and not difference(run)
        say(f"{title}: training{', going on from its last checkpoint' if going_on else ''}")
        train(run.config, resume=going_on, overwrite=not going_on)
    _measure(run, evaluate)
    _trace(run).unlink(missing_ok=True)
    say(f"{title}: done in {time.perf_counter() - began:.0f} s")


def _measure(run: Run, evaluate: Evaluate) -> None:
    """The run's measures, written to results/experiment.json of it."""
    numbers, parameters = measure(run, evaluate)
    contents = record(
        "experiment",
        run.seed,
        setting=run.setting,
        evaluate=evaluate.model_dump(mode="json"),
        steps=yaml.safe_load((run.directory.path / "plan.yaml").read_text())["steps"],
        parameters=parameters,
        rows=[number.to_json() for number in numbers],
    )
    write_json(run.directory.result(RESULT), contents)


def _trace(run: Run) -> Path:
    return run.directory.path / "error.txt"
