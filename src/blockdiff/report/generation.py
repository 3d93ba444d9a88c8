"""The frontier: what a judge makes of generated texts against their entropy and forwards (results/generation.json)."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from blockdiff.report.drawing import INK, Picture, half_width, legend, panels, series
from blockdiff.report.exhibits import Caption, DataTable, Exhibit, Section, each, extent, number, origin
from blockdiff.report.sources import Source

Rows = list[dict[str, Any]]
_COLUMNS = {
    "temperature": "g",
    "forwards_per_text": ".1f",
    "tokens_per_forward": ".2f",
    "judge_nll": ".4f",
    "judge_nll_sd": ".4f",
    "judge_nll_se": ".4f",
    "entropy": ".4f",
    "entropy_sd": ".4f",
    "distinct_1": ".3f",
    "distinct_2": ".3f",
    "distinct_3": ".3f",
    "self_bleu": ".3f",
    "repeated_4grams": ".3f",
    "mauve": ".3f",
    "texts": "d",
    "blank": "d",
}


def section(sources: list[Source]) -> Section | None:
    measured = [source for source in sources if source.results.get("generation", {}).get("rows")]
    if not measured:
        return None
    exhibits = [_frontier(measured), _speed(measured)]
    return Section("Generation", tuple(exhibit for exhibit in exhibits if exhibit))


def _all(sources: list[Source]) -> Rows:
    several = len(sources) > 1
    return [
        {**row, "way": f"{source.label}: {row['way']}" if several else row["way"]}
        for source in sources
        for row in source.results["generation"]["rows"]
    ]


def _data(sources: list[Source]) -> list[tuple[str, dict[str, Any]]]:
    """The data's own point, once where the sources agree on it."""
    found: list[tuple[str, dict[str, Any]]] = []
    for source in sources:
        data = source.results["generation"]["data"]
        if all(data != known for _, known in found):
            found.append((f"the data ({source.label})" if found else "the data", data))
    return found


def _frontier(sources: list[Source]) -> Exhibit:
    rows, data = _all(sources), _data(sources)
    ways = {way: at for at, way in enumerate(dict.fromkeys(row["way"] for row in rows))}
    budgets = sorted({row["budget"] for row in rows})

    def draw(figure: Figure) -> None:
        for axes, budget in zip(panels(figure, len(budgets), columns=2, share_y=True), budgets, strict=True):
            for way, at in ways.items():
                mine = [r for r in rows if r["way"] == way and r["budget"] == budget]
                _points(axes, sorted(mine, key=lambda row: row["temperature"]), way, at)
            for label, point in data:
                _star(axes, point["entropy"], point, label)
            axes.set_title(f"{budget} forwards that denoise")
            axes.set_xlabel("entropy of the tokens, nats")
        figure.axes[0].set_ylabel("judge's nats per token")
        legend(figure)

    what = (
        "Judge's NLL of generated texts over the entropy of their tokens, a panel for each budget of forwards, a line "
        "for each way from the lowest temperature to the highest, each with the data's own point (star): a way is "
        "better where its line passes below the star, worse where it passes above"
    )
    errors = (
        "bars: 95 % intervals, ± 1.96 standard errors over texts; sideways: one standard deviation over groups of texts"
    )
    caption = Caption(what, _counts(sources, rows), errors=errors, **origin(sources, "generation"))
    picture = Picture("frontier", what, draw, height=3.6 * -(-len(budgets) // 2) + 0.8)
    return Exhibit("frontier", caption, "Frontier", picture, _table(rows))


def _points(axes: Any, rows: Rows, way: str, at: int) -> None:
    if rows:
        x, y = [row["entropy"] for row in rows], [row["judge_nll"] for row in rows]
        bars = [half_width(row["judge_nll_se"]) for row in rows]
        sideways = [row.get("entropy_sd") or 0.0 for row in rows]
        axes.errorbar(x, y, yerr=bars, xerr=sideways, capsize=2, elinewidth=0.8, label=way, **series(at))


def _star(axes: Any, x: float, data: dict[str, Any], label: str) -> None:
    style = {"marker": "*", "markersize": 13, "color": INK, "linestyle": "none", "capsize": 3, "zorder": 5}
    axes.errorbar([x], [data["judge_nll"]], yerr=[half_width(data["judge_nll_se"])], label=label, **style)


def _speed(sources: list[Source]) -> Exhibit | None:
    rows, data = [row for row in _all(sources) if row["nearest_to_data"]], _data(sources)
    if not rows:
        return None
    ways = {way: at for at, way in enumerate(dict.fromkeys(row["way"] for row in _all(sources)))}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for way, at in ways.items():
            mine = sorted((row for row in rows if row["way"] == way), key=lambda row: row["forwards_per_text"])
            x, y = [row["forwards_per_text"] for row in mine], [row["judge_nll"] for row in mine]
            bars = [half_width(row["judge_nll_se"]) for row in mine]
            axes.errorbar(x, y, yerr=bars, capsize=3, elinewidth=0.8, label=way, **series(at))
        for label, point in data:
            axes.axhline(point["judge_nll"], color=INK, alpha=0.7, linewidth=1, linestyle="--", label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="forwards a text, commits counted", ylabel="judge's nats per token")
        legend(figure)

    what = (
        "Judge's NLL at the temperature whose entropy is nearest to the data's, against forwards; level: the data's own"
    )
    errors = "bars: 95 % intervals, ± 1.96 standard errors over texts"
    caption = Caption(what, _counts(sources, rows), errors=errors, **origin(sources, "generation"))
    picture = Picture("frontier-speed", what, draw)
    return Exhibit("frontier-speed", caption, "At the data's entropy", picture, _table(rows))


def _counts(sources: list[Source], rows: Rows) -> str:
    groups = {row["groups"] for row in rows if row.get("groups")}
    judges = [f"judge {source.results['generation']['judge']}" for source in sources]
    texts = f"{extent({row['texts'] for row in rows})} texts a point"
    texts += f" in {extent(groups)} groups" if groups else ""
    return (
        f"{texts}; the data: {extent({point['texts'] for _, point in _data(sources)})} texts; {each(sources, judges)}"
    )


def _table(rows: Rows) -> DataTable:
    shown = {name: form for name, form in _COLUMNS.items() if any(row.get(name) is not None for row in rows)}
    header = ("", "budget", *(name.replace("_", " ") for name in shown))
    lines = [
        (row["way"], str(row["budget"]), *(number(row.get(name), form) for name, form in shown.items())) for row in rows
    ]
    return DataTable(header, tuple(lines))
