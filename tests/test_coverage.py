"""Coverage: what training makes of each configuration, what is asked for, and whether the one covers the other."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import tiny_config
from test_cli import run
from test_layout import EVERY

import blockdiff
from blockdiff import coverage, evaluate
from blockdiff.coverage import (
    Calls,
    Cell,
    SpanShare,
    Trained,
    compare,
    decode_calls,
    grid_calls,
    histogram,
    traced_calls,
    trained,
)
from blockdiff.coverage.trained import MAX_SPANS
from blockdiff.data import Document
from blockdiff.decode import POLICIES, Policy, parse
from blockdiff.distributions import AR, Fixed, Full, LayoutDistribution, Mixture, RandomOffset, ScaleMixture
from blockdiff.engine import Request, generate
from blockdiff.layout import Spans, TokenMap
from blockdiff.loading import load_tokenizer
from blockdiff.model import SPEC_FILE, Spec
from blockdiff.noise import Bernoulli, Clipped, ExactCount, Noise
from blockdiff.objectives import Alignment, block_numbers, maskable, two_streams
from blockdiff.own_layouts import OWN_LAYOUTS, Own

CLEAN, SEED, NOISY, SAME = Alignment(), Alignment("shift", "seed"), Alignment("shift", "noisy"), Alignment("same")
TEXT = (SpanShare(1, 64, 1.0),)  # one text of 65 tokens, the first of them given


def mu(layout: LayoutDistribution, noise: Noise | None = None, alignment: Alignment = CLEAN, **options) -> Trained:
    spans = options.pop("spans", TEXT)
    return trained(layout, noise or ExactCount(), alignment, spans, **{"ar_trained": True, **options})


def decode(policy: Policy | str = "threshold", alignment: Alignment = CLEAN, **options) -> Calls:
    asked = {"prompt": 17, "block_size": 8, "new_tokens": 32, "context": 1000, **options}
    return decode_calls(alignment, POLICIES[policy] if isinstance(policy, str) else policy, **asked)


def kinds(found: coverage.Coverage) -> list[str]:
    return [violation.kind for violation in found.violations]


def every_cell(alignment: Alignment, spans: tuple[SpanShare, ...]) -> torch.Tensor:
    """All configurations of documents with these spans."""
    end = max(span.given + span.scored for span in spans)
    cells = []
    for p in range(end):
        for w in range(1, end - p + 1):
            cells += [(p, w, k) for k in range(1, masks(alignment, w) + 1)]
        cells.append((p, 1, 0))
    return torch.tensor(cells)


def masks(alignment: Alignment, size: int) -> int:
    if alignment.shift and size == 1:
        return 0
    return size - (alignment.shift and not alignment.seeded)


def drawn(
    layout: LayoutDistribution,
    noise: Noise,
    alignment: Alignment,
    documents: list[list[bool]],
    *,
    with_ar: bool,
    repeats: int,
) -> Counter:
    """Calls counted in what a training step builds, for `repeats` copies of documents (given or not, by token)."""
    width = max(map(len, documents))
    rows = documents * repeats
    doc = torch.tensor([[i if t < len(row) else -1 for t in range(width)] for i, row in enumerate(rows)])
    prompt = torch.tensor([row + [True] * (width - len(row)) for row in rows])
    generator = torch.Generator().manual_seed(3)
    spans = Spans.of(doc, prompt)
    tokens = TokenMap.build(doc, prompt, spans.place(layout.draw(spans.lengths, generator)))
    corruption = noise.draw(block_numbers(tokens, maskable(tokens, alignment)), generator)
    stream = two_streams(torch.zeros_like(doc), tokens, corruption, alignment, mask_id=1, with_ar=with_ar)

    masked = torch.zeros_like(prompt)
    masked[maskable(tokens, alignment)] = corruption.masked
    scored = tokens.scored
    row = torch.arange(len(rows))[:, None].expand_as(doc)[scored]
    key = torch.stack([row, tokens.start[scored], masked[scored].long(), tokens.is_block_start[scored].long()], 1)
    blocks: dict[tuple[int, int], list[int]] = {}
    for r, start, hidden, first in key.tolist():
        entry = blocks.setdefault((r, start), [0, 0, 0])
        entry[0] += 1
        entry[1] += hidden
        entry[2] |= hidden & first
    found: Counter = Counter()
    for (_, start), (size, k, first_masked) in blocks.items():
        if alignment.seeded and size == 1:
            found[start, 1, 0] += k
        elif k and not (first_masked and not alignment.is_bound):
            found[start, size, k] += 1
    if alignment.shift:
        from_clean = ~stream.tokens.noisy.flatten()[stream.reads.index]
        places = stream.tokens.position.flatten()[stream.reads.index[from_clean]] + 1
        for p, count in enumerate(torch.bincount(places).tolist()):
            found[p, 1, 0] += count
    return found


@pytest.mark.parametrize("layout", EVERY, ids=repr)
@pytest.mark.parametrize(
    ("alignment", "noise", "with_ar"),
    [
        (CLEAN, ExactCount(), True),
        (CLEAN, Clipped(0.3, 0.8), False),
        (SEED, Bernoulli(), True),
        (NOISY, ExactCount(), False),
        (NOISY, ExactCount({0.5: 0.7, 2.0: 0.3}), False),
        (SAME, Bernoulli("cosine"), False),
    ],
    ids=["clean-ar", "clean", "seed-ar", "noisy", "noisy-left", "same"],
)
def test_what_is_said_to_be_trained_is_what_training_draws(layout, alignment, noise, with_ar):
    """Documents of several lengths, a prompt and a chat of two turns."""
    documents = [
        [True, *[False] * 9],
        [True, *[False] * 4],
        [True] * 4 + [False] * 6,
        [True, False, False, True, True, False, False, False],
    ]
    repeats = 1500
    counted = drawn(layout, noise, alignment, documents, with_ar=with_ar, repeats=repeats)
    shapes = [(1, 9), (1, 4), (4, 6), (1, 2), (5, 3)]
    made = trained(layout, noise, alignment, histogram(shapes), ar_trained=with_ar)
    cells = every_cell(alignment, made.spans)
    expected = made.visits(cells) * len(shapes)
    frequency = torch.tensor([counted[tuple(cell)] for cell in cells.tolist()]) / repeats
    error = (expected.clamp(min=0.02) / repeats).sqrt()
    assert ((frequency - expected).abs() <= 5 * error).all()
    assert not frequency[expected == 0].any()
    assert sum(counted.values()) == pytest.approx(float(frequency.sum() * repeats))  # no call is outside the cells
    if alignment.is_bound and isinstance(noise, ExactCount):
        assert float(expected.sum()) == pytest.approx(made.calls * len(shapes))


@pytest.mark.parametrize("layout", EVERY, ids=repr)
def test_one_table_serves_spans_of_all_lengths(layout):
    shapes = [(1, 30), (1, 12), (3, 12), (7, 1), (2, 29)]
    made = trained(layout, ExactCount(), SAME, histogram(shapes))
    expected = torch.zeros(len(made.blocks), 31, dtype=torch.float64)
    for given, scored in shapes:
        expected[given : given + scored, : scored + 1] += layout.configurations(scored) / len(shapes)
    width = made.blocks.shape[1]  # of a grid that of its blocks
    assert not expected[:, width:].any()
    torch.testing.assert_close(made.blocks, expected[:, :width])
    assert ((made.blocks > 0) == (expected[:, :width] > 0)).all()


def test_octaves_add_up_to_the_cells_in_them():
    for alignment in (CLEAN, SEED, SAME):
        made = mu(ScaleMixture(16, {4: 0.3}), alignment=alignment, spans=(SpanShare(1, 20, 0.5), SpanShare(3, 9, 0.5)))
        cells = every_cell(alignment, made.spans)
        visits = made.visits(cells) / made.calls
        for before, size in ((range(4, 8), range(1, 2)), (range(2, 4), range(4, 8)), (range(16, 32), range(2, 4))):
            inside = torch.tensor([p in before and w in size for p, w, _ in cells.tolist()])
            assert made.share(before, size) == pytest.approx(float(visits[inside].sum()))


def test_many_lengths_are_rounded_down_and_the_longest_is_kept():
    lengths = torch.randint(10, 900, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(1, length) for length in [*lengths, 1000]]
    spans = histogram(pairs)
    assert len(spans) <= MAX_SPANS
    assert sum(span.share for span in spans) == pytest.approx(1)
    assert SpanShare(1, 1000, 1 / len(pairs)) in spans
    assert {(span.given, span.scored) for span in spans} <= set(pairs)
    mean = sum(scored for _, scored in pairs) / len(pairs)
    assert 0.97 * mean < sum(span.share * span.scored for span in spans) <= mean
    assert (
        histogram(pairs[:50])
        == tuple(  # twin: few lengths are kept as they are
            SpanShare(*pair, count / 50) for pair, count in sorted(Counter(pairs[:50]).items())
        )
    )


def test_a_fixed_grid_covers_its_own_places_only():
    aligned = compare(mu(Fixed(8)), decode(prompt=17))
    assert aligned.covered
    assert aligned.uncovered == 0
    found = compare(mu(Fixed(8)), decode(prompt=20))
    assert kinds(found) == ["offset"]
    assert found.violations[0].example == Cell(20, 8, 1)
    assert "a block of 8 tokens after 20: this size was trained, but not at this place" in found.worst.sentence
    assert "the nearest is after 17" in found.worst.sentence
    # of each block's 8 calls the clean stream's prediction of its first token is covered, by the AR loss
    assert found.uncovered == pytest.approx(7 / 8)
    for prompt in range(1, 33):
        assert compare(mu(RandomOffset(8)), decode(prompt=prompt)).covered


def test_a_size_that_was_not_trained_is_named():
    found = compare(mu(Mixture({1: 0.5, 8: 0.5})), decode(block_size=12, prompt=1))
    assert kinds(found) == ["size"]
    assert found.worst.sentence == "no block of 12 tokens was trained; the nearest trained size is 8"
    assert compare(mu(ScaleMixture(16)), decode(block_size=12, prompt=1)).covered


def test_a_text_longer_than_trained_is_named():
    found = compare(mu(ScaleMixture(16)), decode(new_tokens=64))
    assert kinds(found) == ["length"]
    assert found.worst.example == Cell(65, 1, 0)
    assert "training went no further than 65 tokens" in found.worst.sentence
    assert compare(mu(ScaleMixture(16)), decode(new_tokens=48)).covered
    # the context's end cuts the last block, and nothing is asked beyond it
    assert compare(mu(ScaleMixture(16)), decode(new_tokens=64, context=65)).covered


@dataclass(frozen=True)
class NeverAll(Noise):
    """Masks one token fewer than exact counts do."""

    @property
    def is_bound(self) -> bool:
        return False

    def corrupt(self, block, u_block, u_token):
        raise NotImplementedError

    def count_probability(self, n: int) -> torch.Tensor:
        return torch.cat([ExactCount().count_probability(n)[1:], torch.zeros(1)])


def test_a_number_of_masks_that_was_not_trained_is_named():
    found = compare(mu(Fixed(8), NeverAll()), decode())
    assert kinds(found) == ["mask count"]
    assert "a block of 8 tokens after 17 with 7 of 7 masked" in found.worst.sentence
    assert found.worst.calls == 4  # the first call of each block
    assert compare(mu(Fixed(8), ExactCount()), decode()).covered
    assert compare(mu(Fixed(8), Clipped(0.3, 0.8)), decode()).covered  # seldom, but trained


def test_first_tokens_are_read_from_the_clean_stream_only_where_it_was_trained():
    """A model trained with the `noisy` boundary decodes as `clean` and asks for predictions it was not trained on."""
    found = compare(mu(Fixed(8), alignment=NOISY, ar_trained=False), decode(alignment=NOISY))
    assert kinds(found) == ["next token"]
    assert "the token after 17 others is read from the clean stream" in found.worst.sentence
    assert compare(mu(Fixed(8), alignment=NOISY, ar_trained=True), decode(alignment=NOISY)).covered
    one = decode(block_size=1, new_tokens=16)
    assert kinds(compare(mu(Fixed(8), ar_trained=False), one)) == ["next token"]
    assert compare(mu(Fixed(8), ar_trained=True), one).covered


def test_policies_ask_for_what_they_visit():
    n = 7
    left = {
        "first_hitting": [7, 6, 5, 4, 3, 2, 1],
        "fixed_count": [7, 5, 3, 1],
        "threshold": [7, 6, 5, 4, 3, 2, 1],
    }
    for policy, expected in left.items():
        asked = decode(policy, new_tokens=8)
        assert sorted((k for _, _, k in asked.cells.tolist() if k), reverse=True) == expected
    wide = decode(parse("threshold(0.9) + fixed(3)"), new_tokens=8)
    assert [k for _, _, k in wide.cells.tolist() if k] == [1, 2, 3, 4, n]
    for policy in POLICIES:
        assert compare(mu(ScaleMixture(16)), decode(policy)).covered


def test_excess_risk_is_bounded():
    """sum pi r <= max(pi / mu) * sum mu r, for any non-negative table of risks; nothing bounds what is uncovered."""
    made = mu(ScaleMixture(16, {8: 0.4}), spans=(SpanShare(1, 30, 0.6), SpanShare(5, 20, 0.4)))
    cells = every_cell(CLEAN, made.spans)
    share = made.visits(cells) / made.calls
    assert float(share.sum()) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    index = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    for asked in (decode(prompt=3, block_size=5, new_tokens=20), decode("fixed_count", prompt=1, new_tokens=8)):
        found = compare(made, asked)
        rows = torch.tensor([index[tuple(cell)] for cell in asked.cells.tolist()])
        tight = torch.zeros(len(cells), dtype=torch.float64)
        tight[rows[(asked.times / asked.total / share[rows]).argmax()]] = 1
        for risk in (*torch.rand(20, len(cells), dtype=torch.float64, generator=generator) ** 8, tight):
            under_pi = float((asked.times / asked.total * risk[rows]).sum())
            assert under_pi <= found.excess_risk_bound(float((share * risk).sum())) * (1 + 1e-12)
        assert found.excess_risk_bound(float((share * tight).sum())) == pytest.approx(  # and it is reached
            float((asked.times / asked.total * tight[rows]).sum())
        )
        assert found.max_ratio >= found.ratio_p99 >= found.ratio_p95
    assert compare(mu(Fixed(8)), decode(prompt=20)).excess_risk_bound(0.01) == float("inf")


def test_rarely_trained_configurations_are_counted_where_the_budget_is_known():
    many, few, unknown = (compare(mu(ScaleMixture(16), tokens=tokens), decode()) for tokens in (10**8, 10**4, 0))
    assert many.rare == 0
    assert few.rare > 0.5
    assert unknown.rare is None
    assert few.covered


@pytest.mark.parametrize(
    ("alignment", "policy"), [(CLEAN, "fixed_count"), (SEED, "first_hitting"), (SAME, "threshold")]
)
def test_traces_are_the_calls_that_were_made(alignment, policy):
    """Blocks and steps of an output give the calls that the engine made, step by step."""
    bridge = tiny.model(prediction=alignment.prediction, boundary=alignment.boundary)
    bridge.tokenizer = _Numbers()
    watched: list = []
    request = Request((5, 6, 7), max_new_tokens=20, block_size=5, policy=POLICIES[policy])
    output = generate(bridge, [request], on_step=watched.append)[0]
    seen = Counter((step.start, len(step.tokens), step.tokens.count(None)) for step in watched if None in step.tokens)
    if alignment.first_is_clean:
        seen.update((step.start, 1, 0) for step in watched if step.step == 0)
    traced = traced_calls(alignment, prompt=3, block_size=5, context=64, blocks=output.blocks, steps=output.steps)
    sets = Counter(tuple(t is None for t in step.tokens) for step in watched if None in step.tokens)
    kept = [tuple([False] * (5 - n) + row) for n, rows in traced.sets.items() for row in rows.tolist()]
    assert Counter(kept) == sets
    assert {tuple(cell): times for cell, times in zip(traced.cells.tolist(), traced.times.tolist())} == seen
    if policy != "threshold":
        dry = decode(policy, alignment, prompt=3, block_size=5, new_tokens=20)
        assert torch.equal(dry.cells, traced.cells)
        assert torch.equal(dry.times, traced.times)
    short = traced_calls(alignment, prompt=3, block_size=5, context=64, blocks=[5, 2], steps=output.steps[:7])
    n = masks(alignment, 5)
    assert [c for c in short.cells.tolist() if c[:2] == [8, 5]] == [[8, 5, n]]  # of a cut block only the first call


class _Numbers:
    """A tokenizer for models without text."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def test_a_real_output_is_covered_by_its_own_training(trained):
    model = blockdiff.load(trained / "checkpoint")
    prompt = len(model.encode("the cat"))
    output = model.generate("the cat", max_new_tokens=24, block_size=4)
    assert evaluate.output_coverage(model, [prompt], output, block_size=4).covered
    model.spec = replace(model.spec, layout=Fixed(2))
    assert kinds(evaluate.output_coverage(model, [prompt], output, block_size=4)) == ["size"]


