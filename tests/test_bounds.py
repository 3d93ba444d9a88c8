"""Bounds: against enumeration and known numbers, with honest errors and windows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from conftest import SHARED, needs_shared, tiny_config, write_corpus
from test_cli import run

import blockdiff
from blockdiff.api import documents_of
from blockdiff.config import make_config
from blockdiff.coverage import SpanShare
from blockdiff.data import Document
from blockdiff.datafiles import DataError
from blockdiff.distributions import Fixed
from blockdiff.evaluate import bound, compare, unigram
from blockdiff.evaluate.bounds import ratio
from blockdiff.evaluate.windows import window_length, windows
from blockdiff.training import train


def random_documents(lengths: list[int], seed: int = 0, given: int = 1) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [
        Document(generator.integers(3, tiny.VOCABULARY, length).astype(np.int32), np.arange(length) < given, f"d{i}")
        for i, length in enumerate(lengths)
    ]


@needs_shared
def test_the_teachers_own_value():
    """stories260K, unadapted, scores its own stories as it was measured when they were sampled: 1.3063."""
    model = blockdiff.load(SHARED / "models" / "stories260K")
    (row,) = blockdiff.bound(model, SHARED / "data" / "stories-synthetic" / "valid.jsonl.gz", [1])
    assert row.nats_per_token == pytest.approx(1.306311, abs=1e-4)
    assert (row.tokens, row.documents, row.estimator) == (228488, 660, "exact")
    assert row.se == pytest.approx(0.0043, abs=2e-4)


def test_an_ar_checkpoint_has_block_size_one_only(tmp_path):
    tiny.backbone("llama", dtype=torch.float32).save_pretrained(tmp_path)
    model = blockdiff.load(tmp_path)
    assert len(bound(model, random_documents([9, 12]), [1])) == 1
    with pytest.raises(ValueError, match="block size 4: this is an autoregressive checkpoint"):
        bound(model, random_documents([9, 12]), [1, 4])


def test_monte_carlo_agrees_with_enumeration_within_its_error():
    model = tiny.model("gpt_neox")
    documents = random_documents([9, 12, 17, 10, 14, 11])
    exact = bound(model, documents, [2, 4], exact=True)
    drawn = bound(model, documents, [2, 4], draws=64)
    assert drawn[0].nats_per_token == pytest.approx(exact[0].nats_per_token, abs=1e-10)  # one maskable token: no noise
    assert drawn[1].se_mc is not None
    assert 0 < drawn[1].se_mc < 0.1
    assert abs(drawn[1].nats_per_token - exact[1].nats_per_token) < 4 * drawn[1].se_mc
    assert exact[1].nll_nats is not None
    assert exact[1].nll_nats < exact[1].nats_per_token
    assert [row.estimator for row in (*exact, *drawn)] == ["exact", "exact", "exact", "exact_count"]


def test_more_draws_mean_less_monte_carlo_error():
    model = tiny.model("gpt_neox", "same")
    documents = random_documents([14] * 8)
    errors = [bound(model, documents, [6], draws=draws)[0].se_mc for draws in (4, 64)]
    assert errors[1] < errors[0] / 2.5


def test_rows_do_not_depend_on_batching_or_on_one_another():
    model = tiny.model("gpt_neox")
    documents = random_documents([9, 17, 30, 12])
    together = bound(model, documents, [1, 4, 5], draws=3)
    for row in together:
        (alone,) = bound(model, documents, [row.block_size], draws=3, batch_tokens=1)
        assert alone.nats_per_token == pytest.approx(row.nats_per_token, abs=1e-10)
    other = bound(model, documents, [4], draws=3, seed=1)[0]
    assert other.nats_per_token != pytest.approx(together[1].nats_per_token, abs=1e-6)


def test_differences_are_paired_by_document():
    """Documents vary far more than the difference between block sizes: the paired error is much the smaller."""
    model = tiny.model("gpt_neox")
    documents = random_documents([20] * 12)
    for index, document in enumerate(documents):  # some documents are constant, hence easy or hard as a whole
        document.ids[:] = 3 + index if index % 2 else document.ids
    first, second = bound(model, documents, [2, 3], draws=32)
    assert first.delta_nats == 0
    assert second.delta_nats == pytest.approx(second.nats_per_token - first.nats_per_token, abs=1e-12)
    assert second.delta_se < 0.6 * math.hypot(first.se, second.se)


def test_standard_errors_are_those_of_a_ratio_over_documents():
    """Against the spread of the estimate over many resampled sets of documents."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 50, (400,), generator=generator).double()
    sums = counts * (2 + torch.rand(400, generator=generator).double()) + 3
    mean, error = ratio(sums, counts)
    picks = torch.randint(400, (3000, 400), generator=generator)
    spread = (sums[picks].sum(1) / counts[picks].sum(1)).std()
    assert error == pytest.approx(float(spread), rel=0.1)
    assert mean == pytest.approx(float(sums.sum() / counts.sum()))
    assert ratio(sums[:1], counts[:1])[1] is None


