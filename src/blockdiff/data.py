"""Data: files of text, prompt/completion pairs or chats -> documents -> packed rows -> batches.

A document is token ids and, for each token, whether it is *given* (prompt: never masked, never scored). A text has one
given token, its first (the beginning token where the tokenizer adds one). A completion or an assistant's turn is
scored, everything else in its document is given. Every document ends with the model's end token, which is scored like
any other.

Files: .txt (one document), .jsonl, .parquet, each also with .gz where it is text, and directories written by
`datasets.Dataset.save_to_disk`. Rows: {"text"}, {"prompt", "completion"} or {"messages"}.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff.datafiles import BadRows, DataError, read_rows, reject
from blockdiff.rng import uniform

_CHUNK = 512
_ORDER = 9  # purpose of random numbers


@dataclass(frozen=True)
class Document:
    """ids int32 [n] and prompt bool [n] (True: given). `name` says where it came from; text_bytes: UTF-8 bytes of the
    scored text (None: unknown, as of a part of a text)."""

    ids: NDArray[np.int32]
    prompt: NDArray[np.bool_]
    name: str
    text_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def scored(self) -> int:
        """Tokens that a loss or a bound counts."""
        return int((~self.prompt).sum())

    def spans(self) -> list[tuple[int, int]]:
        """(tokens before it in the document, its length) of every run of scored tokens."""
        edges = np.flatnonzero(np.diff(self.prompt, prepend=True, append=True))
        return [(begin, end - begin) for begin, end in edges.reshape(-1, 2).tolist()]


@dataclass
class Corpus:
    """Documents, and what was left out on the way to them and to rows (`cut`, `left_out`: documents)."""

    documents: list[Document] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)
    cut: int = 0
    left_out: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(document) for document in self.documents)

    def summary(self) -> str:
        skipped = f"; skipped {len(self.bad_rows)} bad rows, first: {self.bad_rows[0]}" if self.bad_rows else ""
        cut = f"; {self.cut} longer than a row were cut" if self.cut else ""
        left_out = f"; {self.left_out} whose prompt fills a row were left out" if self.left_out else ""
        return f"{len(self.documents)} documents, {self.tokens} tokens{cut}{left_out}{skipped}"


@dataclass(frozen=True)
class Encoder:
    """Turns rows into documents: a tokenizer, the token that ends a document (None: none does) and all end ids."""

    tokenizer: PreTrainedTokenizerBase
    end_id: int | None
    end_ids: tuple[int, ...] = ()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many plain texts at once, for `document`."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        return ids

    def completion(self, prompt: str, completion: str, name: str) -> Document:
        """The prompt as decoding will read it, then the completion."""
        lead = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(prompt + completion)["input_ids"]
        if whole[: len(lead)] != lead:  # a token would straddle the boundary: keep the prompt's own tokens
            whole = lead + self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        return self.document(whole, len(lead), name, len(completion.encode()))

    def text(self, text: str, ids: list[int], name: str) -> Document:
        """A plain text, already tokenized: all but its first token is scored."""
        given = self._bytes_of(ids[0]) if ids else 0
        return self.document(ids, 1, name, len(text.encode()) - given)

    def _bytes_of(self, token: int) -> int:
        """UTF-8 bytes that a token stands for; none where it is special."""
        if token in self.tokenizer.all_special_ids:
            return 0
        text = self.tokenizer.decode([token])
        if "\ufffd" not in text:
            return len(text.encode())
        piece = self.tokenizer.convert_ids_to_tokens(token)  # a part of a character: byte-level, a sign for each byte
        return 1 if piece.startswith("<0x") else len(piece)

    def chat(self, messages: list[dict[str, Any]], name: str) -> Document:
        """A conversation through the tokenizer's chat template; the assistant's turns are scored."""
        if not self.tokenizer.chat_template:
            raise DataError(f"{name}: the tokenizer has no chat template; give rows with prompt and completion instead")
        whole = self._render(messages, name)
        turns = []  # places in the text at which an assistant's turn begins and ends
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], name, add_generation_prompt=True)
            through = self._render(messages[: turn + 1], name)
            if not (whole.startswith(before) and whole.startswith(through)):
                raise DataError(f"{name}: the chat template rewrites earlier turns; give each turn a row of its own")
            turns.append((len(before), len(through)))
        if not turns:
            raise DataError(f"{name}: no message has the role assistant, so there is nothing to learn or to score")
        ids, begins = self._chat_tokens(whole, [begin for begin, _ in turns])
        prompt = np.ones(len(ids), dtype=np.bool_)
        for begin, end in turns:
            for i in range(bisect_left(begins, begin), bisect_left(begins, end)):
                prompt[i] = False
                if ids[i] in self.end_ids:  # what the template puts after the turn's end is not the assistant's
                    break
        prompt[0] = True
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        size = sum(len(answer.encode()) for answer in answers)  # without what the template puts around them
        return Document(np.array(ids, dtype=np.int32), prompt, name, size)

    def _chat_tokens(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and where each begins. Where a token would straddle a cut, the text is tokenized in parts: decoding
        reads what stands before an answer as tokens of its own."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = encoded["offset_mapping"]
        if not any(begin < cut < end for cut in cuts for begin, end in places):
            return encoded["input_ids"], [begin for begin, _ in places]
        ids: list[int] = []
        begins: list[int] = []
        for start, stop in pairwise([0, *cuts, len(text)]):
            part = self.tokenizer(text[start:stop], add_special_tokens=False, return_offsets_mapping=True)
            ids += part["input_ids"]
            begins += [start + begin for begin, _ in part["offset_mapping"]]
        return ids, begins

    def _render(self, messages: list[dict[str, Any]], name: str, *, add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise DataError(f"{name}: the chat template refuses this conversation ({error})") from error
        assert isinstance(text, str)
        return text

    def document(self, ids: list[int], given: int, name: str, size: int | None = None) -> Document:
        """A document of these tokens, the first `given` (at least one) of them given, closed by the end token; size:
        bytes of its scored text."""
        if self.end_id is not None and (len(ids) < 2 or ids[-1] != self.end_id):
            ids = [*ids, self.end_id]
        prompt = np.zeros(len(ids), dtype=np.bool_)
        prompt[: max(given, 1)] = True
        if prompt.all():
            raise DataError(f"{name}: nothing is left to score after the first token; give a longer text")
        return Document(np.array(ids, dtype=np.int32), prompt, name, size)


def read_corpus(paths: str | Path | Sequence[str | Path], encoder: Encoder, bad_rows: BadRows = "error") -> Corpus:
    """All documents of the given files, in order.

    Raises DataError for a missing or empty file and, unless `bad_rows` is "skip", for the first unusable row.
    """
    corpus = Corpus()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        before = len(corpus.documents)
        rows = iter(read_rows(Path(path), bad_rows, corpus.bad_rows))
        while chunk := list(islice(rows, _CHUNK)):
            corpus.documents += _encode(chunk, encoder, bad_rows, corpus.bad_rows)
        if len(corpus.documents) == before:
            raise DataError(f"{path}: no documents in it; give a file with some text")
    return corpus


def cut(documents: Iterable[Document], length: int) -> tuple[list[Document], int]:
    """Documents of at most `length` tokens, and how many had to be changed.

    A longer text becomes several, each beginning with the last token of the one before as its given token, so every
    token is still scored once. A longer completion or chat is cut at its end; one whose prompt fills the length is left
    out.
    """
    out: list[Document] = []
    changed = 0
    for document in documents:
        if len(document) <= length:
            out.append(document)
            continue
        changed += 1
        if document.prompt.sum() > 1:
            short = Document(document.ids[:length], document.prompt[:length], document.name)
            out += [short] if short.scored else []
            continue
        for start in range(0, len(document) - 1, length - 1):
            ids = document.ids[start : start + length]
            prompt = np.zeros(len(ids), dtype=np.bool_)
            prompt[0] = True
            out.append(Document(ids, prompt, f"{document.name}+{start}"))
    return out, changed


def fill_end(document: Document, multiple: int, length: int, end_ids: Sequence[int]) -> Document:
    """The end token repeated, scored, until the last span is a multiple of `multiple` (or the document has `length`).

    Decoding opens a block without knowing where in it the text will end; a last block cut at the end would tell. A
    document that does not end with an end token (it was cut) stays as it is.
    """
    last = len(document) - int(np.argmin(document.prompt[::-1]))  # what a template puts after the last turn is dropped
    if document.ids[last - 1] not in end_ids:
        return document
    given = np.flatnonzero(document.prompt[:last])
    span = last - 1 - int(given[-1]) if len(given) else last
    more = max(min(-span % multiple, length - last), 0)
    return Document(
        np.concatenate([document.ids[:last], np.repeat(document.ids[last - 1 : last], more)]),
        np.concatenate([document.prompt[:last], np.zeros(more, dtype=np.bool_)]),
        document.name,
    )


def pack(documents: Sequence[Document], length: int) -> list[list[Document]]:
    """Documents put into rows of at most `length` tokens: best fit, longest first. No document is split."""
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    rows: list[list[Document]] = []
    for document in sorted(documents, key=len, reverse=True):
        at = bisect_left(open_rows, (len(document), -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(document)
        insort(open_rows, (room - len(document), row))
    return rows


class PackedRows(Dataset[list[Document]]):
    """Rows for a data loader; `collate` makes them a batch."""

    def __init__(self, rows: Sequence[list[Document]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Document]:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return sum(len(document) for row in self.rows for document in row)

    @property
    def scored(self) -> int:
        """Scored tokens in all rows."""
        return sum(document.scored for row in self.rows for document in row)

    def checksum(self) -> str:
        """Of all tokens, of which are given, and of their order."""
        found = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            for document in row:
                found.update(document.ids.tobytes())
                found.update(document.prompt.tobytes())
            found.update(len(row).to_bytes(4, "little"))
        return found.hexdigest()


class TrainingStream(Dataset[tuple[int, list[Document]]]):
    """The rows of a whole training, one after another: a new order of all rows for every pass through the data.

    Its item k is (k, row): which row that is depends on `seed` and k alone, so processes that share the stream, however
    many, read the same rows in the same steps. `collate_numbered` makes them a batch.
    """

    def __init__(self, rows: PackedRows, seed: int, length: int) -> None:
        self.rows, self.seed, self.length = rows, seed, length
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[int, list[Document]]:
        epoch, place = divmod(number, len(self.rows))
        if epoch != self._epoch:
            key = int(uniform(self.seed, epoch, _ORDER) * 2**53)
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=Generator().manual_seed(key))
        return number, self.rows[int(self._order[place])]


def collate_numbered(items: Sequence[tuple[int, Sequence[Document]]]) -> dict[str, Tensor]:
    """`collate` of a `TrainingStream`'s items, with their numbers: row int64 [B]."""
    return collate([row for _, row in items]) | {"row": torch.tensor([number for number, _ in items])}


