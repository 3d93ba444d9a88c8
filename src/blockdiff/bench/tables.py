"""Rows of the benchmarks as tables. Reads rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]
Cell = Callable[[dict[str, Any]], str]
_WORDS = ("way", "variant")  # columns that are read from the left


def lined_up(rows: Rows, columns: Mapping[str, Cell]) -> str:
    """A line for every row under its head; columns that would be empty are left out."""
    cells = {name: [name, *(cell(row) for row in rows)] for name, cell in columns.items()}
    wide = {name: max(map(len, column)) for name, column in cells.items() if any(column[1:])}
    lines = (
        "  ".join(
            cells[name][number].ljust(width) if name in _WORDS else cells[name][number].rjust(width)
            for name, width in wide.items()
        )
        for number in range(len(rows) + 1)
    )
    return "\n".join(line.rstrip() for line in lines)


def with_range(row: dict[str, Any], name: str) -> str:
    """A median and its range over the rounds."""
    low, high = row[f"{name}_range"]
    return f"{row[name]:.2f} ({low:.2f}\u2013{high:.2f})"


def megabytes(row: dict[str, Any], name: str) -> str:
    return "" if row[name] is None else f"{row[name]:.0f}"


def schedule_table(rows: Rows) -> str:
    """Ways of decoding fixed numbers of tokens a step (`bench.schedules`)."""
    return lined_up(
        rows,
        {
            "batch": lambda row: str(row["batch"]),
            "tokens": lambda row: str(row["new_tokens"]),
            "block": lambda row: str(row["block_size"]),
            "a step": lambda row: str(row["tokens_per_step"]),
            "way": lambda row: row["way"],
            "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
            "x HF AR": lambda row: with_range(row, "speedup_over_ar"),
            "forwards": lambda row: str(row["forwards"]),
            "ms/forward": lambda row: f"{row['ms_per_forward']:.2f}",
            "matmul ms": lambda row: f"{row['matmul_ms']:.2f}",
            "peak MB": lambda row: megabytes(row, "peak_mb"),
            "above model": lambda row: megabytes(row, "peak_above_model_mb"),
        },
    )


def serve_table(rows: Rows) -> str:
    """Ways of serving the same requests (`bench.serving`)."""
    return lined_up(
        rows,
        {
            "way": lambda row: row["way"],
            "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
            "x one": lambda row: with_range(row, "throughput_over_one"),
            "same text": lambda row: f"{row['equal_to_alone']:.0%}",
            "forwards": lambda row: str(row["forwards"]),
            "ms/forward": lambda row: f"{row['ms_per_forward']:.2f}",
            "first text s": lambda row: f"{row['first_text_seconds']:.2f}",
            "request s": lambda row: f"{row['request_seconds']:.2f}",
            "95 %": lambda row: f"{row['request_seconds_p95']:.2f}",
            "prompt read": lambda row: str(row["prompt_tokens_read"]),
            "shared": lambda row: str(row["prompt_tokens_shared"]),
            "preempted": lambda row: str(row["preemptions"]),
        },
    )
