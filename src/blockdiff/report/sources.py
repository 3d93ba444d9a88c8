"""Reading what a report is made from: the files of a run, or the summary of an experiment. Raises ValueError and
FileNotFoundError with one line for what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from typing import Any

# what the page needs of a results file: keys of each row, and lists that must be there beside the rows
_ROW_KEYS = {
    "bound": {"block_size", "offset", "nats_per_token", "se", "ppl", "ppl_ci", "tokens", "documents"},
    "baselines": {"name", "nats_per_token", "ppl"},
    "coverage": {"before", "size", "asked", "trained", "uncovered"},
    "length": {"way", "cache", "bin", "start", "end", "nats_per_token", "se", "tokens", "documents"},
    "generation": {"way", "budget", "temperature", "forwards_per_text", "judge_nll", "judge_nll_se", "entropy"}
    | {"texts", "nearest_to_data"},
    "speed": {"name", "tokens_per_second", "speed_over_ar", "tokens_per_forward", "repeats"},
    "samples": {"name", "prompt", "pieces", "steps"},
    "traces": {"name", "prompt", "block_size", "policy", "temperature", "seed", "tokens", "frames", "forwards"}
    | {"denoise_forwards", "commit_forwards"},
    "experiment": {"measure", "place", "value"},
    "summary": {"setting", "measure", "place", "value", "sd", "n", "se_mc", "by_seed"},
}
_KEYS = {
    "length": {"trained_length"},
    "generation": {"data", "judge"},
    "summary": {"name", "about", "settings", "seeds", "claims", "compare"},
}
_KINDS = {
    "experiment": "summary",
    "eval bound": "bound",
    "eval coverage": "coverage",
    "eval length": "length",
    "eval generation": "generation",
    "generate": "traces",
}


@dataclass(frozen=True)
class Source:
    """A run (config.yaml, metrics.jsonl, results/*.json by stem), an experiment (its summary alone) or one result."""

    label: str
    path: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()
    config: str = ""
    mask: str = ""
    summary: dict[str, Any] | None = None


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Every path's files; labels are as much of the paths' ends as tells them apart."""
    where = [path.resolve() for path in paths]
    for path, place in zip(paths, where, strict=True):
        if where.count(place) > 1:
            raise ValueError(f"{path}: given twice; give every run or experiment once")
    return [_read(path, label) for path, label in zip(paths, _labels(where), strict=True)]


def _read(path: Path, label: str) -> Source:
    if path.is_file():
        return _single(path, label)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run; give its directory, an experiment's, or its summary.json")
    if (path / "summary.json").exists():
        file = path / "summary.json"
        return Source(label, path, summary=_checked(_parsed(_text(file), str(file)), "summary", file))
    if not (path / "config.yaml").exists():
        raise FileNotFoundError(
            f"{path}: no config.yaml in it, and no summary.json; give the directory of a run or an experiment"
        )
    results = {file.stem: _result(file) for file in sorted((path / "results").glob("*.json"))}
    if "bound" not in results and "experiment" in results:
        results["bound"] = _bound_of(results["experiment"])
    metrics = tuple(
        _parsed(line, f"{path / 'metrics.jsonl'}:{at}")
        for at, line in enumerate(_text(path / "metrics.jsonl").splitlines(), 1)
    )
    return Source(label, path, results, metrics, _text(path / "config.yaml"), _text(path / "results" / "mask.txt"))


def _single(file: Path, label: str) -> Source:
    """One file of results, of a run or of several models: what command wrote it says what it is."""
    result = _parsed(_text(file), str(file))
    kind = _KINDS.get(str(result.get("command"))) if isinstance(result, dict) else None
    if kind is None:
        raise ValueError(
            f"{file}: neither the summary of an experiment nor a result of {', '.join(list(_KINDS)[1:])}; give one of "
            "them, or a run's directory"
        )
    checked = _checked(result, kind, file)
    return Source(label, file, summary=checked) if kind == "summary" else Source(label, file, {kind: checked})


def _result(file: Path) -> dict[str, Any]:
    kind = "traces" if file.stem.startswith("traces-") else file.stem
    return _checked(_parsed(_text(file), str(file)), kind, file)


def _checked(result: Any, kind: str, file: Path) -> dict[str, Any]:
    """The result, where it has what the page will ask of it."""
    if not isinstance(result, dict):
        raise ValueError(f"{file}: not a JSON object; write it anew with its command's --json")
    rows = result.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: rows that are no rows; write it anew with its command's --json")
    keys = _KEYS.get(kind, set()) | ({"rows"} if kind in _ROW_KEYS else set())
    missing = sorted(keys - result.keys())
    for at, row in enumerate(result.get("rows", []) if kind in _ROW_KEYS else []):
        missing = missing or [f"{key} in row {at}" for key in sorted(_ROW_KEYS[kind] - row.keys())]
    if missing:
        raise ValueError(f"{file}: no {missing[0]}; write it anew with its command, or delete it")
    return result


def _bound_of(measured: dict[str, Any]) -> dict[str, Any]:
    """The bounds among what an experiment measured of a run, in the form of `eval bound`."""
    rows = []
    for row in measured["rows"]:
        if row["measure"] == "bound" and not row["place"]["left_bias"]:
            value, se = row["value"], row["se"]
            interval = None if se is None else [exp(value - 1.96 * se), exp(value + 1.96 * se)]
            numbers = {"nats_per_token": value, "se": se, "se_mc": row["se_mc"], "ppl": exp(value), "ppl_ci": interval}
            rows.append({**row["place"], **numbers, **row["counts"]})
    return {**measured, "rows": rows}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); write it anew, or delete it") from None


def _text(path: Path) -> str:
    try:
        return path.read_text() if path.exists() else ""
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text in UTF-8; write it anew, or delete it") from None


def _labels(paths: Sequence[Path]) -> list[str]:
    """demo and joint, or a/seed0 and b/seed0 where the last names are the same."""
    parts = [[*path.parent.parts[1:], path.name.removesuffix(".json")] for path in paths]
    depth = 1
    while True:
        labels = ["/".join(names[-depth:]) for names in parts]
        if len(set(labels)) == len(labels) or depth > max(map(len, parts)):
            return labels
        depth += 1
