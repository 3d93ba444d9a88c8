"""Data: files of text, prompt/completion pairs or chats -> documents -> packed rows -> batches.

A document is token ids and, for each token, whether it is *given* (prompt: never masked, never scored). A text has one
given token, its first (the beginning token where the tokenizer adds one). A completion or an assistant's turn is
scored, everything else in its document is given. Every document ends with the model's end token, which is scored like
any other.

Files: .txt (one document), .jsonl, .parquet, each also with .gz where it is text, and directories written by
`datasets.Dataset.save_to_disk`. Rows: {"text"}, {"prompt", "completion"} or {"messages"}.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

BadRows = Literal["error", "skip"]
_CHUNK = 512


class DataError(ValueError):
    """Input that cannot be used, named by file and line, with what to do."""


@dataclass(frozen=True)
class Document:
    """ids int32 [n] and prompt bool [n] (True: given). `name` says where it came from."""

    ids: NDArray[np.int32]
    prompt: NDArray[np.bool_]
    name: str

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
    """Documents, and what was left out on the way to them."""

    documents: list[Document] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(document) for document in self.documents)

    def summary(self) -> str:
        skipped = f"; skipped {len(self.bad_rows)} bad rows, first: {self.bad_rows[0]}" if self.bad_rows else ""
        return f"{len(self.documents)} documents, {self.tokens} tokens{skipped}"


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
        return self.document(whole, len(lead), name)

    def chat(self, messages: list[dict[str, Any]], name: str) -> Document:
        """A conversation through the tokenizer's chat template; the assistant's turns are scored."""
        if not self.tokenizer.chat_template:
            raise DataError(f"{name}: the tokenizer has no chat template; give rows with prompt and completion instead")
        whole = self._render(messages)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, begins = encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]
        prompt = np.ones(len(ids), dtype=np.bool_)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], add_generation_prompt=True)
            through = self._render(messages[: turn + 1])
            if not (whole.startswith(before) and whole.startswith(through)):
                raise DataError(f"{name}: the chat template rewrites earlier turns; give each turn a row of its own")
            turn_tokens = range(bisect_left(begins, len(before)), bisect_left(begins, len(through)))
            for i in turn_tokens:
                prompt[i] = False
                if ids[i] in self.end_ids:  # what the template puts after the turn's end is not the assistant's
                    break
        if prompt.all():
            raise DataError(f"{name}: no message has the role assistant, so there is nothing to learn or to score")
        prompt[0] = True
        return Document(np.array(ids, dtype=np.int32), prompt, name)

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    def document(self, ids: list[int], given: int, name: str) -> Document:
        """A document of these tokens, the first `given` (at least one) of them given, closed by the end token."""
        if self.end_id is not None and (len(ids) < 2 or ids[-1] != self.end_id):
            ids = [*ids, self.end_id]
        prompt = np.zeros(len(ids), dtype=np.bool_)
        prompt[: max(given, 1)] = True
        if prompt.all():
            raise DataError(f"{name}: nothing is left to score after the first token; give a longer text")
        return Document(np.array(ids, dtype=np.int32), prompt, name)


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


def read_rows(
    path: Path, on_bad: BadRows = "error", bad: list[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, row) of every row of a file; the name says file and line."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    suffix = "".join(s for s in path.suffixes[-2:] if s in (".txt", ".jsonl", ".json", ".parquet", ".gz"))
    if path.is_dir():
        yield from _rows_on_disk(path)
    elif suffix in (".txt", ".txt.gz"):
        yield from _text_file(path)
    elif suffix in (".jsonl", ".jsonl.gz"):
        yield from _json_lines(path, on_bad, bad if bad is not None else [])
    elif suffix == ".parquet":
        import pyarrow.parquet

        rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
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


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _text_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        try:
            text = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if text.strip():
        yield str(path), {"text": text}


def _json_lines(path: Path, on_bad: BadRows, bad: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):  # of bytes: only a newline ends a row, never a U+2028 in its text
            if not line.strip():
                continue
            name = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                _reject(f"{name}: not JSON ({error.msg} at column {error.colno})", on_bad, bad)
                continue
            except UnicodeDecodeError as error:
                _reject(f"{name}: not UTF-8 (byte {error.start} of the line)", on_bad, bad)
                continue
            if isinstance(row, dict):
                yield name, row
            else:
                _reject(f"{name}: a row must be an object, this is {type(row).__name__}", on_bad, bad)


def _rows_on_disk(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: not a directory written by datasets' save_to_disk") from error
    if isinstance(data, datasets.DatasetDict):
        raise DataError(f"{path}: holds the splits {', '.join(data)}; give the directory of one of them")
    yield from ((f"{path}:{number}", row) for number, row in enumerate(data, 1))


def _encode(
    rows: Sequence[tuple[str, dict[str, Any]]], encoder: Encoder, on_bad: BadRows, bad: list[str]
) -> list[Document]:
    """Documents of some rows, in order; plain texts are tokenized together."""
    encoded = iter(encoder.tokenize([row["text"] for _, row in rows if _is_text(row)]))
    documents = []
    for name, row in rows:
        try:
            if _is_text(row):
                documents.append(encoder.document(next(encoded), 1, name))
            elif isinstance(row.get("messages"), list) and all(_is_message(m) for m in row["messages"]):
                documents.append(encoder.chat(row["messages"], name))
            elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and row["completion"]:
                documents.append(encoder.completion(row["prompt"], row["completion"], name))
            else:
                raise DataError(
                    f"{name}: has {', '.join(map(repr, row)) or 'no keys'}; a row needs a non-empty 'text', "
                    "'prompt' and 'completion', or 'messages' with role and content"
                )
        except DataError as error:
            _reject(str(error), on_bad, bad)
    return documents


def _is_text(row: dict[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and bool(row["text"].strip())


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _reject(problem: str, on_bad: BadRows, bad: list[str]) -> None:
    if on_bad == "error":
        raise DataError(
            f"{problem}; mend the row, or leave such rows out (data.bad_rows: skip in a config, --skip-bad-rows here)"
        )
    bad.append(problem)
