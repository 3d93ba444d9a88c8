"""Layouts: which tokens of a document are given, and how the others fall into blocks.

A *layout* is a prompt (given tokens) and the lengths of the blocks that follow it. A *token map* is the same for a
batch of rows, token by token: every mask, loss and cache rule of blockdiff reads it, so blocks may have any lengths,
rows may hold several documents, and a document may hold several prompts (the turns of a chat).

    prompt 3 | 4 4 2     p p p [ . . . . ] [ . . . . ] [ . . ]

Shapes: B rows, T tokens of a row, S spans (maximal runs of tokens that are not given, within one document).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The partition of one document: `prompt` given tokens, then blocks of the given lengths.

    Raises ValueError for a negative prompt or a block shorter than one token.
    """

    prompt: int
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.prompt < 0:
            raise ValueError(f"layout: the prompt has {self.prompt} tokens; give 0 or more")
        if any(size < 1 for size in self.blocks):
            raise ValueError(f"layout: block lengths {self.blocks} must all be at least 1")

    @property
    def length(self) -> int:
        """Tokens of the document."""
        return self.prompt + sum(self.blocks)

    def __str__(self) -> str:
        return f"prompt {self.prompt} | {' '.join(map(str, self.blocks))}"


@dataclass(frozen=True)
class TokenMap:
    """What each token of a batch is, as tensors [B, T].

    doc       document of the token (int64); -1 is padding. Tokens of different documents never see each other.
    position  place in its document, from 0 (int64)
    block     block of the token, numbered along the row (int64); a prompt token is a block of its own, so a prompt is
              read causally whatever the clean context
    start     position of the first token of its block (int64)
    prompt    True for given tokens: they are never masked and never scored
    noisy     True in the noisy stream, False in the clean stream
    """

    doc: Tensor
    position: Tensor
    block: Tensor
    start: Tensor
    prompt: Tensor
    noisy: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.doc.shape

    @property
    def scored(self) -> Tensor:
        """Tokens that a bound or a loss counts: in a document and not given."""
        return (self.doc >= 0) & ~self.prompt

    @property
    def is_block_start(self) -> Tensor:
        return self.position == self.start

    def map(self, function: object) -> TokenMap:
        """The token map with `function` applied to each of its tensors."""
        assert callable(function)
        return TokenMap(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def __getitem__(self, index: object) -> TokenMap:
        return self.map(lambda tensor: tensor[index])

    def take(self, source: Tensor) -> TokenMap:
        """Tokens `source` [B, N] of each row, in that order."""
        return self.map(lambda tensor: tensor.gather(1, source))

    def to(self, device: torch.device | str) -> TokenMap:
        return self.map(lambda tensor: tensor.to(device))

    def as_noisy(self) -> TokenMap:
        return replace(self, noisy=torch.ones_like(self.noisy))

    @staticmethod
    def cat(*maps: TokenMap) -> TokenMap:
        """The maps side by side, along the token dimension."""
        return TokenMap(**{f.name: torch.cat([getattr(part, f.name) for part in maps], 1) for f in fields(TokenMap)})

    @staticmethod
    def build(doc: Tensor, prompt: Tensor, starts: Tensor) -> TokenMap:
        """The clean-stream map of a batch.

        doc [B, T] document of each token (-1 for padding), prompt [B, T] True for given tokens, starts [B, T] True
        where a block begins. The first scored token of a span begins a block whether `starts` says so or not.
        """
        index = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
        doc_start = torch.ones_like(prompt)
        doc_start[:, 1:] = doc[:, 1:] != doc[:, :-1]
        after_prompt = torch.zeros_like(prompt)
        after_prompt[:, 1:] = prompt[:, :-1]
        block_start = starts | prompt | doc_start | after_prompt | (doc < 0)
        document_origin = _last_true(doc_start, index)
        return TokenMap(
            doc=doc,
            position=index - document_origin,
            block=block_start.cumsum(1) - 1,
            start=_last_true(block_start, index) - document_origin,
            prompt=prompt,
            noisy=torch.zeros_like(prompt),
        )

    @staticmethod
    def from_layouts(rows: Sequence[Sequence[Layout]]) -> TokenMap:
        """The map of explicitly given layouts: each row is a list of documents packed one after another.

        Documents are numbered through the batch; short rows are padded at the end.
        """
        width = max(sum(layout.length for layout in row) for row in rows)
        doc = torch.full((len(rows), width), -1, dtype=torch.int64)
        prompt = torch.zeros((len(rows), width), dtype=torch.bool)
        starts = torch.zeros((len(rows), width), dtype=torch.bool)
        number = 0
        for r, row in enumerate(rows):
            at = 0
            for layout in row:
                doc[r, at : at + layout.length] = number
                prompt[r, at : at + layout.prompt] = True
                at += layout.prompt
                for size in layout.blocks:
                    starts[r, at] = True
                    at += size
                number += 1
        return TokenMap.build(doc, prompt, starts)

    def layouts(self) -> list[list[Layout]]:
        """Back to explicit layouts, row by row (for printing; documents with a single leading prompt only)."""
        rows = []
        for r in range(self.shape[0]):
            row = []
            for number in self.doc[r][self.doc[r] >= 0].unique_consecutive().tolist():
                mine = self.doc[r] == number
                scored = ~self.prompt[r][mine]
                sizes = self.block[r][mine][scored].unique_consecutive(return_counts=True)[1]
                row.append(Layout(int((~scored).sum()), tuple(sizes.tolist())))
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Spans:
    """The maximal runs of scored tokens of a batch: what a layout distribution partitions into blocks.

    span [B, T] number of the token's span (-1 outside), offset [B, T] place in its span, lengths [S].
    """

    span: Tensor
    offset: Tensor
    lengths: Tensor

    @staticmethod
    def of(doc: Tensor, prompt: Tensor) -> Spans:
        scored = (doc >= 0) & ~prompt
        index = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
        begins = scored.clone()
        begins[:, 1:] &= ~(scored[:, :-1] & (doc[:, 1:] == doc[:, :-1]))
        number = (begins.flatten().cumsum(0) - 1).view_as(doc)
        span = torch.where(scored, number, -1)
        offset = index - _last_true(begins, index)
        return Spans(span, offset, torch.bincount(span[scored], minlength=int(begins.sum())))

    def place(self, starts: Tensor) -> Tensor:
        """Block starts given for each span, starts [S, max length], put in their places in the rows, [B, T]."""
        inside = self.span >= 0
        out = torch.zeros_like(inside)
        out[inside] = starts[self.span[inside], self.offset[inside]]
        return out


def _last_true(flags: Tensor, index: Tensor) -> Tensor:
    """Index of the last True at or before each place; 0 where there is none."""
    return torch.where(flags, index, 0).cummax(1).values
