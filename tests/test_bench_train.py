"""The training benchmark: every way in one run, the same work in each, its table and its plot."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from test_cli import run

from blockdiff.bench import train as bench
from blockdiff.bench.costs import cost_table
from blockdiff.bench.train import AR, OURS, TEXTBOOK, Case, Trained


@pytest.fixture
def checkpoint(tmp_path):
    tiny.backbone("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_bench_train_compares_within_one_run(checkpoint, tmp_path, capsys):
    target, plot = tmp_path / "bench.json", tmp_path / "cost.png"
    base = ["bench", "train", "--model", checkpoint, "--rounds", 2, "--block-size", 4, "--draws", 2]
    code, out, _ = run(*base, "--lengths", 32, "--tokens", 64, "--json", target, "--plot", plot, capsys=capsys)
    assert code == 0
    rows = json.loads(target.read_text())["rows"]
    assert out.strip().startswith(cost_table(rows).strip())
    assert [(row["length"], row["batch"], row["variant"]) for row in rows] == [
        (32, 2, way) for way in (AR, TEXTBOOK, OURS, "ours, 2 draws")
    ]
    for row in rows:
        low, high = row["cost_over_ar_range"]
        assert 0 < low <= row["cost_over_ar"] <= high
        assert row["cost_per_draw"] == pytest.approx(row["cost_over_ar"] / row["draws"])
        assert row["peak_mb"] > row["peak_above_model_mb"] > 0
        assert row["cost_over_matmul"] > 1
    assert rows[0]["cost_over_ar_range"] == [1.0, 1.0]
    assert plot.stat().st_size > 10_000
    longer, shorter = tmp_path / "two.json", ["--lengths", "16,32", "--batch", 3, "--draws", 1, "--no-memory"]
    assert run(*base, *shorter, "--json", longer, capsys=capsys)[0] == 0
    found = json.loads(longer.read_text())["rows"]
    assert [(row["length"], row["batch"]) for row in found] == [(16, 3)] * 3 + [(32, 3)] * 3
    assert all(row["peak_mb"] is None for row in found)
    assert "length 4 has no room for blocks of 4" in run(*base, "--lengths", 4, capsys=capsys)[2]
    assert "does not fit the model's context of 64" in run(*base, "--lengths", 128, capsys=capsys)[2]


def test_the_ways_compute_the_same_loss_and_ours_fewer_products(checkpoint):
    ways = {way: Trained(Case(32, 2, 4, 2, checkpoint), way) for way in (AR, TEXTBOOK, OURS)}
    losses = {way: float(own.loss(3).detach()) for way, own in ways.items()}
    assert losses[OURS] == pytest.approx(losses[TEXTBOOK], rel=1e-5)
    for other in (losses[AR], float(ways[OURS].loss(4).detach())):  # twins: another objective, other noise
        assert other != pytest.approx(losses[OURS], rel=1e-5)
    rows = {way: sum(count for count, _ in own.products()) for way, own in ways.items()}
    assert rows[AR] == 2 * 32 * (7 * 3 + 1)  # a Llama layer has seven products
    assert rows[AR] < rows[OURS] < 0.95 * rows[TEXTBOOK]
    before = ways[OURS].network.get_input_embeddings().weight.detach().clone()
    ways[OURS].step(0)
    assert not torch.equal(ways[OURS].network.get_input_embeddings().weight, before)


def test_peak_memory_grows_with_what_is_kept(checkpoint):
    small, large = (bench.peak_memory(bench._steps, Case(64, batch, 4, 1, checkpoint), OURS) for batch in (1, 256))
    assert large[1] > small[1] + 20