def test_an_evaluation_asks_for_what_it_scores(trained):
    model = blockdiff.load(trained / "checkpoint")
    prompt = np.array([True, True, *[False] * 9, True, *[False] * 5])
    chat = Document(np.zeros(17, dtype=np.int32), prompt, "chat")
    asked = grid_calls(CLEAN, Counter([(2, 9, 1), (12, 5, 1)]), 4)
    assert chat.spans() == [(2, 9), (12, 5)]
    firsts = [p for p, _, k in asked.cells.tolist() if k == 0]
    assert firsts == [2, 3, 7, 12, 13]  # a first block of one token, then fours
    assert asked.total == 5 + 3  # and one call for each block with masks, its numbers of masks sharing it
    assert grid_calls(CLEAN, {(1, 2, 0): 3}, 8).cells.tolist() == [[1, 1, 0], [1, 2, 1]]  # shorter than a block
    assert grid_calls(SAME, {(1, 2, 0): 3}, 8).times.tolist() == [1.5, 1.5]
    found = evaluate.evaluation_coverage(model, [chat], [1, 4], offsets=[0, 1])
    assert found.covered
    model.spec = replace(model.spec, layout=Fixed(4), documents=(SpanShare(2, 40, 1.0),))
    assert evaluate.evaluation_coverage(model, [chat], [4]).uncovered > 0  # the second turn lies off the grid
    assert evaluate.evaluation_coverage(model, [Document(chat.ids[:10], prompt[:10], "text")], [4]).covered
    with pytest.raises(ValueError, match="block size 0 is not possible"):
        evaluate.evaluation_coverage(model, [chat], [0])


