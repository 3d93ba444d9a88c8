"""The identities the whole library rests on, in float64 on random models, each with its "must differ" twin.

gpt_neox has rotary positions and, unlike the RMSNorm families, no rounding to float32 inside.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from blockdiff.data import Document
from blockdiff.evaluate import bound
from blockdiff.layout import Layout, TokenMap
from blockdiff.masking import Corruption, subset
from blockdiff.model import BlockDiffusionModel
from blockdiff.noise import ExactCount
from blockdiff.objectives import Alignment, block_numbers, maskable, score, token_losses, two_streams
from blockdiff.reference import Block, Reference, blocks

CONVENTIONS = [("shift", "clean"), ("shift", "seed"), ("same", "clean")]
CONTEXTS = ["context_causal", "block_causal"]


def draw(tokens: TokenMap, alignment: Alignment, seed: int) -> Corruption:
    block = block_numbers(tokens, maskable(tokens, alignment))
    return ExactCount().draw(block, torch.Generator().manual_seed(seed))


def losses_per_document(
    model: BlockDiffusionModel,
    ids: Tensor,
    tokens: TokenMap,
    corruption: Corruption,
    alignment: Alignment | None = None,
) -> Tensor:
    stream = two_streams(ids, tokens, corruption, alignment or model.spec.alignment, model.spec.mask_id or 0)
    logits = model(stream.ids, stream.tokens, read=stream.reads.index)
    return score(token_losses(logits, stream.reads), stream.reads, tokens, int(tokens.doc.max()) + 1).blocks


def reference(model: BlockDiffusionModel) -> Reference:
    return Reference(
        tiny.native_denoise(model), model.spec.mask_id or 0, model.spec.alignment, model.spec.clean_context
    )


def one_by_one(model: BlockDiffusionModel, ids: Tensor, tokens: TokenMap, layouts, corruption: Corruption) -> Tensor:
    """The same losses, each block alone, by the reference."""
    slow = reference(model)
    can = maskable(tokens, model.spec.alignment)
    masked, weight = torch.zeros_like(can), torch.zeros(can.shape, dtype=torch.float64)
    masked[can], weight[can] = corruption.masked, corruption.weight
    totals = []
    for row, documents in enumerate(layouts):
        at = 0
        for layout in documents:
            total = torch.zeros((), dtype=torch.float64)
            place = at + layout.prompt
            for block in blocks(ids[row, at : at + layout.length].tolist(), layout):
                size = len(block.tokens)
                hidden = masked[row, place : place + size].nonzero()[:, 0].tolist()
                total = total + slow.first_loss(block)
                for i, loss in slow.losses(block, hidden).items():
                    total = total + weight[row, place + i] * loss
                place += size
            totals.append(total)
            at += layout.length
    return torch.stack(totals)


def ar_loss(model: BlockDiffusionModel, ids: Tensor, prompt: int) -> Tensor:
    """transformers' own next-token loss of the scored tokens, by its own attention; [MASK] cannot be predicted."""
    ours = model.backbone.config._attn_implementation
    model.backbone.set_attn_implementation("sdpa")
    logits = model.backbone(input_ids=ids[None]).logits[0].clone()
    model.backbone.set_attn_implementation(ours)
    logits[:, model.spec.mask_id] = -torch.inf
    return F.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="sum")


@pytest.mark.parametrize("clean_context", CONTEXTS)
@pytest.mark.parametrize(("prediction", "boundary"), CONVENTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_one_pass_equals_blocks_one_by_one(prediction, boundary, clean_context, seed):
    """Losses and gradients, for random ragged layouts, packed documents and prompts."""
    model = tiny.model("gpt_neox", prediction, boundary, clean_context)
    ids, tokens, layouts = tiny.random_batch(seed)
    corruption = draw(tokens, model.spec.alignment, seed)
    fast = losses_per_document(model, ids, tokens, corruption)
    slow = one_by_one(model, ids, tokens, layouts, corruption)
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)

    parameters = list(model.parameters())
    fast_gradients = torch.autograd.grad(fast.sum(), parameters, allow_unused=True)
    slow_gradients = torch.autograd.grad(slow.sum(), parameters, allow_unused=True)
    for a, b in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("clean_context", CONTEXTS)
