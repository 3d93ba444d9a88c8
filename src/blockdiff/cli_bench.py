"""`bench`: speed as ratios, measured side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockdiff.cli_options import JsonFile, Seed, load_model, out, progress, whole_numbers, write_result

bench = typer.Typer(help="Measure speed, as ratios within one run.", no_args_is_help=True)
_LEVELS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)
_SWEEP = (*(f"threshold({level})" for level in _LEVELS), "fixed(1)", "fixed(2)", "fixed(4)", "one_step")


_OF_TEXTS = ("data", "policy", "temperature", "prompts", "judge", "quality")
_OF_RANDOM_WEIGHTS = ("tokens_per_step", "textbook", "memory")


@bench.command("decode")
def bench_decode(
    context: typer.Context,
    path: Annotated[
        str | None, typer.Argument(help="Checkpoint whose texts count; none: what decoding costs, on random weights.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Texts whose beginnings are the prompts, of a checkpoint.")] = None,
    block_sizes: Annotated[str | None, typer.Option(help="Comma-separated; default 4,8, on random weights 16.")] = None,
    policy: Annotated[list[str] | None, typer.Option("--policy", help="Policies beside lossless; repeatable.")] = None,
    tokens_per_step: Annotated[str, typer.Option(help="On random weights: tokens that a step fills.")] = "1,4",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    batch: Annotated[str, typer.Option(help="Prompts decoded together; several on random weights: 1,8.")] = "1",
    prompts: Annotated[int, typer.Option(help="Prompts of a checkpoint.", min=1)] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 16,
    new_tokens: Annotated[str, typer.Option(help="Tokens that every text gets; several on random weights.")] = "128",
    rounds: Annotated[int, typer.Option(help="Counted rounds.", min=1)] = 5,
    judge: Annotated[str | None, typer.Option(help="AR model that scores the texts.")] = None,
    quality: Annotated[bool, typer.Option("--quality", help="Sweep thresholds and steps; needs a judge.")] = False,
    textbook: Annotated[bool, typer.Option(help="On random weights: block decoding as usually written, too.")] = True,
    memory: Annotated[bool, typer.Option(help="On random weights: peak memory, in processes of their own.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw quality, or cost, against speed (.png, .svg, .pdf).")] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Decoding against transformers' `generate` on the same weights: lossless and policies on a checkpoint and its
    texts; or what fixed numbers of tokens a step cost, over lengths, batches and block sizes, on random weights."""
    from blockdiff.runtime import record, use_available_threads

    use_available_threads()
    _drawable(plot)
    batches, lengths = whole_numbers(batch, "--batch"), whole_numbers(new_tokens, "--new-tokens")
    if path is None:
        _refuse(context, _OF_TEXTS, "is about a checkpoint's texts: give its path")
        sizes = whole_numbers(block_sizes or "16", "--block-sizes")
        steps = whole_numbers(tokens_per_step, "--tokens-per-step")
        _positive("--batch", batches)
        _positive("--new-tokens", lengths)
        _positive("--block-sizes", sizes)
        _positive("--tokens-per-step", steps)
        _schedules(
            [(b, n, size, tuple(steps)) for n in lengths for b in batches for size in sizes],
            prompt_tokens,
            textbook,
            rounds,
            memory,
            plot,
            seed,
            json_file,
        )
        return
    _refuse(context, _OF_RANDOM_WEIGHTS, "is about random weights: leave the checkpoint out")
    if data is None:
        raise ValueError("--data: give texts whose beginnings are the prompts")
    if len(batches) > 1 or len(lengths) > 1:
        raise ValueError("--batch and --new-tokens: give one number for a checkpoint")
    if (quality or plot) and judge is None:
        raise ValueError("--quality and --plot compare texts: give --judge, an AR model that scores them")
    from transformers import AutoModelForCausalLM

    from blockdiff.api import load
    from blockdiff.bench import areas as areas_of
    from blockdiff.bench import bench_decode as measure
    from blockdiff.frontier import bench_table, frontier_plot

    model = load_model(path)
    network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).to(model.device).eval()
    scorer = None if judge is None else load(judge)
    with progress("decoding") as on_progress:
        rows = measure(
            model,
            data,
            block_sizes=whole_numbers(block_sizes or "4,8", "--block-sizes"),
            policies=(policy or ()) if not quality else (*_SWEEP, *(policy or ())),
            temperature=temperature,
            batch=batches[0],
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=lengths[0],
            rounds=rounds,
            lossless=model.spec.ar_trained and model.spec.clean_context == "context_causal",
            hugging_face=network,
            judge=scorer,
            seed=seed,
            on_progress=on_progress,
        )
    out.print(bench_table(rows))
    _say_threads()
    areas = areas_of(rows)
    for size, area in areas.items() if quality else ():
        out.print(f"area under quality over parallelism (AUP), policies at b={size}: {area:.1f}")
    if plot is not None:
        frontier_plot(rows, plot)
    write_result(json_file, record("bench decode", seed, model=path, data=str(data), areas=areas, rows=rows))


