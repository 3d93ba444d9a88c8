"""Beyond the trained length: bounds, variance, texts, lengths and caches by position (results/length.json)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.figure import Figure

from blockdiff.report.drawing import INK, Picture, half_width, legend, panels, series
from blockdiff.report.exhibits import Caption, DataTable, Exhibit, Section, counted, each, number, origin
from blockdiff.report.sources import Source

Rows = list[dict[str, Any]]
_CACHES = {"full": "the whole context in the cache", "window": "a cache of the trained length, sliding"}
_TEXTS = {
    "judge_nll": "judge's nats per token",
    "entropy": "entropy of the tokens, nats",
    "repeated_4grams": "share of repeated 4-grams",
}


def section(sources: list[Source]) -> Section | None:
    measured = [source for source in sources if source.results.get("length", {}).get("rows")]
    if not measured:
        return None
    parts = (_curves, _variance, _texts, _lengths, _caches, _verdicts)
    exhibits = [part(measured) for part in parts]
    return Section("Length", tuple(exhibit for exhibit in exhibits if exhibit))


def _all(sources: list[Source], key: str) -> Rows:
    """The rows of every source, each way named by its run where there are several; `trained` is the run's length."""
    several = len(sources) > 1
    return [
        {
            **row,
            "way": f"{source.label}: {row['way']}" if several else row["way"],
            "trained": source.results["length"]["trained_length"],
        }
        for source in sources
        for row in source.results["length"].get(key, [])
    ]


def _lines(rows: Rows) -> dict[str, Rows]:
    """The rows of each way, from the first position on."""
    ways = dict.fromkeys(row["way"] for row in rows)
    return {way: sorted((r for r in rows if r["way"] == way), key=lambda row: row.get("start", 0)) for way in ways}


def _place(row: dict[str, Any]) -> float:
    """The middle of a range of positions, in trained lengths."""
    return float((row["start"] + row["end"]) / 2 / row["trained"])


def _by_position(rows: Rows, key: str, ylabel: str, error: str | None = None) -> Callable[[Figure], None]:
    """A panel for each kind of cache, a line for each way."""
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    numbers = {way: at for at, way in enumerate(_lines(rows))}

    def draw(figure: Figure) -> None:
        for axes, cache in zip(panels(figure, len(caches), share_y=True), caches, strict=True):
            for way, mine in _lines([r for r in rows if r["cache"] == cache and r.get(key) is not None]).items():
                x, y = [_place(row) for row in mine], [row[key] for row in mine]
                bars = [half_width(row[error]) for row in mine] if error else None
                axes.errorbar(x, y, yerr=bars, capsize=3, elinewidth=0.8, label=way, **series(numbers[way]))
            axes.axvline(1, color=INK, alpha=0.6, linewidth=1, linestyle=":")
            axes.set(xlabel="position, trained lengths", title=_CACHES.get(cache, cache))
        figure.axes[0].set_ylabel(ylabel)
        legend(figure)

    return draw


def _counts(sources: list[Source], rows: Rows) -> str:
    lengths = each(sources, [f"trained on {s.results['length']['trained_length']:,} tokens" for s in sources])
    return f"{counted(rows)} in a range of positions; {lengths}"


def _curves(sources: list[Source]) -> Exhibit:
    rows = _all(sources, "rows")
    what = "Bound by position in the text, beyond the trained length (dotted)"
    errors = "bars: 95 % intervals, ± 1.96 standard errors clustered by document, common to all ways"
    caption = Caption(what, _counts(sources, rows), errors=errors, **origin(sources, "length"))
    keys = ("nats_per_token", "se", "se_mc", "variance")
    draw = _by_position(rows, "nats_per_token", "nats per token (upper bound)", "se")
    return Exhibit("length", caption, "Bound by position", Picture("length", what, draw), _table(rows, keys))


def _variance(sources: list[Source]) -> Exhibit | None:
    rows = [row for row in _all(sources, "rows") if row.get("variance") is not None]
    if not any(row["variance"] for row in rows):
        return None
    what = "Variance of the bound's estimator by position: how noisy one draw of masks is"
    caption = Caption(what, _counts(sources, rows), errors="none drawn", **origin(sources, "length"))
    picture = Picture("length-variance", what, _by_position(rows, "variance", "variance of a draw"), height=3.6)
    return Exhibit("length-variance", caption, "Variance by position", picture)


