"""The rows of `bench train` as a table, and plots of what training and decoding cost. Reads rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockdiff.bench.tables import Rows, lined_up, megabytes, with_range


def cost_table(rows: Rows) -> str:
    """A line for every way: its cost with the range over rounds, per draw, over its matrix products, and its memory."""
    columns: dict[str, Any] = {
        "length": lambda row: str(row["length"]),
        "batch": lambda row: str(row["batch"]),
        "block": lambda row: str(row["block_size"]),
        "variant": lambda row: row["variant"],
        "s/step": lambda row: f"{row['seconds']:.3f}",
        "x AR": lambda row: with_range(row, "cost_over_ar"),
        "a draw": lambda row: f"{row['cost_per_draw']:.2f}",
        "draw / one": lambda row: with_range(row, "draw_over_one") if row["draws"] > 1 else "",
        "x matmul": lambda row: f"{row['cost_over_matmul']:.2f}",
        "peak MB": lambda row: megabytes(row, "peak_mb"),
        "above model": lambda row: megabytes(row, "peak_above_model_mb"),
    }
    return lined_up(rows, columns)


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
    for axes, word in ((cost, "time of a training step, AR = 1"), (memory, "peak memory above the model, MB")):
        _over_tokens(axes, "length, tokens", word)
        axes.set_ylim(bottom=0)
    cost.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def schedule_plot(rows: Rows, file: Path) -> None:
    """Speed over transformers' AR decoding, and milliseconds of a forward, over the tokens that are written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, forward = figure.subplots(1, 2)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        step = f", {row['tokens_per_step']} a step" if row["block_size"] > 1 else ""
        lines.setdefault(f"{row['way']}{step}, batch {row['batch']}", []).append(row)
    for label, group in lines.items():
        points = sorted(group, key=lambda row: row["new_tokens"])
        across = [row["new_tokens"] for row in points]
        speed.plot(across, [row["speedup_over_ar"] for row in points], "o-", markersize=4, label=label)
        forward.plot(across, [row["ms_per_forward"] for row in points], "o-", markersize=4, label=label)
    for axes, word in ((speed, "speed, transformers' AR decoding = 1"), (forward, "milliseconds of a forward")):
        _over_tokens(axes, "tokens written", word)
    speed.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def serve_plot(rows: Rows, file: Path) -> None:
    """Throughput over one request at a time, with its range, and how long requests took and waited for first text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    throughput, waiting = figure.subplots(1, 2)
    ways = [row["way"] for row in rows]
    found = [row["throughput_over_one"] for row in rows]
    below = [row["throughput_over_one"] - row["throughput_over_one_range"][0] for row in rows]
    above = [row["throughput_over_one_range"][1] - row["throughput_over_one"] for row in rows]
    throughput.bar(ways, found, yerr=(below, above), capsize=4)
    throughput.set_ylabel("throughput, one request at a time = 1")
    for name, shift in (("first_text_seconds", -0.2), ("request_seconds", 0.2)):
        waiting.bar([at + shift for at in range(len(ways))], [row[name] for row in rows], 0.4, label=name[:-8])
    waiting.set_xticks(range(len(ways)), ways)
    waiting.set_ylabel("seconds after arrival, median")
    waiting.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _over_tokens(axes: Any, across: str, up: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
