"""Policies: every named one on a real checkpoint, the laws they promise by enumeration, and what must never happen."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run as cli
from test_generation import TEXT

from blockdiff.api import load
from blockdiff.config import make_config
from blockdiff.decode import FILLED, FIXED, MASK, POLICIES, TABLE, OpenBlocks, Sampling, View, described, named, parse
from blockdiff.decode.counts import EntropyBudget, Factor, Reverse
from blockdiff.decode.ranking import Ranking
from blockdiff.engine import Request, generate
from blockdiff.evaluate.oracle import (
    HiddenMarkov,
    Table,
    decode,
    outcome_share,
    sampling_distance,
    total_variation,
)
from blockdiff.tokenizer import train_tokenizer
from blockdiff.training import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model, trained, saved and loaded like a user's own."""
    directory = tmp_path_factory.mktemp("policies")
    model = load(train(make_config(tiny_config(directory))).checkpoint)
    model.spec = replace(model.spec, uniform_state=True)  # so that policies which ask for it can run at all
    return model


def requests_of(model, policy, temperature, **changes):
    prompts = ["the cat", "a dog ate the hat . one", "."]
    sampling = Sampling(temperature)
    return [
        replace(
            Request(tuple(model.encode(text)), 17, 8, policy, sampling, seed, forbidden=model.control_ids), **changes
        )
        for seed, text in enumerate(prompts)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", TABLE)
def test_every_named_policy_runs_on_a_checkpoint(checkpoint, name, temperature):
    """... in a batch as alone, with no mask and no control token in its text, and with progress at every step."""
    policy = POLICIES[name]
    if policy.search and not temperature:
        with pytest.raises(ValueError, match="particles need a temperature above 0"):
            generate(checkpoint, requests_of(checkpoint, policy, temperature))
        return
    requests = requests_of(checkpoint, policy, temperature)
    together = generate(checkpoint, requests)
    for request, output in zip(requests, together):
        (alone,) = generate(checkpoint, [request])
        assert (alone.tokens, alone.forwards, alone.steps) == (output.tokens, output.forwards, output.steps)
        assert len(output.tokens) == 17
        assert not {checkpoint.spec.mask_id, *checkpoint.control_ids} & set(output.tokens)
        assert len(output.log_probabilities) == len(output.tokens) == sum(output.blocks)
        assert all(value <= 1e-9 for value in output.log_probabilities)
        most = 3 * max(7, *(getattr(p, "steps", 0) + getattr(p, "post_steps", 0) for p in policy.parts))
        assert 0 < output.denoise_forwards <= most + 17 * bool(policy.region or policy.planner or policy.refine)
        assert output.positions >= 17
    assert len({tuple(output.tokens) for output in together}) == 3


def test_renoising_is_refused_on_a_mask_trained_model(checkpoint):
    checkpoint.spec = replace(checkpoint.spec, uniform_state=False)
    try:
        with pytest.raises(ValueError, match="this model was trained on masks"):
            generate(checkpoint, requests_of(checkpoint, POLICIES["diffusion_gemma"], 0.0))
    finally:
        checkpoint.spec = replace(checkpoint.spec, uniform_state=True)


def test_the_documented_table_is_the_registry(capsys):
    assert (ROOT / "docs" / "policies.md").read_text() == described.page(), (
        "run: blockdiff policies --markdown > docs/policies.md"
    )
    assert cli("policies", capsys=capsys)[1].splitlines() == described.policies_table().splitlines()
    assert "entropy_budget" in cli("policies", "--parts", capsys=capsys)[1]


@pytest.mark.parametrize("name", TABLE)
def test_a_policy_reads_back_what_it_prints(name):
    assert parse(str(POLICIES[name])) == POLICIES[name]
    assert named(TABLE[name].composition) == POLICIES[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold", "did you mean threshold"),
        ("nothing_like_it", "blockdiff policies"),
        ("entropy", "nothing says how many"),
        ("entropy + margin + fixed(1)", "entropy and margin are both its score"),
        ("fixed(1.5)", "count is 1.5"),
        ("fixed(count=1, size=2)", "fixed takes count"),
        ("threshold(level='high')", "level is 'high'"),
        ("__import__('os').system('true')", "write parts joined by"),
        ("fixed(1) - entropy", "write parts joined by"),
        ("random + threshold(0.5)", "random gives none"),
        ("random + factor(1.0)", "factor compares probabilities"),
        ("confidence + jitter(0.1) + threshold(0.9)", "jitter gives none"),
        ("entropy + prefix(0.5)", "entropy gives none"),
        ("fixed(99999999999999999999)", "count is 99999999999999999999"),
        ("fixed(1) + max_steps(99999999999999999999)", "max_steps takes one whole number"),
        ("max_steps(0) + fixed(1)", "allows no step"),
        ("particles(1) + fixed(1)", "searches nothing"),
        ("random + reverse(8) + remask(16)", "on one clock"),
    ],
)
def test_bad_policies_are_explained(text, message):
    with pytest.raises(ValueError, match=message):
        named(text)


