"""Supervised fine-tuning: one active block against all of them, ends that do not tell the length, and the presets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from conftest import tiny_config

from blockdiff.building import objective_of, training_rows
from blockdiff.config import ConfigError, make_config
from blockdiff.data import Document, Encoder, collate, fill_end
from blockdiff.distributions import Fixed, Full
from blockdiff.draws import Draws
from blockdiff.explain import explanation
from blockdiff.layout import Layout, TokenMap
from blockdiff.noise import ExactCount
from blockdiff.objectives import Alignment, one_active
from blockdiff.passes import Objective
from blockdiff.presets import PRESETS
from blockdiff.tokenizer import train_tokenizer
from blockdiff.training import train


def document(given: int, scored: int, seed: int = 0) -> Document:
    ids = np.random.default_rng(seed).integers(3, tiny.VOCABULARY, given + scored).astype(np.int32)
    return Document(ids, np.arange(given + scored) < given, f"d{seed}")


def gradient(model, objective: Objective, batch, alignment: Alignment, seed: int) -> torch.Tensor:
    terms = objective.terms(model, batch, alignment, model.spec.mask_id or 0, seed)
    loss = terms.loss(1.0, objective.ar_weight)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize(("prediction", "boundary"), [("shift", "clean"), ("shift", "seed"), ("same", "clean")])
@pytest.mark.parametrize("clean_context", ["context_causal", "block_causal"])
def test_one_active_block_averaged_over_the_blocks_has_the_gradient_of_all(
    prediction, boundary, clean_context, monkeypatch
):
    """Blocks of 2 under a full mask rate leave nothing random but the choice of the block, which is enumerated."""
    from blockdiff.noise import Clipped

    model = tiny.model("gpt_neox", prediction, boundary, clean_context)
    batch = collate([[document(3, 6), document(2, 4, 1)]])
    alignment = model.spec.alignment
    every = Objective(Fixed(2), Clipped(1.0, 1.0))
    whole = gradient(model, every, batch, alignment, 0)

    def of_choice(first: int, second: int) -> torch.Tensor:
        """The objective with chosen blocks, through the library's own pass."""
        one = Objective(Fixed(2), Clipped(1.0, 1.0), active="one")
        u = torch.tensor([(first + 0.5) / 3, (second + 0.5) / 2])
        monkeypatch.setattr(Draws, "documents", lambda draws, doc: u)
        return gradient(model, one, batch, alignment, 0)

    mean = torch.stack([of_choice(i, j) for i in range(3) for j in range(2)]).mean(0)
    torch.testing.assert_close(mean, whole, atol=1e-10, rtol=0)
    assert (of_choice(0, 0) - whole).abs().max() > 1e-3  # twin: a single choice is not the mean


