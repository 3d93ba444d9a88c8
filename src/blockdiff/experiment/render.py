"""Tables of an experiment, made from its summary (the saved JSON) and nothing else."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Summary = dict[str, Any]
Lines = tuple[list[str], list[list[str]]]
_TITLES = {
    "bound": "Bound, nats per token",
    "worst_offset": "Bound at the worst measured offset minus the bound on the grid, nats per token",
    "gradient_noise": "Variance of the training gradient over the squared norm of its mean",
    "exact_match": "Share of right answers",
    "tokens_per_forward": "Tokens per forward, commits counted",
    "judge_nll": "Nats per token of the texts under the judge",
    "judged_entropy": "Entropy of the texts' tokens, nats",
    "tokens_per_verify": "Tokens that a verification lets through",
}
_ONLY_IN_JSON = ("gradient_variance", "monotone_share", "tokens", "unended")
_MANY = 8  # columns beyond which intervals would not fit
_NOT_COMPARED = ("judged_entropy",)


def markdown(summary: Summary) -> str:
    """The experiment as a Markdown section: summary.md."""
    parts = [f"### {summary['name']}", summary["about"], claims_table(summary), *details(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def claims_table(summary: Summary) -> str:
    """Its claims with their verdicts; empty where it makes none."""
    return "\n".join(_markdown_table(*_claims(summary))) if summary["claims"] else ""


def details(summary: Summary) -> list[str]:
    """Its numbers: paragraphs and tables of Markdown."""
    parts = []
    for measure in _measures(summary):
        parts += [f"**{_title(measure)}**", "\n".join(_markdown_table(*_values(summary, measure)))]
        if measure == "bound":
            parts.append(_words(summary))
    if summary["compare"]:
        for measure in _measures(summary):
            header, lines = _comparisons(summary, measure)
            if lines:
                parts += [f"**Differences: {_title(measure)}**", "\n".join(_markdown_table(header, lines))]
        parts.append(_test_words())
    parts += [_correlation(found) for found in summary.get("correlations", [])]
    parts += [f"Not counted: {run['setting']}, seed {run['seed']}: {run['why']}." for run in summary["missing"]]
    return parts


def tables(summary: Summary) -> list[Table]:
    """The same numbers for the terminal."""
    found = [_rich_table(_title(measure), *_values(summary, measure)) for measure in _measures(summary)]
    for measure in _measures(summary):
        header, lines = _comparisons(summary, measure)
        if lines:
            found.append(_rich_table(f"Differences: {_title(measure)}", header, lines))
    return [*found, _rich_table("Claims", *_claims(summary))] if summary["claims"] else found


def _measures(summary: Summary) -> list[str]:
    """The measures that are shown, as the runs list them."""
    return [name for name in dict.fromkeys(row["measure"] for row in summary["rows"]) if name not in _ONLY_IN_JSON]


def _title(measure: str) -> str:
    return _TITLES.get(measure, measure.replace("_", " ").capitalize())


def _shown(row: dict[str, Any]) -> bool:
    """Bounds off the grid are summed up by the worst of them, gradient noise by that of all parameters."""
    if row["measure"] == "bound":
        return not row["place"]["offset"]
    return row["measure"] != "gradient_noise" or row["place"]["group"] == "all"


def _values(summary: Summary, measure: str) -> Lines:
    """A line for each setting, a column for each place."""
    rows = [row for row in summary["rows"] if row["measure"] == measure and _shown(row)]
    places = list(dict.fromkeys(_key(row["place"]) for row in rows))
    by_place = {(row["setting"], _key(row["place"])): row for row in rows}
    lines = [
        [setting, *(_cell(by_place.get((setting, place))) for place in places)]
        for setting in summary["settings"]
        if any(row["setting"] == setting for row in rows)
    ]
    return ["", *map(_place, places)], lines


def _comparisons(summary: Summary, measure: str) -> Lines:
    """A line for each pair, a column for each place: mean difference and its 95 % interval, or, where there are many
    places, a star where it leaves 0 out."""
    tests = [test for test in summary["compare"] if test["measure"] == measure and _shown(test)]
    tests = [] if measure in _NOT_COMPARED else tests
    places = list(dict.fromkeys(_key(test["place"]) for test in tests))
    by_place = {(test["setting"], test["baseline"], _key(test["place"])): test for test in tests}
    pairs = dict.fromkeys((test["setting"], test["baseline"]) for test in tests)
    cell = _interval if len(places) <= _MANY else _starred
    shown = {key: cell(test) for key, test in by_place.items()}
    lines = [
        [f"{setting} − {baseline}", *(shown.get((setting, baseline, place), "") for place in places)]
        for setting, baseline in pairs
    ]
    return ["", *map(_place, places)], lines


def _claims(summary: Summary) -> Lines:
    lines = []
    for claim in summary["claims"]:
        what = claim["setting"] if claim["baseline"] is None else f"{claim['setting']} − {claim['baseline']}"
        side = f"below {claim['below']:g}" if claim["below"] is not None else f"above {claim['above']:g}"
        found = "; ".join(
            (f"{_place(_key(verdict['at']))}: " if verdict["at"] else "") + _interval(verdict)
            for verdict in claim["verdicts"]
        )
        lines.append(
            [claim["says"], claim["source"], f"**{claim['outcome']}**", f"{claim['measure']} {what} {side}: {found}"]
        )
    return ["claim", "source", "found", "numbers"], lines


def _key(place: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(place.items())


def _place(place: tuple[tuple[str, Any], ...]) -> str:
    words = {"block_size": "b = {}", "left_bias": "β = {:g}", "offset": "offset {}"}
    named = [words.get(name, "{}").format(value) for name, value in place if value or name == "block_size"]
    return ", ".join(named) or "all"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['value']:.4f}" + ("" if row["sd"] is None else f" ± {row['sd']:.4f}")


def _starred(test: dict[str, Any]) -> str:
    decided = test["ci"] is not None and (test["ci"][0] > 0 or test["ci"][1] < 0)
    return f"{test['mean']:+.4f}" + ("*" if decided else "")


def _interval(test: dict[str, Any]) -> str:
    return f"{test['mean']:+.4f}" + ("" if test["ci"] is None else " ({:+.4f} to {:+.4f})".format(*test["ci"]))


def _correlation(found: dict[str, Any]) -> str:
    return (
        f"Rank correlation of gradient noise with the bound at {_place(_key(found['place']))}, over the "
        f"{found['n']} settings of {found['group']}: {found['spearman']:+.2f}."
    )


def _words(summary: Summary) -> str:
    """What the bounds are, and the errors that the table does not hold."""
    rows = [row for row in summary["rows"] if row["measure"] == "bound"]
    seeds = sorted({row["n"] for row in rows})
    spread = "± is the standard deviation over seeds. " if max(seeds) > 1 else "One seed, so its spread is unknown. "
    within = ""
    known = [row["se"] for row in rows if row["se"] is not None]
    noise = [row["se_mc"] for row in rows if row["se_mc"] is not None]
    if known:
        within = f"Within a run the standard error is {_range(known)} (clustered by document)"
        within += f"; that of the noise draws alone is at most {max(noise):.4f}. " if any(noise) else ". "
    return (
        f"{rows[0]['counts']['tokens']:,} tokens of {rows[0]['counts']['documents']} documents, "
        f"{' or '.join(map(str, seeds))} seeds. {spread}{within}All runs share documents and noise, "
        "so these errors are mostly common to them."
    )


def _test_words() -> str:
    return (
        "Differences are paired by seed, with Student's 95 % interval (in wide tables a star where it leaves 0 out), "
        "not corrected for their number."
    )


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.4f}", f"{max(values):.4f}"
    return low if low == high else f"{low} – {high}"


def _markdown_table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def _rich_table(title: str, header: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*(cell.replace("**", "") for cell in line))
    return table
