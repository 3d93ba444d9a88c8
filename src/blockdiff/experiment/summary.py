"""The summary of an experiment, from the saved results of its runs.

Three errors stand apart: `sd`, the standard deviation over seeds (how much training itself varies); `se`, the mean
standard error within a run, clustered by document; and `se_mc`, its part that comes of random draws alone. The
documents and the noise are the same in every run, so differences between settings carry little of the last two.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from blockdiff.experiment.claims import judge
from blockdiff.experiment.plan import Experiment, Run
from blockdiff.experiment.runner import difference, measured
from blockdiff.runtime import record
from blockdiff.statistics import paired, rank_correlation, spread

_Key = tuple[str, str, tuple[tuple[str, Any], ...]]  # setting, measure, place
_Values = dict[_Key, dict[int, dict[str, Any]]]  # -> seed -> the run's row


def summarise(experiment: Experiment, runs: Sequence[Run], failed: Mapping[str, str]) -> dict[str, Any] | None:
    """The experiment's JSON: rows of settings, paired comparisons, claims, and which runs are missing, and why.

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
        for row in [*result["rows"], *_derived(result["rows"])]:
            key = (run.setting, row["measure"], tuple(row["place"].items()))
            values.setdefault(key, {})[run.seed] = row
    if not counted:
        return None

    def find(setting: str, name: str, at: dict[str, Any]) -> Mapping[int, float]:
        """Values by seed at a place, whose keys that `at` does not name are 0 or missing."""
        for (label, measure, place), by_seed in values.items():
            if (label, measure) == (setting, name) and {k: v for k, v in place if v or k in at} == at:
                return {seed: row["value"] for seed, row in by_seed.items()}
        return {}

    return record(
        "experiment",
        experiment.evaluate.seed,
        name=experiment.name,
        about=experiment.about,
        seeds=experiment.seeds,
        settings=experiment.settings,
        evaluate=experiment.evaluate.model_dump(mode="json"),
        rows=[_row(key, by_seed) for key, by_seed in values.items()],
        compare=[
            {"setting": label, "baseline": baseline, **test}
            for label, baseline in experiment.compare
            for test in _tests(values, label, baseline)
        ],
        correlations=[
            {"group": name, "settings": len(group), **found}
            for name, group in experiment.correlate.items()
            for found in _correlations(values, group)
        ],
        claims=[judge(claim, find) for claim in experiment.claims],
        runs=counted,
        missing=missing,
    )


def _derived(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one run's bounds say together.

    worst_offset: largest bound of a block size at any measured offset minus the one on the grid. monotone_share: share
    of neighbouring block sizes of which the larger has no smaller bound, give or take two standard errors of the draws
    and 0.001 nats (the documents are the same; blocks of one and of two tokens are measured without any draw).
    """
    bounds = {
        (row["place"]["block_size"], row["place"]["offset"]): row
        for row in rows
        if row["measure"] == "bound" and not row["place"]["left_bias"]
    }
    sizes = sorted({size for size, _ in bounds})
    found = []
    for size in sizes:
        off = [row["value"] for (other, offset), row in bounds.items() if other == size and offset]
        if off:
            gap = max(off) - bounds[size, 0]["value"]
            found.append({"measure": "worst_offset", "place": {"block_size": size}, "value": gap})
    steps = [(bounds[a, 0], bounds[b, 0]) for a, b in itertools.pairwise(sizes)]
    if steps:
        errors = [((a["se_mc"] or 0) ** 2 + (b["se_mc"] or 0) ** 2) ** 0.5 for a, b in steps]
        right = [b["value"] >= a["value"] - 2 * error - 1e-3 for (a, b), error in zip(steps, errors, strict=True)]
        found.append({"measure": "monotone_share", "place": {}, "value": fmean(right)})
    return found


def _row(key: _Key, by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    setting, name, place = key
    rows = list(by_seed.values())
    numbers = [row["value"] for row in rows]
    return {
        "setting": setting,
        "measure": name,
        "place": dict(place),
        "value": fmean(numbers),
        "sd": spread(numbers),
        "n": len(numbers),
        "se": _mean([row.get("se") for row in rows]),
        "se_mc": _mean([row.get("se_mc") for row in rows]),
        "by_seed": {str(seed): row["value"] for seed, row in by_seed.items()},
        "counts": rows[0].get("counts", {}),
    }


def _tests(values: _Values, label: str, baseline: str) -> list[dict[str, Any]]:
    """Differences label - baseline of the same seed, wherever both were measured."""
    found = []
    for (setting, name, place), by_seed in values.items():
        other = values.get((baseline, name, place), {})
        both = [seed for seed in by_seed if seed in other]
        if setting == label and both:
            test = paired([by_seed[seed]["value"] - other[seed]["value"] for seed in both])
            found.append({"measure": name, "place": dict(place), **test.to_json()})
    return found


def _correlations(values: _Values, group: Sequence[str]) -> list[dict[str, Any]]:
    """Spearman's correlation, over the settings of a group, of mean gradient noise with every mean bound."""

    def means(name: str) -> dict[tuple[tuple[str, Any], ...], dict[str, float]]:
        found: dict[tuple[tuple[str, Any], ...], dict[str, float]] = {}
        for (setting, measure, place), by_seed in values.items():
            if measure == name and setting in group:
                found.setdefault(place, {})[setting] = fmean(row["value"] for row in by_seed.values())
        return found

    noise = means("gradient_noise").get((("group", "all"),), {})
    found = []
    for place, bound in means("bound").items():
        both = [setting for setting in group if setting in noise and setting in bound]
        rho = rank_correlation([noise[s] for s in both], [bound[s] for s in both])
        if rho is not None:
            found.append({"place": dict(place), "spearman": rho, "n": len(both)})
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _why(run: Run, failed: Mapping[str, str]) -> str:
    if run.name in failed:
        return failed[run.name]
    if key := difference(run):
        return f"was trained with another {key}"
    if not run.directory.checkpoint.exists():
        return "not trained to its end yet"
    return "not measured with these settings yet"