def _schedules(
    cases: list[tuple[int, int, int, tuple[int, ...]]],
    prompt_tokens: int,
    textbook: bool,
    rounds: int,
    memory: bool,
    plot: Path | None,
    seed: int,
    json_file: Path | None,
) -> None:

    from blockdiff.bench import Schedule, bench_schedules
    from blockdiff.bench.costs import schedule_plot
    from blockdiff.bench.tables import schedule_table
    from blockdiff.runtime import record

    schedules = [Schedule(b, n, size, steps, prompt_tokens, textbook) for b, n, size, steps in cases]
    with progress("decoding") as on_progress:
        rows = bench_schedules(
            schedules,
            rounds=rounds,
            seed=seed,
            memory=memory,
            on_progress=on_progress,
        )
    out.print(schedule_table(rows))
    _say_threads()
    if plot is not None:
        schedule_plot(rows, plot)
    write_result(json_file, record("bench decode", seed, model="random llama, 8M parameters", rows=rows))


@bench.command("serve")
def bench_serve(
    path: Annotated[str | None, typer.Argument(help="Checkpoint; none: a random Llama of 8M parameters.")] = None,
    requests: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens that a request gets at most.", min=1)] = 64,
    block_sizes: Annotated[str, typer.Option(help="Comma-separated sizes that requests choose from.")] = "1,2,4,8,16",
    prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.", min=0)] = 0,
    pages: Annotated[int, typer.Option(help="Pages of 16 tokens; 0: as many as all need.", min=0)] = 0,
    rounds: Annotated[int, typer.Option(help="Counted rounds.", min=1)] = 3,
    plot: Annotated[Path | None, typer.Option(help="Draw throughput and waiting (.png, .svg, .pdf).")] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Requests of many kinds at once, arriving at random, and one at a time: throughput, waiting, equality."""
    from blockdiff.bench import bench_serve as measure
    from blockdiff.bench import ragged_requests, random_model
    from blockdiff.bench.costs import serve_plot
    from blockdiff.bench.tables import serve_table
    from blockdiff.engine import Limits
    from blockdiff.runtime import record, use_available_threads

    use_available_threads()
    _drawable(plot)
    model = random_model() if path is None else load_model(path)
    sizes = whole_numbers(block_sizes, "--block-sizes")
    _positive("--block-sizes", sizes)
    made = ragged_requests(requests, model.vocabulary - 1, sizes, new_tokens, prefix, seed)
    with progress("serving") as on_progress:
        rows = measure(
            model,
            made,
            rounds=rounds,
            limits=Limits(pages=pages) if pages else None,
            seed=seed,
            on_progress=on_progress,
        )
    out.print(serve_table(rows))
    _say_threads()
    if plot is not None:
        serve_plot(rows, plot)
    name = path or "random llama, 8M parameters"
    write_result(json_file, record("bench serve", seed, model=name, block_sizes=sizes, prefix=prefix, rows=rows))


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
    from blockdiff.bench import Case
    from blockdiff.bench import bench_train as measure
    from blockdiff.bench.costs import cost_plot, cost_table
    from blockdiff.runtime import record, use_available_threads

    use_available_threads()
    _drawable(plot)
    _positive("--batch", [1 if batch is None else batch])
    _positive("--lengths", whole_numbers(lengths, "--lengths"))
    _positive("--block-size", whole_numbers(block_size, "--block-size"))
    cases = [
        Case(length, batch or max(1, tokens // length), size, draws, model)
        for size in whole_numbers(block_size, "--block-size")
        for length in whole_numbers(lengths, "--lengths")
    ]
    with progress("training") as on_progress:
        rows = measure(cases, rounds=rounds, memory=memory, on_progress=on_progress)
    out.print(cost_table(rows))
    _say_threads()
    if plot is not None:
        cost_plot(rows, plot)
    write_result(json_file, record("bench train", 0, model=model or "random llama, 8M parameters", rows=rows))


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """An option that would do nothing is a mistake of whoever gave it."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def _positive(option: str, values: list[int]) -> None:
    if min(values) < 1:
        raise ValueError(f"{option}: {min(values)} is not possible; give 1 or more")


def _drawable(plot: Path | None) -> None:
    """Refuse a picture that could not be drawn before the time is spent."""
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {plot}: give a file that ends in .png, .svg or .pdf")


def _say_threads() -> None:
    import torch

    from blockdiff.runtime import record

    out.print(f"{torch.get_num_threads()} threads, {record('', 0)['device']}; medians over rounds, least and largest")
