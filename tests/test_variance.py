"""The variance of training gradients, against gradients taken one by one."""

from __future__ import annotations

import pytest
import tiny
import torch
import yaml
from conftest import tiny_config
from test_cli import run
from test_sft import document

from blockdiff.data import collate
from blockdiff.distributions import AR, RandomOffset
from blockdiff.evaluate import gradient_variance
from blockdiff.evaluate.variance import _DRAW
from blockdiff.noise import Bernoulli, ExactCount
from blockdiff.passes import Objective
from blockdiff.rng import uniform


def rows():
    return [[document(2, 12, seed)] for seed in range(6)]


def gradient(model, objective, batch, draw: int) -> torch.Tensor:
    seed = int(uniform(0, draw, _DRAW) * 2**53)
    terms = objective.terms(model, batch, model.spec.alignment, model.spec.mask_id, seed)
    loss = terms.loss(terms.tokens.sum(), objective.ar_weight)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, model.parameters())])


def test_the_variance_is_that_of_the_gradients():
    model = tiny.model("gpt_neox")
    objective = Objective(RandomOffset(4), ExactCount(), ar_weight=0.5)
    for vary in ("noise", "both"):
        gradients = []
        for draw in range(5):
            first = 2 * draw if vary == "both" else 0
            gradients.append(gradient(model, objective, collate([rows()[(first + i) % 6] for i in range(2)]), draw))
        expected = torch.stack(gradients).var(0).sum().item()
        found = gradient_variance(model, rows(), objective, rows_per_batch=2, draws=5, vary=vary)
        assert found[0].group == "all"
        assert found[0].variance == pytest.approx(expected, rel=1e-9)
        assert sum(row.variance for row in found[1:]) == pytest.approx(expected, rel=1e-9)
        assert {row.group for row in found} == {"all", "embedding", "attention", "feed_forward", "norm", "head"}


def test_blocks_of_one_have_no_noise_but_other_texts_do():
    model = tiny.model("gpt_neox")
    objective = Objective(AR(), ExactCount())
    assert gradient_variance(model, rows(), objective, draws=4)[0].variance == pytest.approx(0, abs=1e-12)
    both = gradient_variance(model, rows(), objective, rows_per_batch=2, draws=4, vary="both")
    assert both[0].variance > 1e-6


def test_exact_counts_are_less_noisy_than_bernoulli():
    model = tiny.model("gpt_neox", "same")
    found = [
        gradient_variance(model, rows(), Objective(RandomOffset(4), law), rows_per_batch=6, draws=48)[0].ratio
        for law in (ExactCount(), Bernoulli())
    ]
    assert found[0] is not None
    assert found[1] is None or found[1] > 1.5 * found[0]


def test_the_command_measures_a_configuration(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    code, out, _ = run("eval", "variance", tmp_path / "c.yaml", "--draws", 3, capsys=capsys)
    assert code == 0
    assert "attention" in out
    assert not (tmp_path / "run").exists()  # nothing was trained
    with pytest.raises(ValueError, match="draws is 1; a variance needs 2 or more"):
        gradient_variance(tiny.model("gpt_neox"), rows(), Objective(AR(), ExactCount()), draws=1)
