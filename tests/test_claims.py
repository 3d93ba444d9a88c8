"""Claims and their verdicts, the measures beside the bound, and the page that is made from saved summaries."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import tiny_config
from test_cli import run
from test_experiments import experiment

from blockdiff.config import ConfigError
from blockdiff.experiment import load_experiment, page
from blockdiff.experiment.claims import Claim, judge
from blockdiff.statistics import rank_correlation


def verdict(values: dict[int, float], base: dict[int, float] | None = None, **limit: float) -> str:
    numbers = {"a": values, "b": base or {}}
    claim = Claim(says="s", source="us", setting="a", baseline=None if base is None else "b", **limit)
    found = judge(claim, lambda setting, measure, at: numbers[setting])
    return found["outcome"]


def test_a_claim_holds_where_the_interval_lies_on_its_side():
    near, far = {0: 0.10, 1: 0.11, 2: 0.09}, {0: 1.10, 1: 1.11, 2: 1.09}
    assert verdict(near, far, below=0) == "holds"
    assert verdict(far, near, below=0) == "does not hold"
    assert verdict(far, near, above=0) == "holds"
    assert verdict(near, far, above=0) == "does not hold"
    assert verdict(near, below=0.2) == "holds"
    assert verdict(near, below=0.1) == "not decided"
    wide = {0: 0.5, 1: -0.5, 2: 0.1}
    assert verdict(wide, near, below=0) == verdict(wide, near, above=0) == "not decided"
    assert verdict({0: 0.1}, {0: 1.1}, below=0) == "not decided"  # one seed has no interval
    assert verdict({0: 1.0, 1: 1.0}, above=0.999) == "holds"  # no spread: the interval is a point
    assert verdict({0: 1.0, 1: 1.0}, above=1.0) == "not decided"


def test_pairs_are_paired_and_places_must_all_hold():
    # a common shift of each seed is no part of the difference
    assert verdict({0: 1.0, 1: 5.0, 2: 9.0}, {0: 1.1, 1: 5.11, 2: 9.09}, below=0) == "holds"
    assert verdict({0: 1.0, 1: 5.0, 2: 9.0}, {0: 5.11, 1: 9.09, 2: 1.1}, below=0) == "not decided"
    claim = Claim(says="s", source="us", setting="a", at=[{"block_size": 4}, {"block_size": 8}], below=0)
    by_size = {4: {0: -1.0, 1: -1.1}, 8: {0: 1.0, 1: 1.1}}
    found = judge(claim, lambda setting, measure, at: by_size[at["block_size"]])
    assert [one["outcome"] for one in found["verdicts"]] == ["holds", "does not hold"]
    assert found["outcome"] == "does not hold"
    missing = judge(claim, lambda setting, measure, at: by_size[4] if at == {"block_size": 4} else {})
    assert (missing["outcome"], missing["verdicts"]) == ("not measured", [])


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ([{"says": "x", "source": "y", "setting": "fixed5", "below": 0}], "claims names 'fixed5'.*did you mean fixed4"),
        ([{"says": "x", "source": "y", "setting": "ar"}], "one of below and above"),
        ([{"says": "x", "source": "y", "setting": "ar", "blow": 0}], "did you mean below"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused_before_any_training(tmp_path, claims, words):
    with pytest.raises(ConfigError, match=words):
        load_experiment(experiment(tmp_path, claims=claims))


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)  # 1 - 6 * (1 + 1) / (4 * 15)
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="give pairs"):
        rank_correlation([1, 2, 3], [1, 2])


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """An experiment with every measure, run to its end: its folder."""
    folder = tmp_path_factory.mktemp("measures")
    questions = folder / "questions.jsonl"
    rows = [{"prompt": f"Ada has {n} apples. How many?\n", "answer": str(n)} for n in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = {"train": {"steps": 6, "log_every": 2}}
    judge_run = tiny_config(folder, output=str(folder / "judge"), layout={"kind": "ar"}, eval={"block_sizes": []})
    (folder / "judge.yaml").write_text(json.dumps({**judge_run, "train": {**judge_run["train"], **steps["train"]}}))
    from blockdiff.config import load_config
    from blockdiff.training import train

    train(load_config(folder / "judge.yaml"))
    blocks = {"kind": "random_offset", "size": 4}
    file = experiment(
        folder,
        settings={
            "ar": {"layout": {"kind": "ar"}},
            "fixed4": {"layout": blocks},
            "bernoulli": {"layout": blocks, "noise": {"kind": "bernoulli"}},
        },
        evaluate={
            "block_sizes": [1, 2, 4],
            "offsets": [0, 1],
            "left_bias": [0.0, 1.0],
            "draws": 2,
            "documents": 4,
            "variance": {"draws": 3},
            "generation": {
                "questions": str(questions),
                "judge": str(folder / "judge" / "checkpoint"),
                "count": 4,
                "max_new_tokens": 12,
                "decodes": {"b1": {"block_size": 1}, "b4": {"block_size": 4, "policy": "fixed(1)"}},
            },
        },
        compare=[["bernoulli", "fixed4"]],
        correlate={"all": ["ar", "fixed4", "bernoulli"]},
        claims=[
            {"says": "Everything is below 100", "source": "ours", "setting": "fixed4", "below": 100},
            {"says": "Nobody is right", "source": "ours", "setting": "fixed4", "measure": "exact_match", "above": 0.5},
        ],
    )
    tree = file.read_text().replace("- says: Nobody", "- at: [{decode: b4}]\n  says: Nobody")
    tree = tree.replace("- says: Everything", "- at: [{block_size: 4, left_bias: 1.0}]\n  says: Everything")
    file.write_text(tree)
    from blockdiff.experiment import run_experiment, summarise
    from blockdiff.files import write_json

    plan, runs = load_experiment(file, ["config.train.steps=6"])
    assert run_experiment(plan, runs) == {}
    (folder / "page").mkdir()
    write_json(folder / "page" / "tiny.json", summarise(plan, runs, {}))
    return folder


def test_every_measure_is_there_once_for_every_place(measured):
    summary = json.loads((measured / "page" / "tiny.json").read_text())
    found = [(row["setting"], row["measure"], tuple(row["place"].values())) for row in summary["rows"]]
    assert len(found) == len(set(found))
    of_fixed = {(measure, place) for setting, measure, place in found if setting == "fixed4"}
    for place in ((1, 0, 0.0), (2, 0, 0.0), (2, 1, 0.0), (4, 0, 1.0), (4, 1, 1.0)):
        assert ("bound", place) in of_fixed
    assert {("gradient_noise", ("all",)), ("gradient_variance", ("attention",))} <= of_fixed
    texts = ("exact_match", "tokens_per_forward", "tokens", "unended", "judge_nll", "judged_entropy")
    assert {(name, (decode,)) for name in texts for decode in ("b1", "b4")} <= of_fixed
    of_ar = {(measure, place) for setting, measure, place in found if setting == "ar"}
    assert ("judge_nll", ("b1",)) in of_ar
    assert ("judge_nll", ("b4",)) not in of_ar  # it cannot decode so
    assert ("gradient_noise", ("all",)) not in of_ar
    by = {(row["setting"], row["measure"], tuple(row["place"].values())): row["value"] for row in summary["rows"]}
    gap = by["fixed4", "bound", (4, 1, 0.0)] - by["fixed4", "bound", (4, 0, 0.0)]
    assert by["fixed4", "worst_offset", (4,)] == pytest.approx(gap)
    assert 0 <= by["fixed4", "monotone_share", ()] <= 1
    assert 0 < by["fixed4", "judge_nll", ("b4",)] < 2 * math.log(301)
    assert [claim["outcome"] for claim in summary["claims"]] == ["holds", "does not hold"]


def test_the_page_says_each_claim_and_follows_the_numbers(measured, capsys):
    folder = measured / "page"
    (folder / "introduction.md").write_text("# Results\n\nFirst words.\n")
    (folder / "tiny.md").write_text("What to make of it.\n")
    out = measured / "results.md"
    assert run("results", folder, "--out", out, capsys=capsys)[0] == 0
    text = out.read_text()
    assert text.startswith("# Results\n\nFirst words.\n")
    assert "2 claims: 1 holds, 1 does not hold, 0 not decided" in text
    assert text.index("## tiny") < text.index("What to make of it.") < text.index("**Bound, nats per token**")
    assert (folder / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert text == page(folder, "page")
    summary = json.loads((folder / "tiny.json").read_text())
    summary["rows"][0]["value"] += 1
    (folder / "tiny.json").write_text(json.dumps(summary))
    assert page(folder, "page") != text


def test_questions_and_a_judge_that_are_not_there_are_named_before_any_training(measured, tmp_path, capsys):
    for key, value, words in (
        ("questions", tmp_path / "none.jsonl", "none.jsonl"),
        ("judge", tmp_path / "nobody", "nobody"),
    ):
        change = f"evaluate.generation.{key}={value}"
        code, _, err = run(
            "experiment", measured / "tiny.yaml", "--set", change, "--set", f"output={tmp_path / 'out'}", capsys=capsys
        )
        assert code == 2, err
        assert words in err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
    generation = "evaluate.generation={decodes: {a: {block_size: 1}}}"
    with pytest.raises(ConfigError, match="questions with answers, or a judge"):
        load_experiment(measured / "tiny.yaml", [generation])


def test_a_directory_without_summaries_is_named(tmp_path, capsys):
    code, _, err = run("results", tmp_path, "--out", tmp_path / "page.md", capsys=capsys)
    assert code == 2
    assert "no summary of an experiment" in err
    assert not (tmp_path / "page.md").exists()
