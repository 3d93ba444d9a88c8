"""The rows of `eval length` and `eval generation` as tables and as plots. Reads rows alone."""

from __future__ import annotations

from pathlib import Path
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


def length_plot(result: dict[str, Any], file: Path) -> None:
    """NLL with 95 % intervals over position, a panel for each cache, a line for each way."""
    from matplotlib.figure import Figure

    caches = list(dict.fromkeys(row["cache"] for row in result["rows"]))
    figure = Figure(figsize=(6 * len(caches), 4.5), layout="constrained")
    panels = figure.subplots(1, len(caches), squeeze=False, sharey=True)[0]
    names = {"full": "whole past", "window": f"sliding window of {result['trained_length']}"}
    for axes, cache in zip(panels, caches, strict=True):
        for way in dict.fromkeys(row["way"] for row in result["rows"]):
            points = [row for row in result["rows"] if row["way"] == way and row["cache"] == cache]
            middle = [(row["start"] + row["end"]) / 2 for row in points]
            error = [1.96 * (row["se"] or 0.0) for row in points]
            axes.errorbar(
                middle, [row["nats_per_token"] for row in points], error, marker="o", markersize=4, capsize=3, label=way
            )
        axes.axvline(result["trained_length"], color="0.6", ls=":", lw=1)
        axes.set_title(names[cache], fontsize="medium")
        axes.set_xlabel("position (dotted: the trained length)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("nats per token (upper bound)")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


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


def generation_plot(result: dict[str, Any], file: Path) -> None:
    """Judge NLL over entropy, a line over temperatures for every way, a panel for every budget, the data's own point;
    and judge NLL over forwards at the temperature nearest to the data's entropy."""
    from matplotlib.figure import Figure

    rows, data = result["rows"], result["data"]
    budgets = sorted({row["budget"] for row in rows})
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure = Figure(figsize=(3.6 * (len(budgets) + 1), 4), layout="constrained")
    panels = figure.subplots(1, len(budgets) + 1)
    for axes, budget in zip(panels, budgets, strict=False):
        for number, way in enumerate(ways):
            points = sorted((r["entropy"], r["judge_nll"]) for r in rows if r["way"] == way and r["budget"] == budget)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=4, color=f"C{number}", label=way)
        axes.plot(data["entropy"], data["judge_nll"], "k*", markersize=11, label="data")
        axes.set_title(f"{budget} forwards", fontsize="medium")
        axes.set_xlabel("entropy, nats")
    panels[0].set_ylabel("judge, nats per token")
    last = panels[-1]
    for number, way in enumerate(ways):
        own = [r for r in rows if r["way"] == way and r["nearest_to_data"]]
        own.sort(key=lambda r: r["forwards_per_text"])
        if own:
            across, up, error = ([r[n] for r in own] for n in ("forwards_per_text", "judge_nll", "judge_nll_sd"))
            last.errorbar(across, up, error, marker="o", markersize=4, capsize=3, color=f"C{number}", label=way)
    last.axhline(data["judge_nll"], color="k", ls=":", lw=1)
    last.set_xscale("log", base=2)
    last.set_xlabel("forwards of a text, all counted")
    last.set_title("at the data's entropy", fontsize="medium")
    last.legend(fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
