"""Evaluations against truth: known sources, chains of orders, bytes, paired models, length, texts under a judge."""

from __future__ import annotations

import json
import math
from itertools import pairwise, permutations
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import write_corpus
from test_bounds import random_documents
from test_cli import run
from test_engine import model_of
from tokenizers.processors import ByteLevel

import blockdiff
from blockdiff.building import encoder_of
from blockdiff.data import Document, Encoder
from blockdiff.decode import POLICIES
from blockdiff.engine import Request, generate
from blockdiff.evaluate import bound, compare
from blockdiff.evaluate.compare import bootstrap, interval
from blockdiff.evaluate.diversity import distinct, repeated, self_bleu
from blockdiff.evaluate.length import _differences, _verdict, cache_of, stretches
from blockdiff.evaluate.oracle import HiddenMarkov, OracleModel, entropy, sample
from blockdiff.evaluate.plan import LengthPlan
from blockdiff.evaluate.scoring import Estimator, score_tokens
from blockdiff.evaluate.windows import windows
from blockdiff.loading import load_tokenizer
from blockdiff.objectives import Alignment

SOURCE = HiddenMarkov.random(3, 3, 0)
HOWS = [{"draws": 3}, {"exact": True}, {"orders": 2}, {"draws": 3, "left_bias": 1.0}]


def oracle_documents(model: OracleModel, count: int, seed: int = 0) -> list[Document]:
    return [model.document(ids, f"d{n}") for n, ids in enumerate(sample(SOURCE, model.length, count, seed))]


# ---- against the truth


@pytest.mark.parametrize("alignment", [Alignment("same"), Alignment("shift", "clean")])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_every_bound_finds_the_entropy_of_a_known_source(alignment, how):
    model = OracleModel(SOURCE, 6, alignment)
    truth = entropy(SOURCE, 6) / 6
    for row in bound(cast(Any, model), oracle_documents(model, 2000), [1, 3, 6], **how):
        assert abs(row.nats_per_token - truth) < 4 * row.se
        assert row.se < 0.03 * truth * 2
        if "exact" in how:
            assert row.nll_nats == pytest.approx(row.nats_per_token, abs=1e-12)  # every order has the same likelihood
    other = OracleModel(HiddenMarkov.random(3, 3, 1), 6, alignment)  # twin: another source's conditionals cost more
    (wrong,) = bound(cast(Any, other), oracle_documents(model, 2000), [3], **how)
    assert wrong.nats_per_token > truth + 4 * wrong.se


def test_intervals_hold_the_truth_in_most_repeats():
    model = OracleModel(SOURCE, 6)
    truth = entropy(SOURCE, 6) / 6
    rows = [
        bound(cast(Any, model), oracle_documents(model, 80, seed), [3], draws=2, seed=seed)[0] for seed in range(200)
    ]
    held = [abs(row.nats_per_token - truth) <= 1.96 * row.se for row in rows]
    assert 0.92 <= np.mean(held) <= 0.98
    assert (
        np.mean([abs(row.nats_per_token - truth) <= 4 * row.se for row in rows]) > 0.98
    )  # twin: wider intervals hold more
    assert np.mean([abs(row.nats_per_token - truth) <= 1.96 * row.se_mc for row in rows]) < 0.8  # twin: documents vary


def test_the_sources_law_and_samples_agree():
    law, drawn = SOURCE.law(4), sample(SOURCE, 4, 20_000, 0)
    share = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double() / len(drawn)
    assert float((share - law).abs().max()) < 0.01
    assert entropy(SOURCE, 4) == pytest.approx(float(-(law * law.log()).sum()))


# ---- chains of orders


def test_chains_of_orders_are_the_bound_and_their_mean_likelihood_is_tighter():
    model = tiny.model("llama", "same")
    documents = random_documents([10, 13, 9])
    (exact,) = bound(model, documents, [3], exact=True)
    (chains,) = bound(model, documents, [3], orders=60)
    assert abs(chains.nats_per_token - exact.nats_per_token) < 4 * chains.se_mc
    assert chains.tightened_nats < chains.nats_per_token
    assert chains.tightened_nats == pytest.approx(exact.nll_nats, abs=0.3 * (exact.nats_per_token - exact.nll_nats))
    (one,) = bound(model, documents, [3], orders=1)
    assert one.tightened_nats == pytest.approx(one.nats_per_token)  # twin: nothing to average
    again = bound(model, documents, [3], orders=60, batch_tokens=1)[0]
    assert again.tightened_nats == pytest.approx(chains.tightened_nats, abs=1e-10)


