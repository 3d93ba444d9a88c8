"""What changes while training: growing blocks, learned proposals, searched intervals, several draws a pass."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import tiny_config

from blockdiff.config import ConfigError, make_config
from blockdiff.curriculum import ClipSearch, CountProposal, Growth, ShareSearch
from blockdiff.distributions import AR, AdaptiveMixture, Fixed, ScaleMixture
from blockdiff.layout import TokenMap
from blockdiff.masking import Corruption, complement, proposed_count, systematic
from blockdiff.model import Spec
from blockdiff.noise import Clipped, ExactCount, LearnedCount, SearchedClip
from blockdiff.objectives import block_numbers, maskable, score, token_losses, two_streams
from blockdiff.passes import Objective, Schedule
from blockdiff.training import train


def blocks_of(sizes: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def counts_of(draw, size: int) -> list[float]:
    found = torch.bincount(draw.count.view(-1, size)[:, 0], minlength=size + 1)
    return (found / found.sum()).tolist()


def draws_of(block: torch.Tensor, count: int) -> list[Corruption]:
    """Draws of exact counts that share their numbers for the blocks."""
    generator = torch.Generator().manual_seed(0)
    u_token = torch.rand(count, len(block), dtype=torch.float64, generator=generator)
    return ExactCount().draws(block, systematic(int(block[-1]) + 1, generator), u_token)


def sizes_over(growth: Growth, largest: int) -> list[int]:
    return [growth.size(largest, step / 100, 0.5) for step in range(100)]


def test_blocks_grow_as_said():
    grown = sizes_over(Growth(until=0.5), 32)
    assert sorted(set(grown)) == [1, 2, 4, 8, 16, 32]
    assert grown == sorted(grown)
    assert [grown.count(size) for size in (1, 2, 4, 8, 16)] == [10] * 5  # equal plateaus in the first half
    assert grown[50:] == [32] * 50
    wsd = sizes_over(Growth("wsd", ratio=4, until=0.3, peak=64, decay=0.3), 8)
    assert wsd[:1] + wsd[29:30] + wsd[50:51] + wsd[-1:] == [1, 64, 64, 8]
    drawn = {Growth("random").size(8, 0.1, u / 10) for u in range(10)}
    assert drawn == {1, 2, 4, 8}


def test_growth_changes_the_layout_and_nothing_else():
    objective = Objective(Fixed(16), ExactCount(), ar_weight=0.5)
    early = Schedule(Growth()).at(objective, 0.0, 0.5)
    assert early.layout == Fixed(1)
    assert replace(early, layout=objective.layout) == objective
    assert Schedule(Growth()).at(objective, 1.0, 0.5) == objective
    mixture = Schedule(Growth(until=1.0)).at(replace(objective, layout=ScaleMixture(32, {4: 0.2, 16: 0.2})), 0.5, 0.5)
    assert mixture.layout == ScaleMixture(4, {4: 0.2})
    weighted = Schedule(ar_weight_end=0.1).at(objective, 0.5, 0.5)
    assert (weighted.ar_weight, weighted.layout) == (pytest.approx(0.3), objective.layout)
    with pytest.raises(ValueError, match="the layout ar has no block size that could grow"):
        Growth().layout(AR(), 0.5, 0.5)


def test_a_learned_proposal_stays_unbiased_and_has_the_least_variance():
    """Losses that are known for every k: the estimate is their bound, with less spread than uniform counts."""
    n, copies = 6, 60000
    block, generator = blocks_of([n] * copies), torch.Generator().manual_seed(0)
    per_mask = torch.tensor([0, 0.1, 0.2, 0.4, 1.0, 3.0, 8.0], dtype=torch.float64)  # CE of a masked token, by k
    expected = float(per_mask[1:].sum())  # sum over k of (1/k) * (k * CE)
    proposal = CountProposal(LearnedCount(floor=0.1))
    draw = ExactCount().draw(block, generator)
    proposal.observe(draw, per_mask[draw.count][draw.masked], block)
    assert torch.equal(proposal.kappa(), CountProposal(LearnedCount(floor=0.1)).kappa())  # until the step is over
    proposal.settle(lambda noted: noted)
    kappa = proposal.kappa()[n]
    assert float(kappa.sum()) == pytest.approx(1)
    best = per_mask[: n + 1] / per_mask[1:].sum()
    torch.testing.assert_close(kappa[: n + 1], 0.9 * best + 0.1 * (torch.arange(n + 1) > 0) / n)
    spread = []
    for law in (proposal.noise(), ExactCount()):
        draw = law.draw(block, generator)
        loss = torch.where(draw.masked, per_mask[draw.count] * draw.weight, 0.0).view(copies, n).sum(1)
        assert float(loss.mean()) == pytest.approx(expected, rel=0.01)
        spread.append(float(loss.var()))
    assert spread[0] < 0.1 * spread[1]


def test_a_proposal_never_loses_the_support_of_a_count():
    kappa = CountProposal(LearnedCount()).kappa()
    torch.testing.assert_close(kappa[5, 1:6], torch.full((5,), 0.2, dtype=torch.float64))  # nothing seen: uniform
    skewed = torch.zeros(7, 7, dtype=torch.float64)
    skewed[6, 1:] = torch.tensor([0.9, 0.02, 0.02, 0.02, 0.02, 0.02])
    draw = proposed_count(
        blocks_of([6] * 20000), skewed, torch.rand(20000).double(), torch.rand(120000, dtype=torch.float64)
    )
    assert counts_of(draw, 6)[1:] == pytest.approx([0.9, 0.02, 0.02, 0.02, 0.02, 0.02], abs=0.01)
    torch.testing.assert_close(draw.weight, 1 / (draw.count * skewed[6, draw.count]))
    state = CountProposal(LearnedCount())
    state.observe(draw, torch.ones(int(draw.masked.sum())), blocks_of([6] * 20000))
    state.settle(lambda noted: noted)
    again = CountProposal(LearnedCount())
    again.restore(json.loads(json.dumps(state.state())))
    assert torch.equal(again.kappa(), state.kappa())
    assert not torch.equal(again.kappa(), kappa)


def test_redrawn_masks_have_the_counts_of_the_published_code():
    """BD3-LM's best interval for blocks of 4, [0.45, 0.95]: with redrawing only 2 or 3 of 4 are ever masked."""
    block, generator = blocks_of([4] * 100000), torch.Generator().manual_seed(0)
    redrawn = counts_of(Clipped(0.45, 0.95, redraw=True).draw(block, generator), 4)
    assert redrawn == pytest.approx([0, 0, 0.38, 0.62, 0], abs=0.01)
    assert counts_of(Clipped(0.45, 0.95).draw(block, generator), 4) == pytest.approx(
        [0.02, 0.10, 0.24, 0.34, 0.30], abs=0.01
    )
    places = Clipped(0.45, 0.95, redraw=True).draw(block, generator).masked.view(-1, 4).double().mean(0)
    assert places.tolist() == pytest.approx([2.62 / 4] * 4, abs=0.01)
    lone = Clipped(0.45, 0.95, redraw=True).draw(blocks_of([1] * 1000), generator)  # no count fits: left as drawn
    assert 0.6 < lone.masked.double().mean() < 0.8