def _texts(sources: list[Source]) -> Exhibit | None:
    rows = _all(sources, "texts")
    if not rows:
        return None
    lines = {f"{way}, {cache} cache": mine for way, cache, mine in _split(rows)}

    def draw(figure: Figure) -> None:
        shown = [key for key in _TEXTS if any(row.get(key) is not None for row in rows)]
        for axes, key in zip(panels(figure, len(shown)), shown, strict=True):
            for at, (label, mine) in enumerate(lines.items()):
                known = [row for row in mine if row.get(key) is not None]
                bars = [half_width(row.get("judge_nll_se")) for row in known] if key == "judge_nll" else None
                x, y = [_place(row) for row in known], [row[key] for row in known]
                axes.errorbar(x, y, yerr=bars, capsize=3, elinewidth=0.8, label=label, **series(at))
            axes.axvline(1, color=INK, alpha=0.6, linewidth=1, linestyle=":")
            axes.set(xlabel="position, trained lengths", ylabel=_TEXTS[key])
        legend(figure, columns=2)

    what = "Generated texts by position: what a judge makes of them, their entropy, and how much they repeat"
    counts = "{} texts".format(" or ".join(map(str, sorted({row["texts"] for row in rows}))))
    errors = "bars: 95 % intervals of the judge's value, ± 1.96 standard errors over texts; none for the others"
    caption = Caption(what, counts, errors=errors, **origin(sources, "length"))
    keys = ("judge_nll", "judge_nll_se", "entropy", "repeated_4grams", "texts")
    return Exhibit(
        "length-texts", caption, "Texts by position", Picture("length-texts", what, draw), _table(rows, keys)
    )


def _split(rows: Rows) -> Iterable[tuple[str, str, Rows]]:
    for way, mine in _lines(rows).items():
        for cache in dict.fromkeys(row["cache"] for row in mine):
            yield way, cache, [row for row in mine if row["cache"] == cache]


def _lengths(sources: list[Source]) -> Exhibit | None:
    rows = [row for row in _all(sources, "lengths") if row.get("histogram")]
    if not rows:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, row in enumerate(rows):
            starts, counts = zip(*row["histogram"], strict=True)
            width = starts[1] - starts[0] if len(starts) > 1 else 1
            shares = [count / max(sum(counts), 1) for count in counts]
            style = {key: value for key, value in series(at).items() if not key.startswith("marker")}
            axes.stairs(shares, [*starts, starts[-1] + width], label=f"{row['way']}, {row['cache']} cache", **style)
        axes.set(xlabel="tokens of a text", ylabel="share of texts")
        legend(figure, columns=2)

    what = "Lengths of the generated texts; unended: cut off at the longest length that was asked for"
    header = ("", "cache", "mean", "sd", "median", "90 % below", "unended")
    keys = ("mean", "sd", "median", "p90")
    lines = [(r["way"], r["cache"], *(number(r.get(key), ".1f") for key in keys), str(r["unended"])) for r in rows]
    texts = sorted({sum(count for _, count in row["histogram"]) for row in rows})
    counts = f"{' or '.join(map(str, texts))} texts"
    errors = "none; sd: standard deviation over texts"
    caption = Caption(what, counts, errors=errors, **origin(sources, "length"))
    picture = Picture("length-histogram", what, draw, height=3.6)
    return Exhibit("length-histogram", caption, "Lengths of texts", picture, DataTable(header, tuple(lines), (1,)))


def _caches(sources: list[Source]) -> Exhibit | None:
    rows = _all(sources, "differences")
    if not rows:
        return None
    bins = sorted({row["bin"] for row in rows})
    found = {(row["way"], row["cache"], row["bin"]): row["max_abs_difference"] for row in rows}
    ways = dict.fromkeys((row["way"], row["cache"]) for row in rows)
    lines = [(*way, *(number(found.get((*way, at)), ".1e") for at in bins)) for way in ways]
    what = "Largest difference of any logit, decoded with the cache and computed without it, by range of positions"
    caption = Caption(what, f"{len(bins)} ranges", errors="none: largest values", **origin(sources, "length"))
    header = ("", "cache", *(f"range {at}" for at in bins))
    return Exhibit("length-caches", caption, "The cache is exact", table=DataTable(header, tuple(lines), (1,)))


def _verdicts(sources: list[Source]) -> Exhibit | None:
    rows = _all(sources, "verdicts")
    if not rows:
        return None
    what = "Whether the criterion that was declared before the run is held"
    words = {True: "held", False: "not held", None: "not decided"}
    lines = [(r["way"], r["cache"], words[r["held"]], _signed(r), r.get("says", "")) for r in rows]
    caption = Caption(what, f"{len(rows)} ways", errors="± one standard error", **origin(sources, "length"))
    header = ("", "cache", "criterion", "difference, nats/token", "")
    return Exhibit("length-verdicts", caption, "The criterion", table=DataTable(header, tuple(lines), (1, 2, 4)))


def _signed(row: dict[str, Any]) -> str:
    error = "" if row.get("se") is None else f" ± {row['se']:.4f}"
    return number(row.get("difference"), "+.4f") + error


def _table(rows: Rows, keys: Iterable[str]) -> DataTable:
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    header = ("", "cache", "tokens", *(key.replace("_", " ") for key in shown))
    lines = [
        (row["way"], row["cache"], f"{row['start']}-{row['end'] - 1}", *(_cell(row.get(key)) for key in shown))
        for row in rows
    ]
    return DataTable(header, tuple(lines), (1,))


def _cell(value: float | int | None) -> str:
    return str(value) if isinstance(value, int) else number(value)
