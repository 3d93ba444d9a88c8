"""The summary of an experiment, from the saved results of its runs.

Three errors stand apart: `sd`, the standard deviation over seeds (how much training itself varies); `se`, the mean
standard error within a run, clustered by document; and `se_mc`, its part that comes of the noise draws alone. The
documents and the noise are the same in every run, so differences between settings carry little of the last two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from blockdiff.experiment.plan import Experiment, Run
from blockdiff.experiment.runner import difference, measured
from blockdiff.runtime import record
from blockdiff.statistics import paired, spread

_Values = dict[tuple[str, int, int], dict[int, dict[str, Any]]]  # (setting, block size, offset) -> seed -> row


def summarise(experiment: Experiment, runs: Sequence[Run], failed: Mapping[str, str]) -> dict[str, Any] | None:
    """The experiment's JSON: rows of settings, paired comparisons, and which runs are not among them, and why.

    `failed` is what `run_experiment` returned. Numbers that a single seed cannot give are null. None where no run has
    been measured yet.
    """
    values: _Values = {}
    counted, missing = [], []
    for run in runs:
        result = measured(run, experiment.evaluate)
        if result is None or run.name in failed:
            missing.append({"setting": run.setting, "seed": run.seed, "why": _why(run, failed)})
            continue
        counted.append({key: result[key] for key in ("setting", "seed", "steps", "parameters")})
        for row in result["rows"]:
            values.setdefault((run.setting, row["block_size"], row["offset"]), {})[run.seed] = row
    if not counted:
        return None
    return record(
        "experiment",
        experiment.evaluate.seed,
        name=experiment.name,
        about=experiment.about,
        seeds=experiment.seeds,
        settings=experiment.settings,
        evaluate=experiment.evaluate.model_dump(mode="json"),
        rows=[_row(*key, by_seed) for key, by_seed in values.items()],
        compare=[
            {"setting": label, "baseline": baseline, "block_size": size, "offset": offset, **test}
            for label, baseline in experiment.compare
            for size, offset, test in _tests(values, label, baseline)
        ],
        runs=counted,
        missing=missing,
    )


def _row(setting: str, size: int, offset: int, by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    rows = list(by_seed.values())
    nats = [row["nats_per_token"] for row in rows]
    mean = fmean(nats)
    return {
        "setting": setting,
        "block_size": size,
        "offset": offset,
        "nats_per_token": mean,
        "ppl": math.exp(mean),
        "sd": spread(nats),
        "n": len(nats),
        "se": _mean([row["se"] for row in rows]),
        "se_mc": _mean([row["se_mc"] for row in rows]),
        "by_seed": {str(seed): row["nats_per_token"] for seed, row in by_seed.items()},
        "tokens": rows[0]["tokens"],
        "documents": rows[0]["documents"],
        "draws": rows[0]["draws"],
    }


def _tests(values: _Values, label: str, baseline: str) -> list[tuple[int, int, dict[str, Any]]]:
    """Differences label - baseline of the same seed, wherever both were measured."""
    found = []
    for (setting, size, offset), by_seed in values.items():
        other = values.get((baseline, size, offset), {})
        both = [seed for seed in by_seed if seed in other]
        if setting == label and both:
            test = paired([by_seed[seed]["nats_per_token"] - other[seed]["nats_per_token"] for seed in both])
            found.append((size, offset, test.to_json()))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _why(run: Run, failed: Mapping[str, str]) -> str:
    if run.name in failed:
        return failed[run.name]
    if key := difference(run):
        return f"was trained with another {key}"
    if not run.directory.checkpoint.exists():
        return "not trained to its end yet"
    return "not measured with these settings yet"
