"""The picture of an experiment, made from its summary (the saved JSON) and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Summary = dict[str, Any]
Rows = list[dict[str, Any]]


def plot(summary: Summary, file: Path) -> None:
    """Bounds against block size, right answers by the way of decoding, and judged texts against their speed, as far as
    they were measured; a line for each setting, bars of one standard deviation over seeds."""
    panels = [
        (draw, rows)
        for draw, rows in (
            (_bounds, _of(summary, "bound")),
            (_answers, _of(summary, "exact_match")),
            (_frontier, _of(summary, "judge_nll")),
        )
        if rows
    ]
    figure = Figure(figsize=(7 * len(panels) + 2, 4.5), layout="constrained")
    for number, (draw, rows) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        draw(axes, summary, rows)
        axes.grid(alpha=0.3)
    figure.suptitle(summary["name"])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=110)


def _of(summary: Summary, measure: str) -> Rows:
    rows = [row for row in summary["rows"] if row["measure"] == measure]
    return [row for row in rows if not row["place"].get("offset")]


def _bounds(axes: Axes, summary: Summary, rows: Rows) -> None:
    """On the grid; of several reveal orders, the uniform one."""
    rows = [row for row in rows if not row["place"]["left_bias"]]
    sizes = sorted({row["place"]["block_size"] for row in rows})
    for number, setting in enumerate(summary["settings"]):
        mine = sorted((r for r in rows if r["setting"] == setting), key=lambda r: r["place"]["block_size"])
        _line(axes, number, setting, [r["place"]["block_size"] for r in mine], mine)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="block size", ylabel="nats per token (upper bound)")


def _answers(axes: Axes, summary: Summary, rows: Rows) -> None:
    decodes = list(dict.fromkeys(row["place"]["decode"] for row in rows))
    for number, setting in enumerate(summary["settings"]):
        mine = [row for row in rows if row["setting"] == setting]
        _line(axes, number, setting, [decodes.index(row["place"]["decode"]) for row in mine], mine)
    axes.set_xticks(range(len(decodes)), decodes)
    axes.set(xlabel="way of decoding", ylabel="share of right answers", ylim=(-0.02, 1.02))


def _frontier(axes: Axes, summary: Summary, rows: Rows) -> None:
    """A point for each way of decoding: ways of different kinds have no line between them."""
    speed = {(r["setting"], r["place"]["decode"]): r["value"] for r in _of(summary, "tokens_per_forward")}
    for number, setting in enumerate(summary["settings"]):
        mine = [row for row in rows if row["setting"] == setting]
        _line(axes, number, setting, [speed[setting, row["place"]["decode"]] for row in mine], mine, joined=False)
        for row in mine if number == 0 else ():
            place = (speed[setting, row["place"]["decode"]], row["value"])
            axes.annotate(row["place"]["decode"], place, xytext=(5, 5), textcoords="offset points", fontsize="x-small")
    axes.set(xlabel="tokens per forward, commits counted", ylabel="nats per token under the judge")


def _line(axes: Axes, number: int, label: str, places: list[float], rows: Rows, *, joined: bool = True) -> None:
    axes.errorbar(
        places,
        [row["value"] for row in rows],
        yerr=[row["sd"] or 0.0 for row in rows],  # no bar where one seed leaves the spread unknown
        marker="osD^v"[number // 10 % 5],
        linestyle="-" if joined else "none",
        markersize=4,
        capsize=3,
        color=f"C{number % 10}",
        label=label,
    )