def test_a_chain_is_the_likelihood_of_its_order():
    """All orders of one block, by hand: their mean is the bound, -log of their mean likelihood the exact NLL."""
    model = tiny.model("llama", "same")
    (document,) = random_documents([4])
    pieces = list(windows([document], 3, 0, 64))
    exact = score_tokens(model, pieces, 3, Estimator("exact"), 8192)
    drawn = score_tokens(model, pieces, 3, Estimator("orders", 200), 8192)
    found = sorted({round(float(total), 9) for total in drawn.nats.sum(1)})
    assert len(found) == len(list(permutations(range(3))))
    assert np.mean(found) == pytest.approx(float(exact.nats.sum()), abs=1e-6)
    assert -math.log(np.mean(np.exp(-np.array(found)))) == pytest.approx(float(exact.nll.sum()), abs=1e-6)


def test_orders_and_exact_exclude_each_other():
    with pytest.raises(ValueError, match="not with exact"):
        bound(tiny.model(), random_documents([9]), [3], orders=2, exact=True)


# ---- bytes, and two models


def test_bits_per_byte_count_the_scored_text(trained, tmp_path):
    model = blockdiff.load(trained / "checkpoint")
    (row,) = blockdiff.bound(model, ["the cat sät ."], [1])
    assert row.text_bytes == len("the cat sät .".encode())  # the beginning token is given, the end token has no bytes
    assert row.bits_per_byte == pytest.approx(row.nats_per_token * row.tokens / row.text_bytes / math.log(2))
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "the cat", "completion": " sat ."}) + "\n")
    assert blockdiff.bound(model, tmp_path / "a.jsonl", [1])[0].text_bytes == len(" sat .")
    assert bound(model, random_documents([9, 12]), [1])[0].bits_per_byte is None


def test_bytes_are_those_of_the_text_whatever_surrounds_it(trained):
    model = blockdiff.load(trained / "checkpoint")
    encoder = encoder_of(model)
    plain = load_tokenizer(trained / "checkpoint")
    plain._tokenizer.post_processor = ByteLevel(trim_offsets=False)  # no beginning token
    without = Encoder(plain, encoder.end_id)
    for text in ("the cat", "é", "日本 is", "“the cat”"):
        ids = without.tokenize([text])[0]
        rest = len(text.encode()) - sum(len(piece) for piece in plain.convert_ids_to_tokens(ids[:1]))
        assert without.text(text, ids, "t").text_bytes == rest
        assert encoder.text(text, encoder.tokenize([text])[0], "t").text_bytes == len(text.encode())
    plain.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat ."}]
    assert Encoder(plain, encoder.end_id, (encoder.end_id,)).chat(chat, "c").text_bytes == len("sat .")


def test_two_models_of_different_tokenizers_are_compared_by_their_own_bytes():
    """One scores all bytes of a text, the other not its first token's: the difference is that of their own values."""
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    documents = [Document(d.ids, d.prompt, d.name, 3 * d.scored) for d in random_documents([20, 31, 18, 25])]
    others = [Document(d.ids[:-3], d.prompt[:-3], d.name, 3 * d.scored - 5) for d in documents]
    (found,) = compare(model, other, documents, others, [3])
    first, second = bound(model, documents, [3])[0], bound(other, others, [3])[0]
    assert found.bits_per_byte == pytest.approx(first.bits_per_byte - second.bits_per_byte)
    assert found.nats_per_token is None
    assert found.bits_ci[0] < found.bits_per_byte < found.bits_ci[1]


