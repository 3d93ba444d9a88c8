"""Long documents made of what there is: short texts one after another, longer ones cut at the end of a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from blockdiff.datafiles import DataError, read_rows
from blockdiff.files import write_lines

BETWEEN = "\n\n"


def pack_texts(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Texts of at least so many characters, an empty line between those that are joined; the rest at the end may be
    shorter. A text of more than twice as many is cut into several, at the next end of a line (or inside a line that is
    longer).
    """
    held = ""
    for text in texts:
        held = held + BETWEEN + text if held else text
        while len(held) >= 2 * characters:
            end = held.find("\n", characters - 1, 2 * characters) + 1 or characters
            yield held[:end]
            held = held[end:]
        if len(held) >= characters:
            yield held
            held = ""
    if held.strip():
        yield held


def pack_files(sources: Sequence[Path], output: Path, characters: int, valid: Path | None, share: float) -> list[int]:
    """Write {"text"} rows to `output`, the last `share` of them to `valid` where it is given; how many rows each got.

    Raises DataError for a source without texts, ValueError for fewer than two rows to divide.
    """
    if characters < 1:
        raise ValueError(f"--characters {characters}: give 1 or more")
    written = [output] if valid is None else [output, valid]
    for file in written:
        if not file.name.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(f"{file}: give a file that ends in .jsonl or .jsonl.gz")
        if file.resolve() in [source.resolve() for source in sources] or written.count(file) > 1:
            raise ValueError(f"{file}: would be written over; give another file")
    rows = [{"text": text} for text in pack_texts(_texts(sources), characters)]
    kept = len(rows)
    if valid is not None:
        kept = min(len(rows) - 1, round(len(rows) * (1 - share)))
        if kept < 1:
            raise ValueError(f"--valid {valid}: {len(rows)} text is not enough to divide; give fewer --characters")
        write_lines(valid, rows[kept:])
    write_lines(output, rows[:kept])
    return [kept] if valid is None else [kept, len(rows) - kept]


def _texts(sources: Sequence[Path]) -> Iterator[str]:
    for source in sources:
        found = False
        for name, row in read_rows(source):
            if not isinstance(row.get("text"), str):
                raise DataError(f"{name}: has no text; only plain texts can be joined")
            if row["text"].strip():
                found = True
                yield row["text"]
        if not found:
            raise DataError(f"{source}: no texts in it; give a file with some text")