# ---- the laws, against exact sources


ROWS = 20_000
HMM = HiddenMarkov.random(4, 2, seed=1, sharpness=3.0)


def distance(policy: str, n: int = 4, source=HMM) -> float:
    written = decode(source, named(policy), n, ROWS)
    return total_variation(outcome_share(written.ids, source.symbols), source.law(n))


@pytest.mark.parametrize(
    "policy",
    ["first_hitting", "random(1.5) + fixed(1)", "leftmost + fixed(1)", "entropy + fixed(1)", "random + reverse(200)"],
)
def test_one_token_at_a_time_is_exact(policy):
    """Orders that do not look at what was drawn write the source's own law; ancestral sampling does in small steps."""
    extra = 0.012 if "reverse" in policy else 0.0  # 200 steps of ancestral sampling still fill two at once now and then
    assert distance(policy) < 1.6 * sampling_distance(HMM.law(4), ROWS) + extra


@pytest.mark.parametrize(
    ("policy", "at_least"), [("random + fixed(2)", 0.04), ("one_step", 0.2), ("confidence + fixed(1)", 0.1)]
)
def test_parallel_and_value_dependent_steps_are_not(policy, at_least):
    """The must-differ twin. The last one fills one token at a step: choosing by what was drawn is a bias of its own."""
    assert distance(policy) > at_least


@pytest.mark.parametrize("policy", ["first_hitting", "random + reverse(20)", "entropy + jitter(1.0) + fixed(1)"])
def test_which_position_comes_next_does_not_depend_on_what_it_will_hold(policy):
    """Two slots that are equal, uniform over twelve symbols: every symbol must be as frequent as any other. (The noise
    of the order once had the keys of one token's noise.)"""
    symbols, rows = 12, 24_000
    source = Table(torch.eye(symbols, dtype=torch.float64) / symbols)
    ids = decode(source, named(policy), 2, rows).ids
    share = torch.bincount(ids[:, 0], minlength=symbols) / rows
    assert (share - 1 / symbols).abs().max() < 5 * (1 / symbols / rows) ** 0.5
    if "reverse" not in policy:
        assert (ids[:, 0] == ids[:, 1]).all()


@pytest.mark.parametrize(
    "policy",
    [
        "random + reverse(32, eta=0.05) + remask(32, eta=0.05)",
        "confidence + everything + keep_top(8)",
        "threshold(0.9) + edit(0.1)",
    ],
)
def test_step_limits_hold_for_revisers_too(checkpoint, policy):
    request = Request(tuple(checkpoint.encode("the cat")), 16, 8, named(policy + " + max_steps(3)"), Sampling(1.0), 1)
    (output,) = generate(checkpoint, [request])
    assert max(output.steps_per_block) <= 3
    (free,) = generate(checkpoint, [replace(request, policy=named(policy))])
    assert max(free.steps_per_block) > 3  # twin