def test_one_pass_differs_when_the_context_rule_does(clean_context):
    """The twin: scored under the other clean context, the same batch gives other losses."""
    model = tiny.model("gpt_neox", "same", clean_context=clean_context)
    ids, tokens, _ = tiny.random_batch(1)
    corruption = draw(tokens, model.spec.alignment, 1)
    here = losses_per_document(model, ids, tokens, corruption)
    other = tiny.model("gpt_neox", "same", clean_context=CONTEXTS[1 - CONTEXTS.index(clean_context)])
    assert (losses_per_document(other, ids, tokens, corruption) - here).abs().max() > 1e-3


def test_packed_documents_do_not_see_each_other():
    model = tiny.model("gpt_neox")
    layout = Layout(2, (3, 4, 2))
    ids = torch.randint(3, tiny.VOCABULARY, (1, 2 * layout.length), generator=torch.Generator().manual_seed(0))
    packed = TokenMap.from_layouts([[layout, layout]])
    corruption = draw(packed, model.spec.alignment, 0)
    together = losses_per_document(model, ids, packed, corruption)
    apart = TokenMap.from_layouts([[layout], [layout]])
    separate = losses_per_document(model, ids.view(2, -1), apart, corruption)
    torch.testing.assert_close(together, separate, atol=1e-10, rtol=1e-10)

    # twin: as one document, the second half sees the first
    glued = TokenMap.from_layouts([[Layout(2, (3, 4, 2, 2, 3, 4, 2))]])
    loss = losses_per_document(model, ids, glued, draw(glued, model.spec.alignment, 0))
    assert abs(loss.sum() - together.sum()) > 1e-3


@pytest.mark.parametrize("boundary", ["clean", "seed"])
def test_block_size_one_is_the_ar_loss(boundary):
    model = tiny.model("gpt_neox", "shift", boundary)
    layout = Layout(2, (1,) * 9)
    tokens = TokenMap.from_layouts([[layout]])
    ids = torch.randint(3, tiny.VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(0))
    loss = losses_per_document(model, ids, tokens, draw(tokens, model.spec.alignment, 0))
    torch.testing.assert_close(loss[0], ar_loss(model, ids[0], 2), atol=1e-10, rtol=1e-10)


def test_block_size_one_is_not_the_ar_loss_under_the_noisy_boundary_or_with_larger_blocks():
    model = tiny.model("gpt_neox", "shift", "clean")
    ids = torch.randint(3, tiny.VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(0))
    expected = ar_loss(model, ids[0], 2)
    for layout, boundary in ((Layout(2, (1,) * 9), "noisy"), (Layout(2, (3, 3, 3)), "clean")):
        tokens, alignment = TokenMap.from_layouts([[layout]]), Alignment("shift", boundary)
        loss = losses_per_document(model, ids, tokens, draw(tokens, alignment, 0), alignment)
        assert abs(loss[0] - expected) > 1e-3


def test_clean_stream_is_the_untouched_ar_model_when_context_causal():
    """... whatever the layout; a block-causal clean stream is another model."""
    untouched = tiny.backbone("gpt_neox")
    ids, tokens, _ = tiny.random_batch(4, rows=1)
    first = tokens.doc[0] == 0
    expected = untouched(input_ids=ids[:, first]).logits[0]
    for clean_context, same in (("context_causal", True), ("block_causal", False)):
        model = tiny.model("gpt_neox", clean_context=clean_context)
        corruption = draw(tokens, model.spec.alignment, 0)
        stream = two_streams(ids, tokens, corruption, model.spec.alignment, model.spec.mask_id)
        logits = model(stream.ids, stream.tokens).view(stream.ids.shape[1], -1)
        clean = logits[-ids.shape[1] :][first][:, : tiny.VOCABULARY]
        assert (((clean - expected).abs().max() < 1e-10).item()) is same


