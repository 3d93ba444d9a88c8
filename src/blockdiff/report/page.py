"""The page: every section whose files are there, in one HTML file that asks no other host for anything."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from blockdiff.files import write_text
from blockdiff.report import ablation, bounds, coverage, generation, length, texts, training
from blockdiff.report.exhibits import Caption, Exhibit, Section
from blockdiff.report.sources import Source, read_sources

_STATIC = Path(__file__).parent / "static"


def write(path: Path, out: Path | None = None) -> Path:
    """The report of a run or an experiment: PATH/report.html with its pictures as PNG in PATH/figures, or `out` alone.

    Returns the page's file. Raises FileNotFoundError and ValueError where there is no run, or a file of it is damaged.
    """
    (source,) = read_sources([path])
    sections = _sections([source])
    if out is not None or path.is_file():
        return _write(out or Path("report.html"), source.label, [source], sections)
    for section in sections:
        for exhibit in section.exhibits:
            if exhibit.picture is not None:
                exhibit.picture.png(path / "figures" / f"{exhibit.picture.name}.png")
    return _write(path / "report.html", path.resolve().name, [source], sections)


def compare(paths: Sequence[Path], out: Path = Path("report.html")) -> Path:
    """One page of several runs and experiments, a colour each; returns its file. Raises as `write` does."""
    sources = read_sources(paths)
    return _write(out, " · ".join(source.label for source in sources), sources, _sections(sources))


def draw(kind: Literal["length", "generation"], result: dict[str, Any], file: Path) -> None:
    """The first picture that the page makes of one result, as PNG."""
    found = {"length": length, "generation": generation}[kind].section([Source(kind, file, {kind: result})])
    picture = None if found is None else found.exhibits[0].picture
    if picture is not None:
        picture.png(file)


def _sections(sources: list[Source]) -> list[Section]:
    builders: dict[str, Callable[[list[Source]], Any]] = {
        "bound": bounds.section,
        "experiment": ablation.sections,
        "coverage": coverage.section,
        "length": length.section,
        "generation": generation.section,
        "traces": texts.traces,
        "samples": texts.samples,
        "speed": texts.speed,
        "metrics": training.section,
    }
    found: list[Section | None] = []
    for name, build in builders.items():
        with _named(f"{name} results", sources):
            made = build(sources)
            found += made if isinstance(made, list) else [made]
    found += [
        _preformatted(sources, "What a training pass sees", "mask"),
        _preformatted(sources, "Configuration", "config"),
    ]
    return [section for section in found if section is not None]


@contextmanager
def _named(what: str, sources: list[Source]) -> Iterator[None]:
    """One line for a file that is JSON and holds something else than the page reads."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        where = ", ".join(str(source.path) for source in sources)
        raise ValueError(
            f"{where}: {what} that are damaged, or another version's ({type(error).__name__}: {error}); write them "
            "anew with their command's --json"
        ) from error


def _preformatted(sources: list[Source], title: str, part: str) -> Section | None:
    exhibits = tuple(
        Exhibit(f"{part}-{at}", Caption(source.label), text=getattr(source, part))
        for at, source in enumerate(sources)
        if getattr(source, part).strip()
    )
    return Section(title, exhibits) if exhibits else None


def _write(out: Path, title: str, sources: list[Source], sections: list[Section]) -> Path:
    if out.is_dir():
        raise ValueError(f"{out}: is a directory; give --out a file to write")
    pages = Environment(
        loader=FileSystemLoader(_STATIC),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script = (_STATIC / "script.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    with _named("results", sources):  # pictures are drawn here
        page = _rendered(pages, title, sources, sections, script, digest)
    write_text(out, page)
    return out


def _rendered(
    pages: Environment, title: str, sources: list[Source], sections: list[Section], script: str, digest: str
) -> str:
    return pages.get_template("page.html").render(
        title=title,
        overview=training.overview(sources),
        sections=sections,
        versions=_versions(sources),
        command=shlex.join(["blockdiff", "report", *(str(source.path) for source in sources)]),
        style=(_STATIC / "style.css").read_text(),
        script=script,
        digest=digest,
    )


def _versions(sources: list[Source]) -> list[str]:
    """The versions behind the numbers, once where they are the same everywhere."""
    results: list[dict[str, Any]] = [
        result for source in sources for result in (*source.results.values(), *filter(None, [source.summary]))
    ]
    words = [
        ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items()) for result in results
    ]
    return [line for line in dict.fromkeys(words) if line]