def test_masked_diffusion_covers_whole_texts_only():
    whole = SpanShare(17, 32, 1.0)
    assert compare(mu(Full(), spans=(whole,)), decode(block_size=32)).covered
    assert kinds(compare(mu(Full(), spans=(whole,)), decode(block_size=8))) == ["size"]


def test_a_plain_ar_model_is_covered_at_block_size_one_only():
    made = mu(AR(), spans=(SpanShare(1, 131071, 1.0),))  # a long context costs nothing
    found = compare(made, decode(block_size=1, new_tokens=4000, context=131072))
    assert found.covered
    assert kinds(compare(made, decode(block_size=4))) == ["size"]
    assert "trained at block size 1 only" in compare(made, decode(block_size=4)).worst.sentence


# ---- the checkpoint ----


def test_training_records_what_it_saw(trained):
    spec = Spec.from_json(trained / "checkpoint" / SPEC_FILE)
    assert sum(span.share for span in spec.documents) == pytest.approx(1, abs=1e-4)
    assert all(span.given == 1 and 1 <= span.scored < 64 for span in spec.documents)
    assert spec.trained_tokens > 1000
    described = json.loads(json.dumps(spec.to_json()))
    assert described["documents"][0] == list(spec.documents[0])


def test_descriptions_without_documents_are_read_as_texts_of_the_trained_length(trained, tmp_path):
    file = tmp_path / SPEC_FILE
    described = json.loads((trained / "checkpoint" / SPEC_FILE).read_text())
    file.write_text(json.dumps(described))
    assert json.loads(json.dumps(Spec.from_json(file).to_json())) == described
    for name in ("documents", "trained_tokens"):
        del described[name]
    file.write_text(json.dumps(described))
    old = Spec.from_json(file)
    assert (old.documents, old.trained_tokens) == ((), 0)
    model = blockdiff.load(trained / "checkpoint")
    assert evaluate.trained_calls(model).longest < 64
    model.spec = old
    assert evaluate.trained_calls(model).spans == (SpanShare(1, 63, 1.0),)
    assert model.coverage(8, max_new_tokens=56, block_size=8).covered


