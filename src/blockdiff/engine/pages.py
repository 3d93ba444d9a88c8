"""Paged keys and values: append-only memory of clean tokens, shared between requests that begin alike.

A *page* holds the keys and values of `size` successive tokens of one text, in every layer. A `Table` lists the pages of
one text; slot i of a text is its token at position i. Pages that are full (and the last, partly filled one of a text
that ended) are filed under the tokens they hold and those before them, so that a later text that begins alike takes
them over: whole pages are shared and counted, the part of a page that agrees is copied. Filed pages that nobody uses
are kept until memory is needed, the longest unused first.

What is behind a text's written tokens on its own pages is *scratch*: an open block's keys and values lie there during
its passes, in reach of one view together with the context, and are never filed, shared or counted.

Pages are handed out side by side where possible: a text whose pages lie in a row is read through a view, without a
copy; any other is gathered. Where pages lie is a question of speed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

Mark = int | tuple[int, tuple[int, ...]]  # what a slot is filed under: its token (and the whole block of it)
_ROOT = -1


class OutOfPages(Exception):
    """No page is free; somebody must wait or be preempted."""


@dataclass
class Table:
    """The pages of one text. written: slots whose keys and values are final; filed: how many pages were offered for
    sharing, the last of them as the filed page `node`; held: filed pages of other texts that stand for own ones."""

    pages: list[int] = field(default_factory=list)
    written: int = 0
    filed: int = 0
    node: int = _ROOT
    held: list[int] = field(default_factory=list)
    run: bool = True  # the pages lie in a row

    @property
    def base(self) -> int:
        return self.pages[0]


@dataclass
class _Filed:
    parent: int
    marks: tuple[Mark, ...]
    children: set[int] = field(default_factory=set)
    used: int = 0


class Pages:
    """Memory of `count` pages of `size` tokens. Tensors are made at the first write, when shapes are known."""

    def __init__(self, count: int, size: int = 16) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"pages: {count} pages of {size} tokens hold nothing; give 1 or more of both")
        self.count, self.size = count, size
        self.references = [0] * count
        self._free = [True] * count
        self.free = count
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._filed: dict[int, _Filed] = {}
        self._roots: set[int] = set()
        self._whole: dict[tuple[int, tuple[Mark, ...]], int] = {}
        self._clock = 0

    # ---- tensors

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [T, G, D] into the memory's slots [T]; returns the layer's memory [slots, G, D]."""
        if layer not in self.keys:
            shape = (self.count * self.size, *key.shape[1:])
            # zeros, since what a mask hides is still multiplied, and 0 times a chance NaN would be NaN
            self.keys[layer] = torch.zeros(shape, dtype=key.dtype, device=key.device)
            self.values[layer] = torch.zeros((*shape[:2], value.shape[2]), dtype=value.dtype, device=value.device)
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values

    def slots(self, table: Table, first: int, count: int) -> list[int]:
        """Where slots first .. first + count of a text lie in the memory."""
        if table.run:
            start = table.base * self.size + first
            return list(range(start, start + count))
        return [table.pages[at // self.size] * self.size + at % self.size for at in range(first, first + count)]

    def _copy(self, source: int, target: int, count: int) -> None:
        for memory in (*self.keys.values(), *self.values.values()):
            start, end = source * self.size, target * self.size
            memory[end : end + count] = memory[start : start + count]

    # ---- counting

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and filed ones that nobody uses."""
        return self.free + sum(self.references[page] == 0 for page in self._filed)

    @property
    def in_use(self) -> int:
        """Pages that texts hold."""
        return sum(count > 0 for count in self.references)

    def reserve(self, table: Table, slots: int, *, packed: bool = False) -> None:
        """Give a text pages for so many slots in all. Raises OutOfPages, and changes nothing, where there are none.

        packed: it will not grow beyond them, so that the next text may lie right behind."""
        wanted = -(-slots // self.size) - len(table.pages)
        if wanted > 0 and wanted > self.free and wanted > self.available:
            raise OutOfPages
        if packed and wanted > 0 and (start := self._hole(wanted)) is not None:
            table.run = table.run and (not table.pages or start == table.pages[-1] + 1)
            table.pages.append(self._take(start))
            wanted -= 1
        for _ in range(wanted):
            page = self._take(table.pages[-1] + 1 if table.pages else None)
            table.run = table.run and (not table.pages or page == table.pages[-1] + 1)
            table.pages.append(page)

    def fork(self, table: Table, slots: int) -> Table:
        """Another text with the same beginning and pages for so many slots: whole written pages are shared, a partly
        written one is copied."""
        whole, rest = divmod(table.written, self.size)
        copy = Table(table.pages[:whole], table.written, table.filed, table.node, list(table.held), table.run)
        for page in (*copy.pages, *copy.held):
            self.references[page] += 1
        try:
            self.reserve(copy, slots)
        except OutOfPages:
            self.release(copy)
            raise
        if rest:
            self._copy(table.pages[whole], copy.pages[whole], rest)
        return copy

    def release(self, table: Table) -> None:
        """Give a text's pages back; filed ones stay for others."""
        for page in (*table.pages, *table.held):
            self.references[page] -= 1
            if self.references[page] == 0 and page not in self._filed:
                self._free[page] = True
                self.free += 1
        table.pages, table.held, table.written, table.filed, table.node, table.run = [], [], 0, 0, _ROOT, True

    def _take(self, wanted: int | None) -> int:
        if self.free == 0:
            self._evict()
        if wanted is None or wanted >= self.count or not self._free[wanted]:
            wanted = self._roomiest()
        self._free[wanted] = False
        self.free -= 1
        self.references[wanted] = 1
        return wanted

    def _roomiest(self) -> int:
        """A free page with many free ones behind it: in the middle of the largest hole, so that what ends at its
        beginning can grow on, too; at its beginning where no text does."""
        best, length, start = -1, 0, None
        for page in range(self.count + 1):
            if page < self.count and self._free[page]:
                start = page if start is None else start
            elif start is not None:
                if page - start > length:
                    best, length = start, page - start
                start = None
        return best if best == 0 else best + length // 2

    def _hole(self, wanted: int) -> int | None:
        """The first page of the first hole of so many; None where there is none."""
        length = 0
        for page, free in enumerate(self._free):
            length = length + 1 if free else 0
            if length == wanted:
                return page - wanted + 1
        return None

    def _evict(self) -> None:
        """Forget the filed page that was unused for longest."""
        page = min(
            (page for page, filed in self._filed.items() if self.references[page] == 0 and not filed.children),
            key=lambda page: self._filed[page].used,
        )
        filed = self._filed.pop(page)
        self._children(filed.parent).discard(page)
        if self._whole.get((filed.parent, filed.marks)) == page:
            del self._whole[filed.parent, filed.marks]
        self._free[page] = True
        self.free += 1

    def _children(self, node: int) -> set[int]:
        return self._roots if node == _ROOT else self._filed[node].children

    # ---- sharing

    def file(self, table: Table, marks: Sequence[Mark], *, ended: bool = False) -> None:
        """Offer a text's written pages to others: the full ones, and, of a text that ended, the last one as well."""
        self._clock += 1
        while table.filed < len(table.pages):
            first = table.filed * self.size
            held = tuple(marks[first : min(first + self.size, table.written)])
            if not held or (len(held) < self.size and not ended):
                return
            page = table.pages[table.filed]
            known = self._whole.get((table.node, held))
            if known is None:
                self._filed[page] = _Filed(table.node, held)
                self._children(table.node).add(page)
                self._whole[table.node, held] = known = page
            elif known != page:  # what is filed under it must not outlive it
                self.references[known] += 1
                table.held.append(known)
            self._filed[known].used = self._clock
            table.node = known
            table.filed += 1

    def matched(self, marks: Sequence[Mark]) -> int:
        """How many of a text's first tokens are filed already."""
        pages, _, count = self._match(marks)
        return len(pages) * self.size + count

    def adopt(self, table: Table, marks: Sequence[Mark]) -> int:
        """Begin an empty table with what is filed of these tokens; returns how many slots that fills.

        The last, partly agreeing page is copied, which takes a page of its own, if there is one.
        """
        pages, partial, count = self._match(marks)
        self._clock += 1
        for page in pages:
            self.references[page] += 1
            self._filed[page].used = self._clock
        table.pages = list(pages)
        table.run = all(b == a + 1 for a, b in pairwise(pages))
        table.filed, table.node = len(pages), pages[-1] if pages else _ROOT
        table.written = len(pages) * self.size
        if count and partial is not None:
            self.references[partial] += 1  # or making room could forget it
            try:
                self.reserve(table, table.written + count)
                self._copy(partial, table.pages[-1], count)
                table.written += count
                self._filed[partial].used = self._clock
            except OutOfPages:
                pass
            self.references[partial] -= 1
        return table.written

    def _match(self, marks: Sequence[Mark]) -> tuple[list[int], int | None, int]:
        """Filed pages that hold the first tokens, and the page that holds most of those after them."""
        node = _ROOT
        pages: list[int] = []
        while True:
            first = len(pages) * self.size
            page = self._whole.get((node, tuple(marks[first : first + self.size])))
            if page is None or len(self._filed[page].marks) < self.size:
                break
            pages.append(page)
            node = page
        rest = marks[len(pages) * self.size : (len(pages) + 1) * self.size]
        best, count = None, 0
        for child in self._children(node):
            common = 0
            for ours, theirs in zip(rest, self._filed[child].marks, strict=False):
                if ours != theirs:
                    break
                common += 1
            if common > count:
                best, count = child, common
        return pages, best, count