def test_a_planner_that_cuts_nothing_changes_nothing(checkpoint):
    request = Request(tuple(checkpoint.encode("the cat")), 24, 12, named("confidence + even(steps=4)"), Sampling(), 1)
    planned = replace(request, policy=named("confidence + even(steps=4) + entropy_shift(1000.0)"))
    assert generate(checkpoint, [request])[0].steps == generate(checkpoint, [planned])[0].steps


def test_remasking_approaches_the_source_too(monkeypatch):
    """What is masked again is drawn with new noise; with the old noise the law drifts off."""
    policy = "random + reverse(60, eta=0.2) + remask(60, eta=0.2)"
    found = distance(policy)
    assert found < 1.6 * sampling_distance(HMM.law(4), ROWS) + 0.02
    monkeypatch.setattr(OpenBlocks, "draws", property(lambda self: self.place))
    assert distance(policy) > found + 0.03


def test_first_hitting_has_the_law_of_ancestral_sampling_in_the_limit():
    """On a denoiser that is *not* exact, so that their common law is not the source's."""

    class Flawed(HiddenMarkov):
        def log_conditionals(self, ids, known):
            exact = super().log_conditionals(ids, known)
            return (0.5 * exact.clamp(min=-30)).log_softmax(-1)  # flattened

    source = Flawed(HMM.start, HMM.move, HMM.emit)
    hitting = outcome_share(decode(source, named("first_hitting"), 4, ROWS).ids, 2)
    ancestral = outcome_share(decode(source, named("random + reverse(150)"), 4, ROWS, seed=1).ids, 2)
    noise = 2**0.5 * sampling_distance(hitting, ROWS)
    assert total_variation(hitting, ancestral) < 1.6 * noise + 0.012
    assert total_variation(hitting, HMM.law(4)) > 5 * noise  # twin
    coarse = outcome_share(decode(source, named("random + reverse(2)"), 4, ROWS, seed=1).ids, 2)
    assert total_variation(hitting, coarse) > 3 * noise  # twin