def test_two_models_are_compared_on_the_same_documents():
    model, other = tiny.model(seed=0), tiny.model(seed=1)
    documents = [Document(d.ids, d.prompt, d.name, 2 * d.scored) for d in random_documents([20, 31, 18, 25, 40, 22])]
    (itself,) = compare(model, model, documents, documents, [3])
    assert (itself.nats_per_token, itself.nats_ci) == (0, (0, 0))
    (found,) = compare(model, other, documents, documents, [3], draws=4)
    (back,) = compare(other, model, documents, documents, [3], draws=4)
    first, second = (bound(m, documents, [3], draws=4)[0].nats_per_token for m in (model, other))
    assert found.nats_per_token == pytest.approx(first - second) == pytest.approx(-back.nats_per_token)
    assert found.bits_per_byte == pytest.approx(found.nats_per_token / 2 / math.log(2))
    assert found.nats_ci[0] < found.nats_per_token < found.nats_ci[1]
    assert found.below == pytest.approx(1 - back.below)
    with pytest.raises(ValueError, match="give the same"):
        compare(model, other, documents, documents[:2], [3])
    with pytest.raises(ValueError, match="how many bytes"):
        compare(model, other, random_documents([9]), random_documents([9]), [3])


def test_the_bootstrap_is_that_of_a_ratio():
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(5, 50, (200,), generator=generator).double()
    sums = counts + 4 * torch.rand(200, generator=generator).double()
    low, high = interval(bootstrap(sums, counts))
    from blockdiff.evaluate.bounds import ratio

    mean, se = ratio(sums, counts)
    assert (high - low) / 2 == pytest.approx(1.96 * se, rel=0.15)
    assert low < mean < high
    assert bootstrap(sums[:1], counts[:1]) is None


def test_eval_bound_against_another_model(trained, tmp_path, capsys):
    data, target = write_corpus(tmp_path)[1], tmp_path / "bound.json"
    base = ["eval", "bound", trained / "checkpoint", "--data", data, "--block-sizes", "1,4", "--json", target]
    code, out, _ = run(*base, "--orders", 2, "--against", trained / "checkpoint", capsys=capsys)
    assert code == 0
    assert "tighter" in out
    assert "against" in out
    result = json.loads(target.read_text())
    assert [row["bits_per_byte"] for row in result["compared"]] == [0, 0]
    assert result["rows"][1]["tightened_nats"] < result["rows"][1]["nats_per_token"]


# ---- a bounded cache


def test_a_cache_window_is_a_models_own_sliding_window():
    """The same weights as a Mistral with a window and as a Llama that is given one: bounds and texts."""
    shape = {"sliding_window": 6}
    mistral = tiny.model("mistral", "shift", "clean", **shape)
    llama = tiny.model("llama", "shift", "clean")
    llama.backbone.load_state_dict(mistral.backbone.state_dict())
    documents = random_documents([30, 22])
    expected = bound(mistral, documents, [1, 4], draws=2)
    whole = bound(llama, documents, [1, 4], draws=2)
    with cache_of(llama, 6):
        found = bound(llama, documents, [1, 4], draws=2)
    for own, wanted, other in zip(found, expected, whole, strict=True):
        assert own.nats_per_token == pytest.approx(wanted.nats_per_token, abs=1e-9)
        assert own.nats_per_token != pytest.approx(other.nats_per_token, abs=1e-6)  # twin
    assert llama.cache_window is None


def test_texts_under_a_cache_window_are_those_of_a_model_with_that_window():
    mistral, llama = model_of(architecture="mistral", sliding_window=6), model_of()
    llama.backbone.load_state_dict(mistral.backbone.state_dict())
    requests = [Request(tuple(range(5, 5 + length)), 30, 4, POLICIES["fixed_count"]) for length in (3, 17)]
    whole = [output.tokens for output in generate(llama, requests)]
    expected = [output.tokens for output in generate(mistral, requests)]
    with cache_of(llama, 6):
        assert [output.tokens for output in generate(llama, requests)] == expected != whole
    with cache_of(llama, 1000):
        assert [output.tokens for output in generate(llama, requests)] == whole


# ---- length


