"""The fast training pass equals the textbook one: the loss and every gradient, on random ragged packed cases.

Most architectures round their norms to float32, whatever the weights; that is the tolerance.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from blockdiff import attention, cross_entropy, masks, reading, tiled
from blockdiff.distributions import Fixed, ScaleMixture
from blockdiff.layout import TokenMap
from blockdiff.model import BlockDiffusionModel, Past
from blockdiff.noise import Bernoulli, ExactCount
from blockdiff.passes import Objective
from blockdiff.reference import textbook

WINDOWED = {"mistral", "gemma2", "gemma3_text", "olmo3", "gpt_oss"}  # a 4D mask would override their windows
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ALIGNMENTS = [("same", "clean"), ("shift", "clean"), ("shift", "seed"), ("shift", "noisy")]
USUAL = Objective(ScaleMixture(6, {4: 0.3}), ExactCount(), ar_weight=0.5, draws=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Tiles and chunks so small that every case has several."""
    monkeypatch.setattr(masks, "TILE", 8)
    monkeypatch.setattr(cross_entropy, "CHUNK", 5 * tiny.VOCABULARY)


def learned(model, step, objective, seed, backbone=None):
    """Loss and gradients by name of one training pass over a random ragged packed batch."""
    ids, tokens, _ = tiny.random_batch(seed, rows=3)
    batch = {"input_ids": ids, "doc": tokens.doc, "prompt": tokens.prompt}
    terms = objective.terms(step, batch, model.spec.alignment, model.spec.mask_id, seed)
    loss = terms.loss(terms.tokens.sum(), objective.ar_weight)
    backbone = backbone or model.backbone
    backbone.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}


def by_the_book(model, objective, seed):
    network = copy.deepcopy(model.backbone)
    for module in (network.get_output_embeddings(), network.get_input_embeddings(), *network.modules()):
        module._forward_pre_hooks.clear()  # the copy has no code of ours
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks.clear()
    network.set_attn_implementation("sdpa")
    step = textbook(network, model.spec.clean_context, model.spec.mask_id)
    return learned(model, step, objective, seed, network)


def check_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def differ(found, expected):
    """Whether two gradients are further apart than what is taken for equal."""
    return any(not torch.allclose(found[1][name], gradient, **CLOSE) for name, gradient in expected[1].items())


@pytest.mark.parametrize("alignment", ALIGNMENTS, ids=" ".join)
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("active", ["all", "one"])
@pytest.mark.parametrize("ar_weight", [0.0, 0.5])
def test_loss_and_gradients_are_the_textbook_ones(alignment, draws, active, ar_weight):
    model = tiny.model("llama", *alignment)
    assert model.reading.narrows
    assert model.reading.plain_head
    objective = Objective(ScaleMixture(6, {4: 0.3}), ExactCount(), draws=draws, active=active, ar_weight=ar_weight)
    for seed in range(2):
        expected = by_the_book(model, objective, seed)
        found = learned(model, model, objective, seed)
        check_equal(found, expected)
    assert differ(learned(model, model, objective, seed + 1), expected)  # twin: another batch and another draw


def test_two_passes_are_one_where_nothing_is_noisy():
    """Blocks of one token: the second pass has a slot that nobody reads."""
    model = tiny.model("llama", "shift", "clean")
    objective = replace(USUAL, layout=Fixed(1), ar_weight=0.5)
    one, passes = learned(model, model, objective, 5), []
    note = model.backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    check_equal(learned(model, model, replace(objective, apart=True), 5), one)
    note.remove()
    assert len(passes) == 2
    assert differ(learned(model, model, replace(objective, apart=True), 6), one)


@pytest.mark.parametrize("alignment", ALIGNMENTS, ids=" ".join)
@pytest.mark.parametrize("clean_context", ["context_causal", "block_causal"])
def test_two_passes_are_one(alignment, clean_context, monkeypatch):
    """BD3-LM's first training algorithm: clean keys and values from a pass of their own, with their gradient."""
    model = tiny.model("llama", *alignment, clean_context=clean_context)
    objective = replace(USUAL, ar_weight=0.5 * (clean_context == "context_causal"))
    one, passes = learned(model, model, objective, 5), []
    note = model.backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    check_equal(learned(model, model, replace(objective, apart=True), 5), one)
    note.remove()
    assert len(passes) == 2
    ids, tokens, _ = tiny.random_batch(5, rows=1)
    both = TokenMap.cat(tokens.as_noisy(), tokens)
    with pytest.raises(ValueError, match="give no past"):  # which would be ignored
        model(torch.cat([ids, ids], 1), both, past=Past(), apart=True)
    right = BlockDiffusionModel._clean_pass

    def without_gradient(*args):
        with torch.no_grad():
            return right(*args)

    monkeypatch.setattr(BlockDiffusionModel, "_clean_pass", without_gradient)  # twin: keys that do not learn
    assert differ(learned(model, model, replace(objective, apart=True), 5), one)


@pytest.mark.parametrize("kind", [kind for kind in tiny.SUPPORTED if kind not in WINDOWED])
@pytest.mark.parametrize("clean_context", ["context_causal", "block_causal"])
def test_every_architecture_trains_as_the_textbook_has_it(kind, clean_context):
    model = tiny.model(kind, clean_context=clean_context)
    objective = Objective(USUAL.layout, Bernoulli(), draws=2, ar_weight=0.5 * (clean_context == "context_causal"))
    expected = by_the_book(model, objective, 3)
    found = learned(model, model, objective, 3)
    check_equal(found, expected)


