"""`blockdiff experiment`, and what experiments measure beside the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiff.cli_options import Changes, JsonFile, Seed, err, out, write_result


def experiment(
    file: Annotated[Path, typer.Argument(help="Experiment file (YAML).")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the file, e.g. --set config.data.length=256 or --set seeds=[0]."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this setting; repeatable.")] = None,
    summary_only: Annotated[bool, typer.Option("--summary-only", help="Run nothing: sum up what is there.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train anew the runs whose configuration changed.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train and measure every setting of an experiment with every seed, and sum them up with tests and a plot.

    What is finished is kept and what was killed goes on, so the same command is also the way to resume. The output
    holds summary.json, summary.md and plot.png; a run that failed
    leaves error.txt in its directory, stops no other, and makes the exit code 1.
    """
    from blockdiff.experiment import load_experiment, plots, render, run_experiment, summarise
    from blockdiff.files import write_json, write_text

    plan, runs = load_experiment(file, changes)
    failed: dict[str, str] = {}
    if not summary_only:
        failed = run_experiment(
            plan,
            runs,
            only=only or [],
            overwrite=overwrite,
            say=lambda line: out.print(line),
        )
    summary = summarise(plan, runs, failed)
    if summary is not None:
        summary |= {"file": file.as_posix(), "changes": changes or []}
        folder = Path(plan.output)
        write_json(folder / "summary.json", summary)
        write_text(folder / "summary.md", render.markdown(summary))
        plots.plot(summary, folder / "plot.png")
        write_result(json_file, summary)
        for table in render.tables(summary):
            out.print(table)
        out.print(f"summary: {folder / 'summary.md'}")
        for run in summary["missing"]:
            line = f"not counted: {run['setting']}, seed {run['seed']}: {run['why']}"
            err.print(line)
    elif not failed:
        raise ValueError(f"{plan.output}: no run of {plan.name} has been measured yet; run it without --summary-only")
    for name, problem in failed.items():
        err.print(f"failed: {name}: {problem}", style="red")
    if failed:
        raise typer.Exit(1)


def results(
    directory: Annotated[Path, typer.Argument(help="Summaries of experiments (JSON), and words about them (.md).")],
    page: Annotated[Path, typer.Option("--out", help="Markdown file to write.")],
) -> None:
    """Write the page of results: every claim with its verdict, every table and plot, from saved summaries alone."""
    from blockdiff.experiment import write_page

    for name in write_page(directory, page):
        out.print(f"experiment: {name}")
    out.print(f"page: {page}")


def eval_variance(
    config: Annotated[Path, typer.Argument(help="YAML configuration: its model, data and objective.")],
    changes: Changes = None,
    init: Annotated[str | None, typer.Option(help="Checkpoint to measure at.")] = None,
    draws: Annotated[int, typer.Option(help="Gradients drawn.", min=2)] = 32,
    both: Annotated[bool, typer.Option("--both", help="Another batch for every draw, not only other noise.")] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Variance of a configuration's training gradient at a checkpoint, by groups of parameters. Trains nothing."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from blockdiff.building import build_model, encoder_of, objective_of, training_rows
    from blockdiff.config import load_config
    from blockdiff.evaluate import gradient_variance
    from blockdiff.runtime import record

    resolved = load_config(config, changes, model__init=init)
    model = build_model(resolved)
    _, rows = training_rows(resolved, encoder_of(model))
    found = gradient_variance(
        model,
        rows.rows,
        objective_of(resolved),
        rows_per_batch=resolved.train.rows,
        draws=draws,
        vary="both" if both else "noise",
        seed=seed,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("group", "variance", "|mean|", "variance / |mean|²", "parameters"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for row in found:
        ratio = "" if row.ratio is None else f"{row.ratio:.4g}"
        table.add_row(row.group, f"{row.variance:.4g}", f"{row.mean_norm:.4g}", ratio, f"{row.parameters:,}")
    out.print(table)
    write_result(json_file, record("eval variance", seed, rows=[row.to_json() for row in found]))
