"""An experiment's summary: settings side by side with the spread over seeds and, apart from it, the error of the draws;
the noise of the gradient beside the bound that training ended at; paired differences; claims."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from blockdiff.report.drawing import SERIES, Picture, legend, panels, series, size_axis
from blockdiff.report.exhibits import Caption, DataTable, Exhibit, Section, command_of, extent, number
from blockdiff.report.sources import Source

Rows = list[dict[str, Any]]
_MOST_PANELS = 4
_NAMES = {
    "bound": "bound, nats/token",
    "gradient_noise": "gradient variance / |mean|²",
    "worst_offset": "worst offset − grid, nats/token",
    "exact_match": "share of right answers",
    "judge_nll": "judge's nats/token",
    "tokens_per_forward": "tokens per forward",
    "tokens_per_verify": "tokens a verification",
    "judged_entropy": "entropy of the tokens, nats",
}
_APART = ("bound", "gradient_noise", "gradient_variance", "worst_offset", "monotone_share", "tokens", "unended")
_SPREAD = "thick: ± one standard deviation over seeds; thin, capped: ± one standard error of the noise draws alone"


def sections(sources: list[Source]) -> list[Section]:
    """One for each experiment."""
    return [_section(source.summary, at) for at, source in enumerate(sources) if source.summary is not None]


def _section(summary: dict[str, Any], at: int) -> Section:
    exhibits = [_claims(summary), _bounds(summary), _sizes(summary), _offsets(summary)]
    measures = dict.fromkeys(row["measure"] for row in summary["rows"] if row["measure"] not in _APART)
    exhibits += [_measure(summary, name) for name in measures]
    exhibits.append(_differences(summary))
    found = tuple(exhibit for exhibit in exhibits if exhibit is not None)
    named = tuple(_named(exhibit, f"experiment-{at}-{exhibit.name}") for exhibit in found)
    return Section(f"Experiment {summary['name']}", named, summary["about"])


def _named(exhibit: Exhibit, name: str) -> Exhibit:
    """The exhibit and its picture under a name that no other experiment has."""
    picture = exhibit.picture
    if picture is not None:
        picture = Picture(name, picture.label, picture.draw, picture.width, picture.height)
    return Exhibit(name, exhibit.caption, exhibit.title, picture, exhibit.table)


def _of(summary: dict[str, Any], measure: str) -> Rows:
    """Rows of a measure: bounds on the grid in uniform reveal order, gradient noise of all parameters."""
    rows = [row for row in summary["rows"] if row["measure"] == measure]
    plain = [row for row in rows if not row["place"].get("offset") and not row["place"].get("left_bias")]
    return [row for row in plain if row["place"].get("group", "all") == "all"]


def _place(row: dict[str, Any]) -> str:
    words = {"block_size": "b = {}", "left_bias": "β = {:g}", "offset": "offset {}", "group": ""}
    shown = [words.get(key, "{}").format(value) for key, value in row["place"].items() if value or key == "block_size"]
    return ", ".join(word for word in shown if word)


def _caption(summary: dict[str, Any], what: str, rows: Rows, errors: str) -> Caption:
    most = max((row.get("counts", {}) for row in rows), key=lambda counts: counts.get("draws", 0))
    counts = [f"{value:,} {name}" for name, value in most.items() if value]
    n = extent({row["n"] for row in rows})
    seeds = f"{n} of seeds {', '.join(map(str, summary['seeds']))} a setting"
    return Caption(what, ", ".join(counts), seeds, errors, (command_of(summary),))


def _bounds(summary: dict[str, Any]) -> Exhibit | None:
    rows, noise = _of(summary, "bound"), _of(summary, "gradient_noise")
    if not rows:
        return None
    what = "Bounds at the end of training, a setting a line; lower is better; the axes do not begin at 0"
    if noise:
        what = "Variance of the training gradient (left) beside the bound that training ended at; lower is better"
        what += "".join(
            f"; rank correlation with the bound at {_place(found)}: {found['spearman']:+.2f} over {found['n']} settings"
            + f" of {found['group']}"
            for found in summary.get("correlations", [])
        )
    caption = _caption(summary, what, rows, f"{_SPREAD}; crosses: single seeds")
    title = "Gradient variance and bound" if noise else "Bounds of the settings"
    return Exhibit("settings", caption, title, _dots(summary, noise + rows, what, "settings"), _table(noise + rows))


def _measure(summary: dict[str, Any], measure: str) -> Exhibit:
    rows = _of(summary, measure)
    what = _NAMES.get(measure, measure.replace("_", " ")).capitalize()
    caption = _caption(summary, what, rows, f"{_SPREAD}; crosses: single seeds")
    return Exhibit(measure, caption, what, _dots(summary, rows, what, measure), _table(rows))


def _dots(summary: dict[str, Any], rows: Rows, label: str, name: str) -> Picture:
    """A panel for each measure and place (of many, some that lie apart), a line for each setting."""
    places = list(dict.fromkeys((row["measure"], _place(row)) for row in rows))
    if len(places) > _MOST_PANELS:
        last = _MOST_PANELS - 1
        places = [places[round(at * (len(places) - 1) / last)] for at in range(_MOST_PANELS)]
    settings = [setting for setting in summary["settings"] if any(row["setting"] == setting for row in rows)]

    def draw(figure: Figure) -> None:
        for axes, (measure, place) in zip(panels(figure, len(places), columns=_MOST_PANELS), places, strict=True):
            mine = [row for row in rows if (row["measure"], _place(row)) == (measure, place)]
            for row in mine:
                _dot(axes, row, settings.index(row["setting"]))
            if measure == "gradient_noise" and all(value > 0 for row in mine for value in row["by_seed"].values()):
                axes.set_xscale("log")
            else:
                axes.locator_params(axis="x", nbins=4)
            axes.set_title(place)
            axes.set_xlabel(_NAMES.get(measure, measure.replace("_", " ")), fontsize="small")
            axes.set_yticks(range(len(settings)), settings if axes is figure.axes[0] else [""] * len(settings))
            axes.set_ylim(len(settings) - 0.5, -0.5)
            axes.tick_params(axis="x", labelsize="small")
        legend(figure, columns=2)

    return Picture(name, label, draw, width=9, height=1.6 + 0.28 * len(settings))


def _dot(axes: Any, row: dict[str, Any], y: int) -> None:
    x = row["value"]
    seeds = list(row["by_seed"].values())
    axes.plot(seeds, [y] * len(seeds), "x", color=SERIES[6], markersize=4, label="a seed")
    if row["sd"] is not None:
        style = {"color": SERIES[0], "alpha": 0.45, "elinewidth": 5}
        axes.errorbar([x], [y], xerr=[row["sd"]], fmt="none", label="± sd over seeds", **style)
    if row["se_mc"]:
        axes.errorbar([x], [y], xerr=[row["se_mc"]], fmt="none", color=SERIES[1], capsize=3, label="± se of the draws")
    axes.plot([x], [y], "o", color=SERIES[0], markersize=5, label="mean")


def _table(rows: Rows) -> DataTable:
    header = ("setting", "measure", "place", "mean", "sd over seeds", "se in a run", "of it from draws", "seeds")
    lines = [
        (
            row["setting"],
            _NAMES.get(row["measure"], row["measure"]),
            _place(row),
            f"{row['value']:.4f}",
            *(number(row.get(key)) for key in ("sd", "se", "se_mc")),
            str(row["n"]),
        )
        for row in rows
    ]
    return DataTable(header, tuple(lines), (1, 2))


def _sizes(summary: dict[str, Any]) -> Exhibit | None:
    what = "Bound against block size on the grid; lower is better"
    return _by_size(summary, "bound", "sizes", what, "nats per token (upper bound)")


def _offsets(summary: dict[str, Any]) -> Exhibit | None:
    what = "Off the grid: bound at the worst measured offset minus the bound on the grid; 0: no grid is preferred"
    return _by_size(summary, "worst_offset", "offsets", what, _NAMES["worst_offset"])


def _by_size(summary: dict[str, Any], measure: str, name: str, what: str, ylabel: str) -> Exhibit | None:
    rows = _of(summary, measure)
    sizes = sorted({row["place"]["block_size"] for row in rows})
    if len(sizes) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, setting in enumerate(summary["settings"]):
            mine = sorted((r for r in rows if r["setting"] == setting), key=lambda row: row["place"]["block_size"])
            if mine:
                x, y = [row["place"]["block_size"] for row in mine], [row["value"] for row in mine]
                bars = [row["sd"] or 0.0 for row in mine]
                axes.errorbar(x, y, yerr=bars, capsize=3, elinewidth=0.8, label=setting, **series(at))
        size_axis(axes, sizes)
        axes.set(xlabel="block size", ylabel=ylabel)
        legend(figure, columns=4)

    caption = _caption(summary, what, rows, "bars: ± one standard deviation over seeds")
    picture = Picture(name, what, draw, height=3.8 + 0.22 * (len(summary["settings"]) / 4))
    return Exhibit(name, caption, picture=picture, table=_table(rows) if measure != "bound" else None)


def _claims(summary: dict[str, Any]) -> Exhibit | None:
    if not summary["claims"]:
        return None
    lines = []
    for claim in summary["claims"]:
        what = claim["setting"] if claim["baseline"] is None else f"{claim['setting']} − {claim['baseline']}"
        side = f"below {claim['below']:g}" if claim["below"] is not None else f"above {claim['above']:g}"
        found = "; ".join(
            (f"{_place({'place': verdict['at']})}: " if verdict["at"] else "") + _interval(verdict)
            for verdict in claim["verdicts"]
        )
        lines.append((claim["says"], claim["source"], claim["outcome"], f"{what} {side}: {found or 'no number'}"))
    errors = "Student's 95 % interval over seeds, paired by seed for differences, not corrected for their number"
    seeds = f"seeds {', '.join(map(str, summary['seeds']))}"
    caption = Caption(_VERDICTS, f"{len(lines)} claims", seeds, errors, (command_of(summary),))
    table = DataTable(("claim", "source", "found", "numbers"), tuple(lines), (1, 2, 3))
    return Exhibit("claims", caption, "Claims", table=table)


_VERDICTS = (
    "What papers, and we, say, and whether it holds: the interval lies on the claimed side of the limit (holds), on "
    "the other (does not hold), or has the limit inside (not decided)"
)


def _differences(summary: dict[str, Any]) -> Exhibit | None:
    tests = [test for name in dict.fromkeys(t["measure"] for t in summary["compare"]) for test in _tests(summary, name)]
    if not tests:
        return None
    lines = [
        (
            f"{test['setting']} − {test['baseline']}",
            _NAMES.get(test["measure"], test["measure"].replace("_", " ")),
            _place(test),
            _interval(test),
            number(test.get("p"), ".3g"),
            str(test["n"]),
        )
        for test in tests
    ]
    what = "Differences between settings with the same seed"
    errors = "Student's 95 % interval over seeds, paired by seed, not corrected for their number"
    caption = Caption(what, f"{len(lines)} differences", "as each row says", errors, (command_of(summary),))
    header = ("", "measure", "place", "mean (95 % interval)", "p", "seeds")
    return Exhibit("differences", caption, "Paired differences", table=DataTable(header, tuple(lines), (1, 2)))


def _tests(summary: dict[str, Any], measure: str) -> Rows:
    return _of({"rows": summary["compare"]}, measure)


def _interval(test: dict[str, Any]) -> str:
    return f"{test['mean']:+.4f}" + ("" if test["ci"] is None else " ({:+.4f} to {:+.4f})".format(*test["ci"]))