def test_offsets_shorten_the_first_block():
    model = tiny.model("gpt_neox")
    documents = random_documents([15, 22])
    rows = bound(model, documents, [1, 4], offsets=[0, 1, 3], exact=True)
    assert [(row.block_size, row.offset) for row in rows] == [(1, 0), (4, 0), (4, 1), (4, 3)]
    values = {round(row.nats_per_token, 9) for row in rows}
    assert len(values) == 4


def test_documents_beyond_the_trained_length_are_scored_in_windows():
    """Every token once, aligned to the grid, with half a window of context or more."""
    from dataclasses import replace

    model = tiny.model("gpt_neox")
    model.spec = replace(model.spec, trained_length=16)
    (document,) = random_documents([61], given=3)
    for size, offset in ((1, 0), (4, 0), (4, 3), (5, 2), (8, 0), (10, 7), (12, 0), (13, 11), (15, 0), (15, 14)):
        seen = np.zeros(61, dtype=int)
        pieces = list(windows([document], size, offset, window_length(model)))
        for piece in pieces:
            assert len(piece.document) <= 16
            scored = np.flatnonzero(~piece.document.prompt) + piece.origin
            seen[scored] += 1
            assert (piece.document.ids == document.ids[piece.origin : piece.origin + len(piece.document)]).all()
            if scored[0] > 3:
                assert (scored[0] - 3 - offset) % size == 0
                assert scored[0] - piece.origin >= 16 - max(8 // size, 1) * size
        assert (seen[3:] == 1).all()
        assert (seen[:3] == 0).all()
        (row,) = bound(model, [document], [size], offsets=[offset], draws=2) if offset < size else [None]
        assert row.tokens == 58
    # block size 1 in windows is the AR model reading windows
    (row,) = bound(model, [document], [1])
    ids, total = torch.tensor(document.ids.astype(int)), 0.0
    with torch.no_grad():
        model.backbone.set_attn_implementation("sdpa")
        for piece in windows([document], 1, 0, window_length(model)):
            window = ids[piece.origin : piece.origin + len(piece.document)]
            logits = model.backbone(input_ids=window[None]).logits[0]
            logits[:, model.spec.mask_id] = -torch.inf
            log_p = logits.log_softmax(-1)
            for i in np.flatnonzero(~piece.document.prompt).tolist():
                total -= float(log_p[i - 1, window[i]])
    assert row.nats_per_token * 58 == pytest.approx(total, abs=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_sizes": [0]}, "block size 0 is not possible; give 1 or more"),
        ({"block_sizes": [40]}, "block size 40 is longer than the data: the longest document scores 11 tokens"),
        ({"block_sizes": []}, "give at least one block size"),
        ({"block_sizes": [4], "offsets": [-1]}, "offsets of 0 or more"),
        ({"block_sizes": [2, 4], "offsets": [0, 4]}, "offset 4 shortens no block"),
        ({"block_sizes": [4], "draws": 0}, "draws is 0; give 1 or more"),
        ({"block_sizes": [4], "documents": []}, "there are no documents to score"),
    ],
)
def test_bad_requests_are_refused(options, message):
    model = tiny.model("gpt_neox")
    with pytest.raises(ValueError, match=message):
        bound(model, **{"documents": random_documents([12]), **options})


def test_enumeration_is_refused_where_it_would_never_end():
    model = tiny.model("gpt_neox", "same")
    with pytest.raises(ValueError, match=r"exact: block size 11 needs 2\^11 - 1 passes; give at most 10"):
        bound(model, random_documents([30]), [11], exact=True)


def test_blocks_must_fit_the_trained_length():
    from dataclasses import replace

    model = tiny.model("gpt_neox")
    model.spec = replace(model.spec, trained_length=16)
    with pytest.raises(ValueError, match="block size 16 does not fit the 16 tokens that the model was trained on"):
        bound(model, random_documents([40]), [16])


def test_unigram_is_the_add_one_frequency_model():
    train, valid = random_documents([30, 30]), random_documents([20], seed=5)
    counts = np.bincount(np.concatenate([d.ids[1:] for d in train]), minlength=tiny.VOCABULARY) + 1
    expected = -np.log(counts[valid[0].ids[1:]] / counts.sum()).mean()
    assert unigram(train, valid, tiny.VOCABULARY) == pytest.approx(expected)


