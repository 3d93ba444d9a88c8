"""What the commands share: their common options, the consoles, loading a model, writing a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from blockdiff.api import Model
    from blockdiff.decode import Policy

# text is shown as it is: never wrapped, coloured by what it looks like, or read as markup
out, err = (Console(stderr=to_stderr, soft_wrap=True, markup=False, highlight=False) for to_stderr in (False, True))

Seed = Annotated[int, typer.Option(help="Seed of every random number.", min=0, max=2**32 - 1)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]
ModelPath = Annotated[str, typer.Argument(help="Checkpoint directory, or a Hugging Face hub name.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a key, e.g. --set data.length=256.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens denoised together; default: the checkpoint's.")]
PolicyName = Annotated[
    str, typer.Option("--policy", help="A name of `blockdiff policies`, or parts: 'entropy + entropy_budget(0.1)'.")
]
Threshold = Annotated[float | None, typer.Option(help="Fill every position at least this certain.")]
LeftBias = Annotated[float | None, typer.Option(help="Left bias of a random order; 0: uniform.")]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="Only draft so: keep what the AR model would write itself, to the token.")
]
PerStep = Annotated[int | None, typer.Option(help="Fill at least this many positions a step.", max=2**31)]


def load_model(path: str) -> Model:
    """The model at a path; what is worth knowing about it goes to standard error."""
    from blockdiff.api import load

    model = load(path)
    for note in model.notes:
        err.print(f"note: {note}", style="dim")
    return model


def chosen_policy(name: str, threshold: float | None, per_step: int | None, left_bias: float | None = None) -> Policy:
    """A policy by its name, with what the options change. Raises ValueError."""
    from blockdiff.decode import changed, named

    return changed(named(name), threshold, per_step, left_bias)


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them. Raises ValueError naming the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: give whole numbers with commas between them, e.g. 1,4,16") from None


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; yields the function that is told how much is done, 0 to 1."""
    from rich.progress import Progress as Bar

    with Bar(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def write_result(path: Path | None, contents: Any) -> None:
    """Write what `--json` asked for, where it did."""
    if path is not None:
        from blockdiff.files import write_json

        write_json(path, contents)
