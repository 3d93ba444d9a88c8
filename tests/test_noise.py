"""Noise: counts, weights, strata, and the identity behind the exact-count estimator."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdiff import noise
from blockdiff.masking import left_masked, rank_in_block, subset, systematic
from blockdiff.noise import Bernoulli, Clipped, ExactCount
from blockdiff.rng import uniform

ragged = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def blocks_of(sizes: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@given(ragged, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_exact_count_masks_exactly_k_of_each_block(sizes, seed):
    block = blocks_of(sizes)
    draw = ExactCount().draw(block, torch.Generator().manual_seed(seed))
    masked = torch.bincount(block[draw.masked], minlength=len(sizes))
    per_block = draw.count[torch.cumsum(torch.tensor([0, *sizes[:-1]]), 0)]
    assert masked.tolist() == per_block.tolist()
    assert (per_block >= 1).all()
    assert (per_block <= torch.tensor(sizes)).all()
    torch.testing.assert_close(draw.weight[draw.masked], (draw.size / draw.count.double())[draw.masked])


def test_counts_are_uniform_and_places_are_uniform():
    block = blocks_of([5] * 20000)
    draw = ExactCount().draw(block, torch.Generator().manual_seed(0))
    counts = torch.bincount(draw.count.view(-1, 5)[:, 0], minlength=6)
    assert counts[1:].tolist() == [4000] * 5  # stratified: exactly even
    share = draw.masked.view(-1, 5).double().mean(0)
    torch.testing.assert_close(share, torch.full((5,), 0.6, dtype=torch.float64), atol=0.02, rtol=0)


def test_a_block_of_one_is_always_masked_with_weight_one():
    draw = ExactCount().draw(blocks_of([1] * 50), torch.Generator().manual_seed(0))
    assert draw.masked.all()
    assert (draw.weight == 1).all()


@pytest.mark.parametrize("beta", [0.0, 0.6, 40.0])
def test_a_left_biased_order_leaves_each_mask_set_as_often_as_it_should(beta):
    n, copies = 4, 60000
    draw = ExactCount(beta).draw(blocks_of([n] * copies), torch.Generator().manual_seed(0))
    masked = draw.masked.view(copies, n)
    which = (masked.long() << torch.arange(n)).sum(1)
    seen = torch.bincount(which, minlength=2**n).double() / copies
    torch.testing.assert_close(seen[1:], left_masked(n, beta)[1:] / n, atol=0.006, rtol=0)  # k is uniform in 1..n
    assert (seen[1:] - left_masked(n, beta + 0.5)[1:] / n).abs().max() > 0.006 or beta == 40
    pull = torch.exp(-beta * torch.arange(n).double())
    expected = n * pull / (pull * masked).sum(1, keepdim=True)
    torch.testing.assert_close(draw.weight.view(copies, n)[masked], expected[masked])
    if beta == 40:  # left to right: what is masked is a suffix, and its first slot has all the weight
        assert set(which.tolist()) == {0b1000, 0b1100, 0b1110, 0b1111}


def test_a_mixture_of_orders_draws_each_with_its_share_and_keeps_the_strata():
    law = ExactCount({0: 1, 40.0: 3})
    draw = law.draw(blocks_of([4] * 40000), torch.Generator().manual_seed(0))
    counts = torch.bincount(draw.count.view(-1, 4)[:, 0], minlength=5)[1:]
    assert (counts - 10000).abs().max() <= 2
    masked = draw.masked.view(-1, 4)
    suffix = (masked.long().diff(dim=1) >= 0).all(1).double()
    at_random = (1 / 4) * (1 / 4 + 1 / 6 + 1 / 4 + 1)  # uniform order: the suffix among C(4, k) sets
    assert suffix.mean() == pytest.approx(0.75 + 0.25 * at_random, abs=0.01)


def test_strata_are_even_and_shuffled():
    values = systematic(1000, torch.Generator().manual_seed(0))
    assert sorted((values * 1000).long().tolist()) == list(range(1000))
    neighbours = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
    assert abs(neighbours) < 0.15  # unshuffled strata would give 1


@given(ragged, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_ranks_are_permutations_within_blocks(sizes, seed):
    block = blocks_of(sizes)
    key = torch.rand(len(block), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rank = rank_in_block(block, key)
    for number, size in enumerate(sizes):
        mine = block == number
        assert sorted(rank[mine].tolist()) == list(range(size))
        assert rank[mine].argmax() == key[mine].argmax()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_linear"])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_every_schedule_weights_a_mask_set_as_exact_count_does(schedule, n):
    """Integral over t of weight(t) P(M | t) = 1 / (k C(n, k)): the bound does not depend on the schedule."""
    law = Bernoulli(schedule)
    t = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    rate, weight = law.mask_rate(t), law.rate_weight(t)
    for k in range(1, n + 1):
        total = float((weight * rate**k * (1 - rate) ** (n - k)).mean())
        expected = 1 / (k * math.comb(n, k))
        tolerance = 1.1e-3 if schedule == "log_linear" else 1e-5  # log-linear stops at a rate of 1 - 1e-3
        assert total == pytest.approx(expected, abs=tolerance)
        if n > 1:
            assert total != pytest.approx(expected * 1.2, abs=tolerance)


def test_enumerated_subsets_are_all_subsets_with_the_weights_of_the_identity():
    block = blocks_of([3, 1, 2])
    seen: dict[int, dict[tuple[int, ...], float]] = {0: {}, 1: {}, 2: {}}
    for index in range(1, 8):
        draw = subset(block, index)
        for number in range(3):
            mine = block == number
            places = tuple(draw.masked[mine].nonzero()[:, 0].tolist())
            if places:
                assert places not in seen[number]
                seen[number][places] = float(draw.weight[mine][draw.masked[mine]][0])
    assert [len(seen[number]) for number in range(3)] == [7, 1, 3]
    for number, n in ((0, 3), (1, 1), (2, 2)):
        for places, weight in seen[number].items():
            assert weight == pytest.approx(1 / (len(places) * math.comb(n, len(places))))


def test_exact_count_has_far_less_variance_than_bernoulli():
    """With losses that depend on the count alone, the closed-form spread of one block's estimate."""
    size, copies = 8, 20000
    block = blocks_of([size] * copies)
    spread = {}
    for law in (ExactCount(), Bernoulli()):
        draw = law.draw(block, torch.Generator().manual_seed(0))
        loss = (2.5 + 1.5 * draw.count / size) * draw.masked * draw.weight
        spread[law.kind] = float(loss.view(copies, size).sum(1).var()) / size**2
    assert spread["bernoulli"] > 10 * spread["exact_count"]


