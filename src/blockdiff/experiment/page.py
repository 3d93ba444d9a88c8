"""The page of results: what the saved summaries of experiments say, claim by claim and table by table.

A directory holds `<experiment>.json` (summaries, as `blockdiff experiment --json` writes them), and what people wrote:
`introduction.md`, which comes first, and `<experiment>.md`, what to make of it, which follows its claims.
"""

from __future__ import annotations

import json
from pathlib import Path

from blockdiff.experiment.plots import plot
from blockdiff.experiment.render import Summary, claims_table, details


def write_page(directory: Path, file: Path) -> list[str]:
    """Write the page of a directory's summaries to `file`, and a plot beside every summary; returns their names.

    Raises ValueError where there is no summary.
    """
    summaries = _summaries(directory)
    for summary in summaries:
        plot(summary, directory / f"{summary['name']}.png")
    file.write_text(page(directory, pictures=directory.name), encoding="utf-8")
    return [summary["name"] for summary in summaries]


def page(directory: Path, pictures: str) -> str:
    """The page's Markdown; `pictures` is where it finds the plots."""
    summaries = _summaries(directory)
    parts = [_words(directory / "introduction.md")]
    every = [(summary["name"], claim) for summary in summaries for claim in summary["claims"]]
    if every:
        counts = {outcome: sum(claim["outcome"] == outcome for _, claim in every) for outcome in _OUTCOMES}
        said = ", ".join(
            f"{count} {outcome}" for outcome, count in counts.items() if count or outcome != "not measured"
        )
        parts.append(
            f"## Claims, and what we found\n\n{len(every)} claims: {said}. Each is judged in its section below."
        )
        lines = ["| claim | source | found | in |", "| --- | --- | --- | --- |"]
        lines += [f"| {c['says']} | {c['source']} | **{c['outcome']}** | [{name}](#{name}) |" for name, c in every]
        parts.append("\n".join(lines))
    for summary in summaries:
        parts += _section(directory, summary, pictures)
    return "\n\n".join(part for part in parts if part) + "\n"


_OUTCOMES = ("holds", "does not hold", "not decided", "not measured")


def _section(directory: Path, summary: Summary, pictures: str) -> list[str]:
    name = summary["name"]
    parts = [f"## {name}", summary["about"]]
    if summary.get("file"):
        changes = "".join(f" --set {change}" for change in summary["changes"])
        parts.append(f"`blockdiff experiment {summary['file']}{changes}`")
    parts += [claims_table(summary), _words(directory / f"{name}.md"), f"![{name}]({pictures}/{name}.png)"]
    return [*parts, *details(summary)]


def _summaries(directory: Path) -> list[Summary]:
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(directory.glob("*.json"))]
    summaries = [summary for summary in found if summary.get("command") == "experiment" and "claims" in summary]
    if not summaries:
        raise ValueError(f"{directory}: no summary of an experiment in it; write one with blockdiff experiment --json")
    return summaries


def _words(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""
