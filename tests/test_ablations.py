"""Training states that decoding never visits, on purpose: noisy prefixes, visible suffixes, annealed attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import tiny_config

from blockdiff.config import ConfigError, make_config
from blockdiff.curriculum import Growth
from blockdiff.data import Document, collate
from blockdiff.distributions import Fixed
from blockdiff.draws import Draws
from blockdiff.layout import Layout, TokenMap
from blockdiff.masks import Annealing, visible
from blockdiff.noise import Clipped, ExactCount
from blockdiff.passes import Objective, Schedule
from blockdiff.run_directory import RunDirectory

ONE = Objective(Fixed(3), Clipped(1.0, 1.0), active="one")


def batch_of(ids: list[int], given: int = 2) -> dict[str, torch.Tensor]:
    return collate([[Document(np.array(ids, np.int32), np.arange(len(ids)) < given, "d")]])


def loss(objective: Objective, ids: list[int], *, prediction: str = "shift", seed: int = 1) -> float:
    """Summed loss of the block that the seed makes active."""
    model = tiny.model("llama", prediction, "clean", "context_causal")
    terms = objective.terms(model, batch_of(ids), model.spec.alignment, model.spec.mask_id or 0, seed)
    return float(terms.blocks.sum().detach())


def changed(ids: list[int], place: int) -> list[int]:
    return [token if i != place else (token + 1) % 20 + 3 for i, token in enumerate(ids)]


TEXT = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]  # two given, then blocks of 3, 3 and 3


def choice(seed: int) -> float:
    """The number that chooses the active block of a batch's one document."""
    return float(Draws.of(seed, torch.tensor([0])).documents(torch.zeros(1, 1)))


FIRST_ACTIVE = next(seed for seed in range(50) if choice(seed) < 1 / 3)


@pytest.mark.parametrize("prediction", ["shift", "same"])
def test_a_visible_suffix_is_seen_and_an_absent_one_is_not(prediction):
    def at(objective: Objective, ids: list[int]) -> float:
        return loss(objective, ids, prediction=prediction, seed=FIRST_ACTIVE)

    seen = replace(ONE, suffix_visible=1.0)
    assert at(seen, TEXT) != pytest.approx(at(seen, changed(TEXT, 9)), rel=1e-9)
    assert at(ONE, TEXT) == pytest.approx(at(ONE, changed(TEXT, 9)), rel=1e-12)
    # what is seen are the suffix's tokens, never the block's own through the clean stream behind it
    hidden = replace(ONE, suffix_visible=0.0)
    assert at(hidden, TEXT) == pytest.approx(at(hidden, changed(TEXT, 9)), rel=1e-12)
    assert at(hidden, TEXT) != pytest.approx(at(ONE, TEXT), rel=1e-9)


def test_the_number_of_masks_tells_the_answers_length_and_an_absent_suffix_does_not():
    longer = [*TEXT, 14, 15, 16]
    seed = next(  # the first block is active whether there are three or four
        s for s in range(50) if choice(s) < 1 / 4
    )
    leak = replace(ONE, suffix_visible=0.0)
    scale = 4 / 3  # the loss of one block stands for all of them

    def ratio(objective: Objective) -> float:
        return loss(objective, longer, seed=seed) / loss(objective, TEXT, seed=seed)

    assert ratio(ONE) == pytest.approx(scale, rel=1e-9)
    assert ratio(leak) != pytest.approx(scale, rel=1e-4)


def test_the_last_block_has_no_suffix():
    last = next(s for s in range(50) if choice(s) > 2 / 3)
    assert loss(replace(ONE, suffix_visible=1.0), TEXT, seed=last) == pytest.approx(loss(ONE, TEXT, seed=last))


def test_prefix_noise_masks_earlier_answers_and_never_the_prompt():
    plain = Objective(Fixed(3), Clipped(1.0, 1.0))  # all masked: the draws differ in nothing but the prefix
    noisy = replace(plain, prefix_noise=0.9)
    assert loss(noisy, TEXT) != pytest.approx(loss(plain, TEXT), rel=1e-6)
    # a document of one block has nothing but its prompt before it
    assert loss(replace(noisy, layout=Fixed(9)), TEXT) == pytest.approx(loss(replace(plain, layout=Fixed(9)), TEXT))