def random_joint(seed: int, n: int, v: int, peak: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    flat = (torch.randn(v**n, generator=generator, dtype=torch.float64) * peak).softmax(0)
    return flat.view(*[v] * n)


def marginals(joint: torch.Tensor) -> torch.Tensor:
    """[n, V]"""
    axes = range(joint.dim())
    return torch.stack([joint.sum([a for a in axes if a != i]) for i in axes])


def step_of(count, probability: torch.Tensor) -> list[int]:
    """The positions that a count fills first, given marginals [n, V]."""
    n = len(probability)
    blocks = OpenBlocks.open(
        torch.zeros(1, n, dtype=torch.int64),
        torch.full((1, n), MASK),
        torch.arange(n)[None],
        torch.zeros(1, dtype=torch.int64),
    )
    logits = probability.log()[None]
    view = View(blocks, logits, logits.argmax(-1))
    score = -view.entropy if isinstance(count, EntropyBudget) else view.top[0][..., 0]
    return count.choose(view, Ranking.of(score.double(), blocks.masked))[0].nonzero()[:, 0].tolist()


def test_the_factor_rule_fills_the_mode_of_the_joint():
    """Theorem 1 of Fast-dLLM over random joints: tokens filled together are the likeliest of their joint marginal."""

    def wrong(f: float) -> tuple[int, int]:
        several = failed = 0
        for seed in range(1500):
            joint = random_joint(seed, 3, 3, 4.0)
            single = marginals(joint)
            chosen = step_of(Factor(f), single)
            if len(chosen) < 2:
                continue
            several += 1
            together = joint.sum([a for a in range(3) if a not in chosen]) if len(chosen) < 3 else joint
            best = [int(i) for i in torch.unravel_index(together.argmax(), together.shape)]
            failed += best != [int(single[i].argmax()) for i in chosen]
        return several, failed

    several, failed = wrong(1.0)
    assert several > 100
    assert failed == 0
    assert wrong(2.5)[1] > 0  # twin: a looser factor breaks the promise


def test_the_factor_rule_counts_like_its_definition():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        probability = (torch.randn(5, 4, generator=generator, dtype=torch.float64) * 4).softmax(-1)
        ranked = sorted(probability.amax(-1).tolist(), reverse=True)
        expected = max([n for n in range(1, 6) if (n + 1) * (1 - ranked[n - 1]) < 1.0], default=0)
        assert len(step_of(Factor(1.0), probability)) == expected


def test_the_entropy_budget_bounds_what_parallel_sampling_loses():
    """KL(joint of the chosen || product of their marginals) is at most gamma, over random joints."""
    largest, over = 0.0, 0
    for seed in range(400):
        joint = random_joint(seed, 3, 3, 2.5)
        single = marginals(joint)
        for gamma in (0.05, 0.4):
            chosen = step_of(EntropyBudget(gamma), single)
            if len(chosen) < 2:
                continue
            together = joint.sum([a for a in range(3) if a not in chosen]) if len(chosen) < 3 else joint
            apart = torch.ones_like(together)
            for axis, i in enumerate(chosen):
                apart = apart * single[i].view(*[-1 if a == axis else 1 for a in range(together.dim())])
            lost = float((together * (together / apart).log()).sum())
            assert lost <= gamma + 1e-9
            largest = max(largest, lost / gamma)
        everything = float((joint * (joint / torch.einsum("i,j,k->ijk", *single)).log()).sum())
        over += everything > 0.4
    assert largest > 0.02  # something was lost, and
    assert over > 20  # twin: filling everything would have lost more than either budget


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_remasking_keeps_the_marginals_of_the_masking_process(eta):
    """After the step to time s a position is masked with probability s, with remasking as without (ReMDM)."""
    steps, rows, n = 6, 40_000, 2
    source = Table(torch.full((2, 2), 0.25, dtype=torch.float64))

    def shares(policy) -> list[float]:
        place = torch.arange(n).expand(rows, -1)
        blocks = OpenBlocks.open(
            torch.zeros(rows, n, dtype=torch.int64), torch.full((rows, n), MASK), place, torch.arange(rows)
        )
        found = []
        for _ in range(steps):
            logits = source.log_conditionals(blocks.ids, ~blocks.masked)
            blocks, _ = policy.step(blocks, logits, lambda read: read.argmax(-1))
            found.append(float(blocks.masked.double().mean()))
        return found

    expected = [1 - (i + 1) / steps for i in range(steps)]
    error = 5 * (0.25 / (rows * n)) ** 0.5
    right = shares(parse(f"random + reverse({steps}, eta={eta}) + remask({steps}, eta={eta})"))
    assert max(abs(a - b) for a, b in zip(right, expected)) < error
    if eta:  # twin: remasking alone leaves too many masks
        alone = shares(parse(f"random + reverse({steps}) + remask({steps}, eta={eta})"))
        assert max(abs(a - b) for a, b in zip(alone, expected)) > 2 * error


# ---- counts and regions, row by row


def view_of(probability: list[list[float]], filled: tuple[int, ...] = ()) -> View:
    logits = torch.tensor(probability, dtype=torch.float64).log()[None]
    n = logits.shape[1]
    status = torch.full((1, n), MASK)
    status[0, list(filled)] = FILLED
    blocks = OpenBlocks.open(
        torch.zeros(1, n, dtype=torch.int64), status, torch.arange(n)[None], torch.zeros(1, dtype=torch.int64)
    )
    return View(replace(blocks, step=blocks.step + 1), logits, logits.argmax(-1))


def first_step(policy: str, view: View) -> list[int]:
    blocks = replace(view.blocks, step=view.blocks.step - 1)
    after, _ = named(policy).step(blocks, view.logits, lambda read: read.argmax(-1))
    return (after.filled & ~blocks.filled)[0].nonzero()[:, 0].tolist()


SURE = [[0.95, 0.05], [0.6, 0.4], [0.92, 0.08], [0.55, 0.45], [0.99, 0.01], [0.7, 0.3], [0.91, 0.09], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("threshold(0.9)", [0, 2, 4, 6]),
        ("threshold(0.999)", [4]),
        ("fixed(3)", [0, 2, 4]),
        ("even(3)", [0, 2, 4]),
        ("linear(4)", [4]),
        ("threshold(0.94) + fixed(3)", [0, 2, 4]),
        ("prefix(0.9)", [0]),
        ("prefix(0.5)", [0, 1, 2, 3, 4, 5, 6]),
        ("margin + fixed(2)", [0, 4]),
        ("entropy + fixed(2)", [0, 4]),
        ("leftmost + fixed(2)", [0, 1]),
        ("everything + left_run", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("threshold(0.9) + subblocks(4)", [0, 2]),
        ("dilated", [0, 4]),
        ("run_best(0.4)", [4]),
    ],
)
def test_what_a_step_fills(policy, expected):
    assert first_step(policy, view_of(SURE)) == expected


def test_runs_are_broken_at_their_best_position():
    view = view_of(SURE, filled=(2, 5))
    assert first_step("run_best(0.4)", view) == [0, 4, 6]
    assert first_step("everything + left_run", view) == [0, 1]
    assert first_step("everything + subblocks(3)", view_of(SURE, filled=(0, 1, 2))) == [3, 4, 5]


def test_dilated_halves_its_spacing():
    policy, view = named("dilated"), view_of(SURE)
    blocks, seen = replace(view.blocks, step=view.blocks.step - 1), []
    for _ in range(4):
        before = blocks.filled
        blocks, done = policy.step(blocks, view.logits, lambda read: read.argmax(-1))
        seen.append((blocks.filled & ~before)[0].nonzero()[:, 0].tolist())
        if bool(done):
            break
    assert seen == [[0, 4], [2, 6], [1, 3, 5, 7]]


def test_stability_waits_for_what_still_moves():
    """Two positions are equally sure; the one that has just changed comes second."""
    policy = named("confidence + stability(1.0) + fixed(1)")
    steady = [[0.5, 0.5], [0.8, 0.2], [0.8, 0.2]]
    moved = [[0.5, 0.5], [0.2, 0.8], [0.8, 0.2]]
    view, after = view_of(moved), view_of(steady)
    blocks = replace(view.blocks, memory={"previous": view.log_probability})
    blocks, _ = policy.step(blocks, after.logits, lambda read: read.argmax(-1))
    assert blocks.filled[0].tolist() == [False, False, True]
    first, _ = policy.step(  # at a block's first step nothing has moved, whatever the block before has left
        replace(blocks, step=view.blocks.step - 1, status=view.blocks.status),
        after.logits,
        lambda read: read.argmax(-1),
    )
    assert first.filled[0].tolist() == [False, True, False]
    plain, _ = named("confidence + fixed(1)").step(
        replace(view.blocks, step=view.blocks.step - 1), after.logits, lambda read: read.argmax(-1)
    )
    assert plain.filled[0].tolist() == [False, True, False]  # twin


def test_klass_asks_for_two_quiet_steps():
    policy, view = named("klass"), view_of([[0.95, 0.05], [0.94, 0.06], [0.93, 0.07], [0.6, 0.4], [0.6, 0.4]])
    blocks, filled = replace(view.blocks, step=view.blocks.step - 1), []
    for _ in range(3):
        before = blocks.filled
        blocks, _ = policy.step(blocks, view.logits, lambda read: read.argmax(-1))
        filled.append((blocks.filled & ~before)[0].nonzero()[:, 0].tolist())
    assert filled == [[0], [1], [2]] or filled == [[0], [1], [2, 3]] or filled[2] == [2]


def test_editing_replaces_and_then_stops():
    policy = named("threshold(0.9) + edit(0.9, post_steps=3)")
    first, second = view_of([[0.95, 0.05], [0.6, 0.4]]), view_of([[0.02, 0.98], [0.95, 0.05]])
    blocks = replace(first.blocks, step=first.blocks.step - 1)
    blocks, done = policy.step(blocks, first.logits, lambda read: read.argmax(-1))
    assert (blocks.ids[0, 0], bool(done)) == (0, False)
    blocks, done = policy.step(blocks, second.logits, lambda read: read.argmax(-1))
    assert (blocks.ids[0].tolist(), blocks.edits[0].tolist(), bool(done)) == ([1, 0], [1, 0], False)
    blocks, done = policy.step(blocks, second.logits, lambda read: read.argmax(-1))
    assert bool(done)  # nothing changed any more
    steps = 0
    while not bool(done) or not steps:  # two answers in turn would never end; the budget ends them
        steps += 1
        blocks, done = policy.step(blocks, (first if steps % 2 else second).logits, lambda read: read.argmax(-1))
        assert steps < 12


def test_given_positions_are_never_touched():
    view = view_of(SURE)
    status = view.blocks.status.clone()
    status[0, 4] = FIXED
    for name in TABLE:
        if POLICIES[name].needs or POLICIES[name].planner:
            continue
        blocks = replace(view.blocks, status=status, ids=view.blocks.ids + 1, step=view.blocks.step - 1)
        for _ in range(40):
            blocks, done = POLICIES[name].step(blocks, view.logits, lambda read: read.argmax(-1))
            if bool(done):
                break
        assert (blocks.ids[0, 4], blocks.status[0, 4]) == (1, FIXED), name
        assert bool(done), name


# ---- whatever is asked


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(TABLE)),
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(1, 11),
    st.integers(1, 25),
    st.sampled_from([0.0, 0.7, 1.0]),
)
def test_invariants_under_fuzz(name, seed, prompt, block_size, new, temperature):
    model = random_model()
    policy = POLICIES[name]
    if policy.search and not temperature:
        return
    literal = model.spec.mask_id  # a prompt that spells the mask is a prompt like any other
    ids = tuple((seed >> i) % 250 if i % 3 else literal for i in range(prompt))
    request = Request(ids, new, block_size, policy, Sampling(temperature), seed, end_ids=(7,), forbidden=(0, 1))
    (output,) = generate(model, [request])
    assert 1 <= len(output.tokens) <= new
    assert not {0, 1, literal} & set(output.tokens)
    assert 7 not in output.tokens[:-1]
    assert (output.finish_reason == "end") == (output.tokens[-1] == 7)
    assert len(output.steps) == len(output.tokens)
    assert output.commit_forwards + output.denoise_forwards == output.forwards