@pytest.mark.parametrize(("prediction", "boundary"), CONVENTIONS)
def test_noise_averages_to_the_enumerated_bound(prediction, boundary):
    """Enumerated subsets in one-pass form equal the reference's; exact-count draws average to it."""
    model = tiny.model("gpt_neox", prediction, boundary)
    layout = Layout(2, (3, 4))
    tokens = TokenMap.from_layouts([[layout]])
    ids = torch.randint(3, tiny.VOCABULARY, (1, layout.length), generator=torch.Generator().manual_seed(3))
    slow = reference(model)
    with torch.no_grad():
        expected = float(slow.document(ids[0].tolist(), layout, slow.nelbo))

    block = block_numbers(tokens, maskable(tokens, model.spec.alignment))
    largest = int(torch.bincount(block).max())
    with torch.no_grad():
        firsts = sum(float(slow.first_loss(b)) for b in blocks(ids[0].tolist(), layout))
        passes = [losses_per_document(model, ids, tokens, subset(block, m)) for m in range(1, 2**largest)]
        assert float(sum(passes)) - firsts * (len(passes) - 1) == pytest.approx(expected, abs=1e-9)

        # every subset of equal count is equally likely: average exactly over counts and a large stratified sample
        copies = 4000
        many = tokens.map(lambda tensor: tensor.expand(copies, -1).clone())
        many = TokenMap(
            torch.arange(copies)[:, None].expand_as(many.doc),
            many.position,
            many.block,
            many.start,
            many.prompt,
            many.noisy,
        )
        losses = losses_per_document(model, ids.expand(copies, -1), many, draw(many, model.spec.alignment, 5))
    error = losses.std() / math.sqrt(copies)
    assert abs(losses.mean() - expected) < 4 * error
    assert abs(losses[: copies // 2].mean() - expected - 0.5) > 4 * error  # twin: half a nat off would be seen


@pytest.mark.parametrize("left_bias", [0.0, 0.7])
@pytest.mark.parametrize(("prediction", "boundary"), CONVENTIONS)
def test_exact_mode_equals_the_reference_and_the_bound_is_above_the_nll(prediction, boundary, left_bias):
    model = tiny.model("gpt_neox", prediction, boundary)
    slow = replace(reference(model), left_bias=left_bias)
    ids = torch.randint(3, tiny.VOCABULARY, (9,), generator=torch.Generator().manual_seed(6))
    layout = Layout(2, (3, 3, 1))
    document = Document(ids.numpy().astype("int32"), (torch.arange(9) < 2).numpy(), "test")
    row = bound(model, [document], [3], exact=True, left_bias=left_bias)[0]
    with torch.no_grad():
        nelbo = float(slow.document(ids.tolist(), layout, slow.nelbo))
        nll = float(slow.document(ids.tolist(), layout, slow.random_order_nll))
    assert row.nats_per_token * 7 == pytest.approx(nelbo, abs=1e-8)
    assert row.nll_nats is not None
    assert row.nll_nats * 7 == pytest.approx(nll, abs=1e-8)
    assert nll < nelbo - 1e-4
    drawn = bound(model, [document], [3], draws=400, left_bias=left_bias)[0]
    assert drawn.se_mc is not None
    assert abs(drawn.nats_per_token * 7 - nelbo) < 4 * drawn.se_mc * 7
    other = bound(model, [document], [3], exact=True, left_bias=left_bias + 0.5)[0]
    assert (other.nats_per_token, other.nll_nats) != pytest.approx((row.nats_per_token, row.nll_nats), abs=1e-6)


def test_the_bound_is_the_mean_over_reveal_orders():
    """The definition, by all orders, against the sum over mask sets; other orders are other bounds."""
    model = tiny.model("gpt_neox", "same")
    block = Block((5, 9), (1, 1), (7, 3, 11))
    with torch.no_grad():
        uniform_order, biased = reference(model), replace(reference(model), left_bias=0.7)
        assert float(uniform_order.nelbo(block)) == pytest.approx(float(uniform_order.order_average(block)), abs=1e-10)
        assert float(biased.nelbo(block)) != pytest.approx(float(uniform_order.nelbo(block)), abs=1e-4)


def test_random_order_nll_equals_brute_force_over_all_orders():
    model = tiny.model("gpt_neox", "same")
    slow = reference(model)
    block = Block((5, 9), (1, 1), (7, 3, 11))
    with torch.no_grad():
        total = 0.0
        for order in permutations(range(3)):
            log_p = 0.0
            for step, i in enumerate(order):
                log_p -= float(slow.losses(block, sorted(order[step:]))[i])
            total += math.exp(log_p) / 6
        assert float(slow.random_order_nll(block)) == pytest.approx(-math.log(total), abs=1e-10)


@pytest.mark.parametrize(("prediction", "boundary"), CONVENTIONS)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_uniform_model_scores_log_v(prediction, boundary, size):
    model = tiny.model("gpt_neox", prediction, boundary)
    with torch.no_grad():
        model.backbone.get_output_embeddings().weight.zero_()
    ids = torch.randint(3, tiny.VOCABULARY, (10,), generator=torch.Generator().manual_seed(0))
    document = Document(ids.numpy().astype("int32"), (torch.arange(10) < 1).numpy(), "test")
    row = bound(model, [document], [size], draws=3)[0]
    assert row.nats_per_token == pytest.approx(math.log(tiny.VOCABULARY), abs=1e-9)  # [MASK] is no outcome


def test_the_mask_row_trains_and_is_never_predicted():
    model = tiny.model("gpt_neox")
    ids, tokens, _ = tiny.random_batch(0)
    losses_per_document(model, ids, tokens, draw(tokens, model.spec.alignment, 0)).sum().backward()
    gradient = model.backbone.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[model.spec.mask_id].abs().max() > 0
    assert torch.isneginf(model(ids, tokens)[:, model.spec.mask_id]).all()


def test_no_token_influences_a_loss_it_must_not():
    """Changing one token changes the losses of later tokens of its document and its own block only."""
    model = tiny.model("gpt_neox", "same")
    layout = Layout(1, (3, 2, 3))
    tokens = TokenMap.from_layouts([[layout, layout]])
    ids = torch.randint(3, tiny.VOCABULARY, tokens.shape, generator=torch.Generator().manual_seed(0))
    corruption = draw(tokens, model.spec.alignment, 2)

    def reads(ids: Tensor) -> tuple[Tensor, Tensor]:
        stream = two_streams(ids, tokens, corruption, model.spec.alignment, model.spec.mask_id)
        source = (~tokens.prompt).nonzero()[:, 1][corruption.masked]
        return model(stream.ids, stream.tokens, read=stream.reads.index), source

    with torch.no_grad():
        before, source = reads(ids)
        for changed in range(tokens.shape[1]):
            other = ids.clone()
            other[0, changed] = 3 + (ids[0, changed] - 2) % (tiny.VOCABULARY - 3)
            after, _ = reads(other)
            moved = (torch.nan_to_num(after - before).abs().amax(-1) > 1e-9).tolist()
            for read, target in enumerate(source.tolist()):
                same_doc = tokens.doc[0, changed] == tokens.doc[0, target]
                same_block = same_doc and tokens.block[0, changed] == tokens.block[0, target]
                earlier = same_doc and tokens.position[0, changed] < tokens.start[0, target]
                visible = bool(earlier or (same_block and changed not in source.tolist()))
                assert moved[read] == visible, (changed, target)