def test_annealed_attention_reaches_the_rule_and_begins_causal():
    tokens = TokenMap.from_layouts([[Layout(1, (4, 4))]]).as_noisy()
    query, key = tokens[:, :, None], tokens[:, None, :]
    rule = visible(query, key, "context_causal")
    causal = visible(query, key, "context_causal", annealing=Annealing(0.0, torch.tensor([0])))
    half = visible(query, key, "context_causal", annealing=Annealing(0.5, torch.tensor([0])))
    assert torch.equal(visible(query, key, "context_causal", annealing=Annealing(1.0, torch.tensor([0]))), rule)
    assert torch.equal(causal, rule & (key.position <= query.position))
    assert bool((causal <= half).all())
    assert bool((half <= rule).all())
    assert not torch.equal(half, rule)
    assert not torch.equal(half, causal)
    assert not torch.equal(half, visible(query, key, "context_causal", annealing=Annealing(0.5, torch.tensor([1]))))


def test_an_annealed_training_ends_with_the_plain_objective():
    plain = Objective(Fixed(3), ExactCount())
    schedule = Schedule(Growth("annealed", until=0.5))
    shares = [schedule.at(plain, progress, 0.5).bidirectional for progress in (0.0, 0.25, 0.5, 1.0)]
    assert shares == [0.0, 0.5, 1.0, 1.0]
    begin, end = (schedule.at(plain, progress, 0.5) for progress in (0.0, 1.0))
    assert begin.layout == end.layout == Fixed(3)
    assert not begin.is_bound(tiny.model("llama", "shift", "clean", "context_causal").spec.alignment)
    model = tiny.model("llama", "shift", "clean", "context_causal")

    def losses(objective: Objective) -> list[float]:
        found: list[float] = []
        fixed = replace(objective, noise=Clipped(1.0, 1.0))  # all masked: the draws differ in nothing
        fixed.terms(
            model,
            batch_of(TEXT),
            model.spec.alignment,
            model.spec.mask_id or 0,
            0,
            lambda draw, loss, block: found.extend(loss.tolist()),
        )
        return found

    assert losses(end) == pytest.approx(losses(plain), rel=1e-12)
    assert losses(begin) != pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": {"suffix_visible": 0.5}}, "objective.active one"),
        ({"objective": {"prefix_noise": 1.0}}, "prefix_noise"),
        (
            {"objective": {"prefix_noise": 0.5}, "model": {"init": "x", "adapter": {"kind": "noisy"}}},
            "prefix_noise",
        ),
        ({"growth": {"shape": "annealed"}, "model": {"init": "x", "adapter": {"kind": "noisy"}}}, "annealed"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    tree = {
        "output": "out",
        "model": {"init": "x"},
        "data": {"train": "t", "length": 32},
        "layout": {"kind": "fixed", "size": 4},
        "train": {"steps": 1},
    }
    with pytest.raises(ConfigError, match=words):
        make_config(tree | settings)


def test_a_run_of_an_older_version_is_the_same_run(tmp_path):
    """Keys that it did not know had their defaults; any other difference is one."""
    config = make_config(tiny_config(tmp_path))
    directory = RunDirectory(tmp_path)
    saved = yaml.safe_load(config.dump())
    del saved["objective"]["prefix_noise"], saved["objective"]["suffix_visible"]
    directory.config.write_text(yaml.safe_dump(saved))
    assert directory.difference(config) is None
    saved["objective"]["ar_weight"] = 0.25
    directory.config.write_text(yaml.safe_dump(saved))
    assert directory.difference(config) == "objective.ar_weight"
    saved["objective"]["ar_weight"] = "much"
    directory.config.write_text(yaml.safe_dump(saved))
    assert directory.difference(config) == "objective.ar_weight"
