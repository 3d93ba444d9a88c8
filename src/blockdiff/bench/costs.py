"""The rows of `bench train` as a table and as a plot. Reads rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def cost_table(rows: Rows) -> str:
    """A line for every way: its cost with the range over rounds, per draw, over its matrix products, and its memory."""
    columns: dict[str, Any] = {
        "length": lambda row: str(row["length"]),
        "batch": lambda row: str(row["batch"]),
        "block": lambda row: str(row["block_size"]),
        "variant": lambda row: row["variant"],
        "s/step": lambda row: f"{row['seconds']:.3f}",
        "x AR": lambda row: _range(row, "cost_over_ar"),
        "a draw": lambda row: f"{row['cost_per_draw']:.2f}",
        "draw / one": lambda row: _range(row, "draw_over_one") if row["draws"] > 1 else "",
        "x matmul": lambda row: f"{row['cost_over_matmul']:.2f}",
        "peak MB": lambda row: "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        "above model": lambda row: "" if row["peak_mb"] is None else f"{row['peak_above_model_mb']:.0f}",
    }
    cells = {name: [name, *map(cell, rows)] for name, cell in columns.items()}
    wide = {name: max(map(len, column)) for name, column in cells.items() if any(column[1:])}
    lines = (
        "  ".join(
            cells[name][number].ljust(width) if name == "variant" else cells[name][number].rjust(width)
            for name, width in wide.items()
        )
        for number in range(len(rows) + 1)
    )
    return "\n".join(line.rstrip() for line in lines)


def cost_plot(rows: Rows, file: Path) -> None:
    """Cost over the AR step with its range, and peak memory, over the length, a line for every way and block size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    cost, memory = figure.subplots(1, 2)
    several = len({row["block_size"] for row in rows}) > 1
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['variant']}, b = {row['block_size']}" if several else row["variant"], []).append(row)
    for label, group in lines.items():
        points = sorted(group, key=lambda row: row["length"])
        lengths = [row["length"] for row in points]
        costs = [row["cost_over_ar"] for row in points]
        below = [row["cost_over_ar"] - row["cost_over_ar_range"][0] for row in points]
        above = [row["cost_over_ar_range"][1] - row["cost_over_ar"] for row in points]
        cost.errorbar(lengths, costs, (below, above), marker="o", markersize=4, capsize=3, label=label)
        if all(row["peak_mb"] is not None for row in points):
            memory.plot(lengths, [row["peak_above_model_mb"] for row in points], "o-", markersize=4, label=label)
    words = {cost: "time of a training step, AR = 1", memory: "peak memory above the model, MB"}
    for axes, word in words.items():
        axes.set_xscale("log", base=2)
        axes.set_xlabel("length, tokens")
        axes.set_ylabel(word)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    cost.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _range(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_range"]
    return f"{row[name]:.2f} ({low:.2f}–{high:.2f})"
