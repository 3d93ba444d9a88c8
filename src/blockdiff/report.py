"""The report of a run: one self-contained HTML page, made from the run's files and nothing else.

Reads config.yaml, metrics.jsonl, results/*.json and results/mask.txt where they exist; a part whose file is missing is
left out.
"""

from __future__ import annotations

import base64
import html
import json
from math import isfinite, log2
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

Rows = list[dict[str, Any]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #6a737d; --line: #d8dee4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #8b949e; --line: #30363d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.25; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
.sample { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: 1rem; }
.sample span { color: #1b1f24; border-radius: 2px; } .prompt { color: var(--soft); }
"""


def write(run: Path) -> Path:
    """Write `run`/report.html; raises FileNotFoundError where `run` is no run directory."""
    from blockdiff.files import write_text

    if not (run / "config.yaml").exists():
        raise FileNotFoundError(f"{run}: no config.yaml in it; give the directory of a run")
    results = {path.stem: json.loads(path.read_text()) for path in sorted((run / "results").glob("*.json"))}
    metrics = [json.loads(line) for line in _text(run / "metrics.jsonl").splitlines()]
    parts = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        _summary(results),
        _losses(metrics, run / "figures" / "training.png"),
        _bounds(results, run / "figures" / "bounds.png"),
        _speed(results),
        _samples(results),
        _preformatted("What a training pass sees", _text(run / "results" / "mask.txt")),
        _preformatted("Configuration", _text(run / "config.yaml")),
        _versions(results),
    ]
    page = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(run.name)}</title>"
    page += f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head><body>"
    write_text(run / "report.html", page + "\n".join(part for part in parts if part) + "</body></html>\n")
    return run / "report.html"


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

    columns: dict[str, Any] = {
        "block size": lambda row: str(row["block_size"]),
        "other's": lambda row: str(row["other_block_size"]),
        "bits/byte": lambda row: f"{row['bits_per_byte']:+.4f}",
        "95 % interval": lambda row: ci(row, "bits_ci"),
        "nats/token": lambda row: "" if row["nats_per_token"] is None else f"{row['nats_per_token']:+.4f}",
        "95 % interval ": lambda row: ci(row, "nats_ci"),
        "better in": lambda row: "" if row["below"] is None else f"{row['below']:.1%}",
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
    return table


def coverage_summary(result: dict[str, Any]) -> Group:
    """What training covers of the calls that a decoder or an evaluation asks for, for the terminal."""
    calls, uncovered = f"{result['calls']:,.0f} calls", result["uncovered"]
    parts: list[Any] = [
        f"covered: training has met the configuration of all {calls}"
        if result["covered"]
        else f"NOT covered: {_percent(uncovered)} of {calls} are in configurations that training never met"
    ]
    if result["violations"]:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("never trained", "calls", "share"):
            table.add_column(name, justify="left" if name == "never trained" else "right", no_wrap=True)
        table.add_column("for example")
        for row in result["violations"]:
            table.add_row(row["kind"], f"{row['calls']:,.0f}", _percent(row["share"]), Text(row["sentence"]))
        parts.append(table)
    else:
        parts.append("")
    parts += [Text(coverage_map(result["rows"]), no_wrap=True), ""]
    if result["max_ratio"] is not None:
        ratios = [_times(result[name]) for name in ("max_ratio", "ratio_p99", "ratio_p95")]
        where = "asked / trained" if result["covered"] else "asked / trained where covered"
        parts.append("{}: max {}, p99 {}, p95 {}".format(where, *ratios))
    parts += _order_lines(result)
    if result["rare"]:
        parts.append(
            f"rare: {_percent(result['rare'])} of the calls are in configurations met less than once on average"
        )
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _order_lines(result: dict[str, Any]) -> list[str]:
    """What the reveal order has to do with it."""
    lines = []
    if result["order_ratio"] is not None:
        known = "" if result["order_exact"] else " or more (of the masked sets that were looked at)"
        lines.append(f"of that by the reveal order: up to {_times(result['order_ratio'])}{known}")
    if result["order_sentence"]:
        lines.append(result["order_sentence"])
    if result["order_gain"] is not None:
        lines.append(f"order gain: {result['order_gain']:+.2f} nats a call (0: trained in uniform order)")
    return lines


def coverage_map(rows: Rows) -> str:
    """Calls asked for over calls trained, as text: octaves of the block size by octaves of the tokens before it."""
    before, size, cells = _octaves(rows)
    names = [_range(octave) for octave in before]
    widths = [max(len(name), 5) + 2 for name in names]
    margin = max(len(_range(octave)) for octave in size)
    lines = [
        "log2 (asked / trained) by tokens in the block and before it",
        f"{'':{margin}}" + "".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True)),
    ]
    for octave, line in zip(size, cells, strict=True):
        marks = "".join(f"{_mark(cell):>{w}}" for cell, w in zip(line, widths, strict=True))
        lines.append(f"{_range(octave):>{margin}}{marks}")
    lines.append("x: never trained, in part where a number stands before it; ·: not asked")
    return "\n".join(lines)


def coverage_figure(result: dict[str, Any], file: Path) -> None:
    """The same as a picture (PNG)."""
    before, size, cells = _octaves(result["rows"])
    figure, axes = _figure()
    axes.grid(visible=False)
    values = [[_log_ratio(cell) for cell in line] for line in cells]
    most = max([abs(value) for line in values for value in line if value is not None], default=1.0)
    shown = [[float("nan") if value is None else value for value in line] for line in values]
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", origin="lower")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            if cell is not None and cell["uncovered"]:
                axes.add_patch(_hatched(x, y))
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
            axes.text(x, y, _mark(cell), ha="center", va="center", bbox=paper)
    axes.set_xticks(range(len(before)), [_range(octave) for octave in before])
    axes.set_yticks(range(len(size)), [_range(octave) for octave in size])
    axes.set(xlabel="tokens before the block", ylabel="tokens in the block")
    axes.set_title("x, hatched: never trained, all of it or a part", loc="right", fontsize="medium")
    figure.colorbar(image, label="log2 (asked / trained)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=120)


def _octaves(rows: Rows) -> tuple[Rows, Rows, list[list[Any]]]:
    """The octaves of p and w that occur, and for each w a row of cells (None where nothing is asked)."""
    before, size = (sorted({tuple(row[name]) for row in rows}) for name in ("before", "size"))
    found = {(tuple(row["before"]), tuple(row["size"])): row for row in rows}
    return before, size, [[found.get((p, w)) for p in before] for w in size]  # type: ignore[return-value]


def _log_ratio(cell: dict[str, Any] | None) -> float | None:
    """None where nothing is asked, and where nothing that is asked was trained."""
    if cell is None or cell["uncovered"] > 0.999999 * cell["asked"]:
        return None
    return log2(cell["asked"] / cell["trained"])


def _mark(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "·"
    ratio = _log_ratio(cell)
    return ("" if ratio is None else f"{round(ratio, 1) + 0.0:+.1f}") + ("x" if cell["uncovered"] else "")


def _hatched(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, hatch="//", facecolor="none", edgecolor="#7a7f85", linewidth=0)


def _range(octave: Any) -> str:
    low, high = octave
    return str(low) if low == high else f"{low}-{high}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "< 0.1%"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} ×" if 100 <= ratio < 1e9 else f"{ratio:.3g} ×"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _summary(results: dict[str, Any]) -> str:
    bounds, baselines = results.get("bound", {}).get("rows", []), results.get("baselines", {}).get("rows", [])
    if not bounds:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(row['name'])}</td><td>{row['nats_per_token']:.4f}</td><td></td>"
        f"<td>{row['ppl']:.2f}</td><td></td></tr>"
        for row in baselines
    )
    for row in bounds:
        low, high = row["ppl_ci"] or (row["ppl"], row["ppl"])
        error = "" if row["se"] is None else f"± {row['se']:.4f}"
        lines += (
            f"<tr><td>{_grid(row)}</td>"
            f"<td>{row['nats_per_token']:.4f}</td><td>{error}</td><td>{row['ppl']:.2f}</td>"
            f"<td>{low:.2f} – {high:.2f}</td></tr>"
        )
    n = bounds[0]
    return (
        "<h2>Bounds on the validation text</h2><table><tr><th></th><th>nats/token</th><th>standard error</th>"
        f"<th>PPL</th><th>95 % interval</th></tr>{lines}</table>"
        f"<p class='soft'>{n['tokens']} scored tokens in {n['documents']} documents; errors clustered by document; "
        f"seed {results['bound']['seed']}.</p>"
    )


def _grid(row: dict[str, Any]) -> str:
    return f"block size {row['block_size']}" + (f", offset {row['offset']}" if row["offset"] else "")


def _losses(metrics: Rows, file: Path) -> str:
    points = [m for m in metrics if "loss" in m]
    if len(points) < 2:
        return ""
    figure, axes = _figure()
    for name, label in (("bound", "training bound"), ("block_loss", "blocks' loss (no bound)"), ("ar", "AR term")):
        at = [m for m in points if name in m]
        if at:
            axes.plot([m["step"] for m in at], [m[name] for m in at], label=label)
    validation = [m for m in metrics if any(name.startswith("eval_bound") for name in m)]
    for name in sorted({n for m in validation for n in m if n.startswith("eval_bound_b") and not n.endswith("_se")}):
        at = [m for m in validation if name in m]
        axes.plot(
            [m["step"] for m in at], [m[name] for m in at], "o--", label=name.replace("eval_bound_b", "valid b = ")
        )
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    return f"<h2>Training</h2>{_image(figure, 'Loss per token of the training noise and layouts, by step', file)}"


def _bounds(results: dict[str, Any], file: Path) -> str:
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in results.get("bound", {}).get("rows", []) if row["offset"] == 0 and isfinite(row["ppl"])]
    if len(rows) < 2:
        return ""
    figure, axes = _figure()
    sizes, ppl = [row["block_size"] for row in rows], [row["ppl"] for row in rows]
    errors = [
        [p - row["ppl_ci"][0] for p, row in zip(ppl, rows, strict=True)] if rows[0]["ppl_ci"] else [0] * len(rows)
    ]
    errors += [
        [row["ppl_ci"][1] - p for p, row in zip(ppl, rows, strict=True)] if rows[0]["ppl_ci"] else [0] * len(rows)
    ]
    axes.errorbar(sizes, ppl, yerr=errors, marker="o", capsize=3, label="this model (bound)")
    for number, row in enumerate(results.get("baselines", {}).get("rows", [])):
        axes.axhline(row["ppl"], ls="--", lw=1, color=f"C{number + 1}", label=row["name"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="block size", ylabel="perplexity (upper bound), log scale")
    axes.legend()
    return _image(figure, "Perplexity bound against block size, one model, with 95 % intervals", file)


def _speed(results: dict[str, Any]) -> str:
    rows = results.get("speed", {}).get("rows", [])
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(row['name'])}</td><td>{row['tokens_per_second']:.0f}</td>"
        f"<td>{row['speed_over_ar']:.2f}</td><td>{row['tokens_per_forward']:.2f}</td></tr>"
        for row in rows
    )
    return (
        "<h2>Speed</h2><table><tr><th></th><th>tokens/s</th><th>over AR</th>"
        "<th>tokens per forward (with commits)</th></tr>"
        f"{lines}</table><p class='soft'>Batch 1, median of {rows[0]['repeats']} interleaved runs, "
        f"{results['speed']['threads']} threads, the same weights.</p>"
    )


def _samples(results: dict[str, Any]) -> str:
    rows = results.get("samples", {}).get("rows", [])
    if not rows:
        return ""
    out = (
        "<h2>Samples</h2><p class='soft'>Colour: the step of its block at which a token was filled (pale: known before "
    )
    out += "denoising began; darker: later).</p>"
    for row in rows:
        spans = "".join(_token(*token) for token in zip(row["pieces"], row["steps"], strict=True))
        out += f"<p><b>{html.escape(row['name'])}</b></p>"
        out += f"<p class='sample'><i class='prompt'>{html.escape(row['prompt'])}</i>{spans}</p>"
    return out


def _token(piece: str, step: int) -> str:
    shade = 96 - min(step, 12) * 4
    return f"<span style='background:hsl(210 70% {shade}%)' title='step {step}'>{html.escape(piece)}</span>"


def _preformatted(title: str, text: str) -> str:
    return f"<h2>{title}</h2><pre>{html.escape(text)}</pre>" if text.strip() else ""


def _versions(results: dict[str, Any]) -> str:
    if not results:
        return ""
    first = next(iter(results.values()))
    words = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return f"<p class='soft'>{html.escape(words)}; {first['threads']} threads; {html.escape(first['device'])}</p>"


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _image(figure: Any, caption: str, file: Path) -> str:
    """The figure inside the page, and beside it as a file for use elsewhere."""
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, format="png", dpi=120)
    encoded = base64.b64encode(file.read_bytes()).decode()
    words = html.escape(caption)
    image = f"<img alt='{words}' src='data:image/png;base64,{encoded}'>"
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"
