"""A directory of answers that several processes fill, any of which may be killed at any moment.

    OUT/manifest.json               what was asked; a run that asks something else is refused
    OUT/parts/part-00000007.jsonl   the answers of a fixed stretch of rows, and a last line that vouches for them
    OUT/answers.jsonl               all answers in the order of the input, once every part is there

Every file is written whole or not at all. Which rows a part holds follows from its number alone, so what is done is
seen from the files, whoever wrote them: the number of processes may change between runs, and two that write the same
part write the same answers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockdiff.datafiles import DataError
from blockdiff.files import replace_file, write_bytes, write_json

_LEFTOVER_SECONDS = 3600
_PARTS, _LARGEST = 256, 256  # parts of a run at least, where it has the rows; and rows of a part at most


@dataclass(frozen=True)
class Totals:
    """Rows with an answer or an error, those with an error, tokens that were written and forwards that they took."""

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    forwards: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(mine + theirs for mine, theirs in zip(_counts(self), _counts(other), strict=True)))

    @classmethod
    def of(cls, answers: Sequence[dict[str, Any]]) -> Totals:
        """Counts of rows: an answer has `new_tokens` and `forwards`, others have an `error`."""
        return cls(
            len(answers),
            sum("error" in answer for answer in answers),
            sum(answer.get("new_tokens", 0) for answer in answers),
            sum(answer.get("forwards", 0) for answer in answers),
        )

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(self.forwards, 1)


@dataclass(frozen=True)
class Parts:
    """The answers to `rows` rows in parts of `size`; key: of what was asked, by which parts know their run."""

    directory: Path
    rows: int
    size: int
    key: str

    @classmethod
    def open(cls, directory: Path, rows: int, asked: dict[str, Any], record: dict[str, Any]) -> Parts:
        """The parts of a run, which begins or goes on. asked: what the answers depend on; record: what else the
        manifest tells. Raises DataError for a directory that holds anything else."""
        if directory.exists() and not directory.is_dir():
            raise DataError(f"{directory}: is a file; give a directory as --output")
        file = directory / "manifest.json"
        size = max(1, min(rows // _PARTS, _LARGEST))
        asked = json.loads(json.dumps({**asked, "rows": rows, "rows_per_part": size}))
        if not file.exists():
            held = (
                sorted(path.name for path in directory.iterdir() if path.name[0] != ".") if directory.exists() else []
            )
            if held and not file.exists():  # another process of this run may have begun since
                raise DataError(f"{directory}: holds {held[0]} and no manifest of a run; give another --output")
            write_json(file, {"asked": asked, **record})
        _check(file, asked)
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return cls(directory, rows, size, key)

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def numbers(self, part: int) -> range:
        """Row numbers that a part holds."""
        return range(part * self.size, min((part + 1) * self.size, self.rows))

    def file(self, part: int) -> Path:
        return self.directory / "parts" / f"part-{part:08}.jsonl"

    def write(self, part: int, answers: Sequence[dict[str, Any]]) -> Totals:
        """Write a part; returns its counts."""
        assert [answer["row"] for answer in answers] == list(self.numbers(part))
        body = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers).encode()
        totals = Totals.of(answers)
        write_bytes(self.file(part), body + json.dumps(self._seal(part, body, totals)).encode() + b"\n")
        return totals

    def read(self, part: int) -> tuple[bytes, Totals] | None:
        """The lines and counts of a part; None where it is not there, damaged, or of another run."""
        try:
            whole = self.file(part).read_bytes()
        except FileNotFoundError:
            return None
        at = whole.rfind(b"\n", 0, -1) + 1
        body, last = whole[:at], whole[at:]
        try:
            seal = json.loads(last)
            totals = Totals(**{name: seal[name] for name in asdict(Totals())})
        except (ValueError, KeyError, TypeError):
            return None
        return (body, totals) if seal == self._seal(part, body, totals) and last.endswith(b"\n") else None

    def _seal(self, part: int, body: bytes, totals: Totals) -> dict[str, Any]:
        checksum = hashlib.sha256(body).hexdigest()
        return {"part": part, **asdict(totals), "sha256": checksum, "run": self.key}

    def merge(self) -> Totals | None:
        """Write answers.jsonl if every part is there; returns its counts, or None.

        Whoever writes a run's last part finds them all; two who do write the same file.
        """
        if not all(self.file(part).exists() for part in range(len(self))):
            return None
        totals = Totals()
        try:
            with replace_file(self.directory / "answers.jsonl") as file:
                for part in range(len(self)):
                    if (found := self.read(part)) is None:
                        raise _NotThere
                    file.write(found[0])
                    totals += found[1]
        except _NotThere:
            return None
        self._forget_leftovers()
        return totals

    def _forget_leftovers(self) -> None:
        """Remove what killed processes left half-written: hidden files that nobody has written to for long."""
        for folder in (self.directory, self.directory / "parts"):
            for path in folder.glob(".*.jsonl.*"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                        path.unlink()


class _NotThere(Exception):
    """A part is missing or damaged."""


def _check(file: Path, asked: dict[str, Any]) -> None:
    """Refuse to go on with a run that asked something else: DataError naming the first difference."""
    try:
        before = json.loads(file.read_bytes())["asked"]
        differing = [name for name in (*asked, *before) if before.get(name) != asked.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not the manifest of a run; remove {file.parent}, or give another --output") from error
    if differing:
        name = differing[0]
        shown = f"{name} {_shown(before.get(name))}, not {_shown(asked.get(name))}"
        raise DataError(
            f"{file.parent}: holds the answers of another run ({shown}); ask the same, or give another --output"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _counts(totals: Totals) -> tuple[int, ...]:
    return (totals.rows, totals.errors, totals.tokens, totals.forwards)