def test_the_search_takes_the_interval_of_least_variance_for_each_size():
    search = ClipSearch(SearchedClip(every=10, widths=(0.5,)))
    assert [search.due(step) for step in (0, 9, 10, 20)] == [False, False, True, True]
    whole = search.noise().draw(blocks_of([4] * 5000), torch.Generator().manual_seed(0))
    assert whole.masked.double().mean() == pytest.approx(0.5, abs=0.02)
    generator = torch.Generator().manual_seed(1)

    def measure(noise):
        size = torch.tensor([4] * 50 + [8] * 50)
        best = torch.where(size == 4, 0.5, 0.25)  # the lower end that has no spread at all
        return size, torch.randn(100, generator=generator).double() * (noise.low - best).abs()

    search.search(measure)
    assert search.best == {4: (0.5, 1.0), 8: (0.25, 0.75)}
    again = ClipSearch(search.settings)
    again.restore(json.loads(json.dumps(search.state())))
    draw = again.noise().draw(blocks_of([4] * 5000 + [8] * 5000), torch.Generator().manual_seed(0))
    assert draw.masked[:20000].double().mean() == pytest.approx(0.75, abs=0.02)
    assert draw.masked[20000:].double().mean() == pytest.approx(0.5, abs=0.02)


def test_shares_follow_the_measured_excess_and_keep_their_floor():
    search = ShareSearch(AdaptiveMixture((1, 4, 16), every=10, floor=0.3))
    assert [search.due(step) for step in (0, 9, 10, 20)] == [False, False, True, True]
    bounds = {1: 1.0, 4: 1.5, 16: 2.5}
    search.search(10, lambda layout: bounds[layout.size])
    assert search.shares == pytest.approx({1: 0.1, 4: 0.1 + 0.7 * 0.5 / 2, 16: 0.1 + 0.7 * 1.5 / 2})
    assert search.layout().shares == pytest.approx(search.shares)
    search.search(20, lambda layout: 1.0)  # nothing to gain anywhere
    assert search.shares == pytest.approx(dict.fromkeys((1, 4, 16), 1 / 3))
    # the mean over 40 steps: even for 10, skewed for 10, even for 20
    assert search.trained(40).shares[16] == pytest.approx(0.75 / 3 + 0.25 * (0.1 + 0.7 * 0.75))
    again = ShareSearch(search.settings)
    again.restore(json.loads(json.dumps(search.state())))
    assert again.trained(40) == search.trained(40)
    # above references of its own, the largest size has no excess left
    known = ShareSearch(AdaptiveMixture((1, 4, 16), reference={1: 0.9, 4: 1.1, 16: 2.5}, floor=0.3))
    known.search(100, lambda layout: bounds[layout.size])
    assert known.shares == pytest.approx({1: 0.1 + 0.7 * 0.1 / 0.5, 4: 0.1 + 0.7 * 0.4 / 0.5, 16: 0.1})


