"""What the engine adds to policies: drafts ahead, stepwise guesses, infilling and constraints."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import SHARED, needs_shared, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run as cli
from test_generation import TEXT

from blockdiff.api import bound, load
from blockdiff.config import make_config
from blockdiff.decode import POLICIES, TABLE, Sampling, named
from blockdiff.decode.automaton import compile_pattern
from blockdiff.engine import Request, generate
from blockdiff.engine import drafting as drafting_module
from blockdiff.engine import maps as maps_module
from blockdiff.engine.stepwise import one_at_a_time
from blockdiff.layout import Layout, TokenMap
from blockdiff.loading import load as load_bridge
from blockdiff.model import BlockDiffusionModel
from blockdiff.tokenizer import train_tokenizer
from blockdiff.training import train


def model_of(architecture: str = "llama", boundary: str = "seed", smooth: bool = True) -> BlockDiffusionModel:
    """A random model; a smooth one is so sure of itself that drafts agree with it now and then."""
    tokenizer = train_tokenizer([TEXT], 300)
    conventions = ("shift", boundary, "context_causal")
    model = tiny.model(architecture, *conventions, vocab_size=len(tokenizer), max_position_embeddings=96)
    model.tokenizer = tokenizer
    if smooth:
        with torch.no_grad():
            head = model.backbone.get_output_embeddings()
            bias = torch.full((head.weight.shape[0],), -30.0, dtype=head.weight.dtype)
            bias[40:44] = 0.0
            head.bias = torch.nn.Parameter(bias)
    return model


def ar(model: BlockDiffusionModel, request: Request):
    return generate(model, [replace(request, block_size=1, lossless=True, drafting="policy", adaptive=False)])[0]


SAMPLINGS = [Sampling(), Sampling(0.7, top_p=0.8), Sampling(1.0), Sampling(1.0, top_k=5)]


# ---- lossless


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 8, 13])
def test_drafting_ahead_writes_the_ar_text(block_size, sampling):
    model = model_of()
    request = Request((5, 9, 11), 29, block_size, sampling=sampling, seed=3, lossless=True, drafting="ahead")
    (found,) = generate(model, [request])
    expected = ar(model, request)
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    assert found.denoise_forwards == found.commit_forwards == 0
    if block_size > 1:
        assert found.verify_forwards < expected.verify_forwards  # a token costs less than a pass
    assert sum(size * often for size, often in found.accepted.items()) == len(found.tokens)


def test_a_draft_of_the_wrong_branch_would_be_caught(monkeypatch):
    """The twin: were the branches not told apart, drafts would be worse, and the text the same."""
    model = model_of(smooth=False)
    right = model_of(smooth=True)
    request = Request((5, 9, 11), 40, 6, sampling=Sampling(1.0), seed=3, lossless=True, drafting="ahead")
    kept = generate(right, [request])[0].verify_forwards
    branches = maps_module.branch_map

    def merged(*args):
        tokens = branches(*args)
        return replace(tokens, block=torch.zeros_like(tokens.block))

    monkeypatch.setattr("blockdiff.engine.share.branch_map", merged)
    for one in (model, right):
        (found,) = generate(one, [request])
        assert found.tokens == ar(one, request).tokens
    assert generate(right, [request])[0].verify_forwards != kept


@pytest.mark.parametrize("boundary", ["clean", "seed"])
@pytest.mark.parametrize("name", [name for name in TABLE if not (POLICIES[name].search or POLICIES[name].refine)])
def test_every_policy_may_draft(name, boundary):
    model = model_of(boundary=boundary)
    model.spec = replace(model.spec, uniform_state=True)
    if "unconditional" in POLICIES[name].needs:
        with pytest.raises(ValueError, match="guidance changes the AR text"):
            generate(model, [Request((5,), 4, 4, POLICIES[name], lossless=True)])
        return
    for sampling in (Sampling(), Sampling(1.0)):
        request = Request((5, 9), 21, 6, POLICIES[name], sampling, 7, lossless=True)
        assert generate(model, [request])[0].tokens == ar(model, request).tokens


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.integers(2, 9), st.sampled_from(SAMPLINGS))
def test_ragged_adaptive_batches_are_each_their_own_ar_text(seed, prompt, new, size, sampling):
    model = shared_model()
    requests = [
        Request(
            tuple(40 + (seed >> i) % 4 for i in range(1 + (prompt * (n + 1)) % 13)),
            max(1, new - 3 * n),
            size + n,
            sampling=sampling,
            seed=seed + n,
            end_ids=(41,) if n % 2 else (),
            lossless=True,
            drafting=("ahead", "ahead", "policy", "auto")[n],
            adaptive=n != 1,
        )
        for n in range(4)
    ]
    for request, output in zip(requests, generate(model, requests)):
        assert output.tokens == ar(model, request).tokens


_SHARED: list[BlockDiffusionModel] = []


def shared_model() -> BlockDiffusionModel:
    if not _SHARED:
        _SHARED.append(model_of())
    return _SHARED[0]


def test_where_drafts_fail_decoding_falls_back_to_ar(monkeypatch):
    """A clock on which a drafted token costs more than an AR token makes it stop drafting, and the other way round."""
    model = model_of(smooth=False)
    request = Request((5, 9), 80, 4, sampling=Sampling(1.0), seed=1, lossless=True, drafting="ahead", adaptive=True)

    def drafted(cost: float) -> int:
        drafting_module._LEARNED.clear()
        clock = [0.0]

        def now() -> float:
            return clock[0]

        note = drafting_module.Pace.note

        def told(self, tokens, seconds):
            note(self, tokens, tokens * (1.0 if self.mode == "ar" else cost))

        monkeypatch.setattr(drafting_module.Pace, "note", told)
        (output,) = generate(model, [request])
        monkeypatch.setattr(drafting_module.Pace, "note", note)
        return output.positions

    dear, cheap = drafted(3.0), drafted(0.5)
    assert dear < 0.5 * cheap
    assert ar(model, request).positions <= dear


def test_a_seeded_frozen_adapter_writes_the_users_own_text(tmp_path):
    """... which the adapter's own stream, at block size 1, must not be taken for."""
    for name in ("ar", "noisy"):
        (tmp_path / name).mkdir()
    start = train(make_config(tiny_config(tmp_path / "ar", layout={"kind": "ar"}))).checkpoint
    tree = tiny_config(tmp_path / "noisy")
    tree["model"] = {"init": str(start), "boundary": "seed", "adapter": {"kind": "noisy", "rank": 4}}
    tree["train"] = {**tree.get("train", {}), "steps": 30, "learning_rate": 2e-2}
    tree.pop("preset", None)
    model = load(train(make_config(tree)).checkpoint)
    plain = load(start)
    for sampling in SAMPLINGS:
        request = Request(tuple(model.encode("the cat")), 30, 1, sampling=sampling, seed=2)
        own = generate(plain, [request])[0].tokens
        assert generate(model, [request])[0].tokens == own
        for way in ("ahead", "policy", "auto"):
            drafted = replace(request, block_size=5, lossless=True, drafting=way, policy=POLICIES["one_step"])
            drafted = replace(drafted, adaptive=way == "auto")
            assert generate(model, [drafted])[0].tokens == own
    (scored,), (theirs,) = (bound(one, ["the cat sat on the mat ."], [1]) for one in (model, plain))
    # the AR checkpoint also spreads a little over the spare row that becomes the [MASK]
    assert scored.nats_per_token == pytest.approx(theirs.nats_per_token, abs=5e-3)


