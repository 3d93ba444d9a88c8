"""`eval`: bounds, curves over length, texts under a judge, coverage."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    load_model,
    load_writer,
    measuring_together,
    one_process_only,
    out,
    progress,
    warn,
    whole_numbers,
    write_result,
)

if TYPE_CHECKING:
    from blockdiff.datafiles import BadRows

evaluations = typer.Typer(help="Measure a model, with standard errors.", no_args_is_help=True)


@evaluations.command("bound")
def eval_bound(
    path: ModelPath,
    data: Annotated[list[Path], typer.Option(help="Data file: .txt, .jsonl, .parquet; repeatable.")],
    block_sizes: Annotated[str, typer.Option(help="Comma-separated block sizes.")] = "1,2,4,8,16",
    offsets: Annotated[
        str | None, typer.Option(help="Comma-separated offsets of the first block's end; none: of the trained grid.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Noise draws of each document.", min=1, max=10_000)] = 8,
    exact: Annotated[bool, typer.Option("--exact", help="Enumerate the masks of small blocks instead.")] = False,
    orders: Annotated[
        int, typer.Option(help="Draw so many reveal orders instead: a tighter bound, too.", min=0, max=10_000)
    ] = 0,
    left_bias: Annotated[float, typer.Option(help="Left bias of the reveal order; 0: uniform.", min=0.0)] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Score only the first so many documents.", min=1)] = None,
    against: Annotated[str | None, typer.Option(help="Another model, compared on the same documents.")] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave unusable rows out.")] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Bound on the negative log-likelihood of a text, in nats per token, at any block size and offset."""
    from blockdiff import evaluate, report
    from blockdiff.api import documents_of
    from blockdiff.runtime import record

    sizes, shifts = whole_numbers(block_sizes, "--block-sizes"), _offsets(offsets)
    bad_rows: BadRows = "skip" if skip_bad_rows else "error"
    if against is not None and shifts is not None:
        raise ValueError("--against compares each model on the grid that it was trained on: leave --offsets out")
    how: dict[str, Any] = {"draws": draws, "exact": exact, "orders": orders, "left_bias": left_bias, "seed": seed}
    split = measuring_together()
    model = load_model(path)
    other = None if against is None else load_model(against)
    documents = [document for file in data for document in documents_of(model, file, bad_rows)][:limit]
    how |= {"split": split}
    with progress("scoring") as on_progress:
        rows = evaluate.bound(model, documents, sizes, offsets=shifts, on_progress=on_progress, **how)
    results = [row.to_json() for row in rows]
    out.print(report.bound_table(results))
    problem = evaluate.evaluation_problem(model, documents, sizes, shifts)
    if problem is not None:
        warn(problem)
    compared = []
    if other is not None:
        others = [document for file in data for document in documents_of(other, file, bad_rows)][:limit]
        with progress("comparing") as on_progress:
            found = evaluate.compare(model, other, documents, others, sizes, on_progress=on_progress, **how)
        compared = [row.to_json() for row in found]
        what = f"{compared[-1]['value']} less the other's {compared[-1]['other_value']}"
        out.print(f"against {against}, {what}, below 0 is fewer than it has, 95 % intervals over documents:")
        out.print(report.comparison_table(compared))
        their_problem = evaluate.evaluation_problem(other, others, [row.other_block_size for row in found])
        if their_problem is not None:
            warn(f"{against}: {their_problem}")
    files = [str(file) for file in data]
    result = record("eval bound", seed, model=path, data=files, rows=results, against=against, compared=compared)
    write_result(json_file, {**result, "processes": split.shard.count, "problem": problem})