def length_plan(trained, tmp_path, **changes):
    long = tmp_path / "long.jsonl"
    text = " ".join(json.loads(line)["text"] for line in write_corpus(tmp_path)[1].read_text().splitlines())
    long.write_text("".join(json.dumps({"text": text[shift:]}) + "\n" for shift in (0, 8, 19)))
    checkpoint = str(trained / "checkpoint")
    tree = {
        "data": str(long),
        "length": 16,
        "times": 4,
        "draws": 2,
        "ways": {
            "AR": {"model": checkpoint},
            "b4": {"model": checkpoint, "block_size": 4},
            "full": {"model": checkpoint, "block_size": "full", "policy": "random + fixed(4)"},
        },
        "texts": {"judge": checkpoint, "count": 2, "prompt_tokens": 4},
        **changes,
    }
    file = tmp_path / "length.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_eval_length_measures_bin_by_bin(trained, tmp_path, capsys):
    file, target, plot = length_plan(trained, tmp_path), tmp_path / "length.json", tmp_path / "length.png"
    code, out, _ = run("eval", "length", file, "--json", target, "--plot", plot, capsys=capsys)
    assert code == 0
    assert "48-64" in out
    assert plot.stat().st_size > 10_000
    result = json.loads(target.read_text())
    rows = {(row["way"], row["cache"], row["bin"]): row for row in result["rows"]}
    assert len(rows) == 3 * 2 * 4
    for way in ("AR", "b4"):
        first, last = ([rows[way, cache, at] for cache in ("full", "window")] for at in (0, 3))
        assert first[0]["nats_per_token"] == pytest.approx(
            first[1]["nats_per_token"], abs=1e-5
        )  # nothing is out of sight
        assert last[0]["nats_per_token"] != pytest.approx(last[1]["nats_per_token"], abs=1e-4)  # twin
    assert rows["AR", "full", 1]["variance"] == 0 < rows["b4", "full", 1]["variance"]
    assert rows["full", "full", 0]["block_size"] == 64
    assert rows["full", "window", 0]["block_size"] == 16
    assert all(row["tokens"] == 16 * row["documents"] for row in rows.values())
    model = blockdiff.load(trained / "checkpoint")
    pieces = stretches(blockdiff.api.documents_of(model, json_texts(tmp_path / "long.jsonl")), 64, None)
    whole = score_tokens(model, list(windows(pieces, 4, 0, 65)), 4, Estimator(draws=2), 8192)
    mean = sum(rows["b4", "full", at]["nats_per_token"] for at in range(4)) / 4
    assert mean == pytest.approx(float(whole.nats.mean(0).sum() / len(whole.document)), abs=1e-6)
    assert {row["way"] for row in result["differences"]} == {"AR", "b4"}
    assert max(row["max_abs_difference"] for row in result["differences"]) < 1e-4
    assert {row["cache"] for row in result["verdicts"]} == {"window"}
    assert {(row["texts"], sum(count for _, count in row["histogram"])) for row in result["lengths"]} == {(2, 2)}
    assert run("report", target, "--out", tmp_path / "report.html", capsys=capsys)[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert all(f'id="figure-length{part}"' in page for part in ("", "-variance", "-texts", "-histogram", "-verdicts"))
    for row in result["texts"]:
        assert row["entropy"] > 0
        assert 0 <= (row["repeated_4grams"] or 0) <= 1


def test_a_cache_of_another_text_is_not_taken_for_exact(monkeypatch):
    """The twin of the cache's exactness: keys and values written for other tokens."""
    model = tiny.model("llama", "shift", "seed")
    plan = LengthPlan(data="x", length=8, times=3, ways={"a": {"model": "m", "block_size": 4}})
    (piece,) = random_documents([25])
    exact = [row.max_abs_difference for row in _differences(plan, "a", model, piece, 4, "full")]
    assert max(exact) < 1e-5
    right = model.forward

    def wrong(ids, tokens, **given):
        return right((ids + 1) % 30 if given.get("keep") else ids, tokens, **given)

    monkeypatch.setattr(model, "forward", wrong)
    assert min(row.max_abs_difference for row in _differences(plan, "a", model, piece, 4, "full")) > 1e-3


def json_texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_stretches_need_texts_that_are_long_enough():
    documents = random_documents([50, 70, 20])
    found = stretches(documents, 16, None)
    assert [len(piece) for piece in found] == [17] * 8
    assert [piece.scored for piece in found] == [16] * 8
    assert found[1].ids[0] == found[0].ids[-1]  # every token is scored once
    with pytest.raises(ValueError, match="its longest document has 70"):
        stretches(documents, 64, None)


def test_verdicts_say_held_not_held_and_undecided():
    plan = LengthPlan(data="x", length=16, times=4, ways={"a": {"model": "m"}})
    apart = ((0.0, 0.01), (0.2, 0.01), (0.04, 0.02))
    assert [_verdict(plan, "a", one, 50, []).held for one in apart] == [True, False, None]
    texts = plan.model_copy(update={"texts": {"judge": "j"}})
    varied = [tuple((7 * n + at * at) % 50 for at in range(64)) for n in range(6)]
    dull = [(*text[:48], *[3] * 16) for text in varied]
    verdicts = [
        _verdict(texts, "a", (0.0, 0.01), 50, wholes) for wholes in (varied, dull, varied[:1], [t[:63] for t in varied])
    ]
    assert [verdict.held for verdict in verdicts] == [True, False, None, None]
    assert verdicts[1].entropy == 0 < verdicts[0].entropy
    assert _verdict(plan, "a", (0.0, 0.02), 2, []).held is None  # of two documents nothing is known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": 400}, "lower times"),
        ({"criterion": {"cache": "other"}}, "criterion.cache"),
        ({"caches": ["full"]}, "criterion.cache window is not measured"),
        ({"times": 2}, "times"),
        ({"caches": ["window", "window"]}, "has one twice"),
        ({"criterion": {"below": float("nan")}}, "criterion.below"),
        ({"texts": {"judge": "x", "prompt_tokens": 16}}, "give fewer than length, 16"),
        ({"ways": {"a": {"model": "x", "block_size": 0}}}, "block sizes are 1 or more"),
        ({"ways": {"a": {"model": "x", "policy": "nonsense"}}}, "nonsense"),
        ({"lenght": 3}, "did you mean length?"),
    ],
)
def test_bad_length_plans_are_refused(trained, tmp_path, capsys, changes, message):
    code, _, err = run("eval", "length", length_plan(trained, tmp_path, **changes), capsys=capsys)
    assert code == 2
    assert message in err.replace("\n", " ")


