"""`bench`: speed as ratios, measured side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiff.cli_options import JsonFile, ModelPath, Seed, err, load_model, out, whole_numbers, write_result

bench = typer.Typer(help="Measure speed, as ratios within one run.", no_args_is_help=True)
_LEVELS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)
_SWEEP = (*(f"threshold({level})" for level in _LEVELS), "fixed(1)", "fixed(2)", "fixed(4)", "one_step")


@bench.command("decode")
def bench_decode(
    path: ModelPath,
    data: Annotated[Path, typer.Option(help="Texts whose beginnings are the prompts.")],
    block_sizes: Annotated[str, typer.Option(help="Comma-separated block sizes.")] = "4,8",
    policy: Annotated[list[str] | None, typer.Option("--policy", help="Policies beside lossless; repeatable.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    batch: Annotated[int, typer.Option(help="Prompts decoded together.", min=1)] = 1,
    prompts: Annotated[int, typer.Option(help="Prompts.", min=1)] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens that every text gets.", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="Counted rounds.", min=1)] = 5,
    judge: Annotated[str | None, typer.Option(help="AR model that scores the texts.")] = None,
    quality: Annotated[bool, typer.Option("--quality", help="Sweep thresholds and steps; needs a judge.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against speed (.png, .svg, .pdf).")] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Lossless decoding and policies against AR decoding and Hugging Face's `generate` on the same weights."""
    from rich.progress import Progress as Bar
    from transformers import AutoModelForCausalLM

    from blockdiff.api import load
    from blockdiff.bench import areas as areas_of
    from blockdiff.bench import bench_decode as measure
    from blockdiff.frontier import bench_table, frontier_plot
    from blockdiff.runtime import record

    if (quality or plot) and judge is None:
        raise ValueError("--quality and --plot compare texts: give --judge, an AR model that scores them")
    model = load_model(path)
    network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).to(model.device).eval()
    scorer = None if judge is None else load(judge)
    with Bar(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("decoding", total=1.0)
        rows = measure(
            model,
            data,
            block_sizes=whole_numbers(block_sizes, "--block-sizes"),
            policies=(policy or ()) if not quality else (*_SWEEP, *(policy or ())),
            temperature=temperature,
            batch=batch,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            lossless=model.spec.ar_trained and model.spec.clean_context == "context_causal",
            hugging_face=network,
            judge=scorer,
            seed=seed,
            on_progress=lambda done: bar.update(task, completed=done),
        )
    out.print(bench_table(rows))
    areas = areas_of(rows)
    for size, area in areas.items() if quality else ():
        out.print(f"area under quality over parallelism (AUP), policies at b={size}: {area:.1f}")
    if plot is not None:
        frontier_plot(rows, plot)
    write_result(json_file, record("bench decode", seed, model=path, data=str(data), areas=areas, rows=rows))


@bench.command("train")
def bench_train(
    model: Annotated[str | None, typer.Option(help="Checkpoint; none: a random Llama of 8M parameters.")] = None,
    lengths: Annotated[str, typer.Option(help="Comma-separated tokens of a row.")] = "512,1024,2048",
    tokens: Annotated[int, typer.Option(help="Tokens of a step; rows follow from the length.", min=1)] = 4096,
    batch: Annotated[int | None, typer.Option(help="Rows of a step, at every length, in place of --tokens.")] = None,
    block_size: Annotated[str, typer.Option(help="Comma-separated block sizes.")] = "16",
    draws: Annotated[int, typer.Option(help="Noise draws a pass of the last way; 1: leave it out.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Counted rounds.", min=1)] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each way in a process of its own.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw cost and memory over length (.png, .svg, .pdf).")] = None,
    json_file: JsonFile = None,
) -> None:
    """Training steps: ours and the textbook two-stream step against the AR step of the same Hugging Face model."""
    from rich.progress import Progress as Bar

    from blockdiff.bench import Case
    from blockdiff.bench import bench_train as measure
    from blockdiff.bench.costs import cost_plot, cost_table
    from blockdiff.runtime import record, use_available_threads

    use_available_threads()
    if batch is not None and batch < 1:
        raise ValueError("--batch: give 1 row or more")
    cases = [
        Case(length, batch or max(1, tokens // length), size, draws, model)
        for size in whole_numbers(block_size, "--block-size")
        for length in whole_numbers(lengths, "--lengths")
    ]
    with Bar(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        rows = measure(cases, rounds=rounds, memory=memory, on_progress=lambda done: bar.update(task, completed=done))
    out.print(cost_table(rows))
    if plot is not None:
        cost_plot(rows, plot)
    write_result(json_file, record("bench train", 0, model=model or "random llama, 8M parameters", rows=rows))