def test_drafting_ahead_needs_seeded_blocks():
    with pytest.raises(ValueError, match="drafting ahead needs blocks that are seeded"):
        generate(model_of(boundary="clean"), [Request((5,), 4, 4, lossless=True, drafting="ahead")])


# ---- stepwise


@pytest.mark.parametrize("boundary", ["clean", "seed"])
@pytest.mark.parametrize("name", ["low_confidence", "dream_entropy", "first_hitting", "nbdiff", "dream_stochastic"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stepwise_equals_one_token_at_a_time(name, boundary, steps):
    model = model_of(boundary=boundary)
    for sampling in (Sampling(), Sampling(1.0)):
        request = Request((5, 9, 11), 23, 7, POLICIES[name], sampling, seed=4)
        (slow,) = generate(model, [replace(request, policy=one_at_a_time(POLICIES[name]))])
        (fast,) = generate(model, [replace(request, stepwise=steps)])
        assert (fast.tokens, fast.steps) == (slow.tokens, slow.steps)
        assert fast.denoise_forwards <= slow.denoise_forwards
        if steps == 4 and name != "first_hitting":
            assert fast.denoise_forwards < slow.denoise_forwards
        assert fast.positions >= slow.positions


def test_the_policy_itself_differs_from_its_one_token_form():
    model = model_of(smooth=False)
    request = Request((5, 9, 11), 40, 8, named("fixed(4)"), Sampling(1.0), seed=4)
    assert generate(model, [request])[0].tokens != generate(model, [replace(request, stepwise=3)])[0].tokens


def test_stepwise_rows_do_not_depend_on_their_batch():
    model = model_of()
    requests = [
        Request((5, 9), 20, 6, POLICIES["low_confidence"], Sampling(1.0), 1, stepwise=3),
        Request((5, 9, 13, 2), 11, 4, POLICIES["first_hitting"], Sampling(1.0), 2, stepwise=3),
        Request((7,), 15, 5, POLICIES["threshold"], Sampling(), 3),
        Request((7, 8), 9, 9, POLICIES["dream_margin"], Sampling(), 4, stepwise=2),
    ]
    for request, output in zip(requests, generate(model, requests)):
        (alone,) = generate(model, [request])
        assert (alone.tokens, alone.steps, alone.forwards) == (output.tokens, output.steps, output.forwards)


@pytest.mark.parametrize("policy", ["klass", "token_editing", "credit", "attention", "adablock", "soft_masked"])
def test_stepwise_refuses_what_remembers(policy):
    with pytest.raises(ValueError, match=r"stepwise: policy .* depends on the open block alone"):
        generate(model_of(), [Request((5,), 4, 4, POLICIES[policy], stepwise=2)])


# ---- infilling


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load(train(make_config(tiny_config(tmp_path_factory.mktemp("decoding")))).checkpoint)


@pytest.mark.parametrize(
    "name",
    [n for n in TABLE if not (POLICIES[n].search or POLICIES[n].refine or POLICIES[n].needs or POLICIES[n].planner)],
)
def test_infilling_keeps_both_sides_and_sees_them(checkpoint, name):
    found = checkpoint.infill("the cat sat", " mat . a dog ate", 5, policy=name)
    assert found.text == "the cat sat" + found.hole + " mat . a dog ate"
    assert len(found.output.tokens) >= 5
    if name == "low_confidence":  # twin: another suffix, another hole
        assert found.hole != checkpoint.infill("the cat sat", " the hat . one", 5, policy=name).hole


@pytest.mark.parametrize("suffix", ["nd the dog ran .", "t the mat .", " mat", ". one", "", "cat", "the hat"])
def test_the_suffix_is_kept_to_the_letter(checkpoint, suffix):
    found = checkpoint.infill("the cat sat", suffix, 3)
    assert found.text.endswith(suffix)
    assert found.text == "the cat sat" + found.hole + suffix


def test_infilling_refuses_planned_blocks(checkpoint):
    with pytest.raises(ValueError, match="may end a block between a hole and what is fixed"):
        checkpoint.infill("the cat sat", " the mat .", 5, policy="swordsman")


def test_a_constraint_knows_where_the_context_ends(checkpoint):
    prompt = tuple(checkpoint.encode("the cat sat on the mat . " * 30))[: checkpoint.context_length - 6]
    fits, long = checkpoint.constraint("( mat){1,2}"), checkpoint.constraint("( mat){9,12}")
    base = Request(prompt, 60, 4, sampling=Sampling(1.0), end_ids=checkpoint.end_ids)
    (output,) = generate(checkpoint, [replace(base, constraint=fits)])
    assert re.fullmatch("( mat){1,2}", output.text)
    with pytest.raises(ValueError, match="tokens or more, and 6 are allowed"):
        generate(checkpoint, [replace(base, constraint=long)])


def test_a_hole_must_see_what_is_given_behind_it(checkpoint):
    ids = tuple(checkpoint.encode("the cat sat"))
    given = (ids[-1], None, None, None, 30, 31)
    request = Request(ids[:-1], len(given), 6, given=given)
    assert generate(checkpoint, [request])[0].tokens[4:] == [30, 31]
    with pytest.raises(ValueError, match="a block size of 6 or more"):
        generate(checkpoint, [replace(request, block_size=4)])
    with pytest.raises(ValueError, match="draws a block's first token from what precedes it"):
        generate(checkpoint, [replace(request, prompt=ids, given=given[1:], max_new_tokens=5)])
    with pytest.raises(ValueError, match="infilling has no AR text"):
        generate(checkpoint, [replace(request, lossless=True)])
    with pytest.raises(ValueError, match="context"):
        checkpoint.infill("the cat", " mat", 500)
    with pytest.raises(ValueError, match="a hole of 0 tokens"):
        checkpoint.infill("the cat", " mat", 0)


def test_the_infill_command(tmp_path, checkpoint, capsys):
    checkpoint.save(tmp_path / "model")
    target = tmp_path / "out.json"
    base = ["infill", tmp_path / "model", "--prefix", "the cat sat", "--suffix", " mat . a dog"]
    code, out, err = cli(*base, "--tokens", 4, "--json", target, capsys=capsys)
    result = json.loads(target.read_text())
    assert code == 0
    assert out.strip() == result["text"] == "the cat sat" + result["hole"] + " mat . a dog"
    assert "denoise" in err


# ---- constraints


PATTERNS = [r"( the| a) (cat|dog) (sat|ran)( \.)?", r"[a-f]{2,9}", r" (one|two)( cats| dogs){1,3} \.", r"x*y?"]


@pytest.mark.parametrize("policy", ["threshold", "first_hitting", "one_step", "remdm", "adablock", "dilated", "klass"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constrained_texts_match(checkpoint, policy, temperature):
    for seed, pattern in enumerate(PATTERNS):
        for size in (1, 4, 7):
            (output,) = checkpoint.generate(
                "the",
                max_new_tokens=24,
                block_size=size,
                policy=policy,
                sampling=Sampling(temperature),
                seed=seed,
                regex=pattern,
            )
            assert re.fullmatch(pattern, output.text), (pattern, output.text)
            assert output.finish_reason in ("end", "length")


def test_without_the_constraint_the_text_does_not_match(checkpoint):
    (output,) = checkpoint.generate("the", max_new_tokens=24, block_size=4)
    assert not re.fullmatch(PATTERNS[2], output.text)


def test_constrained_rows_in_a_batch_are_their_own(checkpoint):
    pieces = checkpoint.constraint(PATTERNS[0]), checkpoint.constraint(PATTERNS[1])
    base = Request(tuple(checkpoint.encode("the")), 20, 5, sampling=Sampling(1.0), end_ids=checkpoint.end_ids)
    requests = [replace(base, seed=n, constraint=pieces[n % 2] if n < 4 else None) for n in range(5)]
    for request, output in zip(requests, generate(checkpoint, requests)):
        assert generate(checkpoint, [request])[0].tokens == output.tokens


def test_the_constrained_draw_is_the_conditioned_one():
    """One step, one block: the law of the text is the model's own factorised law, given that it matches."""
    model = model_of("gpt_neox", boundary="clean", smooth=False)
    end = 7
    texts = tuple("ab"[i % 2] if i < 4 else None for i in range(model.vocabulary))
    automaton = compile_pattern("(ab|ba|aa)b?", texts, (end,))
    count = 4000
    requests = [
        Request((5, 9), 3, 3, POLICIES["one_step"], Sampling(1.0), seed, end_ids=(end,), constraint=automaton)
        for seed in range(count)
    ]
    outputs = generate(model, requests)
    first = torch.tensor([output.tokens[0] for output in outputs])
    prompt = TokenMap.from_layouts([[Layout(2, ())]])
    with torch.inference_mode():
        own = (
            model(torch.tensor([[5, 9]]), prompt)[1, :4].double().softmax(-1)
        )  # every first letter can still be finished
    share = torch.bincount(first, minlength=4)[:4] / count
    assert ((share - own).abs() < 5 * (own * (1 - own) / count).sqrt()).all()


def test_json_schemas(checkpoint, tmp_path, capsys):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22]}},
        "required": ["ok", "n"],
    }
    for temperature in (0.0, 1.0):
        (output,) = checkpoint.generate(
            "the", max_new_tokens=60, block_size=6, sampling=Sampling(temperature), json_schema=schema
        )
        found = json.loads(output.text)
        assert isinstance(found["ok"], bool)
        assert found["n"] in (1, 22)
    checkpoint.save(tmp_path / "model")
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    base = ["generate", tmp_path / "model", "--prompt", "the", "--max-new-tokens", 60]
    code, out, _ = cli(*base, "--json-schema", tmp_path / "schema.json", capsys=capsys)
    assert code == 0
    assert set(json.loads(out.removeprefix("the"))) == {"ok", "n"}
    assert cli(*base, "--json-schema", "nowhere.json", capsys=capsys)[0] == 2
    assert cli(*base, "--regex", "[", capsys=capsys)[0] == 2
    assert "a match takes" in cli(*base, "--max-new-tokens", 2, "--regex", "q{40}", capsys=capsys)[2]
    assert cli(*base, "--regex", "a+", "--policy", "token_editing", capsys=capsys)[0] == 2
    assert cli(*base, "--regex", "a+", "--lossless", capsys=capsys)[0] == 2


# ---- the real checkpoint


@needs_shared
def test_lossless_on_the_real_checkpoint_is_its_own_ar_text_in_float64():
    model = load(SHARED / "models" / "stories260K", dtype=torch.float64)
    drafted = load_bridge(SHARED / "models" / "stories260K", dtype=torch.float64, add_mask=True)
    drafted.spec = replace(drafted.spec, alignment=replace(drafted.spec.alignment, boundary="seed"))
    prompt = tuple(model.tokenizer.encode("Once upon a time"))
    for sampling in SAMPLINGS:
        request = Request(prompt, 60, 1, sampling=sampling, seed=1, end_ids=model.end_ids)
        own = generate(model, [request])[0].tokens
        ahead = replace(request, block_size=6, lossless=True, drafting="ahead")
        assert generate(drafted, [ahead])[0].tokens == own