# ---- texts under a judge


def test_eval_generation_draws_the_frontier(trained, tmp_path, capsys):
    length_plan(trained, tmp_path)
    checkpoint = str(trained / "checkpoint")
    tree = {
        "data": str(tmp_path / "long.jsonl"),
        "judge": checkpoint,
        "ways": {"AR": {"model": checkpoint}, "b4": {"model": checkpoint, "block_size": 4}},
        "budgets": [4, 8, 16],
        "temperatures": [0.5, 1.5],
        "new_tokens": 16,
        "prompt_tokens": 4,
        "groups": 2,
        "texts": 3,
    }
    file, target, plot = tmp_path / "frontier.yaml", tmp_path / "frontier.json", tmp_path / "frontier.png"
    file.write_text(yaml.safe_dump(tree))
    code, out, _ = run("eval", "generation", file, "--json", target, "--plot", plot, capsys=capsys)
    assert code == 0
    assert "data: judge NLL" in out
    assert plot.stat().st_size > 10_000
    result = json.loads(target.read_text())
    rows = {(row["way"], row["budget"], row["temperature"]): row for row in result["rows"]}
    assert len(rows) == 2 + 3 * 2
    assert len(result["skipped"]) == 2
    assert result["skipped"][0] == "AR: 16 blocks of 1 cannot take 4 forwards"
    assert (result["data"]["texts"], rows["b4", 4, 0.5]["texts"], rows["b4", 4, 0.5]["groups"]) == (6, 6, 2)
    for cold, hot in ((rows[way, 16, 0.5], rows[way, 16, 1.5]) for way in ("AR", "b4")):
        assert cold["judge_nll"] < hot["judge_nll"]
        assert cold["entropy"] < hot["entropy"]
        assert cold["nearest_to_data"] != hot["nearest_to_data"]
    forwards = [rows["b4", budget, 0.5]["forwards_per_text"] for budget in (4, 8, 16)]
    assert all(low < high for low, high in pairwise(forwards))
    assert run("report", target, "--out", tmp_path / "report.html", capsys=capsys)[0] == 0
    assert 'id="figure-frontier-speed"' in (tmp_path / "report.html").read_text()
    for budget in (7, 11, 15, 16):  # never overspent, whatever divides what
        options = [
            "--set",
            f"budgets=[{budget}]",
            "--set",
            "temperatures=[1.0]",
            "--set",
            f"ways.b4.block_size={budget % 4 + 2}",
        ]
        assert run("eval", "generation", file, *options, "--json", target, capsys=capsys)[0] == 0
        assert all(row["forwards_per_text"] <= budget + 1 for row in json.loads(target.read_text())["rows"])
    code, _, err = run("eval", "generation", file, "--set", "texts=500", capsys=capsys)
    assert (code, "1000 are needed for 2 groups of 500" in err) == (2, True)
    code, _, err = run("eval", "generation", file, "--set", "budgets=[1]", capsys=capsys)
    assert (code, "no way's blocks can fill 16 tokens so" in err) == (2, True)
    again = tmp_path / "again.json"
    assert run("eval", "generation", file, "--set", "batch=1", "--json", again, capsys=capsys)[0] == 0
    assert json.loads(again.read_text())["rows"] == result["rows"]


