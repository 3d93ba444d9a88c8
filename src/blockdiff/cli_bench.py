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
