"""Sampled documents: what the file says is what the model says, whatever the batch."""

from __future__ import annotations

import gzip
import json

import pytest
from conftest import tiny_config
from test_cli import run

import blockdiff
from blockdiff.config import make_config
from blockdiff.sample import sample_documents
from blockdiff.training import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model over bytes that has learned to write short words and to end; some words hold a merged token."""
    folder = tmp_path_factory.mktemp("writer")
    tree = tiny_config(
        folder,
        model={"vocabulary": 270},
        train={"steps": 120, "rows": 4},
        eval={"block_sizes": []},
        objective={"ar_weight": 1.0},
    )
    words = ["".join("abcd"[(i * k + j) % 4] for j in range(3 + i % 9)) for i in range(40) for k in (1, 3)]
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    return train(make_config(tree)).path


def rows_of(file):
    read = gzip.open if file.suffix == ".gz" else open
    with read(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_the_stored_nll_is_what_the_bound_measures(trained, tmp_path, capsys):
    file, result, bound = tmp_path / "s.jsonl.gz", tmp_path / "s.json", tmp_path / "bound.json"
    options = ["--documents", 40, "--out", file, "--json", result]
    code, out, _ = run("sample", trained / "checkpoint", *options, capsys=capsys)
    assert code == 0
    counts = json.loads(result.read_text())["rows"][0]
    rows = rows_of(file)
    assert len(rows) == counts["written"] > 10
    assert counts["written"] + counts["without_end"] + counts["not_reencoded"] == counts["documents"] == 40
    assert f"{counts['without_end']} without an end" in out
    mean = sum(row["nll"] for row in rows) / sum(row["n"] for row in rows)
    assert mean == pytest.approx(counts["nats_per_token"])
    code, _, _ = run(
        *["eval", "bound", trained / "checkpoint", "--data", file, "--block-sizes", 1, "--json", bound], capsys=capsys
    )
    assert code == 0
    measured = json.loads(bound.read_text())["rows"][0]
    assert measured["nats_per_token"] == pytest.approx(mean, abs=1e-4)
    assert measured["tokens"] == sum(row["n"] for row in rows)
    # document by document too, and another model says otherwise
    model = blockdiff.load(trained / "checkpoint")
    alone = blockdiff.bound(model, [rows[3]["text"]], [1])[0]
    assert alone.nats_per_token * alone.tokens == pytest.approx(rows[3]["nll"], abs=1e-4)
    assert rows[3]["nll"] != pytest.approx(rows[4]["nll"], abs=1e-4)


def test_a_document_depends_on_the_seed_and_its_number_only(trained, tmp_path):
    model = blockdiff.load(trained / "checkpoint")

    def texts(name, documents=12, **options):
        sample_documents(model, documents, tmp_path / f"{name}.jsonl", **options)
        return [row["text"] for row in rows_of(tmp_path / f"{name}.jsonl")]

    whole = texts("whole")
    assert texts("batches", batch=5) == whole
    assert whole[: len(few := texts("few", documents=4))] == few != []
    other = texts("other", seed=1)
    assert other != whole
    assert other[:6] != whole[1:7]  # another seed is no shift of the documents
    assert texts("blocks", block_size=4) != whole
    assert texts("blocks in batches", block_size=4, batch=3) == texts("blocks again", block_size=4)


def test_what_is_left_out_is_counted(trained, tmp_path, capsys):
    file = tmp_path / "s.jsonl"
    model = blockdiff.load(trained / "checkpoint")
    cut = sample_documents(model, 6, file, max_new_tokens=1)
    assert (cut.written, cut.without_end, cut.nats_per_token) == (0, 6, None)
    assert file.read_text() == ""
    for options, message in (
        (["--out", file], "exists already"),
        (["--out", tmp_path / "s.txt"], r"ends in .jsonl or .jsonl.gz"),
        (["--out", tmp_path / "t.jsonl", "--max-new-tokens", 64], "the model scores 1 to 63 at once"),
    ):
        code, _, error = run("sample", trained / "checkpoint", "--documents", 2, *options, capsys=capsys)
        assert code == 2
        assert message in error
    assert {path.name for path in tmp_path.iterdir()} == {"s.jsonl"}
