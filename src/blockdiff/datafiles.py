"""Files of rows: .txt (one row), .jsonl and .parquet, text also with .gz, and directories written by
`datasets.Dataset.save_to_disk`. A row that cannot be used is named by file and line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

BadRows = Literal["error", "skip"]


class DataError(ValueError):
    """Input that cannot be used, named by file and line, with what to do."""


def read_rows(
    path: Path, on_bad: BadRows = "error", bad: list[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, row) of every row of a file; the name says file and line."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if path.is_dir():
        yield from _rows_on_disk(path)
    elif suffix in (".txt", ".txt.gz"):
        yield from _text_file(path)
    elif suffix in (".jsonl", ".jsonl.gz"):
        yield from _json_lines(path, on_bad, bad if bad is not None else [])
    elif suffix == ".parquet":
        yield from _parquet_file(path)
    else:
        raise DataError(
            f"{path}: unknown kind of file; give .txt, .jsonl (each also .gz), .parquet, or a directory written by "
            "datasets' save_to_disk"
        )


def texts_of(row: dict[str, Any]) -> list[str]:
    """Every text in a row of any kind (for training a tokenizer)."""
    turns = row["messages"] if isinstance(row.get("messages"), list) else [row]
    found = [turn.get(key) for turn in turns for key in ("text", "prompt", "completion", "content")]
    return [text for text in found if isinstance(text, str)]


def _is_unicode(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: Path, file: Any) -> Iterator[bytes]:
    """Lines of an open file; a compressed file that is cut or broken is named."""
    try:
        yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); copy it again") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _text_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        try:
            text = b"".join(_lines(path, file)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if text.strip():
        yield str(path), {"text": text}


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every line of a .jsonl or .jsonl.gz file that is not blank."""
    with _open(path) as file:
        # lines of bytes: only a newline ends a row, never a U+2028 in its text
        for number, line in enumerate(_lines(path, file), 1):
            if line.strip():
                yield number, line


def json_row(name: str, line: bytes) -> dict[str, Any]:
    """The row in a line of JSON. Raises DataError that begins with the line's name."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: not JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 (byte {error.start} of the line)") from error
    except RecursionError as error:
        raise DataError(f"{name}: nested too deeply to be a row of text") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{name}: not JSON ({error})") from error
    if b"\\ud" in line.lower() and not _is_unicode(row):
        raise DataError(f"{name}: holds half of a surrogate pair, which is no text")
    if not isinstance(row, dict):
        raise DataError(f"{name}: a row must be an object, this is {type(row).__name__}")
    return row


def _json_lines(path: Path, on_bad: BadRows, bad: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        name = f"{path}:{number}"
        try:
            row = json_row(name, line)
        except DataError as error:
            reject(str(error), on_bad, bad)
            continue
        yield name, row


def _parquet_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        rows = (row for batch in ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from error


def _rows_on_disk(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: not a directory written by datasets' save_to_disk") from error
    if isinstance(data, datasets.DatasetDict):
        raise DataError(f"{path}: holds the splits {', '.join(data)}; give the directory of one of them")
    yield from ((f"{path}:{number}", row) for number, row in enumerate(data, 1))


def reject(problem: str, on_bad: BadRows, bad: list[str]) -> None:
    """Stop at a row that cannot be used, or note it. Raises DataError."""
    if on_bad == "error":
        raise DataError(
            f"{problem}; mend the row, or leave such rows out (data.bad_rows: skip in a config, --skip-bad-rows here)"
        )
    bad.append(problem)
