"""The command line. Exit code 0: done, 1: failed, 2: bad usage or bad input (one line says which, and what to do)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from blockdiff import (
    cli_bench,
    cli_chat,
    cli_checkpoints,
    cli_data,
    cli_evaluate,
    cli_experiment,
    cli_generate,
    cli_recipes,
    cli_serve,
    cli_tasks,
)
from blockdiff.cli_options import Changes, JsonFile, Seed, err, out, write_result

app = typer.Typer(
    help="Train, adapt, measure, decode and serve block diffusion language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.", min=0.02)] = 2.0,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """The whole way in a few minutes, on text that every Python carries: train, adapt, measure, generate, report."""
    from blockdiff.demo import run_demo

    write_result(json_file, run_demo(output, minutes=minutes, seed=seed, console=out))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    changes: Changes = None,
    init: Annotated[str | None, typer.Option(help="Checkpoint to start from (model.init).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where a run already is.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of every random number.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Train or adapt a model as a configuration says."""
    from blockdiff import report, training
    from blockdiff.config import load_config
    from blockdiff.progress import Progress
    from blockdiff.shards import Shard

    resolved = load_config(config, changes, model__init=init, seed=seed)
    first = Shard.of_process().number == 0  # of several processes, the one that reports
    out.quiet = not first
    run = training.train(resolved, resume=resume, overwrite=overwrite, say=out.print, callbacks=[Progress(out)])
    if not first:
        return
    page = report.write(run.path)
    bounds = json.loads(run.result("bound").read_text()) if run.result("bound").exists() else None
    if bounds:
        out.print(report.bound_table(bounds["rows"]))
    out.print(f"model: {run.checkpoint}\nreport: {page}")
    write_result(json_file, bounds or json.loads(run.result("train").read_text()))


@app.command()
def explain(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    changes: Changes = None,
    processes: Annotated[int, typer.Option(help="Processes that the training would run on.", min=1)] = 1,
    tflops: Annotated[
        float | None,
        typer.Option(help="TFLOP/s that each reaches; without it matrix products are timed here.", min=1e-6),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of an hour of one process.", min=0)] = None,
    seed: Seed = 0,
) -> None:
    """Show what a configuration trains and what that takes: keys, block sizes, mask, memory, arithmetic, time."""
    from blockdiff.config import load_config
    from blockdiff.estimate import describe, estimate
    from blockdiff.explain import explanation

    resolved = load_config(config, changes)
    out.print(explanation(resolved, seed), highlight=False)
    try:
        needs = describe(estimate(resolved, processes), tflops, price)
    except FileNotFoundError as error:  # what is trained can be said all the same
        needs = f"  not known: {error}"
    out.print(f"\nwhat it takes:\n\n{needs}", highlight=False)


@app.command("report")
def make_report(
    paths: Annotated[
        list[Path], typer.Argument(help="Directories of runs or experiments, or files of results (JSON).")
    ],
    output: Annotated[Path | None, typer.Option("--out", help="Page to write.")] = None,
) -> None:
    """Write one page from saved files: RUN/report.html of one run, report.html of several side by side."""
    from blockdiff import report

    page = report.write(paths[0], output) if len(paths) == 1 else report.compare(paths, output or Path("report.html"))
    out.print(f"report: {page}")


app.add_typer(cli_evaluate.evaluations, name="eval")
app.add_typer(cli_data.data, name="data")
app.add_typer(cli_bench.bench, name="bench")
app.command()(cli_experiment.experiment)
app.command()(cli_experiment.results)
app.command()(cli_data.sample)
app.command()(cli_generate.generate)
app.command()(cli_generate.infill)
app.command()(cli_generate.policies)
app.command()(cli_serve.serve)
app.command()(cli_chat.chat)
app.command()(cli_checkpoints.inspect)
app.command()(cli_checkpoints.export)
app.command()(cli_recipes.recipes)
cli_evaluate.evaluations.command("tasks")(cli_tasks.eval_tasks)
cli_evaluate.evaluations.command("variance")(cli_experiment.eval_variance)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from blockdiff import __version__

        out.print(__version__)
        raise typer.Exit
    from blockdiff.runtime import quiet_libraries, use_available_threads

    use_available_threads()
    quiet_libraries()


def main() -> None:
    """Run the command line; turns the errors of bad input into one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 1
    except (ValueError, FileNotFoundError) as error:
        code = _complain(error, 2)
    except (OSError, MemoryError) as error:
        code = _complain(error, 1)
    except KeyboardInterrupt:
        code = 1
    except Exception as error:  # click's own usage errors know how to show themselves
        if not hasattr(error, "show"):
            raise
        error.show()
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _complain(error: BaseException, code: int) -> int:
    if "BLOCKDIFF_TRACEBACK" in os.environ:
        raise error
    err.print(f"blockdiff: {error}", style="red")
    return code
