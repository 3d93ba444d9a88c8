"""What a training is said to need, held against what one has and does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_config
from test_cli import run
from torch.utils.flop_counter import FlopCounterMode

from blockdiff.building import build_model, encoder_of, objective_of, training_rows
from blockdiff.config import ConfigError, make_config
from blockdiff.data import Document, collate
from blockdiff.datafiles import DataError
from blockdiff.estimate import describe, estimate


@pytest.fixture
def tree(tmp_path):
    tree = tiny_config(tmp_path, layout={"kind": "fixed", "size": 4}, data={"length": 128})
    tree["model"]["architecture"] |= {"hidden_size": 64, "num_hidden_layers": 3}
    return tree


def with_train(tree, **changes):
    return make_config({**tree, "train": {**tree["train"], **changes}})


def test_parameters_are_those_of_the_model(tree, trained):
    config = make_config(tree)
    assert estimate(config).parameters == estimate(config).trained == build_model(config).backbone.num_parameters()
    adapted = {"init": str(trained / "checkpoint"), "adapter": {"kind": "noisy", "rank": 4}}
    config = make_config(
        {**tree, "model": adapted, "objective": {"ar_weight": 0.0}, "data": {**tree["data"], "length": 64}}
    )
    model = build_model(config)
    assert estimate(config).trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_arithmetic_is_that_of_a_step(tree):
    """torch's own count over a pass of full rows and its backward. It does not see the attention's products on a CPU,
    and the last layer runs for the rows that are read alone."""
    config = make_config(tree)
    model, length = build_model(config), config.data.length
    rows = [[Document(np.full(length, 5, np.int32), np.arange(length) < 1, "d")] for _ in range(config.train.rows)]
    objective, spec = objective_of(config), model.spec
    with FlopCounterMode(display=False) as counter:
        terms = objective.terms(model, collate(rows), spec.alignment, spec.mask_id or 0, 0)
        terms.loss(terms.tokens.sum(), objective.ar_weight).backward()
    found = estimate(config)
    assert found.tokens == 2 * length - 1
    assert found.reads == pytest.approx(terms_read(terms) / config.train.rows, rel=0.1)
    attention = 3 * config.train.rows * 4 * 64 * 3 * found.tokens**2  # width 64, 3 layers
    assert found.flops - attention == pytest.approx(counter.get_total_flops(), rel=0.15)


def terms_read(terms) -> int:
    return int(terms.ar_tokens.sum()) + int(terms.tokens.sum() * 0.7)  # firsts, and what is masked of the others


def test_shards_checkpoints_and_processes_change_what_they_should(tree):
    one, eight = estimate(with_train(tree, global_rows=32)), estimate(with_train(tree, global_rows=32), 8)
    assert one.flops == eight.flops
    assert (one.passes, eight.passes) == (8, 1)
    assert one.memory["weights"] == eight.memory["weights"]  # ddp keeps the model whole
    sharded = estimate(with_train(tree, global_rows=32, parallel="fsdp"), 8)
    assert sharded.memory["weights"] == one.memory["weights"] // 8
    assert sharded.memory["Adam"] == one.memory["Adam"] // 8
    assert eight.memory["gradients in flight"] == eight.memory["gradients"]  # DDP's buckets
    network = build_model(with_train(tree)).backbone
    layer = sum(p.numel() for p in network.model.layers[0].parameters())
    assert sharded.memory["gathered layers"] == 4 * (network.num_parameters() - layer)  # of three, two are whole
    assert sharded.memory["their gradients"] == 4 * (network.num_parameters() - layer)  # two of a layer: to sum it up
    rounded = estimate(with_train(tree, mixed_precision="bf16"))
    assert rounded.memory["weights in bfloat16"] == 2 * network.num_parameters()
    assert rounded.memory["weights"] == one.memory["weights"]
    assert 0.4 < rounded.memory["activations"] / one.memory["activations"] < 0.7
    again = estimate(with_train(tree, gradient_checkpointing=True))
    assert again.memory["activations"] < 0.7 * estimate(with_train(tree)).memory["activations"]
    assert again.flops > estimate(with_train(tree)).flops
    assert eight.hours(1.0) == pytest.approx(one.hours(8.0))
    assert one.hours(2.0) == pytest.approx(one.steps * one.flops / 2e12 / 3600)
    with pytest.raises(ConfigError, match="32 rows a step do not divide over 5 processes"):
        estimate(with_train(tree, global_rows=32), 5)


def test_explain_says_it(tree, tmp_path, capsys, trained):
    (tmp_path / "c.yaml").write_text(make_config(tree).dump())
    _, out, _ = run(
        "explain", str(tmp_path / "c.yaml"), "--processes", "2", "--tflops", "0.5", "--price", "3", capsys=capsys
    )
    assert "8 rows: 2 processes x 1 passes x 4" in out
    assert "for 30 steps at 0.5 TFLOP/s a process" in out
    assert "at 3 an hour and process" in out
    _, out, _ = run("explain", str(tmp_path / "c.yaml"), capsys=capsys)
    assert "matrix products on this machine" in out
    minutes = with_train(tree, steps=None, minutes=1.0)
    assert "the number of steps is known when data are read" in describe(estimate(minutes), 1.0)
    (tmp_path / "c.yaml").write_text(make_config({**tree, "model": {"init": "Qwen/Nothing"}}).dump())
    _, out, _ = run("explain", str(tmp_path / "c.yaml"), capsys=capsys)
    assert "not known: the config.json of Qwen/Nothing is not on this machine" in out
    assert "who sees whom" in out  # what can be said is said
    (tmp_path / "c.yaml").write_text(make_config({**tree, "model": {"init": "/nowhere/x"}}).dump())
    code, out, _ = run("explain", str(tmp_path / "c.yaml"), capsys=capsys)
    assert code == 0
    assert "not known: the config.json of /nowhere/x is not on this machine" in out
    code, _, error = run("explain", str(tmp_path / "c.yaml"), "--tflops", "0", capsys=capsys)
    assert code == 2
    assert "--tflops" in error


def test_an_estimate_reads_no_data(tree):
    config = make_config({**tree, "data": {**tree["data"], "train": "nowhere.jsonl"}})
    assert estimate(config).flops == estimate(make_config(tree)).flops
    with pytest.raises(DataError, match="nowhere"):
        training_rows(config, encoder_of(build_model(make_config(tree))))


def test_mixtures_of_experts_count_those_that_work(tree):
    def flops(kind="mixtral", **changes):
        kind = {"type": kind, "num_local_experts": 8, "num_experts_per_tok": 2}
        architecture = {**tree["model"]["architecture"], **kind, **changes}
        return estimate(make_config({**tree, "model": {"architecture": architecture, "vocabulary": 300}}))

    assert flops().flops == pytest.approx(flops(num_local_experts=4).flops, rel=0.05)
    assert flops("granitemoe").flops == pytest.approx(flops("granitemoe", num_local_experts=4).flops, rel=0.05)
    assert flops().parameters > 1.5 * flops(num_local_experts=4).parameters
    assert "activations not known for this network" in describe(flops(), 1.0)
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize("kind", ["whole", "lora", "noisy"])
@pytest.mark.parametrize("size", [1, 3])
def test_memory_is_that_of_a_step(tree, tmp_path, kind, size):
    """What autograd keeps of a real pass, and what the weights, their gradients and Adam take after a step."""
    start = tmp_path / "start"
    base = make_config(tree)
    build_model(base).save(start)
    adapter = {} if kind == "whole" else {"adapter": {"kind": kind, "rank": 4}}
    config = make_config({**tree, "model": {"init": str(start), **adapter}, "objective": {"ar_weight": 0.0}})
    config = make_config({**yaml.safe_load(config.dump()), "train": {"steps": 1, "rows": size}})
    model, length = build_model(config).train(), config.data.length
    rows = [[Document(np.full(length, 5, np.int32), np.arange(length) < 1, "d")] for _ in range(size)]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[torch.Tensor] = []
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = objective_of(config).terms(model, collate(rows), model.spec.alignment, model.spec.mask_id or 0, 0)
    terms.loss(terms.tokens.sum(), 0.0).backward()
    optimizer.step()
    found = estimate(config)
    said = found.memory
    assert said["activations"] == pytest.approx(sum(held.values()), rel=0.25)
    assert said["weights"] == 4 * build_model(base).backbone.num_parameters()
    assert said["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert said["Adam"] == sum(m.nbytes for state in optimizer.state.values() for m in state.values() if m.ndim)
    assert said["logits"] == 2 * 4 * size * found.reads * len(model.backbone.get_input_embeddings().weight)
