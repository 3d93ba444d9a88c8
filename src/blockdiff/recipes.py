"""The files that the documentation's commands read: configurations, experiments, evaluations and examples.

In the repository they lie at its root; a wheel carries them inside the package (pyproject.toml, `force-include`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

FOLDERS = ("configs", "evaluations", "examples", "experiments")
_PACKAGED = Path(__file__).parent / "recipe_files"
_ROOT = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2]


@dataclass(frozen=True)
class Recipe:
    """name: its path as commands give it, e.g. configs/adapt.yaml; about: the first sentence of its comment."""

    name: str
    about: str


def recipes() -> list[Recipe]:
    """The YAML files among them, with what each is."""
    files = sorted(file for folder in FOLDERS for file in (_ROOT / folder).glob("*.yaml"))
    return [Recipe(file.relative_to(_ROOT).as_posix(), _first_sentence(file)) for file in files]


def write_recipes(target: Path) -> tuple[list[Path], list[Path]]:
    """Copy all of them below `target`: the files that were written, and those that were there already and stay."""
    written, kept = [], []
    for folder in FOLDERS:
        for source in sorted(file for file in (_ROOT / folder).rglob("*") if file.is_file()):
            copy = target / source.relative_to(_ROOT)
            if copy.exists():
                kept.append(copy)
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            written.append(copy)
    return written, kept


def _first_sentence(file: Path) -> str:
    lines = takewhile(lambda line: re.match("# (?! )", line), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line[2:].strip() for line in lines).split(". ")[0].rstrip(".:")