_MODELS: list = []


def random_model():
    if not _MODELS:
        tokenizer = train_tokenizer([TEXT], 300)
        model = tiny.model(
            "llama", "shift", "clean", "context_causal", vocab_size=len(tokenizer), max_position_embeddings=96
        )
        model.tokenizer, model.spec = tokenizer, replace(model.spec, uniform_state=True)
        _MODELS.append(model)
    return _MODELS[0]


def test_guidance_at_scale_zero_is_no_guidance():
    model = random_model()
    request = Request((5, 9, 11, 12), 12, 4, named("threshold(0.9)"), seed=1)
    guided = replace(request, policy=named("threshold(0.9) + guidance(0.0)"))
    strong = replace(request, policy=named("threshold(0.9) + guidance(3.0)"))
    plain = generate(model, [request])[0].tokens
    assert generate(model, [guided])[0].tokens == plain
    assert generate(model, [strong])[0].tokens != plain


def test_particles_find_likelier_texts(checkpoint):
    """The kept text is the likeliest of the particles, so more of them are no worse on average."""

    def mean(policy: str) -> float:
        outputs = [
            generate(checkpoint, [Request(tuple(checkpoint.encode("the")), 16, 4, named(policy), Sampling(1.0), seed)])[
                0
            ]
            for seed in range(12)
        ]
        return sum(sum(output.log_probabilities) for output in outputs) / 12

    assert mean("fixed(1) + particles(6)") > mean("fixed(1)") + 1


