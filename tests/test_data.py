"""Data: every kind of file and row, bad input named, packing without cross-talk."""

from __future__ import annotations

import gzip
import json

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from blockdiff.data import Document, Encoder, collate, cut, pack, read_corpus
from blockdiff.datafiles import DataError
from blockdiff.tokenizer import BEGIN, END, train_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = train_tokenizer(["hello world, hello there. what is 2+2? it is 4."] * 3, 280)
    tokenizer.chat_template = CHAT
    return Encoder(tokenizer, tokenizer.eos_token_id, (tokenizer.eos_token_id,))


def text_of(encoder: Encoder, document: Document, scored: bool) -> str:
    return encoder.tokenizer.decode(document.ids[document.prompt != scored])


def test_a_text_is_begin_text_end(encoder, tmp_path):
    (tmp_path / "a.txt").write_text("hello world\nhello there")
    corpus = read_corpus(tmp_path / "a.txt", encoder)
    (document,) = corpus.documents
    assert encoder.tokenizer.decode(document.ids) == f"{BEGIN}hello world\nhello there{END}"
    assert document.prompt.tolist() == [True] + [False] * (len(document) - 1)
    assert document.scored == len(document) - 1


def test_every_kind_of_file_gives_the_same_documents(encoder, tmp_path):
    rows = [{"text": "hello world"}, {"text": "what is 2+2?\u2028it is 4."}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    expected = [document.ids.tolist() for document in read_corpus(tmp_path / "a.jsonl", encoder).documents]
    assert len(expected) == 2
    for name in ("b.jsonl.gz", "c.parquet", "d"):
        assert [document.ids.tolist() for document in read_corpus(tmp_path / name, encoder).documents] == expected
    both = read_corpus([tmp_path / "a.jsonl", tmp_path / "d"], encoder)
    assert len(both.documents) == 4


def test_a_completion_is_scored_and_its_prompt_is_given(encoder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "what is 2+2?", "completion": " it is 4."}))
    (document,) = read_corpus(tmp_path / "a.jsonl", encoder).documents
    assert text_of(encoder, document, scored=False) == f"{BEGIN}what is 2+2?"
    assert text_of(encoder, document, scored=True) == f" it is 4.{END}"
    lead = encoder.tokenizer("what is 2+2?")["input_ids"]
    assert document.ids[document.prompt].tolist() == lead  # exactly what decoding will read


def test_a_token_across_the_boundary_keeps_the_prompts_own_tokens(encoder):
    """'hel' + 'lo world' would merge into one token; decoding sees the prompt alone, so training does too."""
    document = encoder.completion("hel", "lo world", "x")
    assert document.ids[document.prompt].tolist() == encoder.tokenizer("hel")["input_ids"]
    assert text_of(encoder, document, scored=True) == f"lo world{END}"
    assert encoder.tokenizer("hello world")["input_ids"][:2] != encoder.tokenizer("hel")["input_ids"][:2]


def test_the_assistants_turns_are_scored(encoder, tmp_path):
    messages = [
        {"role": "user", "content": "what is 2+2?"},
        {"role": "assistant", "content": "it is 4."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello there."},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    (document,) = read_corpus(tmp_path / "a.jsonl", encoder).documents
    assert text_of(encoder, document, scored=True) == f"it is 4.{END}hello there.{END}"
    assert "<|assistant|>" in text_of(encoder, document, scored=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.jsonl: no documents in it"),
        ("\n\n", r"a\.jsonl: no documents in it"),
        ('{"text": "ok"}\n{"text": oops}\n', r"a\.jsonl:2: not JSON \(Expecting value at column 10\)"),
        ('{"text": "ok"}\n[1, 2]\n', r"a\.jsonl:2: a row must be an object, this is list"),
        ('{"txet": "ok"}\n', r"a\.jsonl:1: has 'txet'; a row needs a non-empty 'text'"),
        ('{"text": "  "}\n', r"a\.jsonl:1: has 'text'; a row needs a non-empty 'text'"),
        ('{"text": 3}\n', r"a\.jsonl:1: has 'text'"),
        ('{"prompt": "a", "completion": ""}\n', r"a\.jsonl:1: has 'prompt', 'completion'"),
        ('{"messages": [{"role": "user", "content": "hi"}]}\n', r"a\.jsonl:1: no message has the role assistant"),
        ('{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: has 'messages'"),
    ],
)
def test_bad_rows_are_named_and_can_be_skipped(encoder, tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_corpus(path, encoder)
    if content.strip():
        path.write_text(content + '{"text": "hello"}\n')
        corpus = read_corpus(path, encoder, "skip")
        assert corpus.documents
        assert len(corpus.bad_rows) == 1
        assert "a.jsonl:" in corpus.summary()


def test_other_bad_files_are_named(encoder, tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt: no such file"):
        read_corpus(tmp_path / "missing.txt", encoder)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file; give \.txt"):
        read_corpus(tmp_path / "a.csv", encoder)
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 text \(byte 3\)"):
        read_corpus(tmp_path / "b.txt", encoder)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:1: not UTF-8"):
        read_corpus(tmp_path / "c.jsonl", encoder)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="not a directory written by datasets"):
        read_corpus(tmp_path / "folder", encoder)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="holds the splits train; give the directory of one"):
        read_corpus(tmp_path / "splits", encoder)


def test_chats_need_a_template(tmp_path):
    plain = train_tokenizer(["hello"], 258)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}))
    with pytest.raises(DataError, match="the tokenizer has no chat template; give rows with prompt and completion"):
        read_corpus(tmp_path / "a.jsonl", Encoder(plain, plain.eos_token_id))


def document(length: int, given: int = 1) -> Document:
    return Document(np.arange(100, 100 + length, dtype=np.int32), np.arange(length) < given, f"d{length}")


@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_cutting_and_packing_keep_every_scored_token_once(lengths, room):
    documents = [document(length) for length in lengths]
    pieces, changed = cut(documents, room)
    assert changed == sum(length > room for length in lengths)
    assert sum(piece.scored for piece in pieces) == sum(d.scored for d in documents)
    assert all(len(piece) <= room for piece in pieces)
    rows = pack(pieces, room)
    assert sorted(id(d) for row in rows for d in row) == sorted(map(id, pieces))
    assert all(sum(map(len, row)) <= room for row in rows)
    if len(rows) > 1:  # best fit: no two rows could be joined
        filled = sorted(sum(map(len, row)) for row in rows)
        assert filled[0] + filled[1] > room


def test_long_completions_are_cut_at_their_end_and_endless_prompts_left_out():
    pieces, changed = cut([document(30, given=5), document(30, given=25)], 20)
    assert changed == 2
    (piece,) = pieces
    assert (len(piece), piece.scored) == (20, 15)


def test_batches_number_their_documents_and_mark_what_counts():
    batch = collate([[document(3), document(4, given=2)], [document(5)]])
    assert batch["doc"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, -1, -1]]
    assert batch["prompt"].int().tolist() == [[1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert (batch["labels"] != -100).sum() == 2 + 2 + 4
    assert batch["input_ids"][0, 3] == 100


def test_trained_tokenizers_are_lossless_and_of_the_asked_size():
    tokenizer = train_tokenizer(["some text, mostly harmless"] * 5, 290)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) <= 290
    for text in ("héllo\n\t 🙂", " leading", "日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="vocabulary of 100 tokens is too small; give at least 258"):
        train_tokenizer(["x"], 100)
