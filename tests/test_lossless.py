"""Lossless decoding: whatever drafts, the text is the AR model's own, token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run
from test_generation import TEXT, WAYS

from blockdiff.api import load
from blockdiff.config import make_config
from blockdiff.decode import POLICIES, Sampling, parse
from blockdiff.engine import Request, generate
from blockdiff.engine.drafting import agreed
from blockdiff.model import BlockDiffusionModel
from blockdiff.tokenizer import train_tokenizer
from blockdiff.training import train


def model_of(architecture: str = "llama", *conventions: str, smooth: bool = True) -> BlockDiffusionModel:
    """A random model; a smooth one is so sure of itself that drafts agree with it now and then."""
    tokenizer = train_tokenizer([TEXT], 300)
    conventions = conventions or ("shift", "clean", "context_causal")
    model = tiny.model(architecture, *conventions, vocab_size=len(tokenizer), max_position_embeddings=96)
    model.tokenizer = tokenizer
    if smooth:  # few tokens are likely, whatever the context
        with torch.no_grad():
            head = model.backbone.get_output_embeddings()
            bias = torch.full((head.weight.shape[0],), -30.0, dtype=head.weight.dtype)
            bias[40:44] = 0.0
            head.bias = torch.nn.Parameter(bias)
    return model


def ar(model: BlockDiffusionModel, request: Request):
    return generate(model, [replace(request, block_size=1, lossless=False)])[0]


@pytest.mark.parametrize("block_size", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_that_of_block_size_one(way, block_size):
    model = model_of()
    policy, sampling = WAYS[way]
    request = Request((5, 9, 11), 24, block_size, policy, sampling, seed=3, lossless=True)
    (found,) = generate(model, [request])
    expected = ar(model, request)
    assert found.tokens == expected.tokens
    assert found.text == expected.text
    assert (found.finish_reason, found.commit_forwards) == (expected.finish_reason, 0)
    assert found.verify_forwards == len(found.blocks)
    assert sum(found.blocks) == len(found.tokens) == len(found.steps)
    if block_size > 1:
        assert found.verify_forwards < len(found.tokens)  # some of what was drafted stayed
        assert found.tokens_per_verify > 1


def test_without_verification_the_text_is_another_one():
    model = model_of()
    request = Request((5, 9, 11), 24, 4, POLICIES["fixed_count"], Sampling(1.0), seed=3)
    assert generate(model, [request])[0].tokens != ar(model, request).tokens


def test_a_rejected_token_must_not_stay(monkeypatch):
    """The twin: one token more than the AR model agrees with, and the text is another one."""
    model = model_of(smooth=False)
    request = Request((5, 9, 11), 24, 6, parse("random + fixed(3)"), Sampling(1.0), seed=1, lossless=True)
    expected = ar(model, request).tokens
    assert generate(model, [request])[0].tokens == expected

    def generous(logits, ids, noise, used, sampling):
        return (agreed(logits, ids, noise, used, sampling) + 1).minimum(used.sum(1))

    monkeypatch.setattr("blockdiff.engine.rows.agreed", generous)
    assert generate(model, [request])[0].tokens != expected


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt_neox"])
def test_mixed_batches_give_every_row_its_own_text(architecture):
    """Lossless beside ordinary rows, of all lengths and settings; a window that slides, too."""
    model = model_of(architecture, smooth=architecture == "llama")
    requests = [
        Request((5,), 30, 8, POLICIES["threshold"], Sampling(0.0), lossless=True),
        Request((7, 8, 9, 10, 11), 11, 4, POLICIES["fixed_count"], Sampling(1.0), seed=4),
        Request((3, 4), 17, 5, POLICIES["first_hitting"], Sampling(1.0, top_k=9), seed=5, lossless=True),
        Request((12, 13), 9, 1, sampling=Sampling(1.0), seed=6),
        Request((12, 13), 9, 3, parse("threshold(0.01)"), Sampling(1.0), seed=6, lossless=True),
    ]
    for request, together in zip(requests, generate(model, requests), strict=True):
        (alone,) = generate(model, [request])
        assert (alone.tokens, alone.blocks, alone.forwards) == (together.tokens, together.blocks, together.forwards)
        if request.lossless:
            assert together.tokens == ar(model, request).tokens


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 30),
    st.sampled_from(list(WAYS)),
    st.sampled_from([(), (41,), (40, 43)]),
    st.booleans(),
)
def test_any_request(seed, block_size, budget, way, end_ids, smooth):
    model = model_of(smooth=smooth)
    policy, sampling = WAYS[way]
    prompt = tuple(3 + seed % 7 + i for i in range(1 + seed % 5))
    request = Request(prompt, budget, block_size, policy, sampling, seed, end_ids=end_ids, lossless=True)
    (found,) = generate(model, [request])
    expected = ar(model, request)
    assert (found.tokens, found.text, found.finish_reason) == (
        expected.tokens,
        expected.text,
        expected.finish_reason,
    )


def test_stop_strings_and_the_context_end():
    model = model_of()
    request = Request((5, 9), 90, 8, POLICIES["fixed_count"], Sampling(1.0), seed=2, lossless=True)
    expected = ar(model, request)
    (found,) = generate(model, [request])
    assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    stop = expected.text[10:13]
    stopped = replace(request, stop=(stop,))
    (found,) = generate(model, [stopped])
    assert found.text == ar(model, stopped).text == expected.text[: expected.text.index(stop)]
    long = Request((5, 9), 500, 8, POLICIES["fixed_count"], Sampling(1.0), seed=2, lossless=True)
    (found,) = generate(model, [long])
    assert len(found.tokens) == 94
    assert found.tokens == ar(model, long).tokens


def test_a_frozen_adapter_writes_what_the_users_checkpoint_writes(trained, tmp_path, capsys):
    """On a trained model, from the command line, greedily: the original AR model's own words."""
    from blockdiff.run_directory import RunDirectory

    original = RunDirectory(trained).checkpoint
    changes = {"model": {"init": str(original), "adapter": {"kind": "noisy"}}, "output": str(tmp_path / "frozen")}
    tree = tiny_config(tmp_path, train={"steps": 20}) | changes
    frozen = train(make_config(tree)).checkpoint
    expected = load(original).generate("the cat", block_size=1, max_new_tokens=40)[0]
    found = load(frozen).generate("the cat", block_size=8, max_new_tokens=40, lossless=True)[0]
    assert found.text == expected.text
    assert found.tokens == expected.tokens
    words = ["generate", frozen, "--prompt", "the cat", "--block-size", "8", "--max-new-tokens", "40"]
    code, out, err = run(*words, "--lossless", capsys=capsys)
    assert code == 0
    assert out.rstrip("\n") == ("the cat" + expected.text).rstrip("\n")
    assert "0 commit" in err
    assert "kept a verification" in err


@pytest.mark.parametrize(
    ("conventions", "words"),
    [
        (("shift", "clean", "block_causal"), "block_causal"),
        (("same", "clean", "context_causal"), "prediction same"),
    ],
)
def test_models_without_an_ar_stream_are_refused(conventions, words):
    with pytest.raises(ValueError, match=f"lossless: .*{words}"):
        generate(model_of("llama", *conventions), [Request((5,), 4, 2, lossless=True)])


def test_an_untrained_ar_stream_is_refused():
    model = model_of()
    model.spec = replace(model.spec, ar_trained=False)
    with pytest.raises(ValueError, match="ar_weight"):
        generate(model, [Request((5,), 4, 2, lossless=True)])
    assert generate(model, [Request((5,), 4, 2)])[0].tokens