def test_refining_changes_the_least_sure_tokens_only(checkpoint):
    request = Request(tuple(checkpoint.encode("the cat")), 16, 4, named("first_hitting"), Sampling(1.0), 5)
    (draft,) = generate(checkpoint, [request])
    (refined,) = generate(checkpoint, [replace(request, policy=named("random + fixed(1) + refine(0.25)"))])
    changed = [i for i, (a, b) in enumerate(zip(draft.tokens, refined.tokens)) if a != b]
    least = sorted(range(16), key=lambda i: draft.log_probabilities[i])[:4]
    assert set(changed) <= set(least)
    assert refined.edits == len(changed)
    assert refined.denoise_forwards == draft.denoise_forwards + 4


def test_a_stop_string_cuts_refined_texts_too(checkpoint):
    policy = named("random + fixed(1) + refine(0.5)")
    request = Request(tuple(checkpoint.encode("the cat")), 24, 4, policy, Sampling(1.0), 3)
    (whole,) = generate(checkpoint, [request])
    stop = whole.text[12:15]
    (cut,) = generate(checkpoint, [replace(request, stop=(stop,))])
    assert stop not in cut.text
    assert len(cut.tokens) == len(cut.steps) == len(cut.log_probabilities) == sum(cut.blocks)
    if cut.finish_reason == "stop":
        assert len(cut.tokens) < 24


