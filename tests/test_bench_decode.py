"""Benchmarks of what decoding and serving cost: the baseline writes our texts, ratios are within a round."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from test_cli import run

from blockdiff.bench import Schedule, schedules, serving
from blockdiff.bench.models import random_model, random_network
from blockdiff.bench.tables import schedule_table, serve_table
from blockdiff.bench.textbook import decode_blocks
from blockdiff.decode import Policy
from blockdiff.decode.counts import Fixed
from blockdiff.engine import Request, generate

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def small(monkeypatch):
    """The benchmark's network, smaller."""
    from blockdiff.bench import models

    monkeypatch.setattr(models, "SMALL", models.SMALL | SMALL | {"num_key_value_heads": 2})


@pytest.mark.parametrize(("block_size", "per_step"), [(1, 1), (4, 1), (4, 2), (8, 3)])
def test_the_textbook_writes_our_text(block_size, per_step):
    model = tiny.model("llama", "shift", "clean", "context_causal", dtype=torch.float64)
    model.tokenizer = random_model().tokenizer
    network = copy.deepcopy(model.backbone)
    network.set_attn_implementation("sdpa")
    prompts = torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    requests = [Request(tuple(row.tolist()), 13, block_size, Policy(counts=(Fixed(per_step),))) for row in prompts]
    ours = [list(output.tokens) for output in generate(model, requests)]
    assert model.spec.mask_id is not None
    theirs = decode_blocks(network, prompts, 13, block_size, per_step, model.spec.mask_id)
    assert theirs.tolist() == ours
    if block_size > 1:  # twin: another number of tokens a step is another text
        assert decode_blocks(network, prompts, 13, block_size, block_size, model.spec.mask_id).tolist() != ours


def test_bench_decode_on_random_weights(small, tmp_path, capsys):
    target, plot = tmp_path / "decode.json", tmp_path / "cost.png"
    base = ["bench", "decode", "--new-tokens", "12,24", "--block-sizes", 4, "--prompt-tokens", 5, "--no-memory"]
    options = ["--tokens-per-step", "1,2", "--batch", "1,2", "--rounds", 2, "--json", target, "--plot", plot]
    code, out, _ = run(*base, *options, capsys=capsys)
    assert code == 0
    rows = json.loads(target.read_text())["rows"]
    assert out.startswith(schedule_table(rows))
    assert len(rows) == 4 * (2 + 2 * 3)
    for row in rows:
        low, high = row["speedup_over_ar_range"]
        assert 0 < low <= row["speedup_over_ar"] <= high
        assert row["forwards"] * row["tokens_per_forward"] == pytest.approx(row["new_tokens"])
        assert row["ms_per_forward"] > row["matmul_ms"] > 0
    ar = [row for row in rows if row["way"] == "hf generate"]
    assert all(row["speedup_over_ar_range"] == [1.0, 1.0] for row in ar)
    two = {row["way"]: row for row in rows if (row["batch"], row["new_tokens"], row["tokens_per_step"]) == (1, 24, 2)}
    # six blocks: a commit and two steps each; the seeded ones are committed in a step, and after the prompt
    assert two["textbook"]["forwards"] == two["ours, clean"]["forwards"] == 18
    assert two["ours, seed"]["forwards"] == 12
    assert plot.stat().st_size > 10_000
    assert "do not fit the network's context of 8192" in run(*base[:2], "--new-tokens", 8190, capsys=capsys)[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", 1], "--temperature is about a checkpoint's texts"),
        (["--judge", "x"], "--judge is about a checkpoint's texts"),
        (["nowhere", "--tokens-per-step", 1], "--tokens-per-step is about random weights"),
        (["nowhere", "--no-memory"], "--memory is about random weights"),
        (["nowhere"], "--data: give texts"),
        (["--batch", "0"], "--batch: 0 is not possible"),
        (["--plot", "x.txt"], "give a file that ends in .png"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message, capsys):
    code, _, err = run("bench", "decode", *options, capsys=capsys)
    assert code == 2
    assert message in err


def test_bench_serve_serves_the_same_texts(small, tmp_path, capsys):
    target, plot = tmp_path / "serve.json", tmp_path / "serve.svg"
    base = ["bench", "serve", "--requests", 6, "--new-tokens", 12, "--block-sizes", "1,4", "--rounds", 2]
    code, out, _ = run(*base, "--json", target, "--plot", plot, capsys=capsys)
    assert code == 0
    rows = json.loads(target.read_text())["rows"]
    assert out.startswith(serve_table(rows))
    assert len(rows) == 3
    for row in rows:
        low, high = row["throughput_over_one_range"]
        assert 0 < low <= row["throughput_over_one"] <= high
        assert row["equal_to_alone"] == 1.0
        assert 0 <= row["first_text_seconds"] <= row["request_seconds"] <= row["request_seconds_p95"]
    forwards = {row["way"]: row["forwards"] for row in rows}
    assert forwards["together"] < forwards["one at a time"] / 2
    assert plot.stat().st_size > 5_000
    shared = tmp_path / "shared.json"
    assert run(*base, "--prefix", 64, "--json", shared, capsys=capsys)[0] == 0
    found = json.loads(shared.read_text())["rows"]
    assert any(row["prompt_tokens_shared"] > 0 for row in found)
    assert all(row["prompt_tokens_shared"] == 0 for row in rows)  # twin


def test_schedules_reject_what_does_not_fit(small):
    with pytest.raises(ValueError, match="do not fit the network's context"):
        schedules.bench_schedules([Schedule(1, 8192, 16, (1,))])
    assert random_network().config.hidden_size == 32
    assert serving.ragged_requests(3, 100, [2], 8, 0, 0) == serving.ragged_requests(3, 100, [2], 8, 0, 0)
