"""Commands that make data (`data ...`, `sample`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from blockdiff.cli_options import (
    JsonFile,
    ModelPath,
    Seed,
    load_model,
    out,
    progress,
    write_result,
)

data = typer.Typer(help="Make data to train and to measure on.", no_args_is_help=True)
Folder = Annotated[Path, typer.Option("--out", help="Directory of train.jsonl and valid.jsonl.")]


@data.command()
def arithmetic(
    output: Folder,
    train: Annotated[int, typer.Option(help="Training problems.", min=0)] = 10000,
    valid: Annotated[int, typer.Option(help="Validation problems; none is among the training's.", min=0)] = 500,
    seed: Seed = 0,
) -> None:
    """Arithmetic word problems, worked out step by step, that end in `#### answer`."""
    from blockdiff.arithmetic import write_arithmetic

    for file in write_arithmetic(output, train=train, valid=valid, seed=seed):
        out.print(f"data: {file}")


@data.command()
def topics(output: Folder) -> None:
    """The text that every Python carries (`pydoc_data.topics`), a tenth of its sections held out."""
    from blockdiff.demo import write_data

    for file in write_data(output):
        out.print(f"data: {file}")


@data.command("pack")
def pack(
    sources: Annotated[list[Path], typer.Argument(help="Files of plain texts.")],
    output: Annotated[Path, typer.Option("--out", help="File to write: .jsonl or .jsonl.gz.")],
    characters: Annotated[int, typer.Option(help="Characters of a text, at least.", min=1)] = 8000,
    valid: Annotated[Path | None, typer.Option(help="File for the last texts, held out.")] = None,
    share: Annotated[float, typer.Option(help="Share of the texts that is held out.", min=0.0, max=1.0)] = 0.1,
) -> None:
    """Long texts: short ones joined with an empty line between them, longer ones cut at ends of lines."""
    from blockdiff.longtext import pack_files

    for file, rows in zip((output, valid), pack_files(sources, output, characters, valid, share), strict=False):
        out.print(f"data: {file}, {rows} texts")


def sample(
    path: ModelPath,
    documents: Annotated[int, typer.Option(help="Documents to draw; those that cannot be kept are counted.", min=1)],
    output: Annotated[Path, typer.Option("--out", help="File to write: .jsonl or .jsonl.gz.")],
    block_size: Annotated[int, typer.Option(help="1: the AR model; larger: the random-order sampler.", min=1)] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest document; default: what the model reads.")] = None,
    batch: Annotated[int, typer.Option(help="Documents drawn at once; changes nothing but the speed.", min=1)] = 64,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Draw documents from a model at temperature 1, with their NLL: data whose entropy is known."""
    from blockdiff.runtime import record
    from blockdiff.sample import sample_documents

    model = load_model(path)
    with progress("sampling") as on_progress:
        sampled = sample_documents(
            model,
            documents,
            output,
            block_size=block_size,
            max_new_tokens=max_new_tokens,
            batch=batch,
            seed=seed,
            on_progress=on_progress,
        )
    out.print(f"{output}: {sampled.words()}")
    write_result(json_file, record("sample", seed, model=path, out=str(output), rows=[asdict(sampled)]))


@data.command("own")
def own(
    path: ModelPath,
    source: Annotated[Path, typer.Option("--data", help="Texts whose beginnings are continued.")],
    output: Annotated[Path, typer.Option("--out", help="File to write: .jsonl or .jsonl.gz.")],
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable; default: 0 and 1.")] = None,
    documents: Annotated[int | None, typer.Option(help="Continue the first so many texts only.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.", min=1)] = 192,
    batch: Annotated[int, typer.Option(help="Texts written at once; changes nothing but the speed.", min=1)] = 64,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """A model's own continuations: what to train a frozen adapter on, so that its drafts are accepted."""
    from blockdiff.owntext import own_text
    from blockdiff.runtime import record

    model = load_model(path)
    with progress("writing") as on_progress:
        written = own_text(
            model,
            source,
            output,
            temperatures=temperature or (0.0, 1.0),
            documents=documents,
            max_new_tokens=max_new_tokens,
            batch=batch,
            seed=seed,
            on_progress=on_progress,
        )
    out.print(f"{output}: {written.documents} texts, of which the model wrote {written.tokens} tokens")
    write_result(json_file, record("data own", seed, model=path, out=str(output), rows=[asdict(written)]))
