"""`blockdiff experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiff.cli_options import JsonFile, err, out, write_result


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
    holds summary.json, summary.md and bounds.png; a run that failed
    leaves error.txt in its directory, stops no other, and makes the exit code 1.
    """
    from blockdiff.experiment import load_experiment, render, run_experiment, summarise
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
        folder = Path(plan.output)
        write_json(folder / "summary.json", summary)
        write_text(folder / "summary.md", render.markdown(summary))
        render.plot(summary, folder / "bounds.png")
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