def test_a_new_training_forgets_the_documents_of_the_old(trained, tmp_path):
    from blockdiff.building import build_model
    from blockdiff.config import make_config

    config = tiny_config(tmp_path, model={"architecture": None, "init": str(trained / "checkpoint")})
    bridge = build_model(make_config(config))
    assert (bridge.spec.documents, bridge.spec.trained_tokens) == ((), 0)


def test_a_problem_is_found_without_the_ratios():
    problems = set()
    for layout in (ScaleMixture(8, {4: 0.3}), Fixed(4), AR()):
        bridge = tiny.model()
        bridge.spec = replace(bridge.spec, layout=layout, trained_length=64, ar_trained=True)
        for prompt, size, tokens, policy in product((1, 10), (1, 3, 4, 16), (8, 70), ("threshold", "first_hitting")):
            asked = {"block_size": size, "max_new_tokens": tokens, "policy": POLICIES[policy]}
            whole = evaluate.decode_coverage(bridge, [prompt], **asked)
            found = evaluate.decode_problem(bridge, prompt, **asked)
            assert found == whole.problem
            assert (found is None) == whole.covered
            problems.add(found)
    assert len(problems) > 4
    assert None in problems


def test_what_was_trained_is_looked_up_anew_where_it_changes():
    bridge = tiny.model()
    bridge.spec = replace(bridge.spec, layout=Fixed(4), trained_length=64)
    before = evaluate.trained_calls(bridge)
    assert evaluate.trained_calls(bridge) is before
    bridge.spec = replace(bridge.spec, layout=Fixed(8))
    assert evaluate.trained_calls(bridge) is not before


