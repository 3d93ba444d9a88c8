"""Layouts, token maps and layout distributions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdiff import distributions
from blockdiff.distributions import (
    AR,
    AdaptiveMixture,
    Fixed,
    Full,
    Geometric,
    LayoutDistribution,
    LogUniform,
    Mixture,
    RandomOffset,
    ScaleMixture,
    Uniform,
)
from blockdiff.layout import Layout, Spans, TokenMap

EVERY: list[LayoutDistribution] = [
    Fixed(4),
    Fixed(5, offset=3),
    RandomOffset(6),
    Mixture({1: 0.2, 4: 0.5, 16: 0.3}),
    Uniform(7),
    LogUniform(9),
    Geometric(3.5),
    ScaleMixture(16),
    ScaleMixture(16, {4: 0.2, 8: 0.3}),
    AdaptiveMixture((1, 3, 8), {1: 0.5, 3: 0.2, 8: 0.3}),
    Full(),
    AR(),
]


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 5), max_size=4)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_explicit_layouts_come_back(documents):
    row = [Layout(prompt, tuple(sizes)) for prompt, sizes in documents if prompt + sum(sizes) > 0]
    if not row:
        return
    tokens = TokenMap.from_layouts([row])
    assert tokens.layouts() == [row]
    for number, layout in enumerate(row):
        mine = tokens[:, tokens.doc[0] == number]
        assert mine.position[0].tolist() == list(range(layout.length))
        assert int(mine.scored.sum()) == sum(layout.blocks)
        starts = mine.start[0][mine.scored[0]].tolist()
        expected, at = [], layout.prompt
        for size in layout.blocks:
            expected += [at] * size
            at += size
        assert starts == expected


def test_padding_belongs_to_no_document():
    tokens = TokenMap.from_layouts([[Layout(1, (2,))], [Layout(2, (4, 1))]])
    assert tokens.doc[0].tolist() == [0, 0, 0, -1, -1, -1, -1]
    assert not tokens.scored[0, 3:].any()


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match="must all be at least 1"):
        Layout(2, (3, 0))
    with pytest.raises(ValueError, match="prompt has -1 tokens"):
        Layout(-1, (3,))


def test_spans_are_the_runs_between_prompts():
    """A chat has several prompts in one document: each run of scored tokens is a span of its own."""
    doc = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]])
    prompt = torch.tensor([[True, False, False, True, False, False, True, False, False, False]])
    spans = Spans.of(doc, prompt)
    assert spans.span.tolist() == [[-1, 0, 0, -1, 1, 1, -1, 2, 2, -1]]
    assert spans.lengths.tolist() == [2, 2, 2]
    placed = spans.place(torch.tensor([[True, False], [True, True], [True, False]]))
    assert placed.nonzero()[:, 1].tolist() == [1, 4, 5, 7]
    tokens = TokenMap.build(doc, prompt, placed)
    assert tokens.start[0].tolist()[:6] == [0, 1, 1, 3, 4, 5]


@pytest.mark.parametrize("distribution", EVERY, ids=repr)
@pytest.mark.parametrize("length", [1, 2, 13, 40])
def test_the_table_of_configurations_covers_every_token_once(distribution, length):
    table = distribution.configurations(length)
    sizes = torch.arange(length + 1, dtype=torch.float64)
    assert float((table.sum(0) * sizes).sum()) == pytest.approx(length, rel=1e-9)
    assert float(distribution.token_share(length).sum()) == pytest.approx(1, rel=1e-9)
    place = torch.arange(length)[:, None]
    assert not table[(place + torch.arange(length + 1)[None]) > length].any()  # no block leaves the span
    torch.testing.assert_close(distribution.block_counts(length), table.sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("distribution", EVERY, ids=repr)
def test_draws_have_the_stated_frequencies_and_support(distribution):
    length, count = 11, 8000
    lengths = torch.full((count,), length)
    starts = distribution.draw(lengths, torch.Generator().manual_seed(0))
    assert starts.shape == (count, length)
    assert starts[:, 0].all()
    drawn = torch.zeros(length, length + 1, dtype=torch.float64)
    for row in starts[:].unique(dim=0, return_counts=True)[0]:
        times = int((starts == row).all(1).sum())
        edges = [*row.nonzero()[:, 0].tolist(), length]
        for a, b in pairwise(edges):
            drawn[a, b - a] += times
    table = distribution.configurations(length)
    assert not drawn[~distribution.support(length)].any()
    error = (table * (1 - table).clamp(min=0.05) / count).sqrt()
    assert ((drawn / count - table).abs() <= 5 * error + 1e-9).all()


def test_ragged_spans_are_partitioned_as_if_alone():
    """Rows of different lengths are drawn together; each is a whole partition of its own span."""
    lengths = torch.tensor([1, 7, 30])
    for distribution in EVERY:
        starts = distribution.draw(lengths, torch.Generator().manual_seed(1))
        assert starts.shape == (3, 30)
        assert starts[:, 0].all()


@pytest.mark.parametrize(("distribution", "sizes"), [(Uniform(8), range(1, 9)), (LogUniform(8), range(1, 9))])
def test_names_describe_token_shares(distribution, sizes):
    """In a long text `uniform` gives every size the same share of the tokens, `log_uniform` a share like 1 / size."""
    share = distribution.token_share(2000)[list(sizes)]
    expected = torch.ones(8) if isinstance(distribution, Uniform) else 1 / torch.arange(1, 9)
    torch.testing.assert_close(share, (expected / expected.sum()).double(), rtol=0.02, atol=1e-3)


def test_ar_and_full_are_the_two_ends():
    assert AR().token_share(50)[1] == 1
    assert Full().token_share(50)[50] == 1
    assert Geometric(1).token_share(50)[1] == pytest.approx(1)


@pytest.mark.parametrize("count", range(2, 40))
def test_shares_that_were_saved_come_back_to_the_last_digit(count):
    for kind in (Mixture, AdaptiveMixture):
        made = kind(dict.fromkeys(range(1, count + 1), 1.0)) if kind is Mixture else kind(tuple(range(1, count + 1)))
        assert distributions.from_dict(distributions.to_dict(made)) == made


def test_scale_mixture_covers_every_configuration_and_its_atoms_have_their_shares():
    distribution = ScaleMixture(32, {8: 0.4})
    support = distribution.support(64)
    place, size = torch.arange(64)[:, None], torch.arange(65)[None]
    assert support[(size > 0) & (place + size <= 64)].all()
    assert not Fixed(8).support(64)[3].any()  # twin: a fixed grid has no block there
    without = ScaleMixture(32).token_share(512)[8]
    assert distribution.token_share(512)[8] == pytest.approx(0.4 * RandomOffset(8).token_share(512)[8] + 0.6 * without)


@pytest.mark.parametrize("distribution", EVERY, ids=repr)
def test_descriptions_are_read_back(distribution):
    import json

    described = json.loads(json.dumps(distributions.to_dict(distribution)))
    assert distributions.from_dict(described) == distribution


def test_every_registered_distribution_is_tested():
    # a user's own ones: test_own_layouts.py
    assert {d.kind for d in EVERY} == set(distributions.DISTRIBUTIONS) - {"own"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "block size 0 is not possible"),
        (lambda: Fixed(4, -1), "offset -1 is negative"),
        (lambda: Mixture({}), "must be positive"),
        (lambda: Mixture({4: -1.0}), "must be positive"),
        (lambda: Geometric(0.5), "mean block length 0.5 is not possible"),
        (lambda: ScaleMixture(8, {4: 0.7, 8: 0.5}), "above 1"),
        (lambda: ScaleMixture(8, {4: 0.0}), "give a positive share"),
        (lambda: AdaptiveMixture((4,)), "two or more different"),
        (lambda: AdaptiveMixture((4, 8), {4: 1.0}), "shares are of"),
        (lambda: AdaptiveMixture((4, 8), reference={4: 1.0, 9: 2.0}), "reference are of"),
        (lambda: AdaptiveMixture((4, 8), floor=0.0), "floor in"),
        (lambda: distributions.from_dict({"kind": "spiral"}), "layout kind 'spiral' is unknown"),
    ],
)
def test_bad_distributions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_random_batches_have_many_shapes():
    shapes = {tuple(map(tuple, tiny.random_batch(seed)[2])) for seed in range(5)}
    assert len(shapes) == 5