@evaluations.command("length")
def eval_length(
    plan_file: Annotated[Path, typer.Argument(help="YAML file, e.g. evaluations/length_stories.yaml.")],
    changes: Changes = None,
    plot: Annotated[Path | None, typer.Option(help="Draw NLL over position as PNG.")] = None,
    json_file: JsonFile = None,
) -> None:
    """NLL, texts and caches out to several times the trained length, and whether the declared criterion held."""
    from blockdiff import curves, evaluate, report
    from blockdiff.api import documents_of, load
    from blockdiff.runtime import record

    one_process_only("eval length")
    plan = evaluate.read_plan(evaluate.LengthPlan, plan_file, changes)
    _png(plot)
    files = [plan.data] if isinstance(plan.data, str) else plan.data
    judge = None if plan.texts is None else load_model(plan.texts.judge)
    if judge is not None:
        evaluate.tokenizer_of(judge)
    for label, way in plan.ways.items():  # before the first is measured
        evaluate.check_length(plan, label, load(way.model))
    found: dict[str, list[Any]] = {}
    result: dict[str, Any] = {}
    for number, (label, way) in enumerate(plan.ways.items(), 1):
        model = load_model(way.model)
        documents = [document for file in files for document in documents_of(model, file)]
        with progress(f"{label} ({number} of {len(plan.ways)})") as on_progress:
            for name, rows in evaluate.measure_way(plan, label, model, documents, judge, on_progress).items():
                found.setdefault(name, []).extend(rows)
        result = record(
            "eval length",
            plan.seed,
            trained_length=plan.length,
            **plan.model_dump(mode="json", include={"data", "times", "criterion", "ways"}),
            judge=None if plan.texts is None else plan.texts.judge,
            settings=plan.model_dump(mode="json", include={"length", "draws", "documents", "caches", "texts"}),
            **found,
        )
        write_result(json_file, result)  # what is measured is kept, whatever becomes of the next way
    out.print(curves.length_table(result))
    if plot is not None:
        report.draw("length", result, plot)
        out.print(f"figure: {plot}")


@evaluations.command("generation")
def eval_generation(
    plan_file: Annotated[Path, typer.Argument(help="YAML file, e.g. evaluations/frontier_stories.yaml.")],
    changes: Changes = None,
    plot: Annotated[Path | None, typer.Option(help="Draw NLL over entropy as PNG.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Texts at forward budgets and temperatures: a judge's NLL beside their entropy, and the data's own point."""
    from blockdiff import api, curves, evaluate, report
    from blockdiff.runtime import record

    one_process_only("eval generation")
    plan = evaluate.read_plan(evaluate.FrontierPlan, plan_file, changes)
    _png(plot)
    files = [plan.data] if isinstance(plan.data, str) else plan.data
    judge = load_model(plan.judge)
    evaluate.tokenizer_of(judge)
    for label, way in plan.ways.items():  # before the first is measured
        evaluate.check_frontier(plan, label, api.load_writer(way.model))
    result: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    point = None
    for number, (label, way) in enumerate(plan.ways.items(), 1):
        model = load_writer(way.model)
        documents = [document for file in files for document in api.documents_of(model, file)]
        point = point or evaluate.data_point(plan, model.tokenizer, documents, judge)
        with progress(f"{label} ({number} of {len(plan.ways)})") as on_progress:
            found, not_possible = evaluate.measure_frontier(plan, label, model, documents, judge, point, on_progress)
        rows += [asdict(row) for row in found]
        skipped += not_possible
        result = record(
            "eval generation",
            plan.seed,
            judge=plan.judge,
            settings=plan.model_dump(mode="json", exclude={"judge", "seed"}),
            data=point.to_json(),
            rows=rows,
            skipped=skipped,
        )
        write_result(json_file, result)  # what is measured is kept, whatever becomes of the next way
    out.print(curves.generation_table(result))
    if plot is not None:
        report.draw("generation", result, plot)
        out.print(f"figure: {plot}")


def _offsets(text: str | None) -> list[int] | None:
    return None if text is None else whole_numbers(text, "--offsets")


def _png(plot: Path | None) -> None:
    if plot is not None and plot.suffix != ".png":
        raise ValueError(f"--plot {plot}: give a file that ends in .png")


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
    offsets: Annotated[
        str | None, typer.Option(help="With --data: comma-separated offsets; none: of the trained grid.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw the map as PNG to this file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Whether training covers what a decoder, or an evaluation, would ask of the model. Exit code 1: not all of it."""
    from blockdiff import evaluate, report
    from blockdiff.api import documents_of
    from blockdiff.runtime import record

    chosen = chosen_policy(policy, threshold, per_step, None if data else left_bias)
    sizes, shifts = whole_numbers(block_sizes, "--block-sizes"), _offsets(offsets)
    if data and block_size is not None:
        raise ValueError("--block-size asks about a decoder and --data about an evaluation: give one of them")
    model = load_model(path)
    if data:
        documents = [document for file in data for document in documents_of(model, file)]
        found = evaluate.evaluation_coverage(model, documents, sizes, shifts, left_bias or 0.0)
        request: dict[str, Any] = {
            "data": [str(file) for file in data],
            "block_sizes": sizes,
            "offsets": sorted({offset for _, offset in evaluate.grids(model, sizes, shifts)}),
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
