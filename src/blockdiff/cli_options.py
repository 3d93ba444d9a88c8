"""What the commands share: their common options, the consoles, loading a model, writing a result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from blockdiff.api import Model
    from blockdiff.decode import Policy, Sampling
    from blockdiff.diffusion_gemma import DiffusionGemma
    from blockdiff.shards import Split

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
    """The model at a path, on the GPU of this process where it has one beside others; what is worth knowing about it
    goes to standard error."""
    from blockdiff.api import load

    _use_own_device()
    model = load(path)
    for note in model.notes:
        err.print(f"note: {note}", style="dim")
    return model


def load_writer(path: str) -> Model | DiffusionGemma:
    """Whatever at a path writes texts; device and notes as in `load_model`."""
    from blockdiff.api import load_writer as read

    _use_own_device()
    model = read(path)
    for note in model.notes:
        err.print(f"note: {note}", style="dim")
    return model


def _use_own_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def chosen_sampling(temperature: float | None, top_k: int = 0, top_p: float = 1.0) -> dict[str, Sampling]:
    """The options of `generate` that say how tokens are drawn; none where none was given. Raises ValueError."""
    from blockdiff.decode import Sampling

    if temperature is None and not top_k and top_p == 1:
        return {}
    return {"sampling": Sampling(temperature or 0.0, top_k, top_p)}


def chosen_policy(name: str, threshold: float | None, per_step: int | None, left_bias: float | None = None) -> Policy:
    """A policy by its name, with what the options change. Raises ValueError."""
    from blockdiff.decode import changed, named

    return changed(named(name), threshold, per_step, left_bias)


def asked_policy(
    name: str | None, threshold: float | None, per_step: int | None, left_bias: float | None = None
) -> Policy | None:
    """As `chosen_policy`, from `threshold` where there is no name; None where no option says anything."""
    if all(value is None for value in (name, threshold, per_step, left_bias)):
        return None
    return chosen_policy(name or "threshold", threshold, per_step, left_bias)


def warn(problem: str) -> None:
    """Print a warning; of several processes that measure together the first does."""
    if not out.quiet:
        err.print(f"warning: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them. Raises ValueError naming the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: give whole numbers with commas between them, e.g. 1,4,16") from None


def measuring_together() -> Split:
    """The processes that torchrun started, for a measurement that they share; only the first of them tells it."""
    from blockdiff.shards import Shard, together

    shard = Shard.of_process()
    out.quiet = shard.number > 0
    return together(shard)


def one_process_only(what: str) -> None:
    """Refuse to do under torchrun what every process would do anew."""
    from blockdiff.shards import Shard

    if Shard.of_process().count > 1:
        raise ValueError(f"{what}: is not shared among processes; start it without torchrun")


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; yields the function that is told how much is done, 0 to 1."""
    from rich.progress import Progress as Bar

    with Bar(console=err, transient=True, disable=not err.is_terminal or out.quiet) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def write_result(path: Path | None, contents: Any) -> None:
    """Write what `--json` asked for, where it did and this process is the one that tells."""
    if path is not None and not out.quiet:
        from blockdiff.files import write_json

        write_json(path, contents)