def collate(rows: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
    """A batch of packed rows, padded at the end to the longest.

    input_ids [B, L]; doc [B, L] numbers the documents through the batch, -1 is padding; prompt [B, L] marks given
    tokens; labels [B, L] holds the scored tokens and -100 elsewhere, which is how the Trainer counts what it averages
    over.
    """
    width = max(sum(map(len, row)) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    doc = np.full((len(rows), width), -1, dtype=np.int64)
    prompt = np.zeros((len(rows), width), dtype=np.bool_)
    number = 0
    for r, row in enumerate(rows):
        at = 0
        for document in row:
            place = slice(at, at + len(document))
            ids[r, place], doc[r, place], prompt[r, place] = document.ids, number, document.prompt
            at += len(document)
            number += 1
    labels = np.where((doc >= 0) & ~prompt, ids, -100)
    arrays = {"input_ids": ids, "doc": doc, "prompt": prompt, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _encode(
    rows: Sequence[tuple[str, dict[str, Any]]], encoder: Encoder, on_bad: BadRows, bad: list[str]
) -> list[Document]:
    """Documents of some rows, in order; plain texts are tokenized together."""
    encoded = iter(encoder.tokenize([row["text"] for _, row in rows if _is_text(row)]))
    documents = []
    for name, row in rows:
        try:
            if _is_text(row):
                documents.append(encoder.text(row["text"], next(encoded), name))
            elif isinstance(row.get("messages"), list) and all(is_message(m) for m in row["messages"]):
                documents.append(encoder.chat(row["messages"], name))
            elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and row["completion"]:
                documents.append(encoder.completion(row["prompt"], row["completion"], name))
            else:
                raise DataError(
                    f"{name}: has {', '.join(map(repr, row)) or 'no keys'}; a row needs a non-empty 'text', "
                    "'prompt' and 'completion', or 'messages' with role and content"
                )
        except DataError as error:
            reject(str(error), on_bad, bad)
    return documents


def _is_text(row: dict[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and bool(row["text"].strip())


def is_message(message: Any) -> bool:
    """Whether this is a turn of a conversation: an object with the texts role and content."""
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