def test_a_model_without_a_training_says_so():
    bridge = tiny.model()
    bridge.spec = replace(bridge.spec, trained_length=0)
    with pytest.raises(ValueError, match="says nothing about its training"):
        evaluate.decode_coverage(bridge, [4], block_size=4, max_new_tokens=8, policy=POLICIES["threshold"])


# ---- the command ----


def test_the_command_says_covered_or_not(trained, tmp_path, capsys):
    target, picture = tmp_path / "coverage.json", tmp_path / "coverage.png"
    base = ["eval", "coverage", trained / "checkpoint", "--json", target]
    good = ["--prompt-tokens", 3, "--max-new-tokens", 16, "--block-size", 4]
    code, out, _ = run(*base, *good, "--figure", picture, capsys=capsys)
    assert code == 0
    assert out.startswith("covered")
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(target.read_text())
    assert {"command", "seed", "versions", "threads", "model", "request", "rows", "violations"} <= set(result)
    assert (result["command"], result["covered"], result["uncovered"]) == ("eval coverage", True, 0)
    assert sum(row["asked"] for row in result["rows"]) == pytest.approx(1)
    code, out, _ = run(*base, "--prompt-tokens", 3, "--max-new-tokens", 100, "--block-size", 4, capsys=capsys)
    assert code == 1
    assert "NOT covered" in out
    assert "length" in out
    result = json.loads(target.read_text())
    assert [row["kind"] for row in result["violations"]] == ["length"]
    assert set(result["violations"][0]["example"]) == {"before", "size", "masks"}
    per_step = run(*base, *good, "--policy", "fixed_count", "--per-step", 3, capsys=capsys)
    assert per_step[0] == 0
    assert json.loads(target.read_text())["calls"] == 4 * 2  # a first token and one step of three for each block


