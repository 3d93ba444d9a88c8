"""The coverage heat map: what a decoder or an evaluation asks for over what training drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from blockdiff.report.drawing import INK, PAPER, Picture
from blockdiff.report.exhibits import Caption, DataTable, Exhibit, Section, origin
from blockdiff.report.octaves import log_ratio, mark, octaves, percent, span, times
from blockdiff.report.sources import Source

_WHAT = "log2 (asked / trained) by tokens of the block and tokens before it"


def section(sources: list[Source]) -> Section | None:
    found = [source for source in sources if source.results.get("coverage", {}).get("rows")]
    several = len(found) > 1
    exhibits = tuple(_exhibit(source, at, several) for at, source in enumerate(found))
    return Section("Coverage of what is asked by what was trained", exhibits) if exhibits else None


def coverage_figure(result: dict[str, Any], file: Path) -> None:
    """The map as a picture (PNG)."""
    _picture(result, "coverage").png(file)


def _exhibit(source: Source, at: int, several: bool) -> Exhibit:
    result = source.results["coverage"]
    what = f"{_WHAT}; below 0: trained more often than asked; hatched, x: never trained, all of it or a part"
    errors = "none: the shares are exact" if result.get("order_exact") is not False else "order: a lower limit"
    caption = Caption(what, _counts(result), errors=errors, **origin([source], "coverage"))
    name = f"coverage-{at}" if several else "coverage"
    title = source.label if several else ""
    return Exhibit(name, caption, title, _picture(result, name), _table(result["rows"]))


def _counts(result: dict[str, Any]) -> str:
    words = f"{result['calls']:,.0f} calls" if "calls" in result else "calls"
    asked = result.get("request", {})
    words += " of " + ", ".join(f"{key} {value}" for key, value in asked.items()) if asked else ""
    if result.get("uncovered"):
        words += f"; {percent(result['uncovered'])} in configurations that training never met"
    if result.get("max_ratio") is not None:
        words += f"; asked / trained at most {times(result['max_ratio'])}"
    return words


def _table(rows: list[dict[str, Any]]) -> DataTable:
    before, size, cells = octaves(rows)
    header = ("tokens of the block", *(f"{span(octave)} before" for octave in before))
    return DataTable(header, tuple((span(octave), *map(mark, line)) for octave, line in zip(size, cells, strict=True)))


def _picture(result: dict[str, Any], name: str) -> Picture:
    before, size, cells = octaves(result["rows"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        values = [[log_ratio(cell) for cell in line] for line in cells]
        most = max([abs(value) for line in values for value in line if value is not None], default=1.0) or 1.0
        shown = [[float("nan") if value is None else value for value in line] for line in values]
        mesh = axes.pcolormesh(shown, cmap="RdBu_r", vmin=-most, vmax=most)
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                if cell is not None and cell["uncovered"]:
                    style: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "alpha": 0.5, "linewidth": 0}
                    axes.add_patch(Rectangle((x, y), 1, 1, hatch="//", **style))
                paper = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                axes.text(x + 0.5, y + 0.5, mark(cell), ha="center", va="center", bbox=paper)
        axes.set_xticks([x + 0.5 for x in range(len(before))], [span(octave) for octave in before])
        axes.set_yticks([y + 0.5 for y in range(len(size))], [span(octave) for octave in size])
        axes.set(xlabel="tokens before the block", ylabel="tokens of the block")
        axes.set_title("x, hatched: never trained, all of it or a part", loc="right", fontsize="medium")
        figure.colorbar(mesh, label="log2 (asked / trained)")

    return Picture(name, _WHAT, draw, height=max(2.4, 0.45 * len(size) + 1.4))
