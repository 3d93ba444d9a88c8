"""The rows of `bench decode` as a table and as a plot. Reads rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockdiff.bench.tables import Rows, lined_up


def bench_table(rows: Rows) -> str:
    """Ways of decoding, a line each: ratios with their range over rounds; columns that would be empty are left out."""
    columns: dict[str, Any] = {
        "way": lambda row: row["way"],
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
        "x AR": lambda row: _range(row["ratio_to_ar"]),
        "x HF generate": lambda row: _range(row["ratio_to_hf"]),
        "per forward": lambda row: _number(row.get("tokens_per_forward")),
        "per denoise": lambda row: _number(row.get("tokens_per_denoise")),
        "per verify": lambda row: _number(row.get("tokens_per_verify")),
        "AR text": lambda row: f"{row['equal_to_ar']:.0%}",
        "judge NLL": lambda row: f"{row['judge_nll']:.3f} ± {row['judge_nll_se']:.3f}" if "judge_nll" in row else "",
        "entropy": lambda row: _number(row.get("judged_entropy")),
    }
    return lined_up(rows, columns)


def frontier_plot(rows: Rows, file: Path) -> None:
    """Quality against speed: the judge's NLL over tokens per forward and over tokens a second, and the entropy of the
    texts beside it, one line for each block size."""
    from matplotlib.figure import Figure

    judged = [row for row in rows if "judge_nll" in row]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    views = (("tokens_per_forward", "judge_nll"), ("ratio", "judge_nll"), ("tokens_per_forward", "judged_entropy"))
    words = {
        "tokens_per_forward": "tokens per forward, commits counted",
        "ratio": "speed, AR = 1",
        "judge_nll": "judge, nats per token",
        "judged_entropy": "entropy of the tokens, nats",
    }
    for axes, (across, up) in zip(panels, views, strict=True):
        for label, group in _lines(judged).items():
            points = sorted((_value(row, across), row[up], row["way"]) for row in group if _value(row, across))
            if not points:
                continue
            marker = "o-" if len(points) > 1 else "o"
            axes.plot([p[0] for p in points], [p[1] for p in points], marker, markersize=4, label=label)
            for x, y, way in points:
                axes.annotate(way.split(" b=")[0], (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
        axes.set_xlabel(words[across])
        axes.set_ylabel(words[up])
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _lines(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind, _, size = row["way"].partition(" b=")
        label = kind if not size else "lossless" if kind.startswith("lossless") else f"policies, b = {size}"
        lines.setdefault(label, []).append(row)
    return lines


def _value(row: dict[str, Any], name: str) -> float | None:
    value = row["ratio_to_ar"]["median"] if name == "ratio" else row.get(name)
    return None if value is None else float(value)


def _range(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