def test_bernoulli_and_clipped_rates():
    block = blocks_of([1] * 40000)
    draw = Clipped(0.3, 0.8).draw(block, torch.Generator().manual_seed(0))
    assert draw.masked.double().mean() == pytest.approx(0.55, abs=0.01)
    assert float(draw.weight.min()) >= 1 / 0.8 - 1e-9
    assert float(draw.weight.max()) <= 1 / 0.3 + 1e-9
    assert not Clipped(0.3, 0.8).is_bound
    assert ExactCount().is_bound
    assert Bernoulli(t_min=0).is_bound
    assert not Bernoulli().is_bound  # what lies below t_min is missing
    draw = Bernoulli("cosine").draw(block, torch.Generator().manual_seed(0))
    assert draw.masked.double().mean() == pytest.approx(1 - 2 / math.pi, abs=0.01)


@pytest.mark.parametrize(
    "law",
    [
        ExactCount(),
        ExactCount(0.5),
        ExactCount({0.0: 0.5, 1.5: 0.5}),
        Bernoulli(),
        Bernoulli("cosine", 0.01),
        Clipped(0.2, 0.9),
    ],
    ids=repr,
)
def test_descriptions_are_read_back(law):
    assert noise.from_dict(json.loads(json.dumps(noise.to_dict(law)))) == law


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactCount(-1), "left_bias -1 must be 0"),
        (lambda: ExactCount({0.5: 0}), "needs positive shares"),
        (lambda: Clipped(0.9, 0.2), "must satisfy 0 < low <= high"),
        (lambda: Bernoulli("sigmoid"), "schedule 'sigmoid' is unknown"),
        (lambda: Bernoulli("linear", 1.0), r"t_min 1.0 must lie in \[0, 1\)"),
        (lambda: noise.from_dict({"kind": "pink"}), "noise kind 'pink' is unknown"),
    ],
)
def test_bad_noise_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_maskable_tokens_is_no_noise():
    draw = ExactCount().draw(torch.zeros(0, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert len(draw.masked) == 0


def test_keyed_numbers_are_uniform_independent_and_pure():
    grid = uniform(7, torch.arange(300)[:, None], torch.arange(300)[None])
    assert grid.shape == (300, 300)
    assert float(grid.mean()) == pytest.approx(0.5, abs=0.004)
    assert float(grid.var()) == pytest.approx(1 / 12, abs=0.002)
    assert (torch.histc(grid.float(), 20, 0, 1) - 4500).abs().max() < 5 * math.sqrt(4500)
    for other in (grid[1:], grid.T):
        size = min(other.shape)
        pair = torch.stack([grid[:size, :size].flatten(), other[:size, :size].flatten()])
        off_diagonal = pair[:, torch.eye(size).flatten() == 0]
        assert abs(torch.corrcoef(off_diagonal)[0, 1]) < 0.02
    assert uniform(7, 3, 5) == grid[3, 5]
    assert uniform(8, 3, 5) != grid[3, 5]
    assert float(grid.min()) > 0
    assert float(grid.max()) < 1


NOISES = [
    ExactCount(),
    Bernoulli(),
    Bernoulli("cosine"),
    Bernoulli("log_linear", t_min=0.2),
    Clipped(0.3, 0.8),
    Clipped(0.5, 0.5),
]


@pytest.mark.parametrize("kind", NOISES, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_count_probabilities_are_the_frequencies_of_draws(kind, n):
    blocks = 20000
    draw = kind.draw(blocks_of([n] * blocks), torch.Generator().manual_seed(n))
    counted = torch.bincount(draw.masked.view(blocks, n).sum(1), minlength=n + 1) / blocks
    probability = kind.count_probability(n)
    assert float(probability.sum()) == pytest.approx(1, abs=1e-12)
    error = (probability * (1 - probability) / blocks).sqrt()
    assert ((counted - probability).abs() <= 5 * error + 1e-4).all()


def test_count_probabilities_in_closed_form():
    for n in (1, 4, 33, 700):
        flat = torch.full((n + 1,), 1 / (n + 1), dtype=torch.float64)
        torch.testing.assert_close(Bernoulli("linear", t_min=0.0).count_probability(n), flat)
        assert ExactCount().count_probability(n).tolist() == [0.0, *[1 / n] * n]
    for n in (3, 700):  # the integral of rate^n over [low, high]
        expected = (0.8 ** (n + 1) - 0.3 ** (n + 1)) / ((n + 1) * 0.5)
        assert float(Clipped(0.3, 0.8).count_probability(n)[n]) == pytest.approx(expected, rel=1e-9)
    assert Clipped(0.5, 0.5).count_probability(2).tolist() == pytest.approx([0.25, 0.5, 0.25])
    assert all(kind.count_probability(0).tolist() == pytest.approx([1.0]) for kind in NOISES)