def test_a_late_mistake_loses_nothing(trained, tmp_path, capsys):
    file, target = length_plan(trained, tmp_path), tmp_path / "kept.json"
    bad = "ways.zz={model: nowhere}"
    code, _, err = run("eval", "length", file, "--set", bad, "--json", target, capsys=capsys)
    assert code == 2
    assert "nowhere" in err
    assert not target.exists()  # refused before anything was measured
    code, _, err = run("eval", "length", file, "--plot", tmp_path / "a.svg", capsys=capsys)
    assert (code, "give a file that ends in .png" in err) == (2, True)
    unwritable = tmp_path / "long.jsonl" / "plot.png"
    assert (
        run("eval", "length", file, "--set", "texts=null", "--plot", unwritable, "--json", target, capsys=capsys)[0]
        != 0
    )
    assert len(json.loads(target.read_text())["rows"]) == 24


def test_a_strong_left_bias_is_a_number():
    (row,) = bound(tiny.model("llama", "same"), random_documents([9, 12]), [4], exact=True, left_bias=400.0)
    (drawn,) = bound(tiny.model("llama", "same"), random_documents([9, 12]), [4], orders=1, left_bias=400.0)
    assert row.nats_per_token == pytest.approx(row.nll_nats) == pytest.approx(drawn.nats_per_token)  # one order only


def test_diversity_in_closed_form():
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) is None
    assert repeated(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert repeated(["a b c d e f g h"]) == 0
    assert repeated(["a b"]) is None
    assert self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(1)
    assert self_bleu(["a b c d e", "f g h i j"]) < 0.2
    assert self_bleu(["a b c"]) is None
    # by hand: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, half a hit of 1
    assert self_bleu(["a b c x", "a b c y"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_long_texts_are_made_of_short_ones(tmp_path, capsys):
    source = tmp_path / "short.jsonl"
    source.write_text("".join(json.dumps({"text": f"line {n}\nand more"}) + "\n" for n in range(40)))
    long, held = tmp_path / "long.jsonl", tmp_path / "held.jsonl"
    code, _, _ = run("data", "pack", source, "--out", long, "--valid", held, "--characters", 60, capsys=capsys)
    assert code == 0
    texts, kept = json_texts(long), json_texts(held)
    assert len(kept) == round(len(texts + kept) / 10)
    assert all(60 <= len(text) < 120 for text in texts)
    assert "\n\n".join(texts + kept) == "\n\n".join(json_texts(source))
    whole = tmp_path / "whole.txt"
    whole.write_text("\n".join(f"row {n} of a long play" for n in range(200)))
    assert run("data", "pack", whole, "--out", long, "--characters", 500, capsys=capsys)[0] == 0
    cut = json_texts(long)
    assert "".join(cut) == whole.read_text()
    assert all(text.endswith("\n") and 500 <= len(text) < 530 for text in cut[:-2])
    for options in (["--out", whole], ["--out", long, "--valid", long], ["--out", tmp_path / "a.parquet"]):
        assert run("data", "pack", whole, *options, capsys=capsys)[0] == 2
    assert "".join(cut) == whole.read_text()
    source.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert run("data", "pack", source, "--out", long, capsys=capsys)[0] == 2