def test_texts_and_files_give_the_same_bound(trained, tmp_path):
    model = blockdiff.load(trained / "checkpoint")
    texts = ["the cat sat on the mat .", "a dog ate the hat . we all ran home ."]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert blockdiff.bound(model, texts, [1, 4]) == blockdiff.bound(model, tmp_path / "a.jsonl", [1, 4])
    with pytest.raises(DataError, match="no such file"):
        blockdiff.bound(model, tmp_path / "missing.jsonl", [1])


def on_sdars_grid(model: blockdiff.api.Model) -> blockdiff.api.Model:
    """The model as one that was trained on SDAR's grid, blocks of 4 counted from a text's first, given token, and on
    texts of every length."""
    documents = tuple(SpanShare(1, scored, 1 / 60) for scored in range(4, 64))
    model.spec = replace(model.spec, layout=Fixed(4, offset=3), documents=documents)
    return model


def test_a_bound_lies_on_the_grid_that_was_trained(trained, tmp_path):
    model, texts = on_sdars_grid(blockdiff.load(trained / "checkpoint")), ["the cat sat on the mat . " * 2] * 3
    row, one = blockdiff.bound(model, texts, [4, 2], draws=2)
    (named,) = blockdiff.bound(model, texts, [4], offsets=[3], draws=2)
    (other,) = blockdiff.bound(model, texts, [4], offsets=[0], draws=2)
    assert (row.offset, row.grid, one.offset) == (3, 3, 0)  # no grid of blocks of 2 was trained
    assert row.nats_per_token == named.nats_per_token
    assert (other.offset, other.grid) == (0, 3)
    assert other.nats_per_token != pytest.approx(named.nats_per_token, abs=1e-6)  # twin
    (against,) = compare(model, model, *[documents_of(model, texts)] * 2, [4], draws=2)
    assert (against.offset, against.other_offset, against.bits_per_byte) == (3, 3, 0)


def test_validation_in_training_lies_on_the_trained_grid(tmp_path):
    layout = {"kind": "fixed", "size": 4, "offset": 3}
    changes = {"layout": layout, "train": {"steps": 2, "rows": 4}, "eval": {"block_sizes": [4], "draws": 4, "every": 2}}
    run = train(make_config(tiny_config(tmp_path, **changes)))
    (row,) = json.loads(run.result("bound").read_text())["rows"]
    assert row["offset"] == 3
    model = blockdiff.load(run.checkpoint)
    (named,) = blockdiff.bound(model, tmp_path / "valid.jsonl", [4], offsets=[3], draws=4)
    assert row["nats_per_token"] == pytest.approx(named.nats_per_token, abs=1e-6)
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["eval_bound_b4"] for line in logged if "eval_bound_b4" in line] == [
        pytest.approx(named.nats_per_token, abs=1e-4)
    ]
    (other,) = blockdiff.bound(model, tmp_path / "valid.jsonl", [4], offsets=[0], draws=4)
    assert abs(other.nats_per_token - named.nats_per_token) > 1e-3  # twin


def test_eval_bound_says_what_was_not_trained(trained, tmp_path, capsys):
    on_sdars_grid(blockdiff.load(trained / "checkpoint")).save(tmp_path / "grid")
    write_corpus(tmp_path)
    base = ["eval", "bound", tmp_path / "grid", "--data", tmp_path / "valid.jsonl", "--limit", 1, "--draws", 1]
    base += ["--json", tmp_path / "bound.json"]
    code, out, error = run(*base, "--block-sizes", 4, capsys=capsys)
    assert (code, "offset" in out, "not covered" in error) == (0, True, False)
    _, _, error = run(*base, "--block-sizes", 4, "--offsets", 0, capsys=capsys)
    assert error.startswith("warning: not covered by training (offset,")
    assert json.loads((tmp_path / "bound.json").read_text())["problem"] in error
    _, _, error = run(*base, "--block-sizes", "4,8", capsys=capsys)
    assert "no block of 8 tokens was trained; the nearest trained size is 4" in error
    code, out, _ = run(*base, "--block-sizes", 4, "--against", trained / "checkpoint", capsys=capsys)
    assert (code, "4, offset 3" in out) == (0, True)
    code, _, error = run(*base, "--offsets", 0, "--against", trained / "checkpoint", capsys=capsys)
    assert (code, "each model on the grid that it was trained on: leave --offsets out" in error) == (2, True)