def test_an_adaptive_mixture_trains_and_says_what_it_trained(tmp_path):
    layout = {"kind": "adaptive_mixture", "sizes": [1, 4, 8], "every": 8, "batches": 1}
    tree = tiny_config(tmp_path, train={"steps": 24, "log_every": 4}, layout=layout)
    run = train(make_config(tree))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    used = {line["step"]: line for line in lines if "share_b4" in line}
    assert list(used) == [4, 8, 12, 16, 20, 24]
    moved = [used[12], used[20]]  # after the searches before steps 9 and 17
    assert used[8]["share_b1"] == pytest.approx(1 / 3)
    assert used[16]["share_b1"] == used[12]["share_b1"]
    assert moved[0]["share_b1"] == pytest.approx(0.2 / 3)  # its excess over itself is nothing
    saved = Spec.from_json(run.checkpoint / "block_diffusion.json").layout
    shares = [{1: 1 / 3, 8: 1 / 3}, *({size: line[f"share_b{size}"] for size in (1, 8)} for line in moved)]
    assert saved.shares[8] == pytest.approx(sum(part[8] for part in shares) / 3)
    assert saved.shares[1] == pytest.approx(sum(part[1] for part in shares) / 3)
    assert bool((saved.token_share(64)[[1, 4, 8]] > 0).all())


@pytest.mark.parametrize(
    ("prediction", "boundary"), [("shift", "clean"), ("shift", "seed"), ("shift", "noisy"), ("same", "clean")]
)
@pytest.mark.parametrize("clean_context", ["context_causal", "block_causal"])
def test_draws_that_share_a_clean_pass_are_the_mean_of_passes_of_their_own(prediction, boundary, clean_context):
    """Loss and gradient, in float64."""
    model = tiny.model("gpt_neox", prediction, boundary, clean_context)
    ids, tokens, _ = tiny.random_batch(3)
    alignment = model.spec.alignment
    block = block_numbers(tokens, maskable(tokens, alignment))
    draws = draws_of(block, 3)

    def loss(chosen) -> torch.Tensor:
        stream = two_streams(ids, tokens, chosen, alignment, model.spec.mask_id or 0, with_ar=True)
        losses = token_losses(model(stream.ids, stream.tokens, read=stream.reads.index), stream.reads)
        return score(losses, stream.reads, tokens, int(tokens.doc.max()) + 1).loss(1.0, 0.5)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), allow_unused=True)])

    together = loss(draws)
    apart = torch.stack([loss(draw) for draw in draws]).mean()
    assert together.item() == pytest.approx(apart.item(), abs=1e-10)
    torch.testing.assert_close(gradient(together), gradient(apart), atol=1e-10, rtol=0)
    assert abs(loss(draws[0]).item() - apart.item()) > 1e-3  # twin


