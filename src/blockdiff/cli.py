"""The command line. Exit code 0: done, 1: failed, 2: bad usage or bad input (one line says which, and what to do)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockdiff import cli_bench, cli_data, cli_experiment, cli_generate
from blockdiff.cli_options import (
    BlockSize,
    Changes,
    JsonFile,
    LeftBias,
    ModelPath,
    PerStep,
    PolicyName,
    Seed,
    Threshold,
    chosen_policy,
    err,
    load_model,
    out,
    progress,
    whole_numbers,
    write_result,
)

if TYPE_CHECKING:
    from blockdiff.datafiles import BadRows
    from blockdiff.evaluate import BoundRow

app = typer.Typer(
    help="Train, adapt, measure, decode and serve block diffusion language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
evaluations = typer.Typer(help="Measure a model, with standard errors.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")


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

    resolved = load_config(config, changes, model__init=init, seed=seed)
    run = training.train(resolved, resume=resume, overwrite=overwrite, say=out.print, callbacks=[Progress(out)])
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
    seed: Seed = 0,
) -> None:
    """Show what a configuration trains: every key resolved, its block sizes, and a drawing of the mask."""
    from blockdiff.config import load_config
    from blockdiff.explain import explanation

    out.print(explanation(load_config(config, changes), seed))


@evaluations.command("bound")
def eval_bound(
    path: ModelPath,
    data: Annotated[list[Path], typer.Option(help="Data file: .txt, .jsonl, .parquet; repeatable.")],
    block_sizes: Annotated[str, typer.Option(help="Comma-separated block sizes.")] = "1,2,4,8,16",
    offsets: Annotated[str, typer.Option(help="Comma-separated offsets of the first block's end.")] = "0",
    draws: Annotated[int, typer.Option(help="Noise draws of each document.", min=1)] = 8,
    exact: Annotated[bool, typer.Option("--exact", help="Enumerate the masks of small blocks instead.")] = False,
    left_bias: Annotated[float, typer.Option(help="Left bias of the reveal order; 0: uniform.", min=0.0)] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Score only the first so many documents.", min=1)] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave unusable rows out.")] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Bound on the negative log-likelihood of a text, in nats per token, at any block size and offset."""
    from blockdiff import evaluate, report
    from blockdiff.api import documents_of
    from blockdiff.runtime import record

    sizes, shifts = whole_numbers(block_sizes, "--block-sizes"), whole_numbers(offsets, "--offsets")
    model = load_model(path)
    bad_rows: BadRows = "skip" if skip_bad_rows else "error"
    documents = [document for file in data for document in documents_of(model, file, bad_rows)][:limit]
    with progress("scoring") as on_progress:
        rows: list[BoundRow] = evaluate.bound(
            model,
            documents,
            sizes,
            offsets=shifts,
            draws=draws,
            exact=exact,
            left_bias=left_bias,
            seed=seed,
            on_progress=on_progress,
        )
    results = [row.to_json() for row in rows]
    out.print(report.bound_table(results))
    write_result(json_file, record("eval bound", seed, model=path, data=[str(file) for file in data], rows=results))


@evaluations.command("coverage")
def eval_coverage(
    path: ModelPath,
    block_size: BlockSize = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 128,
    policy: PolicyName = "threshold",
    threshold: Threshold = None,
    per_step: PerStep = None,
    left_bias: LeftBias = None,
    data: Annotated[list[Path] | None, typer.Option(help="Ask for an evaluation on this file instead.")] = None,
    block_sizes: Annotated[str, typer.Option(help="With --data: comma-separated block sizes.")] = "1,2,4,8,16",
    offsets: Annotated[str, typer.Option(help="With --data: comma-separated offsets.")] = "0",
    figure: Annotated[Path | None, typer.Option(help="Also draw the map as PNG to this file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Whether training covers what a decoder, or an evaluation, would ask of the model. Exit code 1: not all of it."""
    from blockdiff import evaluate, report
    from blockdiff.api import documents_of
    from blockdiff.runtime import record

    chosen = chosen_policy(policy, threshold, per_step, None if data else left_bias)
    sizes, shifts = whole_numbers(block_sizes, "--block-sizes"), whole_numbers(offsets, "--offsets")
    if data and block_size is not None:
        raise ValueError("--block-size asks about a decoder and --data about an evaluation: give one of them")
    model = load_model(path)
    if data:
        documents = [document for file in data for document in documents_of(model, file)]
        found = evaluate.evaluation_coverage(model, documents, sizes, shifts, left_bias or 0.0)
        request: dict[str, Any] = {
            "data": [str(file) for file in data],
            "block_sizes": sizes,
            "offsets": shifts,
            "left_bias": left_bias or 0.0,
        }
    else:
        size = model.spec.default_block_size if block_size is None else block_size
        found = model.coverage(prompt_tokens, max_new_tokens=max_new_tokens, block_size=size, policy=chosen)
        request = {
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "block_size": size,
            "policy": str(chosen),
        }
    result = record("eval coverage", 0, model=path, request=request, **found.to_json())
    out.print(report.coverage_summary(result), highlight=False)
    if figure is not None:
        report.coverage_figure(result, figure)
        out.print(f"figure: {figure}")
    write_result(json_file, result)
    if not found.covered:
        raise typer.Exit(1)


@app.command("report")
def make_report(
    paths: Annotated[
        list[Path], typer.Argument(help="Directories of runs or experiments, or summaries of experiments (JSON).")
    ],
    output: Annotated[Path | None, typer.Option("--out", help="Page to write.")] = None,
) -> None:
    """Write one page from saved files: RUN/report.html of one run, report.html of several side by side."""
    from blockdiff import report

    page = report.write(paths[0], output) if len(paths) == 1 else report.compare(paths, output or Path("report.html"))
    out.print(f"report: {page}")


app.add_typer(cli_data.data, name="data")
app.add_typer(cli_bench.bench, name="bench")
app.command()(cli_experiment.experiment)
app.command()(cli_experiment.results)
app.command()(cli_data.sample)
app.command()(cli_generate.generate)
app.command()(cli_generate.infill)
app.command()(cli_generate.policies)
evaluations.command("generation")(cli_data.eval_generation)
evaluations.command("variance")(cli_experiment.eval_variance)


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
