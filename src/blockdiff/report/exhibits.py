"""What a page is made of: sections of exhibits, each with a caption that says where its numbers come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blockdiff.report.drawing import Picture
from blockdiff.report.sources import Source


@dataclass(frozen=True)
class Caption:
    """what is shown; counts: of what and how many; seeds; errors: what bars, bands and ± are; commands that made it."""

    what: str
    counts: str = ""
    seeds: str = ""
    errors: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataTable:
    """Cells as text; the first column names the row, as do the columns `words`; the others are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = ()


@dataclass(frozen=True)
class Exhibit:
    """A picture, a table (behind the picture where there is one), decoded texts, or preformatted text."""

    name: str
    caption: Caption
    title: str = ""
    picture: Picture | None = None
    table: DataTable | None = None
    text: str = ""
    samples: tuple[dict[str, Any], ...] = ()
    traces: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Section:
    title: str
    exhibits: tuple[Exhibit, ...]
    lead: str = field(default="")

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def each(sources: list[Source], words: list[str]) -> str:
    """One sentence where all sources agree, otherwise one for each by name."""
    if len(set(words)) == 1:
        return words[0]
    return "; ".join(f"{source.label}: {word}" for source, word in zip(sources, words, strict=True))


def origin(sources: list[Source], name: str) -> dict[str, Any]:
    """The seeds and commands of a caption, from the results of this name."""
    results = [source.results[name] for source in sources]
    return {
        "seeds": each(sources, [f"seed {result.get('seed', 'unknown')}" for result in results]),
        "commands": tuple(dict.fromkeys(command_of(result) for result in results)),
    }


def command_of(result: dict[str, Any]) -> str:
    """The command line that made a result; for results that do not hold it, what they say of it."""
    if result.get("invocation"):
        return str(result["invocation"])
    words = ["blockdiff", str(result.get("command", "(unknown command)"))]
    words += [str(result["model"])] if isinstance(result.get("model"), str) else []
    words += [str(result["file"])] if isinstance(result.get("file"), str) else []
    words += [f"--data {file}" for file in result["data"]] if isinstance(result.get("data"), list) else []
    return " ".join([*words, "…"])


def counted(rows: list[dict[str, Any]]) -> str:
    """Scored tokens and documents of rows that may differ in them."""
    tokens, documents = ({row[name] for row in rows} for name in ("tokens", "documents"))
    return f"{extent(tokens)} scored tokens of {extent(documents)} documents"


def extent(values: set[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)
