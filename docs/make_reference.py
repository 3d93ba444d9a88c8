"""Writes docs/cli.md and docs/config.md, from the commands and from the configuration tree:

python docs/make_reference.py

(`tests/test_site.py` says when they are out of date.)
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from blockdiff.adapters import Adapter
from blockdiff.cli import app
from blockdiff.config import RunConfig
from blockdiff.curriculum import Growth
from blockdiff.distributions import DISTRIBUTIONS
from blockdiff.noise import NOISES
from blockdiff.presets import PRESETS

DOCS = Path(__file__).parent
MADE = "Made by `python docs/make_reference.py`; the words are those of the code."


def main() -> None:
    for name, page in (("cli", cli_page()), ("config", config_page())):
        (DOCS / f"{name}.md").write_text(page, encoding="utf-8")


def cli_page() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        MADE,
        "",
        "`blockdiff COMMAND --help` prints the same.",
        "Exit code 0: done, 1: failed, 2: bad usage or bad input, in one line that says which and what to do.",
        "`BLOCKDIFF_TRACEBACK=1` shows where an error comes from.",
    ]
    for path, command in _commands(typer.main.get_command(app), "blockdiff"):
        rows = [_parameter(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        lines += ["", f"## {path}", "", _paragraphs(command.help or "")]
        if rows:
            lines += ["", "| argument or option | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, inner in sorted(command.commands.items()):
            yield from _commands(inner, f"{path} {name}")
    else:
        yield path, command


def _parameter(parameter: Any) -> str:
    required, argument = parameter.required, parameter.param_type_name == "argument"
    name = (
        (parameter.metavar or parameter.name).upper()
        if argument
        else ", ".join([*parameter.opts, *parameter.secondary_opts])
    )
    default = "required" if required else _value(parameter.default)
    return f"| `{name}` | {default} | {_cell(parameter.help or '')} |"


def config_page() -> str:
    """Every key of a configuration with what it takes, its default and its meaning."""
    lines = [
        "# Configuration keys",
        "",
        MADE,
        "",
        "A configuration is a YAML file; `--set data.length=256` changes a key. `blockdiff explain FILE` shows a file",
        "with every key resolved. An unknown key is refused with the nearest known one. What `clean_context`,",
        "`prediction` and `boundary` choose between: [a tour](tour.md). A layout of one's own:",
        "[its page](custom-layout.md).",
        "",
        "## The whole run",
        "",
        *_table((name, field) for name, field in RunConfig.model_fields.items() if not _is_group(field.annotation)),
        "| `layout`, `noise` | one of the kinds below | `{kind: ar}`, `{kind: exact_count}` | |",
    ]
    for name, field in RunConfig.model_fields.items():
        if _is_group(field.annotation):
            group = field.annotation
            rows = _table((f"{name}.{key}", inner) for key, inner in group.model_fields.items())
            lines += ["", f"## {name}", "", _paragraphs(group.__doc__ or ""), "", *rows]
    for name, cls in (("model.adapter", Adapter), ("growth", Growth)):
        lines += ["", f"## {name}", "", *_about(cls, name)]
    for title, kinds in (("layout", DISTRIBUTIONS), ("noise", NOISES)):
        lines += ["", f"## {title} kinds"]
        for kind, cls in kinds.items():
            lines += ["", f"### {title}: {{kind: {kind}}}", "", *_about(cls, title)]
    lines += ["", "## Presets", "", "`preset: NAME` puts these keys beneath the file's own.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(preset.about)} |" for name, preset in PRESETS.items()]
    return "\n".join(lines) + "\n"


def _about(cls: type, title: str) -> list[str]:
    """What a dataclass says of itself, and its settings."""
    fields = [field for field in dataclasses.fields(cls) if title == "model.adapter" or field.name != "kind"]  # type: ignore[arg-type]
    rows = [f"| `{title}.{field.name}` | {_default(field)} |" for field in fields]
    return [_paragraphs(cls.__doc__ or ""), *(["", "| key | default |", "|---|---|", *rows] if rows else [])]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _value(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else _value(field.default)


def _table(fields: Iterator[tuple[str, FieldInfo]]) -> list[str]:
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for name, field in fields:
        if name in ("layout", "noise", "growth"):
            continue
        default = "required" if field.default is PydanticUndefined else _value(field.default)
        rows.append(f"| `{name}` | {_takes(field.annotation)} | {default} | {_cell(field.description or '')} |")
    return rows


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _takes(annotation: Any) -> str:
    """A type in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(inside[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_takes(one) for one in inside if one is not type(None))
    if origin in (list, tuple):
        return f"list of {_takes(inside[0])}"
    words = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return words.get(annotation, "group" if dataclasses.is_dataclass(annotation) else "mapping")


def _value(value: Any) -> str:
    if value is None or value == () or isinstance(value, types.EllipsisType):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _paragraphs(text: str) -> str:
    """The paragraphs of a docstring, each on a line of its own."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


if __name__ == "__main__":
    main()
