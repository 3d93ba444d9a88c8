"""What training draws: a function of the seed and of a row's place in the stream, and spread evenly over rows."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from blockdiff.data import Document, PackedRows, TrainingStream, collate_numbered
from blockdiff.distributions import Full, Mixture, ScaleMixture
from blockdiff.draws import Draws
from blockdiff.evaluate import bound
from blockdiff.noise import Bernoulli, ExactCount, Noise
from blockdiff.passes import Objective


def document(length: int, seed: int) -> Document:
    ids = np.random.default_rng(seed).integers(3, tiny.VOCABULARY, length).astype(np.int32)
    return Document(ids, np.arange(length) < 2, f"d{seed}")


def items(count: int) -> list[tuple[int, list[Document]]]:
    """Rows of different lengths and numbers of documents, as a stream gives them."""
    return [
        (number, [document(5 + 3 * (number % 4 + d), number) for d in range(number % 3 + 1)]) for number in range(count)
    ]


OBJECTIVES = {
    "plain": Objective(ScaleMixture(6, {4: 0.3}), ExactCount(), ar_weight=0.5),
    "bernoulli, mixture": Objective(Mixture({2: 1, 4: 1}), Bernoulli(), draws=3),
    "one active, prefix noise": Objective(ScaleMixture(4), ExactCount(), active="one", prefix_noise=0.4),
    "one active, suffix": Objective(ScaleMixture(4), ExactCount(), active="one", suffix_visible=0.5),
    "annealed, complementary": Objective(ScaleMixture(4), ExactCount(), complementary=True, bidirectional=0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_rows_loss_does_not_depend_on_the_rows_beside_it(name):
    """One batch of six, three of two, six of one and another order: the same losses of every document."""
    model, objective, rows = tiny.model("gpt_neox"), OBJECTIVES[name], items(6)

    def losses(batches: list[list[int]], seed: int = 3) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for numbers in batches:
            batch = collate_numbered([rows[number] for number in numbers])
            with torch.no_grad():
                terms = objective.terms(model, batch, model.spec.alignment, model.spec.mask_id or 0, seed)
            each = iter((terms.blocks + objective.ar_weight * terms.ar).tolist())
            for number in numbers:
                found[number] = [next(each) for _ in rows[number][1]]
        return found

    whole = losses([[0, 1, 2, 3, 4, 5]])
    for batches in ([[0, 1], [2, 3], [4, 5]], [[n] for n in range(6)], [[5, 0, 3], [4, 2, 1]]):
        other = losses(batches)
        for number, values in whole.items():
            assert other[number] == pytest.approx(values, rel=1e-10)
    other = losses([[0, 1, 2, 3, 4, 5]], seed=4)
    assert all(other[number] != pytest.approx(values, rel=1e-6) for number, values in whole.items() if number % 3)


@pytest.mark.parametrize("law", [ExactCount(), Bernoulli(t_min=0.0)])
def test_noise_levels_are_spread_evenly_over_consecutive_rows(law: Noise):
    """Rows of one block each, the hardest case: the levels of any 64 rows in a run lie closer to even than random."""
    levels = []
    for rows in torch.arange(4096).split(64):
        draws = Draws.of(0, rows)
        u_block, _ = draws.noise(torch.arange(64), torch.arange(64), 1)
        assert u_block.dtype == torch.float64
        levels.append(u_block.sort().values)
    ideal = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    worst = max(float((found - ideal).abs().max()) for found in levels)
    random = float(
        (torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values - ideal)
        .abs()
        .max()
    )
    assert worst < 0.05 < random  # 64 random levels miss by about 0.1
    together = torch.cat(levels)
    assert float(together.mean()) == pytest.approx(0.5, abs=0.002)
    assert float(together.var()) == pytest.approx(1 / 12, abs=0.001)


def test_levels_within_a_row_are_even_and_shuffled():
    u_block, u_token = Draws.of(1, torch.tensor([7])).noise(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 2)
    assert sorted((u_block * 1000).long().tolist()) == list(range(1000))
    assert abs(float(torch.corrcoef(torch.stack([u_block[1:], u_block[:-1]]))[0, 1])) < 0.15
    assert u_token.shape == (2, 1000)


def test_the_bound_of_one_block_stays_unbiased():
    """Over rows, the mean loss of whole-span blocks is the bound that exact enumeration gives."""
    model = tiny.model("gpt_neox")
    one = document(7, 0)
    objective = Objective(Full(), ExactCount())
    with torch.no_grad():
        batch = collate_numbered([(number, [one]) for number in range(3000)])
        terms = objective.terms(model, batch, model.spec.alignment, model.spec.mask_id or 0, 0)
    expected = 5 * bound(model, [one], [5], exact=True)[0].nats_per_token
    assert float(terms.blocks.mean()) == pytest.approx(expected, abs=4 * float(terms.blocks.std()) / 3000**0.5)


def test_the_stream_passes_through_all_rows_in_a_new_order_each_time():
    rows = PackedRows([[document(5, number)] for number in range(7)])
    stream = TrainingStream(rows, seed=1, length=20)
    names = [stream[k][1][0].name for k in range(20)]
    assert [number for number, _ in (stream[k] for k in range(20))] == list(range(20))
    assert sorted(names[:7]) == sorted(names[7:14]) == sorted(f"d{n}" for n in range(7))
    assert names[:7] != names[7:14]
    assert [stream[k][1][0].name for k in (19, 3, 11)] == [names[19], names[3], names[11]]  # any item at any time
    assert [TrainingStream(rows, seed=2, length=20)[k][1][0].name for k in range(7)] != names[:7]
