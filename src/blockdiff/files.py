"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yield an empty staging directory beside `target`; on success it takes the target's place by rename.

    On any error, a full disk included, the staging directory is removed and what was at `target` stays there. A kill in
    the instant between the two renames leaves the old directory whole beside it, as `.<name>.old.*/was`.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _room(target):
            yield staging
            staging.chmod(0o755)
            sync_tree(staging)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / "was")
            try:
                staging.rename(target)
            except OSError:
                (old / "was").rename(target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(target)
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Ask the system to put every file below `directory` on the disk, so that a rename cannot overtake its contents."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary neighbour, open for bytes; on success it takes the file's place, so that a reader sees the old
    file or the new one. On any error it is removed; a kill leaves it as `.<name>.*`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with _room(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _room(path: Path) -> Iterator[None]:
    """A full disk, as an OSError that says where."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter knows no number
        full = error.errno in _FULL if isinstance(error, OSError) else "I/O error" in str(error)
        if not full:
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"{path}: {reason}; make room") from error


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file whole or not at all."""
    with replace_file(path) as file:
        file.write(contents)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; for a path that ends in .gz, compressed (the same text, the same bytes)."""
    data = text.encode()
    write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