def test_a_complement_masks_what_was_left_and_is_as_unbiased():
    block = blocks_of([5] * 30000)
    first = ExactCount().draw(block, torch.Generator().manual_seed(0))
    second = complement(block, first)
    full = first.count == 5
    assert torch.equal(first.masked ^ second.masked, ~full)
    assert (first.masked | second.masked).all()
    assert counts_of(second, 5) == counts_of(first, 5)
    torch.testing.assert_close(second.weight[second.masked], (5 / second.count.double())[second.masked])


def test_antithetic_draws_move_the_noise_level():
    draws = draws_of(blocks_of([4] * 1000), 4)
    counts = torch.stack([draw.count.view(-1, 4)[:, 0] for draw in draws])
    assert (counts.sort(0).values == torch.arange(1, 5)[:, None]).all()  # each block meets every count once


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": {"kind": "learned_count"}},
        {"noise": {"kind": "searched_clip", "every": 10, "widths": [0.5], "batches": 1}},
        {"growth": {"until": 0.8}, "layout": {"kind": "fixed", "size": 8}},
        {"growth": {"shape": "random"}},
        {"objective": {"draws_per_pass": 2}},
        {"objective": {"complementary": True}},
        {"objective": {"ar_weight_end": 0.0}},
        {"noise": {"kind": "exact_count", "left_bias": {0.0: 0.5, 1.0: 0.5}}},
        {"layout": {"kind": "adaptive_mixture", "sizes": [1, 4, 8], "every": 5, "batches": 1}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_way_trains_and_resumes_to_the_same_end(tmp_path, changes):
    from blockdiff.run_directory import RunDirectory

    runs: list[RunDirectory] = []
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        tree = tiny_config(folder, train={"steps": 24, "save_every": 9, "log_every": 4}, **changes)
        run = train(make_config(tree))
        if name == "resumed":  # as if killed after step 18, between two lines
            import shutil

            shutil.rmtree(run.trainer / "checkpoint-24")
            shutil.rmtree(run.checkpoint)
            run = train(make_config(tree), resume=True)
        runs.append(run)
    lines = [[json.loads(line) for line in run.metrics.read_text().splitlines()] for run in runs]
    losses = [[m for m in found if "loss" in m] for found in lines]
    assert losses[0] == losses[1]  # with the shares in use, if they are searched
    assert [m["step"] for m in losses[0]] == [4, 8, 12, 16, 20, 24]
    assert math.isfinite(losses[0][-1]["loss"])
    assert losses[0][-1]["loss"] < losses[0][0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"growth": {"shape": "wsd"}}, "growth wsd: give peak"),
        ({"growth": {"shape": "steps"}}, "growth.shape"),
        ({"growth": {}, "layout": {"kind": "full"}}, "the layout full has no block size that could grow"),
        (
            {"objective": {"complementary": True, "draws_per_pass": 3}},
            "objective.complementary needs noise",
        ),
        ({"noise": {"kind": "learned_count", "floor": 0}}, "floor must lie in"),
        ({"noise": {"kind": "searched_clip", "widths": [1.5]}}, "widths"),
    ],
)
def test_bad_curricula_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tiny_config(tmp_path, **changes))


def test_padding_and_packing_do_not_let_draws_see_one_another():
    """A packed batch of ragged documents, one draw changed: the other draw's losses stay as they were."""
    model = tiny.model("gpt_neox", "same")
    ids, tokens, _ = tiny.random_batch(5)
    block = block_numbers(tokens, maskable(tokens, model.spec.alignment))
    a, b, c = draws_of(block, 3)
    assert isinstance(tokens, TokenMap)
    losses = []
    for pair in ((a, b), (a, c)):
        stream = two_streams(ids, tokens, pair, model.spec.alignment, model.spec.mask_id or 0)
        with torch.no_grad():
            found = token_losses(model(stream.ids, stream.tokens, read=stream.reads.index), stream.reads)
        losses.append((found[: int(a.masked.sum())], found[int(a.masked.sum()) :]))
    torch.testing.assert_close(losses[0][0], losses[1][0], atol=1e-12, rtol=0)
    assert losses[0][1].shape != losses[1][1].shape or not torch.allclose(losses[0][1], losses[1][1])
