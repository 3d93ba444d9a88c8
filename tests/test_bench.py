"""The decoding benchmark, its judge and its plot; acceptance rules by enumeration."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import write_corpus
from test_cli import run

import blockdiff
from blockdiff.api import load
from blockdiff.bench import areas
from blockdiff.decode import Sampling, SamplingBatch, gumbel, propose
from blockdiff.evaluate import judge_texts
from blockdiff.frontier import bench_table
from blockdiff.statistics import area_under_parallelism


def test_bench_decode_compares_within_one_run(trained, tmp_path, capsys):
    data = write_corpus(tmp_path)[1]
    target, plot = tmp_path / "bench.json", tmp_path / "frontier.png"
    base = ["bench", "decode", trained / "checkpoint", "--data", data, "--prompts", 3, "--prompt-tokens", 4]
    options = ["--new-tokens", 12, "--rounds", 2, "--block-sizes", 4, "--policy", "one_step"]
    code, out, _ = run(
        *base, *options, "--judge", trained / "checkpoint", "--plot", plot, "--json", target, capsys=capsys
    )
    assert code == 0
    result = json.loads(target.read_text())
    rows = {row["way"]: row for row in result["rows"]}
    assert out.startswith(bench_table(result["rows"]))
    assert f"{result['threads']} threads" in out
    assert set(rows) == {"ar", "hf generate", "lossless b=4", "one_step b=4"}
    for row in rows.values():
        assert row["tokens"] == 36
        assert row["ratio_to_ar"]["low"] <= row["ratio_to_ar"]["median"] <= row["ratio_to_ar"]["high"]
        assert row["judge_nll_se"] > 0
        assert row["judged_entropy"] > 0
    assert rows["ar"]["ratio_to_ar"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows["lossless b=4"]["equal_to_ar"] == rows["hf generate"]["equal_to_ar"] == 1
    assert rows["one_step b=4"]["equal_to_ar"] < 1  # twin
    accepted = rows["lossless b=4"]["accepted"]
    assert sum(int(size) * often for size, often in accepted.items()) == 36
    assert plot.stat().st_size > 10_000
    assert run(*base, "--quality", capsys=capsys)[0] == 2
    assert "no text has more than 4000 tokens" in run(*base, "--prompt-tokens", 4000, capsys=capsys)[2]


def test_the_area_is_over_the_policies_of_a_block_size():
    def row(way, rho, nll):
        return {"way": way, "tokens_per_forward": rho, "judge_nll": nll}

    rows = [
        row("ar", 1.0, 2.0),
        row("fixed(1) b=4", 0.8, 2.0),
        row("fixed(2) b=4", 1.5, 2.02),
        row("lossless b=4", 3.0, 2.0),
    ]
    expected = area_under_parallelism([(0.8, 100.0), (1.5, 100 * math.exp(-0.02))], best=100.0)
    assert areas(rows) == {"4": pytest.approx(expected)}
    assert areas(rows[1:]) == {}


def test_the_judge_scores_what_follows_the_prompt(trained):
    model = load(trained / "checkpoint")
    prompts, texts = ["the cat", "a dog", "x"], [" sat on the mat .", " ate the hat .", "  "]
    found = judge_texts(model, prompts, texts)
    assert found.texts == 2
    assert judge_texts(model, ["x"], [" "]) is None
    likely = judge_texts(model, ["the cat"], [" sat on the mat ."])
    odd = judge_texts(model, ["the cat"], [" qq zz vv kk"])
    assert likely.nll < odd.nll
    flat = judge_texts(model, ["the cat"], [" the the the the the"])
    assert flat.entropy < found.entropy  # what repeats itself shows


def test_area_under_parallelism_is_its_definition():
    assert area_under_parallelism([]) is None
    assert area_under_parallelism([(2.0, 70.0)]) == 140
    points = [(4.0, 69.0), (1.0, 70.0), (2.0, 72.0), (6.0, 60.0)]  # the last fell by more than 5

    def weighed(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / 72)), 1)

    expected = 70 + 0.5 * (weighed(72) + weighed(70)) + 0.5 * 2 * (weighed(69) + weighed(72))
    assert area_under_parallelism(points) == pytest.approx(expected)
    assert area_under_parallelism(points, best=90) < expected


# ---- acceptance rules on random models of two tokens over four symbols


def random_law(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


def classical(p1, p2, q2, q1) -> torch.Tensor:
    """The exact output law [4, 4] of rejection sampling with recorded draft probabilities.

    p1 [4], p2 [4, 4]: the AR model's first token, and its second given the first. The draft draws its second token
    first, from q2 [4], and its first given the second, from q1 [4, 4].
    """
    law = torch.zeros(4, 4, dtype=torch.float64)
    for y2 in range(4):
        for y1 in range(4):
            drawn = q2[y2] * q1[y2, y1]
            keep = min(1.0, float(p1[y1] / q1[y2, y1]))
            residual = (p1 - q1[y2]).clamp(min=0)
            if keep < 1:
                law += drawn * (1 - keep) * (residual / residual.sum())[:, None] * p2
            keep_second = min(1.0, float(p2[y1, y2] / q2[y2]))
            law[y1, y2] += drawn * keep * keep_second
            left = (p2[y1] - q2).clamp(min=0)
            if keep_second < 1:
                law[y1] += drawn * keep * (1 - keep_second) * left / left.sum()
    return law


def test_classical_rejection_is_wrong_for_a_draft_in_any_order():
    """The must-differ twin of coupled verification: its law is off by several hundredths of total variation."""
    generator = torch.Generator().manual_seed(0)
    errors, left_to_right = [], []
    for _ in range(200):
        p1, p2, q2, q1 = (random_law(generator, *shape) for shape in ((4,), (4, 4), (4,), (4, 4)))
        truth = p1[:, None] * p2
        errors.append(float((classical(p1, p2, q2, q1) - truth).abs().sum() / 2))
        blind = q1[:1].expand(4, 4)  # a draft whose first token does not know the second is left to right
        left_to_right.append(float((classical(p1, p2, q2, blind) - truth).abs().sum() / 2))
    assert max(left_to_right) < 1e-12
    assert 0.02 < sum(errors) / 200 < 0.08


def test_coupled_verification_has_the_ar_law_for_any_draft():
    """The kept text is the AR sampler's for that noise, so its law is the AR law, whatever order the draft was
    drawn in, and edited as it may be; drafts from near the truth are mostly kept."""
    generator = torch.Generator().manual_seed(1)
    rows, settings = 200_000, SamplingBatch.of([Sampling(1.0)])
    p1, p2, q2, q1 = (random_law(generator, *shape) for shape in ((4,), (4, 4), (4,), (4, 4)))
    noise = gumbel(torch.arange(rows), torch.tensor([[7, 8]]).expand(rows, 2), 4)
    truth = p1[:, None] * p2

    def draw(law: torch.Tensor, at: int) -> torch.Tensor:
        return propose(law.log()[:, None], noise[:, at : at + 1], settings)[:, 0]

    second = draw(q2.expand(rows, 4), 1)
    first = draw(q1[second], 0)
    first = torch.where(second == 3, 2, first)  # an edit that looks at what came later
    own_first = draw(p1.expand(rows, 4), 0)
    agree = own_first == first
    own_second = draw(p2[own_first], 1)  # verified in the same pass, or drawn anew
    share = torch.bincount(own_first * 4 + own_second, minlength=16).view(4, 4) / rows
    expected_error = float((truth * (1 - truth) / rows).sqrt().sum() * 0.4)
    assert float((share - truth).abs().sum() / 2) < 2 * expected_error
    assert 0.1 < float(agree.double().mean()) < 0.9
    # shared Gumbel noise keeps at least (1 - TV) / (1 + TV) of what a near draft proposes
    near = 0.8 * p1 + 0.2 * q2
    distance = float((near - p1).abs().sum() / 2)
    kept = float((draw(near.expand(rows, 4), 0) == own_first).double().mean())
    assert kept > (1 - distance) / (1 + distance) - 0.005
    # twin: independent noise agrees as two independent draws do
    other = gumbel(torch.arange(rows) + 10**9, torch.tensor([[7, 8]]).expand(rows, 2), 4)
    apart = propose(near.log().expand(rows, 1, 4), other[:, :1], settings)[:, 0] == own_first
    assert float(apart.double().mean()) == pytest.approx(float((near * p1).sum()), abs=0.01)


def test_public_names_reach_the_decoders(trained):
    model = blockdiff.load(trained / "checkpoint")
    (output,) = model.generate("the cat", max_new_tokens=8, policy="entropy + entropy_budget(0.2)")
    assert len(output.tokens) == 8
