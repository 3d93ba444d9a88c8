"""The rows of `eval length` and `eval generation` as tables for the terminal. Reads rows alone."""

from __future__ import annotations

from typing import Any

from blockdiff.bench.tables import Rows, lined_up


def length_table(result: dict[str, Any]) -> str:
    """NLL of every bin, a line for each way and cache; what was written; verdicts."""
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        lines.setdefault((row["way"], row["cache"]), {})[row["bin"]] = row
    columns: dict[str, Any] = {"way": lambda row: row["way"], "cache": lambda row: row["cache"]}
    for at in range(result["times"]):
        name = f"{at * result['trained_length']}-{(at + 1) * result['trained_length']}"
        columns[name] = lambda row, at=at: f"{row['bins'][at]['nats_per_token']:.3f}"
    rows = [{"way": way, "cache": cache, "bins": bins} for (way, cache), bins in lines.items()]
    parts = ["nats per token, by position", lined_up(rows, columns)]
    if result["texts"]:
        parts += ["", "texts, by chunk: the judge's NLL / entropy / repeated 4-grams", _chunk_table(result)]
    if result["differences"]:
        worst = max(row["max_abs_difference"] for row in result["differences"])
        parts += ["", f"cached against uncached logits: at most {worst:.1e} apart"]
    for row in result["verdicts"]:
        parts.append(f"{row['way']}, {row['cache']} cache: {row['says']}")
    return "\n".join(parts)


def _chunk_table(result: dict[str, Any]) -> str:
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in result["texts"]:
        lines.setdefault((row["way"], row["cache"]), {})[row["chunk"]] = row
    columns: dict[str, Any] = {"way": lambda row: row["way"], "cache": lambda row: row["cache"]}

    def cell(row: dict[str, Any], at: int) -> str:
        found = row["chunks"].get(at)
        if found is None:
            return ""
        again = "" if found["repeated_4grams"] is None else f"/{found['repeated_4grams']:.0%}"
        return f"{found['judge_nll']:.2f}/{found['entropy']:.2f}{again}"

    for at in range(result["times"]):
        columns[str(at)] = lambda row, at=at: cell(row, at)
    rows = [{"way": way, "cache": cache, "chunks": chunks} for (way, cache), chunks in lines.items()]
    return lined_up(rows, columns)


def generation_table(result: dict[str, Any]) -> str:
    """A line for every way, budget and temperature; a star: the temperature whose entropy is nearest to the data's."""
    rows: Rows = result["rows"]
    data = result["data"]
    columns: dict[str, Any] = {
        "way": lambda row: row["way"],
        "budget": lambda row: str(row["budget"]),
        "forwards": lambda row: f"{row['forwards_per_text']:.0f}",
        "temperature": lambda row: f"{row['temperature']:g}{'*' if row['nearest_to_data'] else ' '}",
        "judge NLL": lambda row: f"{row['judge_nll']:.3f} ± {row['judge_nll_sd']:.3f}",
        "entropy": lambda row: f"{row['entropy']:.2f} ± {row['entropy_sd']:.2f}",
        "distinct-2": lambda row: _share(row["distinct_2"]),
        "self-BLEU": lambda row: _share(row["self_bleu"]),
        "repeated": lambda row: _share(row["repeated_4grams"]),
        "MAUVE": lambda row: "" if row["mauve"] is None else f"{row['mauve']:.3f}",
    }
    last = f"data: judge NLL {data['judge_nll']:.3f} ± {data['judge_nll_se']:.3f}, entropy {data['entropy']:.2f}"
    if rows:
        last += f"; {rows[0]['texts']} texts in {rows[0]['groups']} groups (± their standard deviation)"
    return "\n".join([lined_up(rows, columns), last, *result["skipped"]])


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
