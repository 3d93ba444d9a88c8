"""Coverage over the reveal order: which tokens of a block are masked, not only how many."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from conftest import tiny_config
from test_cli import run

from blockdiff.api import load
from blockdiff.config import make_config
from blockdiff.coverage import SpanShare, compare, decode_calls, grid_calls, trained
from blockdiff.coverage.order import (
    EXACT,
    biases_of,
    extreme_ratio,
    largest_ratio,
    log_probability,
    order_gain,
    trained_log_probability,
)
from blockdiff.decode import POLICIES, Policy
from blockdiff.distributions import RandomOffset
from blockdiff.masking import left_masked
from blockdiff.noise import Bernoulli, Clipped, ExactCount, LearnedCount
from blockdiff.objectives import Alignment
from blockdiff.training import train

BETAS = (0.0, 0.3, 1.0, 3.0)


def sets_of(n: int, k: int) -> torch.Tensor:
    return torch.tensor([[i in chosen for i in range(n)] for chosen in combinations(range(n), k)])


@pytest.mark.parametrize("beta", BETAS)
def test_the_probability_of_a_set_is_that_of_the_enumerated_order(beta):
    for n in (1, 2, 5, 8):
        table = left_masked(n, beta)
        for k in range(1, n + 1):
            masked = sets_of(n, k)
            index = (masked.long() << torch.arange(n)).sum(1)
            torch.testing.assert_close(log_probability(masked, beta).exp(), table[index], atol=1e-12, rtol=1e-9)
    other = log_probability(sets_of(5, 2), beta + 0.5)
    assert not torch.allclose(other, log_probability(sets_of(5, 2), beta), atol=1e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_the_sets_of_long_blocks_have_probability_one_together(beta):
    """Far beyond what can be enumerated: leaving one of 40 tokens masked, or all but one."""
    for k in (1, 39):
        assert float(log_probability(sets_of(40, k), beta).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_training_masks_by_a_mixture_of_orders():
    noise = ExactCount({0.0: 0.25, 3.0: 0.75})
    masked = sets_of(5, 2)
    expected = 0.25 * log_probability(masked, 0.0).exp() + 0.75 * log_probability(masked, 3.0).exp()
    torch.testing.assert_close(trained_log_probability(biases_of(noise), masked).exp(), expected)
    for uniform in (Bernoulli(), Clipped(0.3, 0.8), LearnedCount(), ExactCount()):
        assert biases_of(uniform) == ((0.0, 1.0),)
    assert biases_of(ExactCount(1.0)) == ((1.0, 1.0),)


@pytest.mark.parametrize("asked", BETAS)
@pytest.mark.parametrize("only", BETAS)
def test_the_largest_ratio_is_at_an_end(only, asked):
    """What longer blocks rely on: among all sets, the leftmost or the rightmost k has the largest ratio."""
    for n in (2, 5, 9):
        for k in range(1, n):
            masked = sets_of(n, k)
            ratio = (log_probability(masked, asked) - log_probability(masked, only)).exp().max()
            assert extreme_ratio(only, asked, n, k) == pytest.approx(float(ratio), rel=1e-8)
            assert largest_ratio(((only, 1.0),), asked, n, k) == pytest.approx(float(ratio), rel=1e-8)


def test_a_mixture_covers_each_of_its_orders_by_its_share():
    mixture = ((0.0, 0.5), (3.0, 0.5))
    for n in (4, EXACT, EXACT + 6):
        for beta in (0.0, 3.0):
            assert 1 <= largest_ratio(mixture, beta, n, n // 2) <= 2 + 1e-9
        assert largest_ratio(((3.0, 1.0),), 0.0, n, n // 2) > 100
    exact = largest_ratio(mixture, 1.0, EXACT, 4)
    bound = min(extreme_ratio(beta, 1.0, EXACT, 4) / 0.5 for beta in (0.0, 3.0))
    assert exact <= bound * (1 + 1e-9)


def mu(noise):
    alignment = Alignment()
    return trained(RandomOffset(6), noise, alignment, (SpanShare(1, 40, 1.0),), ar_trained=True)


def decode(policy):
    return decode_calls(Alignment(), policy, prompt=1, block_size=6, new_tokens=24, context=64)


def test_the_ratio_of_a_decode_holds_the_order():
    uniform, biased = mu(ExactCount()), mu(ExactCount(3.0))
    order = decode(Policy("random", None, 1))
    same, other = compare(uniform, order), compare(biased, order)
    assert same.order_ratio == 1
    worst = max(largest_ratio(((3.0, 1.0),), 0.0, 5, k) for k in range(1, 6))
    assert other.order_ratio == pytest.approx(worst)
    assert other.covered
    assert other.max_ratio > 10 * same.max_ratio
    assert compare(biased, decode(Policy("random", None, 1, left_bias=3.0))).max_ratio == pytest.approx(same.max_ratio)
    assert compare(biased, decode(POLICIES["threshold"])).order_ratio is None  # it follows the confidence
    grid = {(1, 24, 6): 3}
    assert compare(biased, grid_calls(Alignment(), grid, 6)).order_ratio > 10
    assert compare(biased, grid_calls(Alignment(), grid, 6, left_bias=3.0)).order_ratio == 1
    excess = other.excess_risk_bound(0.1)
    assert excess == pytest.approx(0.1 * other.max_ratio)


def test_what_was_met_is_weighed_against_uniform_order():
    left_to_right = [tuple(slot >= step for slot in range(5)) for step in range(5)]
    backwards = [mask[::-1] for mask in left_to_right]
    biased = biases_of(ExactCount(1.0))
    assert order_gain(biases_of(ExactCount()), left_to_right) == pytest.approx(0)
    assert order_gain(biased, left_to_right) > 0 > order_gain(biased, backwards)
    by_hand = [
        math.log(float(left_masked(5, 1.0)[sum(1 << i for i in range(s, 5))]) * math.comb(5, s)) for s in range(1, 5)
    ]
    assert order_gain(biased, left_to_right) == pytest.approx(sum(by_hand) / 4)
    assert order_gain(biased, [(True, True)]) is None


def test_a_real_decode_is_traced_with_its_sets(tmp_path, capsys):
    from blockdiff.evaluate import output_coverage

    layout = {"kind": "random_offset", "size": 6}
    tree = tiny_config(
        tmp_path, layout=layout, noise={"kind": "exact_count", "left_bias": 3.0}, eval={"block_sizes": []}
    )
    checkpoint = train(make_config(tree)).checkpoint
    model = load(checkpoint)
    prompt = len(model.encode("the cat"))
    gains = {}
    for name, policy in {"left": Policy("random", None, 1, 3.0), "uniform": Policy("random", None, 1)}.items():
        outputs = model.generate(["the cat"] * 4, block_size=6, max_new_tokens=36, policy=policy)
        gains[name] = output_coverage(model, [prompt] * 4, outputs, block_size=6).order_gain
    assert gains["left"] > 0.5 > gains["uniform"]
    command = ["eval", "coverage", checkpoint, "--policy", "random_order", "--block-size", "6", "--prompt-tokens", "4"]
    _, out, _ = run(*command, "--max-new-tokens", "24", capsys=capsys)
    assert "by the reveal order" in out
    _, out, _ = run(*command, "--max-new-tokens", "24", "--left-bias", "3", capsys=capsys)
    assert "by the reveal order" not in out
