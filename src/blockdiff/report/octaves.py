"""The coverage map's cells: octaves of the block size by octaves of the tokens before it."""

from __future__ import annotations

from math import log2
from typing import Any

Rows = list[dict[str, Any]]
Cell = dict[str, Any] | None


def octaves(rows: Rows) -> tuple[list[Any], list[Any], list[list[Cell]]]:
    """The octaves of p and w that occur, and for each w a row of cells (None where nothing is asked)."""
    before, size = (sorted({tuple(row[name]) for row in rows}) for name in ("before", "size"))
    found = {(tuple(row["before"]), tuple(row["size"])): row for row in rows}
    return before, size, [[found.get((p, w)) for p in before] for w in size]


def log_ratio(cell: Cell) -> float | None:
    """log2 (asked / trained); None where nothing is asked, and where nothing that is asked was trained."""
    if cell is None or cell["uncovered"] > 0.999999 * cell["asked"]:
        return None
    return log2(cell["asked"] / cell["trained"])


def mark(cell: Cell) -> str:
    """x: never trained, in part where a number stands before it; ·: not asked."""
    if cell is None:
        return "·"
    ratio = log_ratio(cell)
    return ("" if ratio is None else f"{round(ratio, 1) + 0.0:+.1f}") + ("x" if cell["uncovered"] else "")


def span(octave: Any) -> str:
    """16-31, or 1 where it is one number."""
    low, high = octave
    return str(low) if low == high else f"{low}-{high}"


def percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "< 0.1%"


def times(ratio: float) -> str:
    return f"{ratio:,.0f} ×" if 100 <= ratio < 1e9 else f"{ratio:.3g} ×"