def test_the_command_asks_about_evaluations(trained, tmp_path, capsys):
    valid = yaml.safe_load((trained / "config.yaml").read_text())["data"]["valid"]
    base = ["eval", "coverage", trained / "checkpoint", "--data", valid]
    code, out, _ = run(*base, "--block-sizes", "1,2,4", "--offsets", "0,1", capsys=capsys)
    assert (code, out[:7]) == (0, "covered")
    code, _, error = run(*base, "--block-size", 4, capsys=capsys)
    assert code == 2
    assert "give one of them" in error


def test_the_command_on_a_plain_ar_checkpoint(trained, tmp_path, capsys):
    network = tiny.backbone("llama", dtype=torch.float32, vocab_size=320, max_position_embeddings=256)
    network.save_pretrained(tmp_path / "ar")
    load_tokenizer(trained / "checkpoint").save_pretrained(tmp_path / "ar")
    assert run("eval", "coverage", tmp_path / "ar", capsys=capsys)[0] == 0
    code, out, _ = run("eval", "coverage", tmp_path / "ar", "--block-size", 4, capsys=capsys)
    assert code == 1
    assert "block size 1 only" in " ".join(out.split())


def test_generate_warns_and_strict_refuses(trained, capsys):
    base = ["generate", trained / "checkpoint", "--prompt", "the cat", "--block-size", 4]
    code, out, error = run(*base, "--max-new-tokens", 12, capsys=capsys)
    assert code == 0
    assert "warning" not in error
    far = ["--max-new-tokens", 100]
    code, out, error = run(*base, *far, capsys=capsys)
    assert code == 0
    assert out.startswith("the cat")
    assert error.splitlines()[0].startswith("warning: not covered by training (length, ")
    code, out, error = run(*base, *far, "--strict-coverage", capsys=capsys)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert "leave --strict-coverage out" in error
    assert run(*base, "--max-new-tokens", 12, "--strict-coverage", capsys=capsys)[0] == 0


