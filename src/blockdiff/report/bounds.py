"""Likelihood: the bound against block size, off the grid, and its differences between runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from matplotlib.figure import Figure

from blockdiff.report.drawing import (
    INK,
    LINES,
    Picture,
    half_width,
    legend,
    panels,
    perplexity_axis,
    power_of_two,
    series,
    size_axis,
)
from blockdiff.report.exhibits import Caption, DataTable, Exhibit, Section, counted, each, number, origin
from blockdiff.report.sources import Source

Rows = list[dict[str, Any]]
_ERRORS = "95 % intervals, ± 1.96 standard errors clustered by document (which documents, and the draws of noise)"


def section(sources: list[Source]) -> Section | None:
    measured = [source for source in sources if source.results.get("bound", {}).get("rows")]
    if not measured:
        return None
    exhibits = [_curve(measured), _values(measured), _off_grid(measured), _differences(measured)]
    return Section("Bounds on the validation text", tuple(exhibit for exhibit in exhibits if exhibit))


def _rows(source: Source, *, on_grid: bool | None = None) -> Rows:
    rows = [row for row in source.results["bound"]["rows"] if isfinite(row["ppl"])]
    return rows if on_grid is None else [row for row in rows if (row["offset"] == row.get("grid", 0)) == on_grid]


def _counts(sources: list[Source]) -> str:
    return each(sources, [counted(source.results["bound"]["rows"]) for source in sources])


def _curve(sources: list[Source]) -> Exhibit | None:
    drawn = [source for source in sources if len(_rows(source, on_grid=True)) > 1]
    if not drawn:
        return None
    sizes = sorted({row["block_size"] for source in drawn for row in _rows(source, on_grid=True)})

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, source in enumerate(drawn):
            rows = sorted(_rows(source, on_grid=True), key=lambda row: row["block_size"])
            x, style = [row["block_size"] for row in rows], series(at)
            bands = [row["ppl_ci"] or (row["ppl"], row["ppl"]) for row in rows]
            low, high = zip(*bands, strict=True)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(x, [row["ppl"] for row in rows], label=source.label, **style)
        for at, (label, ppl) in enumerate(_baselines(drawn)):
            axes.axhline(ppl, color=INK, alpha=0.7, linewidth=1, linestyle=LINES[1 + at % 3], label=label)
        size_axis(axes, sizes)
        perplexity_axis(axes)
        axes.set(xlabel="block size", ylabel="perplexity (upper bound), log scale")
        legend(figure)

    between = [size for size in sizes if not power_of_two(size)]
    what = "Perplexity (upper bound) against block size on the grid (the trained one, else offset 0): lower is better"
    what += f"; sizes between the powers of two: {', '.join(map(str, between))}" if between else ""
    what += "; level lines: baselines of the same text" if _baselines(drawn) else ""
    caption = Caption(what, _counts(drawn), errors=f"bands: {_ERRORS}", **origin(drawn, "bound"))
    return Exhibit("bounds", caption, picture=Picture("bounds", what, draw, height=4.4))


def _baselines(sources: list[Source]) -> list[tuple[str, float]]:
    """Every baseline once, named by its run where several runs have one of that name."""
    found: dict[tuple[str, float], list[str]] = {}
    for source in sources:
        for row in source.results.get("baselines", {}).get("rows", []):
            found.setdefault((row["name"], row["ppl"]), []).append(source.label)
    names = [name for name, _ in found]
    return [
        (name if names.count(name) == 1 else f"{name} ({', '.join(labels)})", ppl)
        for (name, ppl), labels in found.items()
    ]


def _values(sources: list[Source]) -> Exhibit:
    several = len(sources) > 1
    lines = []
    for source in sources:
        name = f"{source.label}: " if several else ""
        for row in source.results.get("baselines", {}).get("rows", []):
            se = number(row.get("se"))
            lines.append((f"{name}{row['name']}", f"{row['nats_per_token']:.4f}", se, "", f"{row['ppl']:.2f}", ""))
        for row in _rows(source):
            low, high = row["ppl_ci"] or (row["ppl"], row["ppl"])
            known = number(row["se"]), number(row.get("se_mc"))
            numbers = (f"{row['nats_per_token']:.4f}", *known, f"{row['ppl']:.2f}", f"{low:.2f} – {high:.2f}")
            lines.append((f"{name}{_place(row)}", *numbers))
    header = ("", "nats/token", "standard error", "of it from draws", "PPL", "95 % interval")
    errors = "standard errors clustered by document; of it from draws: the part of the random masks alone"
    caption = Caption("The bounds as numbers", _counts(sources), errors=errors, **origin(sources, "bound"))
    return Exhibit("bound-table", caption, table=DataTable(header, tuple(lines)))


def _place(row: dict[str, Any]) -> str:
    return f"block size {row['block_size']}" + (f", offset {row['offset']}" if row["offset"] else "")


def _off_grid(sources: list[Source]) -> Exhibit | None:
    drawn = [source for source in sources if _rows(source, on_grid=False)]
    if not drawn:
        return None
    sizes = sorted({row["block_size"] for source in drawn for row in _rows(source, on_grid=False)})

    def draw(figure: Figure) -> None:
        for axes, source in zip(panels(figure, len(drawn), columns=2, share_y=True), drawn, strict=True):
            for at, size in enumerate(sizes):
                rows = sorted(_shifts(source, size), key=lambda row: row["offset"])
                if len(rows) > 1:
                    x, y = [row["offset"] for row in rows], [row["nats_per_token"] for row in rows]
                    bars = [half_width(row["se"]) for row in rows]
                    axes.errorbar(x, y, yerr=bars, capsize=3, elinewidth=0.8, label=f"block size {size}", **series(at))
            axes.set(xlabel="offset of the grid, tokens", ylabel="nats per token (upper bound)", title=source.label)
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, columns=4)

    what = "Bound against the offset of the grid: the first block is so many tokens long; level: no grid is preferred"
    caption = Caption(what, _counts(drawn), errors=f"bars: {_ERRORS}, common to all offsets", **origin(drawn, "bound"))
    picture = Picture("off-grid", what, draw, height=3.8 * -(-len(drawn) // 2))
    return Exhibit("off-grid", caption, "Off the grid", picture)


def _shifts(source: Source, size: int) -> Rows:
    return [row for row in _rows(source) if row["block_size"] == size]


def _differences(sources: list[Source]) -> Exhibit | None:
    """What `eval bound --against` compared, and every later run minus the first where that was not compared."""
    lines = [line for source in sources for line in _compared(source, sources)]
    known = {line[0] for line in lines}
    wide = [line for other in sources[1:] for line in _subtracted(sources[0], other) if line[0] not in known]
    if not lines and not wide:
        return None
    what = (
        "Differences between models on the same documents, nats per token: below 0 the one named first has less, which "
        "is a better model where the other's value is exact, and not where both are bounds"
    )
    errors = [_BOOTSTRAP] if lines else []
    errors += [_WIDE] if wide else []
    header = ("", "place", "difference", "95 % interval", "leaves 0 out")
    caption = Caption(what, _counts(sources), errors="; ".join(errors), **origin(sources, "bound"))
    return Exhibit("differences", caption, "Differences", table=DataTable(header, (*lines, *wide), (1,)))


_BOOTSTRAP = "of `eval bound --against`: bootstrap over documents, paired"
_WIDE = (
    "of runs that were not compared so: 95 % intervals of the sum of both standard errors, which no pairing can exceed"
)


def _compared(source: Source, sources: list[Source]) -> list[tuple[str, ...]]:
    result = source.results["bound"]
    against = str(result.get("against"))
    labels = {str(other.path / "checkpoint"): other.label for other in sources}
    name = f"{source.label} − {labels.get(against, against)}"
    return [
        _line(name, f"block size {row['block_size']}", row["nats_per_token"], row["nats_ci"])
        for row in result.get("compared") or []
        if row["nats_per_token"] is not None
    ]


def _subtracted(first: Source, other: Source) -> list[tuple[str, ...]]:
    """other - first wherever both were scored on the same text, as far as the files say."""
    base = {(row["block_size"], row["offset"]): row for row in _rows(first)}
    lines = []
    for row in _rows(other):
        against = base.get((row["block_size"], row["offset"]))
        if against is not None and _same_text(first, other, against, row):
            mean, interval = row["nats_per_token"] - against["nats_per_token"], None
            if row["se"] is not None and against["se"] is not None:
                half = 1.96 * (row["se"] + against["se"])
                interval = (mean - half, mean + half)
            lines.append(_line(f"{other.label} − {first.label}", _place(row), mean, interval))
    return lines


def _line(name: str, place: str, mean: float, interval: Sequence[float] | None) -> tuple[str, ...]:
    if interval is None:
        return name, place, f"{mean:+.4f}", "", ""
    low, high = interval
    return name, place, f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", "yes" if low > 0 or high < 0 else "no"


def _same_text(first: Source, other: Source, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """The same counts, and the same data files where both name them."""
    files = [source.results["bound"].get("data") for source in (first, other)]
    return (a["tokens"], a["documents"]) == (b["tokens"], b["documents"]) and (None in files or files[0] == files[1])
