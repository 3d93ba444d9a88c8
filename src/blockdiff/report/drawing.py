"""Pictures of the page: matplotlib figures as SVG that takes its colours from the page, and as PNG for use elsewhere.

A figure is drawn in stand-in colours. In the SVG they become `currentColor` and the page's variables, so that one
drawing is right on white, on dark and on paper. Text stays text.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

INK, PAPER = "#010203", "#fcfdfe"
# after Okabe and Ito, darker where it would be faint on white: told apart with every colour blindness
SERIES = ("#0072b2", "#d55e00", "#00795a", "#b0548a", "#a87400", "#5b6fd6", "#5c6470")
MARKERS = "osD^vPX<>p"
LINES = ("-", "--", "-.", ":")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "blockdiff",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "axes.titlesize": "medium",
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
Draw = Callable[[Figure], None]


@dataclass(frozen=True)
class Picture:
    """A figure that `draw` fills; width and height in inches at 72 points. label: its text alternative."""

    name: str
    label: str
    draw: Draw
    width: float = 8.0
    height: float = 4.0

    def svg(self) -> Markup:
        """The picture as inline SVG without a size, an address or a colour of its own for text."""
        text = self._saved("svg", metadata=_NO_METADATA).decode()
        text = text[text.index("<svg") :]
        box = re.search(r'viewBox="([^"]*)"', text)
        assert box is not None
        body = re.sub(r"<style.*?</style>", "", text[text.index(">") + 1 :], flags=re.S)
        body = re.sub(r'\bid="([^"]*)"', rf'id="{self.name}-\1"', body)
        body = re.sub(r'xlink:href="#', f'href="#{self.name}-', body).replace("url(#", f"url(#{self.name}-")
        body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", body)
        for stand_in, colour in [(INK, "currentColor"), (PAPER, "var(--paper)")]:
            body = body.replace(stand_in, colour)
        for number, stand_in in enumerate(SERIES):
            body = body.replace(stand_in, f"var(--series-{number})")
        label = html.escape(self.label)
        return Markup(f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{label}">{body}')

    def png(self, file: Path) -> None:
        """The picture on white."""
        from blockdiff.files import write_bytes

        write_bytes(file, self._saved("png", dpi=120, facecolor="white"))

    def _saved(self, form: str, **options: Any) -> bytes:
        with rc_context(_STYLE):  # ticks and texts are made as late as at saving
            figure = Figure(figsize=(self.width, self.height), layout="constrained", facecolor="none")
            self.draw(figure)
            out = io.BytesIO()
            figure.savefig(out, format=form, **options)
        return out.getvalue()


def series(number: int) -> dict[str, Any]:
    """Colour, marker and line of a series; no two of the first seventy look alike."""
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(SERIES) % len(LINES)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def panels(figure: Figure, count: int, *, columns: int = 3, share_y: bool = False) -> list[Any]:
    """Axes side by side, `columns` to a line."""
    columns = min(count, columns)
    lines = -(-count // columns)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=share_y)
    flat = [axes for line in grid for axes in line]
    for axes in flat[count:]:
        axes.remove()
    return flat[:count]


def legend(figure: Figure, *, columns: int = 3) -> None:
    """One legend below all panels, every name once."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def size_axis(axes: Any, sizes: Sequence[int]) -> None:
    """Block sizes on a logarithmic scale; of many, only the powers of two get a number."""
    shown = [size for size in sizes if power_of_two(size)] if len(sizes) > 8 else list(sizes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.minorticks_off()


def perplexity_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


def half_width(se: float | None) -> float:
    """Half of a 95 % interval; 0 draws none where the error is unknown."""
    return 1.96 * se if se is not None else 0.0