def test_planned_blocks_end_where_the_plan_says(checkpoint):
    request = Request(
        tuple(checkpoint.encode("the cat")), 30, 12, named("threshold(0.5) + entropy_shift(0.05)"), seed=1
    )
    (output,) = generate(checkpoint, [request])
    assert sum(output.blocks) == 30
    assert min(output.blocks) < 12
    steady = generate(checkpoint, [replace(request, policy=named("threshold(0.5) + entropy_shift(1000.0)"))])[0]
    assert steady.blocks == [12, 12, 6]
    dot = [t for t in range(len(checkpoint.tokenizer)) if "." in checkpoint.tokenizer.decode([t])]
    cut = generate(checkpoint, [replace(request, policy=named("threshold(0.5) + delimiter(0.0, delimiters=('.',))"))])[
        0
    ]
    at = 0
    for size in cut.blocks[:-1]:
        at += size
        assert size == 12 or cut.tokens[at - 1] in dot or size < 12
    assert min(cut.blocks[:-1]) < 12


def test_the_reverse_law_reveals_at_its_rate():
    rows = 30_000
    blocks = OpenBlocks.open(
        torch.zeros(rows, 2, dtype=torch.int64),
        torch.full((rows, 2), MASK),
        torch.arange(2).expand(rows, -1),
        torch.arange(rows),
    )
    blocks = replace(blocks, step=blocks.step + 1)
    logits = torch.zeros(rows, 2, 2)
    view = View(blocks, logits, logits.argmax(-1))
    share = Reverse(5).choose(view, Ranking.of(torch.zeros(rows, 2), blocks.masked)).double().mean()
    assert float(share) == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / (2 * rows)))


def test_enumerated_conditionals_of_the_sources():
    """The oracles themselves: conditionals times marginals give the joint back."""
    law = HMM.law(3)
    outcomes = torch.tensor(list(product(range(2), repeat=3)))
    table = Table(law.view(2, 2, 2))
    for known in product([False, True], repeat=3):
        seen = torch.tensor(known).expand(8, -1)
        ours, theirs = HMM.log_conditionals(outcomes, seen).exp(), table.log_conditionals(outcomes, seen).exp()
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert float(law.sum()) == pytest.approx(1)