@pytest.mark.parametrize("kind", tiny.SUPPORTED)
def test_what_is_left_out_changes_nothing_on_any_architecture(kind):
    """Windows, soft caps and sinks included: against our own pass with a whole last layer and all logits at once."""
    model = tiny.model(kind)
    found = learned(model, model, USUAL, 5)
    assert model.reading.narrows == (kind != "gpt2")  # which reshapes its rows to the input's after the last layer
    assert model.reading.plain_head == (kind not in ("gemma2", "cohere"))  # which cap and scale their logits
    model.reading.narrows = model.reading.plain_head = False
    check_equal(found, learned(model, model, USUAL, 5))


def rows_of_the_last_layer(model, objective, seed=5):
    seen = []
    layer = model.reading.last_layer.mlp
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:2].numel()))
    learned(model, model, objective, seed)
    hook.remove()
    return sum(seen)


def test_the_last_layer_runs_for_read_rows_alone():
    model = tiny.model("llama")
    objective = Objective(Fixed(4), ExactCount())
    narrow = rows_of_the_last_layer(model, objective)
    model.reading.narrows = False
    assert narrow < 0.6 * rows_of_the_last_layer(model, objective)


def test_a_last_layer_of_the_wrong_rows_is_told_from_the_right_one(monkeypatch):
    """Twin of the equalities: the neighbours' rows give other gradients."""
    model = tiny.model("llama")
    right = learned(model, model, USUAL, 5)
    take = reading._take
    monkeypatch.setattr(reading, "_take", lambda values, slots, *rest: take(values, (slots - 1).clamp(min=0), *rest))
    assert differ(learned(model, model, USUAL, 5), right)


def test_a_narrowed_layer_that_differs_is_found_at_load(monkeypatch):
    take = reading._take
    monkeypatch.setattr(reading, "_take", lambda values, slots, *rest: take(values, slots.flip(1), *rest))
    model = tiny.model("llama")
    assert not model.reading.narrows
    monkeypatch.undo()
    check_equal(learned(model, model, USUAL, 5), by_the_book(model, USUAL, 5))


def test_a_soft_cap_is_found_however_small_the_logits_are():
    small = tiny.model("gemma2", initializer_range=1e-3)
    assert not small.reading.plain_head
    assert tiny.model("gemma2", initializer_range=1e-3, final_logit_softcapping=None).reading.plain_head


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_layers_give_the_same_gradients(checkpointing):
    model = tiny.model("llama")
    expected = by_the_book(model, USUAL, 7)
    model.train()
    if checkpointing:
        model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    runs = []
    hook = model.backbone.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    check_equal(learned(model, model, USUAL, 7), expected)
    hook.remove()
    assert len(runs) == 1 + checkpointing


@pytest.mark.parametrize(("dtype", "bias", "excluded"), list(product([torch.float64], [False, True], [None, 4])))
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_cross_entropy_from_hidden_states_in_chunks(dtype, bias, excluded, rows, monkeypatch):
    torch.manual_seed(rows)
    head = nn.Linear(8, tiny.VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    target = torch.randint(5, tiny.VOCABULARY, (rows,))
    weight = torch.rand(rows, dtype=dtype)

    def gradients(losses):
        inputs = [hidden, *head.parameters()]
        return [losses.detach(), *torch.autograd.grad((losses * weight).sum(), inputs)]

    logits = head(hidden)
    if excluded is not None:
        logits = logits.index_fill(1, torch.tensor([excluded]), -torch.inf)
    expected = gradients(F.cross_entropy(logits, target, reduction="none"))
    for chunk in (1, 5 * tiny.VOCABULARY, 1 << 24):
        monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
        losses = cross_entropy.linear_cross_entropy(hidden, head.weight, head.bias, target, excluded)
        for got, right in zip(gradients(losses), expected, strict=True):
            torch.testing.assert_close(got, right)
    other = cross_entropy.linear_cross_entropy(hidden, head.weight, head.bias, target, 3 if excluded is None else None)
    assert not torch.allclose(other, expected[0])  # twin: the excluded column counts


def test_half_precision_heads_are_as_precise_as_their_logits():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 16), nn.Linear(16, 50, bias=False)
    target = torch.randint(50, (9,))
    exact = F.cross_entropy(head(hidden), target, reduction="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cross_entropy.linear_cross_entropy(hidden, head.weight, None, target)
        plain = cross_entropy.cross_entropy(head(hidden), target)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain)
    assert 0 < float((mixed - exact).detach().abs().max()) < 0.05


@pytest.mark.parametrize("clean_context", ["context_causal", "block_causal"])
def test_tiles_with_their_own_backward_equal_automatic_differentiation(clean_context, monkeypatch):
    _, tokens, _ = tiny.random_batch(4, rows=2)
    stream = TokenMap.cat(tokens.as_noisy(), tokens)
    torch.manual_seed(0)
    query = torch.randn(2, 4, stream.shape[1], 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, stream.shape[1], 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pull = torch.randn(2, 4, stream.shape[1], 8, dtype=torch.float64)

    def gradients(kernel, window):
        seen = masks.Visibility(stream, stream, clean_context)
        out = kernel(query, key, value, seen, window, 0.3, 0.0)
        return [out.detach(), *torch.autograd.grad((out * pull).sum(), (query, key, value))]

    for window in (None, 4):
        assert tiled.runs(query, key, value)
        found = gradients(attention._sdpa, window)
        expected = gradients(attention.eager_attention, window)
        with monkeypatch.context() as patched:
            patched.setattr(tiled, "runs", lambda *_: False)
            slow = gradients(attention._sdpa, window)
        for got, right, other in zip(found, expected, slow, strict=True):
            torch.testing.assert_close(got, right)
            torch.testing.assert_close(other, right)
    assert not torch.allclose(gradients(attention._sdpa, None)[2], found[2])  # twin: the window matters