def test_prompts_of_block_causal_models_are_read_otherwise_than_their_texts(trained, tmp_path, capsys):
    """Places and masks alone would call such a prompt covered, which training never read token by token."""
    model = blockdiff.load(trained / "checkpoint")
    texts = tuple(SpanShare(1, scored, 1 / 60) for scored in range(4, 64))
    model.spec = replace(model.spec, clean_context="block_causal", layout=Fixed(4, 3), ar_trained=False)
    model.spec = replace(model.spec, alignment=SAME, documents=texts)
    options = {"max_new_tokens": 8, "block_size": 4, "policy": "low_confidence"}
    assert model.coverage(4, **options).violations == ()
    found = model.coverage(4, **options)
    said = "a prompt of 4 tokens is read token by token, and this block-causal model was trained on given texts of 1 at"
    assert not found.covered
    assert said in str(found.problem)
    assert found.excess_risk_bound(1.0) == float("inf")
    request = Request((5, 6, 7, 8), 8, 4, POLICIES["low_confidence"])
    assert said in str(model.uncovered(request))
    long = Document(np.zeros(12, dtype=np.int32), np.arange(12) < 4, "given 4")
    assert "(prompt)" in str(evaluate.evaluation_problem(model, [long], [4], [0]))
    model.save(tmp_path / "causal in blocks")
    base = ["eval", "coverage", tmp_path / "causal in blocks", "--prompt-tokens", 4, "--max-new-tokens", 8]
    code, out, _ = run(*base, "--block-size", 4, "--policy", "low_confidence", capsys=capsys)
    assert (code, out.startswith("NOT covered: a prompt of 4 tokens")) == (1, True)

    model.spec = replace(model.spec, documents=())
    assert "says nothing of given texts" in str(model.coverage(4, **options).problem)
    model.spec = replace(model.spec, documents=(*texts, SpanShare(4, 8, 0.1)))  # twins: given texts were trained; AR
    assert model.coverage(4, **options).covered
    model.spec = replace(model.spec, documents=texts, clean_context="context_causal")
    assert model.coverage(4, **options).covered


def test_the_table_of_a_grid_is_as_wide_as_its_blocks(monkeypatch):
    """The same numbers as the general table, and room for the 32,768 tokens of other projects' checkpoints."""
    monkeypatch.setitem(OWN_LAYOUTS, "grid", Fixed)
    spans = (SpanShare(1, 9, 0.5), SpanShare(3, 14, 0.3), SpanShare(3, 2, 0.2))
    for layout in (Fixed(4), Fixed(4, 3), Fixed(4, 6), Fixed(20, 1), Fixed(3, 17)):
        narrow = trained(layout, ExactCount(), SAME, spans).blocks
        wide = trained(Own("grid", {"size": layout.size, "offset": layout.offset}), ExactCount(), SAME, spans).blocks
        assert narrow.shape[1] == min(layout.size, 14) + 1
        torch.testing.assert_close(narrow, wide[:, : narrow.shape[1]], atol=1e-15, rtol=0)
        assert not wide[:, narrow.shape[1] :].any()
    mu = trained(Fixed(4, 3), Bernoulli(), SAME, (SpanShare(1, 32767, 1.0),))
    assert mu.blocks.numel() == 32768 * 5
    calls = decode_calls(SAME, POLICIES["low_confidence"], prompt=4, block_size=4, new_tokens=8, context=32768)
    assert compare(mu, calls).covered
