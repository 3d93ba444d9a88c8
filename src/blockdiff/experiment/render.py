"""Tables and a plot of an experiment, made from its summary (the saved JSON) and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

Summary = dict[str, Any]


def markdown(summary: Summary) -> str:
    """The experiment as a Markdown section, for summary.md and for the docs."""
    return "\n".join(
        [
            f"### {summary['name']}",
            "",
            summary["about"],
            "",
            *_markdown_table(*_bounds(summary)),
            "",
            _words(summary),
            *(["", *_markdown_table(*_comparisons(summary)), "", _test_words()] if summary["compare"] else []),
            *[f"\nNot counted: {run['setting']}, seed {run['seed']}: {run['why']}." for run in summary["missing"]],
            "",
        ]
    )


def tables(summary: Summary) -> list[Table]:
    """The same numbers for the terminal."""
    found = [_rich_table(*_bounds(summary))]
    return [*found, _rich_table(*_comparisons(summary))] if summary["compare"] else found


def plot(summary: Summary, file: Path) -> None:
    """Nats per token against block size, a line for each setting (offset 0), bars of one standard deviation."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({row["block_size"] for row in summary["rows"]})
    for setting in summary["settings"]:
        rows = [row for row in summary["rows"] if row["setting"] == setting and row["offset"] == 0]
        rows.sort(key=lambda row: row["block_size"])
        axes.errorbar(
            [row["block_size"] for row in rows],
            [row["nats_per_token"] for row in rows],
            yerr=[row["sd"] or 0.0 for row in rows],  # no bar where one seed leaves the spread unknown
            marker="o",
            capsize=3,
            label=setting,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="block size", ylabel="nats per token (upper bound)", title=summary["name"])
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=120)


def _bounds(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """A line for each block size and offset, a column for each setting."""
    by_place = {(row["block_size"], row["offset"], row["setting"]): row for row in summary["rows"]}
    places = sorted({place[:2] for place in by_place})
    shown = [setting for setting in summary["settings"] if any(row["setting"] == setting for row in summary["rows"])]
    lines = [[_place(*place), *(_cell(by_place.get((*place, setting))) for setting in shown)] for place in places]
    return ["block size", *shown], lines


def _comparisons(summary: Summary) -> tuple[list[str], list[list[str]]]:
    header = ["difference", "block size", "nats per token", "95 % interval", "t", "p", "seeds"]
    lines = [
        [
            f"{test['setting']} − {test['baseline']}",
            _place(test["block_size"], test["offset"]),
            f"{test['mean']:+.4f}" + ("" if test["se"] is None else f" ± {test['se']:.4f}"),
            "" if test["ci"] is None else "{:+.4f} to {:+.4f}".format(*test["ci"]),
            "" if test["t"] is None else f"{test['t']:.2f}",
            "" if test["p"] is None else f"{test['p']:.2g}",
            str(test["n"]),
        ]
        for test in summary["compare"]
    ]
    return header, lines


def _place(size: int, offset: int) -> str:
    return f"{size}" + (f", offset {offset}" if offset else "")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['nats_per_token']:.4f}" + ("" if row["sd"] is None else f" ± {row['sd']:.4f}")


def _words(summary: Summary) -> str:
    """What the numbers are, and the errors that the table does not hold."""
    rows = summary["rows"]
    seeds = sorted({row["n"] for row in rows})
    spread = "± is the standard deviation over seeds. " if max(seeds) > 1 else "One seed, so its spread is unknown. "
    within = ""
    known = [row["se"] for row in rows if row["se"] is not None]
    noise = [row["se_mc"] for row in rows if row["se_mc"] is not None]
    if known:
        within = f"Within a run the standard error is {_range(known)} (clustered by document)"
        within += f", of it {_range(noise)} from the noise draws. " if noise else ". "
    return (
        f"Bounds in nats per token on {rows[0]['tokens']:,} tokens of {rows[0]['documents']} documents, "
        f"{' or '.join(map(str, seeds))} seeds. {spread}{within}All runs share documents and noise, "
        "so these errors are mostly common to them."
    )


def _test_words() -> str:
    return (
        "Differences are paired by seed (± standard error, Student's t, two-sided p); "
        "p is not corrected for the number of lines."
    )


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.4f}", f"{max(values):.4f}"
    return low if low == high else f"{low} – {high}"


def _markdown_table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def _rich_table(header: list[str], lines: list[list[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(name, justify="right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table
