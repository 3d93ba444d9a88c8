"""Generation: cached equals uncached, rows are independent, the law is right, streams deliver final text only."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdiff.decode import POLICIES, Sampling, SamplingBatch, changed, gumbel, parse, propose
from blockdiff.decode.blocks import ORDER
from blockdiff.decode.counts import Fixed, Threshold
from blockdiff.decode.ranking import Ranking
from blockdiff.engine import Request, Step, generate
from blockdiff.engine.stream import TextStream, pieces
from blockdiff.layout import Layout, TokenMap
from blockdiff.model import BlockDiffusionModel
from blockdiff.reference import Block, Reference
from blockdiff.rng import uniform
from blockdiff.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat, and the dog ate the hat; naïve café 日本語 🙂🙂 " * 3
CONVENTIONS = [
    ("shift", "clean", "context_causal"),
    ("shift", "seed", "context_causal"),
    ("same", "clean", "context_causal"),
    ("shift", "clean", "block_causal"),
    ("same", "clean", "block_causal"),
]
WAYS = {
    "threshold": (POLICIES["threshold"], Sampling()),
    "low threshold": (parse("threshold(0.05)"), Sampling(0.9, top_p=0.9)),
    "fixed count": (POLICIES["fixed_count"], Sampling(1.0, top_k=7)),
    "random order": (POLICIES["first_hitting"], Sampling(1.0)),
    "left-biased order": (parse("random(0.8) + fixed(1)"), Sampling(1.0)),
}


def with_tokenizer(*conventions: str) -> BlockDiffusionModel:
    tokenizer = train_tokenizer([TEXT], 300)
    model = tiny.model("gpt_neox", *conventions, vocab_size=len(tokenizer), max_position_embeddings=96)
    model.tokenizer = tokenizer
    return model


@torch.no_grad()
def uncached(model: BlockDiffusionModel, request: Request, blocks: int) -> list[int]:
    """The reference's generation, with the same policy applied to one position set at a time."""
    slow = Reference(
        tiny.native_denoise(model), model.spec.mask_id or 0, model.spec.alignment, model.spec.clean_context
    )
    sampling, policy = SamplingBatch.of([request.sampling]), request.policy

    def choose(logits, masked, start, step):
        place = start + torch.arange(len(logits))[None]
        noise = gumbel(torch.tensor([request.seed]), place, logits.shape[-1])
        tokens = propose(logits[None], noise, sampling)[0]
        if step == 0:
            return {0: int(tokens[0])}
        score = logits.softmax(-1)[torch.arange(len(logits)), tokens]
        if policy.left_bias is not None:
            keys = -(-uniform(request.seed, ORDER, place[0], step).log()).log()
            score = keys - policy.left_bias * torch.arange(len(logits))
        ranked = sorted(masked, key=lambda i: (-float(score[i]), i))
        number = 1
        for count in policy.counts:
            if isinstance(count, Threshold):
                number = max(number, sum(float(score[i]) >= count.level for i in masked))
            if isinstance(count, Fixed):
                number = max(number, count.count)
        now = ranked[:number]
        return {i: int(tokens[i]) for i in now}

    return slow.generate(request.prompt, [request.block_size] * blocks, choose)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("conventions", CONVENTIONS, ids="-".join)
def test_cached_generation_equals_uncached(conventions, way):
    model = with_tokenizer(*conventions)
    policy, sampling = WAYS[way]
    request = Request((5, 9, 11), 12, 4, policy, sampling, seed=3)
    got = generate(model, [request])[0]
    assert got.tokens == uncached(model, request, 3)
    assert got.blocks == [4, 4, 4]
    if sampling.temperature:  # twin: another seed is another text
        assert generate(model, [replace(request, seed=4)])[0].tokens != got.tokens


