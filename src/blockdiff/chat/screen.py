"""How a conversation looks: answers to standard output, all else to standard error.

On a terminal the answer appears live: rows that cannot change any more are printed for good, and only the row that is
still being written, with the open block behind it, is drawn anew; so answers of any length scroll like other text.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text as RichText

from blockdiff.chat.interrupts import undisturbed
from blockdiff.chat.printable import printable

MASK = "░"
_PAUSE = 0.04  # seconds between two drawings


class Drawing(AbstractContextManager["Drawing"], Protocol):
    """An answer while it is written."""

    def text(self, piece: str) -> None:
        """Final text."""

    def draft(self, tokens: tuple[str | None, ...]) -> None:
        """The open block as it stands."""


class Screen:
    """out: for answers; err: for the rest."""

    def __init__(self, out: Console, err: Console) -> None:
        self.out, self.err = out, err

    @property
    def live(self) -> bool:
        return self.out.is_terminal and not self.out.is_dumb_terminal

    def answer(self) -> Drawing:
        return LiveDrawing(self.out) if self.live else PlainDrawing(self.out)

    def say(self, line: str, style: str = "dim") -> None:
        self.err.print(RichText(printable(line), style=style))


class PlainDrawing:
    """Final text as it comes, and a newline at its end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = False

    def __enter__(self) -> PlainDrawing:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._begun or failed is None:
            self.text("\n")

    def text(self, piece: str) -> None:
        self._begun = True
        self._console.file.write(printable(piece))
        self._console.file.flush()

    def draft(self, tokens: tuple[str | None, ...]) -> None:
        pass


class LiveDrawing:
    """The row being written and the open block, dimmed, drawn anew below the rows that are settled."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._row = ""
        self._draft: tuple[str | None, ...] = ()
        self._drawn = 0.0

    def __enter__(self) -> LiveDrawing:
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            self._live.stop()
            if self._row:
                self._console.print(RichText(self._row))

    def text(self, piece: str) -> None:
        with undisturbed():
            self._draft = ()
            self._row += printable(piece).replace("\t", "    ")
            settled = []
            while (end := row_end(self._row, self._console.width)) is not None:
                settled.append(self._row[:end].rstrip())
                self._row = self._row[end:]
            if settled:
                self._live.start()
                self._live.update(self._shown())
                self._console.print(RichText("\n".join(settled)))  # draws what is live anew below itself
            else:
                self._refresh()

    def draft(self, tokens: tuple[str | None, ...]) -> None:
        self._draft = tokens
        self._refresh()

    def _refresh(self) -> None:
        if time.perf_counter() - self._drawn >= _PAUSE:
            with undisturbed():
                self._live.start()
                self._live.update(self._shown(), refresh=True)
            self._drawn = time.perf_counter()

    def _shown(self) -> RichText:
        shown = RichText(self._row)
        return shown.append("".join(MASK if token is None else _inside(token) for token in self._draft), style="dim")


def row_end(text: str, width: int) -> int | None:
    """Where the first row of a text ends for good: behind its newline, or where it must be wrapped; None if it may go
    on. Rows are broken behind blanks, words that are too long for a row anywhere."""
    cells, blank = 0, 0
    for at, character in enumerate(text):
        if character == "\n":
            return at + 1
        cells += cell_len(character)
        if character == " ":
            blank = at + 1
        elif cells > width:
            return blank or max(at, 1)
    return None


def _inside(token: str) -> str:
    """A token of a draft, in one row."""
    return printable(token).replace("\n", "⏎").replace("\t", " ")
