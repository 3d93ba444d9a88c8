"""What is scored at once: documents up to a length, longer ones in windows that overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blockdiff.data import Document
from blockdiff.model import BlockDiffusionModel


@dataclass(frozen=True)
class Window:
    """A document, or a window of one: `origin` is the document's position of its first token, `head` the offset of its
    first block."""

    document: Document
    index: int
    origin: int
    head: int


def windows(documents: Sequence[Document], size: int, offset: int, length: int) -> Iterator[Window]:
    """Documents of at most `length` tokens whole; longer ones in windows that advance by about half, every token scored
    once."""
    for index, document in enumerate(documents):
        if len(document) <= length:
            yield Window(document, index, 0, offset)
            continue
        given = int(np.argmin(document.prompt))  # where the first scored token stands
        advance = max(length // 2 // size, 1)  # blocks of a window that are scored
        begin, head = given, offset
        while begin < len(document):
            blocks = advance
            if begin == given:  # the first window fills up, with at least one token of context
                blocks = min(max((length - given - head) // size, advance), (length - 1 - head) // size)
            end = min(begin + head + blocks * size, len(document))
            origin = max(0, end - length)
            prompt = document.prompt[origin:end].copy()
            prompt[: begin - origin] = True
            if not prompt.all():
                yield Window(Document(document.ids[origin:end], prompt, document.name), index, origin, head)
            begin, head = end, 0


def window_length(model: BlockDiffusionModel) -> int:
    """Tokens that the model sees at once when it is scored: what it was trained on, as far as it can address them."""
    return min(model.spec.trained_length or model.context_length, model.context_length)


def batches(pieces: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Pieces of similar length together, at most `batch_tokens` of two-stream input in a batch."""
    batch: list[Window] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.document)):
        if batch and 2 * len(piece.document) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def room(model: BlockDiffusionModel) -> int:
    """Two-stream tokens of a pass: their logits stay below a quarter of a billion numbers."""
    return min(8192, 2**28 // model.vocabulary)