def test_one_active_block_of_each_document():
    tokens = TokenMap.from_layouts([[Layout(2, (3, 3, 1)), Layout(1, (2, 2))], [Layout(4, (5,))]])
    left, blocks = one_active(tokens, torch.tensor([0.99, 0.0, 0.5]))
    assert blocks.tolist() == [3, 2, 1]
    assert left.scored[0].nonzero()[:, 0].tolist() == [8, 10, 11]
    assert left.scored[1].nonzero()[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert torch.equal(left.block, tokens.block)


def test_classical_sft_is_the_full_layout_over_the_answer():
    """Whatever the answer's length: one block, beginning where the prompt ends."""
    batch = collate([[document(3, 6)], [document(2, 4, 1)]])
    generator = torch.Generator().manual_seed(0)
    from blockdiff.layout import Spans

    spans = Spans.of(batch["doc"], batch["prompt"])
    tokens = TokenMap.build(batch["doc"], batch["prompt"], spans.place(Full().draw(spans.lengths, generator)))
    assert [row[0] for row in tokens.layouts()] == [Layout(3, (6,)), Layout(2, (4,))]
    assert make_config(_sft("classical_sft")).layout == Full()


def test_a_configuration_reaches_the_objective():
    config = make_config(_sft("blockwise_sft", objective={"weighting": "ce", "ar_weight": 0.25, "draws_per_pass": 3}))
    found = objective_of(config)
    assert (found.active, found.weighting, found.ar_weight, found.draws) == ("one", "ce", 0.25, 3)
    assert objective_of(make_config(_sft("fast_dllm_v2"))).complementary


def test_ends_are_filled_to_the_block_or_the_row_and_not_beyond():
    ids = np.array([5, 6, 7, 8, 9, 2], dtype=np.int32)
    answer = Document(ids, np.arange(6) < 2, "a")  # 4 scored: 7 8 9 end
    assert fill_end(answer, 4, 64, [2]) is not None
    assert fill_end(answer, 4, 64, [2]).ids.tolist() == ids.tolist()
    filled = fill_end(answer, 3, 64, [2])
    assert filled.ids.tolist() == [*ids.tolist(), 2, 2]
    assert filled.prompt.tolist() == [True] * 2 + [False] * 6
    assert len(fill_end(answer, 64, 10, [2])) == 10
    assert fill_end(answer, 3, 64, [4]) is answer  # it was cut: it does not end
    turns = Document(np.array([5, 6, 2, 9, 8, 7, 2, 9], dtype=np.int32), np.array([1, 0, 0, 1, 1, 0, 0, 1], bool), "c")
    assert fill_end(turns, 3, 64, [2]).ids.tolist() == [5, 6, 2, 9, 8, 7, 2, 2]  # the last turn alone, no newline


def _sft(preset: str, **changes) -> dict:
    tree = {"preset": preset, "output": "x", "model": {"init": "m"}, "data": {"train": "t"}, "train": {"steps": 2}}
    return tree | changes


def test_a_blocks_end_does_not_tell_where_the_answer_ends(tmp_path):
    """With eos_fill every block of a training row has the full size; without, the last one has the answer's."""
    rows = [{"prompt": "a b", "completion": " c" * n} for n in range(1, 9)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(["a b c"], 300)
    encoder = Encoder(tokenizer, tokenizer.eos_token_id, (tokenizer.eos_token_id,))
    layout = {"layout": {"kind": "fixed", "size": 4}}
    for fill, whole in (("block", True), ("none", False)):
        data = {"train": str(tmp_path / "t.jsonl"), "length": 64, "eos_fill": fill}
        _, packed = training_rows(make_config(_sft("blockwise_sft", **layout, data=data)), encoder)
        scored = [piece.scored for row in packed.rows for piece in row]
        assert (set(np.array(scored) % 4) == {0}) is whole
    with pytest.raises(ConfigError, match=r"data.eos_fill block needs layout fixed"):
        make_config(_sft("blockwise_sft", layout={"kind": "random_offset", "size": 4}))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_explains_itself(preset, tmp_path):
    tree = tiny_config(tmp_path, train={"steps": 3, "log_every": 1})
    for key in ("layout", "objective"):
        del tree[key]
    tree |= {"preset": preset, "eval": {"block_sizes": [1], "draws": 2}}
    sizes = {"fixed": {"size": 8}, "scale_mixture": {"max_size": 8, "atoms": {4: 0.3}}}
    kind = PRESETS[preset].tree["layout"]["kind"]
    if kind in sizes:
        tree["layout"] = sizes[kind]
    if "growth" in PRESETS[preset].tree and PRESETS[preset].tree["growth"]["shape"] == "wsd":
        tree["growth"] = {"peak": 16}
    config = make_config(tree)
    run = train(config)
    losses = [json.loads(line).get("loss") for line in run.metrics.read_text().splitlines()]
    assert all(np.isfinite(loss) for loss in losses if loss is not None)
    text = explanation(config)
    assert text.startswith(f"{preset}: {PRESETS[preset].about[:20]}")
    assert "who sees whom" in text


def test_exact_counts_in_one_active_are_unbiased_on_average():
    """Monte Carlo over noise and choices, against all blocks: means agree within their errors."""
    model = tiny.model("gpt_neox")
    batch = collate([[document(3, 9)] for _ in range(400)])
    means = []
    for active in ("all", "one"):
        objective = Objective(Fixed(4), ExactCount(), active=active)  # type: ignore[arg-type]
        with torch.no_grad():
            terms = objective.terms(model, batch, model.spec.alignment, model.spec.mask_id or 0, 1)
        means.append((terms.blocks.mean().item(), terms.blocks.std().item() / 20))
        assert terms.tokens.tolist() == [9] * 400
    (full, full_error), (one, one_error) = means
    assert abs(full - one) < 4 * (full_error**2 + one_error**2) ** 0.5
    assert one_error > 1.3 * full_error  # and far noisier, which is why all blocks are the default
