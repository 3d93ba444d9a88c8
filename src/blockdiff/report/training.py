"""How a run went: its losses by step, and what it was."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from blockdiff.report.drawing import LINES, Picture, legend, series
from blockdiff.report.exhibits import Caption, DataTable, Exhibit, Section, command_of, each
from blockdiff.report.sources import Source

_LOSSES = (("bound", "training bound"), ("block_loss", "blocks' loss (no bound)"), ("ar", "AR term"))


def overview(sources: list[Source]) -> DataTable:
    """What stands side by side: a line for each path."""
    header = ("", "kind", "path", "seeds", "steps", "trained tokens", "machine")
    return DataTable(header, tuple(map(_line, sources)), (1, 2, 6))


def _line(source: Source) -> tuple[str, ...]:
    if source.summary is not None:
        seeds = ", ".join(map(str, source.summary["seeds"]))
        return source.label, "experiment", str(source.path), seeds, "", "", _machine(source.summary)
    if source.path.is_file():
        (result,) = source.results.values()
        seed = str(result.get("seed", ""))
        return source.label, str(result["command"]), str(source.path), seed, "", "", _machine(result)
    train = source.results.get("train", {})
    tokens = f"{train['tokens']:,}" if train.get("tokens") else ""
    numbers = str(train.get("seed", "")), str(train.get("steps", "")), tokens
    return source.label, "run", str(source.path), *numbers, _machine(train)


def _machine(result: dict[str, Any]) -> str:
    return f"{result['device']}, threads: {result['threads']}" if "device" in result else ""


def section(sources: list[Source]) -> Section | None:
    trained = [source for source in sources if sum("loss" in m for m in source.metrics) > 1]
    if not trained:
        return None
    several = len(trained) > 1

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        at = 0
        for run, source in enumerate(trained):
            for kind, (name, label, points) in enumerate(_curves(source)):
                style = series(run if several else at)
                style |= {"linestyle": LINES[kind % len(LINES)]} if several else {}
                style |= {} if name.startswith("eval") else {"marker": ""}
                axes.plot(*zip(*points, strict=True), label=f"{source.label}: {label}" if several else label, **style)
                at += 1
        axes.set(xlabel="step", ylabel="nats per token")
        legend(figure)

    what = "Loss per token by step of training, of the training noise and layouts; with marks: bounds of the validation"
    seeds = each(trained, [f"seed {source.results.get('train', {}).get('seed', 'unknown')}" for source in trained])
    points = [f"{sum('loss' in m for m in source.metrics)} recorded steps" for source in trained]
    errors = "none drawn: a point is the mean of the batches since the one before"
    commands = [command_of(source.results["train"]) for source in trained if "train" in source.results]
    caption = Caption(what, each(trained, points), seeds, errors, tuple(dict.fromkeys(commands)))
    return Section("Training", (Exhibit("training", caption, picture=Picture("training", what, draw)),))


def _curves(source: Source) -> list[tuple[str, str, list[tuple[int, float]]]]:
    """Key, label and (step, value) of every loss that was recorded more than once, and of the validation's bounds."""
    names = dict(_LOSSES)
    sizes = {n for m in source.metrics for n in m if n.startswith("eval_bound_b") and not n.endswith("_se")}
    names |= {name: name.replace("eval_bound_b", "validation, b = ") for name in sorted(sizes)}
    found = []
    for name, label in names.items():
        points = [(m["step"], m[name]) for m in source.metrics if name in m]
        if points:
            found.append((name, label, points))
    return found
