"""Commands about checkpoints as files (`inspect`, `export`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiff.cli_options import JsonFile, ModelPath, err, load_model, out, write_result


def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    json_file: JsonFile = None,
) -> None:
    """Say what a checkpoint is, which conventions it has, how each is known, and whether it loads (no weights read)."""
    from blockdiff.inspecting import inspect as look
    from blockdiff.runtime import record

    found = look(path)
    out.print(str(found))
    write_result(json_file, record("inspect", 0, **found.to_json()))


def export(
    model: ModelPath,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
    form: Annotated[str, typer.Option("--format", help="sdar: SDAR's, for SGLang and LMDeploy.")] = "sdar",
) -> None:
    """Write a checkpoint in the format of other engines."""
    from blockdiff.export import FORMATS, export_sdar, sdar_notes

    if form not in FORMATS:
        raise ValueError(f"--format {form}: unknown; known: {', '.join(FORMATS)}")
    if target.exists():  # before the model is read
        raise ValueError(f"{target}: something is there already; give another directory")
    loaded = load_model(model)
    files = export_sdar(loaded, target)
    for note in sdar_notes(loaded):
        err.print(f"note: {note}", style="dim")
    out.print("\n".join(f"written: {file}" for file in files))
