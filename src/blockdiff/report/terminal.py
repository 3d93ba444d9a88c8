"""The tables that commands print: bounds, and what training covers."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from blockdiff.report.octaves import Rows, mark, octaves, percent, span, times


def bound_table(rows: Rows) -> Table:
    """Bounds for the terminal; columns that would be empty are left out."""
    columns: dict[str, Any] = {
        "block": lambda row: str(row["block_size"]),
        "offset": lambda row: str(row["offset"]) if any(r["offset"] for r in rows) else "",
        "nats/token": lambda row: f"{row['nats_per_token']:.4f}",
        "± se": lambda row: "" if row["se"] is None else f"{row['se']:.4f}",
        "PPL": lambda row: f"{row['ppl']:.3f}",
        "95 % interval": lambda row: "" if row["ppl_ci"] is None else "{:.3f} – {:.3f}".format(*row["ppl_ci"]),
        "draws": lambda row: str(row["draws"] or "exact"),
        "exact NLL": lambda row: "" if row["nll_nats"] is None else f"{row['nll_nats']:.4f}",
        "tighter": lambda row: "" if row["tightened_nats"] is None else f"{row['tightened_nats']:.4f}",
        "bits/byte": lambda row: "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
    }
    return _right_aligned(rows, columns)


def comparison_table(rows: Rows) -> Table:
    """Paired differences of two models for the terminal."""

    def ci(row: dict[str, Any], name: str) -> str:
        return "" if row[name] is None else "{:+.4f} – {:+.4f}".format(*row[name])

    def place(size: int, offset: int) -> str:
        return f"{size}, offset {offset}" if offset else str(size)

    columns: dict[str, Any] = {
        "block size": lambda row: place(row["block_size"], row["offset"]),
        "other's": lambda row: place(row["other_block_size"], row["other_offset"]),
        "bits/byte": lambda row: f"{row['bits_per_byte']:+.4f}",
        "95 % interval": lambda row: ci(row, "bits_ci"),
        "nats/token": lambda row: "" if row["nats_per_token"] is None else f"{row['nats_per_token']:+.4f}",
        "95 % interval ": lambda row: ci(row, "nats_ci"),
        "below 0 in": lambda row: "" if row["below"] is None else f"{row['below']:.1%}",
    }
    return _right_aligned(rows, columns)


def _right_aligned(rows: Rows, columns: dict[str, Any]) -> Table:
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for line in zip(*shown.values(), strict=True):
        table.add_row(*line)
    everything = Console(width=1000)
    table.width = everything.measure(table, options=everything.options).maximum  # numbers are never cut
    return table


def coverage_summary(result: dict[str, Any]) -> Group:
    """What training covers of the calls that a decoder or an evaluation asks for, for the terminal."""
    calls, uncovered = f"{result['calls']:,.0f} calls", result["uncovered"]
    parts: list[Any] = []
    if result["covered"]:
        parts.append(f"covered: training has met the configuration of all {calls}")
    if result["violations"]:
        parts.append(f"NOT covered: {percent(uncovered)} of {calls} are in configurations that training never met")
    if result["prompt_sentence"]:
        parts.append(f"NOT covered: {result['prompt_sentence']}")
    if result["violations"]:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("never trained", "calls", "share"):
            table.add_column(name, justify="left" if name == "never trained" else "right", no_wrap=True)
        table.add_column("for example")
        for row in result["violations"]:
            table.add_row(row["kind"], f"{row['calls']:,.0f}", percent(row["share"]), Text(row["sentence"]))
        parts.append(table)
    else:
        parts.append("")
    parts += [Text(coverage_map(result["rows"]), no_wrap=True), ""]
    if result["max_ratio"] is not None:
        ratios = [times(result[name]) for name in ("max_ratio", "ratio_p99", "ratio_p95")]
        where = "asked / trained" if result["covered"] else "asked / trained where covered"
        parts.append("{}: max {}, p99 {}, p95 {}".format(where, *ratios))
    parts += _order_lines(result)
    if result["rare"]:
        parts.append(
            f"rare: {percent(result['rare'])} of the calls are in configurations met less than once on average"
        )
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _order_lines(result: dict[str, Any]) -> list[str]:
    """What the reveal order has to do with it."""
    lines = []
    if result["order_ratio"] is not None:
        known = "" if result["order_exact"] else " or more (of the masked sets that were looked at)"
        lines.append(f"of that by the reveal order: up to {times(result['order_ratio'])}{known}")
    if result["order_sentence"]:
        lines.append(result["order_sentence"])
    if result["order_gain"] is not None:
        lines.append(f"order gain: {result['order_gain']:+.2f} nats a call (0: trained in uniform order)")
    return lines


def coverage_map(rows: Rows) -> str:
    """Calls asked for over calls trained, as text: octaves of the block size by octaves of the tokens before it."""
    before, size, cells = octaves(rows)
    names = [span(octave) for octave in before]
    widths = [max(len(name), 5) + 2 for name in names]
    margin = max(len(span(octave)) for octave in size)
    lines = [
        "log2 (asked / trained) by tokens in the block and before it",
        f"{'':{margin}}" + "".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True)),
    ]
    for octave, line in zip(size, cells, strict=True):
        marks = "".join(f"{mark(cell):>{w}}" for cell, w in zip(line, widths, strict=True))
        lines.append(f"{span(octave):>{margin}}{marks}")
    lines.append("x: never trained, in part where a number stands before it; ·: not asked")
    return "\n".join(lines)
