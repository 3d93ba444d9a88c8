"""The command that hands out the files which the documentation's commands read (`recipes`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockdiff.cli_options import out


def recipes(
    target: Annotated[
        Path | None, typer.Argument(help="Directory to write them to; without it they are listed.")
    ] = None,
) -> None:
    """List the configurations, experiments and evaluations that come with blockdiff, or write them to a directory.

    Nothing is overwritten. `blockdiff recipes .` gives every command of the documentation its files.
    """
    from blockdiff import recipes as shipped

    if target is None:
        found = shipped.recipes()
        wide = max(len(recipe.name) for recipe in found)
        out.print("\n".join(f"{recipe.name:<{wide}}  {recipe.about}" for recipe in found))
        return
    written, kept = shipped.write_recipes(target)
    out.print(f"{len(written)} files written to {target}" + (f", {len(kept)} were there and stay" if kept else ""))