def test_block_size_one_is_plain_ar_decoding():
    """... token for token what the untouched network's own greedy decoding gives."""
    model = with_tokenizer("shift", "clean", "context_causal")
    got = generate(model, [Request((5, 9, 11), 20, 1)])[0]
    model.backbone.set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 9, 11]])
    with torch.no_grad():
        for _ in range(20):
            logits = model.backbone(input_ids=ids).logits[0, -1]
            logits[model.spec.mask_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    assert got.tokens == ids[0, 3:].tolist()
    assert (got.denoise_forwards, got.commit_forwards) == (0, 19)
    assert set(got.steps) == {0}


@pytest.mark.parametrize("conventions", CONVENTIONS, ids="-".join)
def test_a_requests_tokens_do_not_depend_on_its_batch(conventions):
    model = with_tokenizer(*conventions)
    policies = list(WAYS.values())
    requests = [
        Request(
            tuple(range(3, 3 + length)),
            new,
            size,
            *policies[number % 4],
            seed=number,
            end_ids=(7, 8) if number % 2 else (),
        )
        for number, (length, new, size) in enumerate([(1, 9, 4), (12, 21, 3), (5, 2, 8), (7, 30, 1), (2, 17, 5)])
    ]
    together = generate(model, requests)
    for request, output in zip(requests, together):
        alone = generate(model, [request])[0]
        assert (alone.tokens, alone.text, alone.steps) == (output.tokens, output.text, output.steps)
        assert (alone.denoise_forwards, alone.commit_forwards) == (output.denoise_forwards, output.commit_forwards)
    assert len({tuple(output.tokens) for output in together}) == len(requests)


@pytest.mark.parametrize("left_bias", [0.0, 1.5])
def test_the_sampled_law_is_the_one_that_is_scored(left_bias):
    """A random order at temperature 1 draws each block with exactly its exact likelihood, over all 25 outcomes."""
    model = tiny.model("gpt_neox", "same", vocab_size=5, pad_token_id=0)
    model.tokenizer = train_tokenizer([TEXT], 300)
    slow = Reference(tiny.native_denoise(model), 5, model.spec.alignment, left_bias=left_bias)
    with torch.no_grad():
        law = {
            pair: math.exp(-float(slow.random_order_nll(Block((1, 2), (1, 1), pair))))
            for pair in product(range(5), repeat=2)
        }
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    count = 4000
    policy = changed(POLICIES["first_hitting"], left_bias=left_bias)
    requests = [Request((1, 2), 2, 2, policy, Sampling(1.0), seed) for seed in range(count)]
    drawn = [tuple(output.tokens) for output in generate(model, requests)]
    chi = sum((drawn.count(pair) - count * p) ** 2 / (count * p) for pair, p in law.items())
    assert chi < 24 + 5 * math.sqrt(2 * 24)  # 24 degrees of freedom
    shifted = dict(zip(law, [*list(law.values())[1:], next(iter(law.values()))]))
    assert sum((drawn.count(pair) - count * p) ** 2 / (count * p) for pair, p in shifted.items()) > 200  # twin


def test_tokens_and_lengths_are_cut_inside_a_block():
    model = with_tokenizer("shift", "clean", "context_causal")
    whole = generate(model, [Request((5, 9), 16, 8, seed=1)])[0]
    for new in (1, 3, 8, 9, 15):
        part = generate(model, [Request((5, 9), new, 8, seed=1)])[0]
        assert part.tokens == whole.tokens[:new]
        assert whole.text.startswith(part.text.rstrip("\ufffd"))
        assert (part.finish_reason, len(part.steps), sum(part.blocks)) == ("length", new, new)
    end = whole.tokens[4]
    at = whole.tokens.index(end)
    ended = generate(model, [Request((5, 9), 16, 8, seed=1, end_ids=(end,))])[0]
    assert (ended.tokens, ended.finish_reason) == (whole.tokens[: at + 1], "end")
    assert model.tokenizer.decode([end]) not in ended.text or at == 0 or end in whole.tokens[:at]


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("conventions", CONVENTIONS[:2], ids="-".join)
def test_forwards_are_limited(conventions, size):
    model = with_tokenizer(*conventions)
    for lossless in (False, True) if conventions[0] == "shift" else (False,):
        request = Request((5, 9, 2), 24, size, POLICIES["first_hitting"], Sampling(1.0), seed=3, lossless=lossless)
        if lossless:
            model.spec = replace(model.spec, ar_trained=True)
        whole = generate(model, [request])[0]
        counts = []
        for most in (1, 2, 3, 5, 8, 13, whole.forwards - 1, whole.forwards):
            short = generate(model, [replace(request, max_forwards=most)])[0]
            assert short.forwards <= most
            assert short.tokens == whole.tokens[: len(short.tokens)]
            assert whole.text.startswith(short.text)
            assert len(short.steps) == len(short.log_probabilities) == sum(short.blocks) == len(short.tokens)
            assert short.finish_reason == ("length" if most < whole.forwards else whole.finish_reason)
            counts.append(len(short.tokens))
        assert counts == sorted(counts)
        assert counts[0] < counts[-1] == len(whole.tokens)
    with pytest.raises(ValueError, match="max_forwards"):
        generate(model, [replace(request, lossless=False, max_forwards=3, policy=POLICIES["draft_then_refine"])])


def test_stop_strings_cut_the_text_and_are_never_streamed():
    model = with_tokenizer("shift", "clean", "context_causal")
    request = Request((5, 9, 4), 40, 4, POLICIES["first_hitting"], Sampling(1.0), seed=5)
    whole = generate(model, [request])[0].text
    stop = whole[13:17]
    streamed: list[str] = []
    stopped = generate(
        model, [replace(request, stop=(stop, "never"))], on_text=lambda _, piece: streamed.append(piece)
    )[0]
    assert stopped.text == whole[: whole.index(stop)]
    assert "".join(streamed) == stopped.text
    assert stopped.finish_reason == "stop"
    assert len(stopped.tokens) < 40


@pytest.mark.parametrize("size", [1, 3, 8])
def test_streamed_pieces_are_the_final_text(size):
    model = with_tokenizer("shift", "clean", "context_causal")
    requests = [Request((5, 9), 40, size, *WAYS["random order"], seed=seed) for seed in range(6)]
    streamed = [""] * 6

    def on_text(number: int, piece: str) -> None:
        streamed[number] += piece

    outputs = generate(model, requests, on_text=on_text)
    assert streamed == [output.text for output in outputs]


@given(st.integers(0, 200), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_streams_never_take_text_back(start, chunk):
    """Fed token by token through multi-byte characters, shown text only ever grows and joins to the whole."""
    tokenizer = train_tokenizer([TEXT], 300)
    ids = tokenizer(TEXT[start : start + 60], add_special_tokens=False)["input_ids"]
    stream, shown = TextStream(tokenizer, (0,), ("mat!",)), ""
    for count in range(chunk, len(ids) + chunk, chunk):
        stream.feed(ids[:count])
        shown += stream.new_text(final=count >= len(ids))
        assert "\ufffd" not in shown
        assert TEXT[start : start + 60].startswith(shown)
    assert shown == TEXT[start : start + 60]
    assert "".join(pieces(tokenizer, (0,), ids)) == shown


def test_steps_show_the_block_filling():
    model = with_tokenizer("shift", "clean", "context_causal")
    steps: list[Step] = []
    output = generate(model, [Request((5, 9), 8, 4, POLICIES["first_hitting"], Sampling(1.0))], on_step=steps.append)[0]
    masks = [sum(token is None for token in step.tokens) for step in steps]
    assert masks == [3, 2, 1, 0, 3, 2, 1, 0]
    assert list(steps[-1].tokens) == output.tokens[4:]
    assert output.steps[0] == output.steps[4] == 0
    assert sorted(output.steps[:4]) == [0, 1, 2, 3]


def test_a_prompt_that_holds_the_mask_token_is_read_as_given():
    """Status is explicit: a literal mask id in the prompt is neither filled nor counted."""
    model = with_tokenizer("same", "clean", "context_causal")
    request = Request((5, model.spec.mask_id, 9), 6, 3)
    output = generate(model, [request])[0]
    assert len(output.tokens) == 6
    assert model.spec.mask_id not in output.tokens
    assert output.tokens != generate(model, [replace(request, prompt=(5, 6, 9))])[0].tokens


@pytest.mark.parametrize("conventions", CONVENTIONS, ids="-".join)
def test_the_context_is_filled_to_its_end_and_no_further(conventions):
    model = with_tokenizer(*conventions)
    output = generate(model, [Request(tuple(range(3, 93)), 50, 4)])[0]
    assert len(output.tokens) == 96 - 90
    assert output.finish_reason == "length"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "the prompt has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"block_size": 0}, "block size 0 is not possible"),
        ({"block_size": 97}, "block size 97 does not fit the model's context of 96 tokens"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"prompt": tuple([3] * 96)}, "the prompt has 96 tokens and the model's context holds 96"),
    ],
)
def test_bad_requests_are_refused(changes, message):
    model = with_tokenizer("shift", "clean", "context_causal")
    with pytest.raises(ValueError, match=message):
        generate(model, [replace(Request((3, 4), 4, 2), **changes)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(-1.0), "temperature -1.0 is out of range"),
        (lambda: Sampling(math.nan), "temperature nan is out of range"),
        (lambda: Sampling(1.0, top_k=-1), "top_k -1 is negative"),
        (lambda: Sampling(1.0, top_p=0.0), "top_p 0.0 is out of range"),
        (lambda: parse("threshold(1.5)"), "level 1.5 is out of range"),
        (lambda: parse("fixed(0)"), "count is 0"),
        (lambda: parse("entropi + fixed(1)"), "did you mean entropy"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_fill_is_the_rule_row_by_row(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, places = 4, 7
    score = torch.rand(rows, places, generator=generator, dtype=torch.float64).mul(8).round() / 8  # with ties
    masked = torch.rand(rows, places, generator=generator) < 0.6
    per_step = torch.randint(1, 4, (rows,), generator=generator)
    ranking = Ranking.of(score, masked)
    sure = (masked & (score >= 0.5)).sum(1)
    got = ranking.best(torch.maximum(sure, per_step))
    assert (ranking.sorted(torch.arange(places).expand(rows, -1)) == ranking.order).all()
    for r in range(rows):
        order = sorted((i for i in range(places) if masked[r, i]), key=lambda i: (-score[r, i], i))
        sure = [i for i in order if score[r, i] >= 0.5]
        expected = set(sure) | set(order[: int(per_step[r])])
        assert set(got[r].nonzero()[:, 0].tolist()) == expected


def test_sampling_draws_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -torch.inf]).repeat(1, 60000, 1)
    noise = gumbel(torch.tensor([3]), torch.arange(60000)[None], 5)
    for settings_, kept in (
        (Sampling(1.0), 4),
        (Sampling(1.0, top_k=2), 2),
        (Sampling(1.0, top_p=0.7), 2),
        (Sampling(0.5), 4),
    ):
        tokens = propose(logits, noise, SamplingBatch.of([settings_]))
        expected = (logits[0, 0].double() / settings_.temperature).softmax(-1)
        expected[kept:] = 0
        share = torch.bincount(tokens[0], minlength=5) / 60000
        expected = expected / expected.sum()
        error = 5 * (expected * (1 - expected) / 60000).sqrt()
        assert ((share.double() - expected).abs() <= error).all()
    greedy = propose(logits, noise, SamplingBatch.of([Sampling()]))
    assert (greedy == 0).all()


def test_pads_in_a_ragged_batch_touch_nothing():
    """The twin of batch independence: were the pads visible, the shorter prompt's text would change."""
    model = with_tokenizer("shift", "clean", "context_causal")
    ids = torch.tensor([[5, 9, 0, 0]])
    visible_pads = TokenMap.from_layouts([[Layout(4, ())]])
    with torch.no_grad():
        seen = model(ids, visible_pads)[-1]
        alone = model(ids[:, :2], visible_pads[:, :2])[-1]
    assert (seen - alone)[: model.spec.mask_id].abs().max() > 1e-3
