"""lm-eval on block diffusion models: the same numbers as `eval bound`, and tasks from local files, offline."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import tiny_config
from test_cli import run

import blockdiff
from blockdiff import evaluate
from blockdiff.api import Model
from blockdiff.config import make_config
from blockdiff.data import Encoder
from blockdiff.engine import Request
from blockdiff.evaluate.bounds import document_nll, estimator_of
from blockdiff.loading import load_tokenizer
from blockdiff.training import train

EXAMPLES = Path(__file__).parents[1] / "examples" / "harness"
lm_eval = pytest.importorskip("lm_eval")

PAIRS = [("the cat", " sat on the mat ."), ("a dog", " ate"), ("", "one bird saw two cats . the mat was red")]


@pytest.fixture(scope="module")
def model(trained) -> Model:
    return blockdiff.load(trained / "checkpoint", device="cpu")


def wrapped(model: Model, block_size: int, *, exact: bool = False, **changes):
    from blockdiff.harness import BlockDiffusionLM

    form = Request(prompt=(0,), block_size=block_size, max_new_tokens=12)
    return BlockDiffusionLM(model, form, estimator_of(changes.get("draws", 4), exact, 0, 0.0, changes.get("seed", 0)))


def requests(kind: str, arguments: list[tuple]):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


@pytest.mark.parametrize(("block_size", "exact"), [(1, False), (4, False), (4, True)])
def test_loglikelihood_is_minus_the_bound(model, block_size, exact):
    encoder = Encoder(model.tokenizer, None)
    documents = [encoder.completion(*pair, "pair") for pair in PAIRS]
    found = [
        value for value, _ in wrapped(model, block_size, exact=exact).loglikelihood(requests("loglikelihood", PAIRS))
    ]
    row = evaluate.bound(model, documents, [block_size], draws=4, exact=exact)[0]
    assert -sum(found) == pytest.approx(row.nats_per_token * row.tokens, rel=1e-9)
    first = evaluate.bound(model, documents[:1], [block_size], draws=4, exact=exact)[0]
    assert -found[0] == pytest.approx(first.nats_per_token * first.tokens, rel=1e-5)
    if block_size == 1:
        assert [-value for value in found] == pytest.approx(document_nll(model, documents), rel=1e-9)
    # twins: another block size, another seed where something is drawn, and the same pairs with an end token
    other = wrapped(model, 5 - block_size, exact=exact).loglikelihood(requests("loglikelihood", PAIRS))
    assert other[0][0] != pytest.approx(found[0], rel=1e-4)
    again = wrapped(model, block_size, exact=exact, seed=1).loglikelihood(requests("loglikelihood", PAIRS))
    assert (again[0][0] == found[0]) == (exact or block_size == 1)
    ended = [Encoder(model.tokenizer, model.end_ids[0]).completion(*pair, "pair") for pair in PAIRS]
    assert evaluate.bound(model, ended, [block_size], draws=4, exact=exact)[0].tokens == row.tokens + len(PAIRS)


@pytest.mark.parametrize("block_size", [1, 4])
def test_rolling_is_eval_bound_of_the_same_texts(model, trained, block_size, tmp_path, capsys):
    """By the command, on texts that spell their end, one of them longer than the model sees at once."""
    end = model.tokenizer.convert_ids_to_tokens(model.end_ids[0])
    texts = ["the cat sat on the mat ." + end, "a dog ate the hat . we all ran home . " * 8 + end]
    assert len(model.encode(texts[1])) > model.spec.trained_length
    found = wrapped(model, block_size).loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
    data, target = tmp_path / "t.jsonl", tmp_path / "b.json"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--data", data, "--block-sizes", "1,4", "--draws", 4, "--json", target]
    assert run("eval", "bound", trained / "checkpoint", *options, capsys=capsys)[0] == 0
    rows = {row["block_size"]: row["nats_per_token"] * row["tokens"] for row in json.loads(target.read_text())["rows"]}
    assert -sum(found) == pytest.approx(rows[block_size], rel=1e-6)
    assert -sum(found) != pytest.approx(rows[5 - block_size], rel=1e-4)


@pytest.mark.parametrize("block_size", [1, 4])
def test_greedy_is_what_greedy_decoding_writes(model, block_size):
    lm = wrapped(model, block_size)
    written = model.generate("the cat", max_new_tokens=8, block_size=block_size)[0]
    document = Encoder(model.tokenizer, None).completion("the cat", written.text, "as written")
    assert document.ids[~document.prompt].tolist() == written.tokens  # else the text could not be asked about
    pairs = [("the cat", written.text), ("the cat", written.text[:-1] + "#"), ("we all", written.text)]
    found = [greedy for _, greedy in lm.loglikelihood(requests("loglikelihood", pairs))]
    assert found == [True, False, False]


def test_generate_until_stops_and_obeys_its_options(model):
    lm = wrapped(model, 4)
    plain = model.generate("the cat", max_new_tokens=12, block_size=4)[0].text
    stop = plain.strip()[3]
    long = "the cat sat on the mat . " * 40  # longer than the context: its end is kept
    asked = [
        ("the cat", {"until": []}),
        ("the cat", {"until": [stop], "do_sample": False, "temperature": 3.0}),
        ("the cat", {"until": [], "max_gen_toks": 3}),
        ("the cat", {"until": [], "do_sample": True, "temperature": 5.0}),
        (long, {"until": "zzz", "max_gen_toks": 5}),
    ]
    texts = lm.generate_until(requests("generate_until", asked))
    assert texts[0] == plain
    assert texts[1] == plain.partition(stop)[0] != plain
    assert plain.startswith(texts[2])
    assert len(texts[2]) < len(plain)
    assert texts[3] != plain
    assert lm.batch == 32
    lm.batch = 1
    assert lm.generate_until(requests("generate_until", asked)) == texts
    with pytest.raises(ValueError, match="generation_kwargs num_beams: not one of until"):
        lm.generate_until(requests("generate_until", [("a", {"num_beams": 3})]))
    with pytest.raises(ValueError, match="500 tokens do not fit the model's context of 128; ask for fewer"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 500})]))


def test_what_the_numbers_are_is_said(model):
    assert wrapped(model, 1).likelihood == "exact likelihood at block size 1"
    assert wrapped(model, 4).likelihood == "bound at block size 4, 4 draws"
    assert wrapped(model, 4, exact=True).get_model_info()["likelihood"] == "bound at block size 4, every mask set"


def test_lm_eval_makes_the_model_of_its_arguments(trained, tmp_path):
    from lm_eval.api.registry import get_model

    import blockdiff.harness  # noqa: F401 - registers

    made = get_model("blockdiff")
    path = trained / "checkpoint"
    lm = made.create_from_arg_string(
        f"path={path},block_size=4,exact=True,seed=3", {"batch_size": 1, "device": "cuda:0"}
    )
    assert (lm.form.block_size, lm.form.seed, lm.estimator.kind, lm.batch) == (4, 3, "exact", 32)
    assert made.create_from_arg_obj({"path": str(path), "batch": 5}).batch == 5
    assert lm.tokenizer_name == str(path)
    for arguments, message in (
        ("path=a,block_sizes=4", "model_args block_sizes: unknown; did you mean block_size"),
        ("block_size=4", "model_args: give path=DIRECTORY"),
    ):
        with pytest.raises(ValueError, match=message):
            made.create_from_arg_string(arguments)
    network = tiny.backbone("llama", dtype=torch.float32, vocab_size=320)
    network.save_pretrained(tmp_path / "ar")
    load_tokenizer(path).save_pretrained(tmp_path / "ar")
    with pytest.raises(ValueError, match="block size 4: this is an autoregressive checkpoint"):
        made.create_from_arg_string(f"path={tmp_path / 'ar'},block_size=4")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and nothing written outside the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked for"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model that has learned the examples' questions by heart."""
    folder = tmp_path_factory.mktemp("taught")
    sums = [json.loads(line) for line in (EXAMPLES / "sums.jsonl").read_text().splitlines()]
    names = [json.loads(line) for line in (EXAMPLES / "repeat.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["question"], "completion": row["choices"][row["answer"]]} for row in sums]
    rows += [{"prompt": row["prompt"], "completion": f" {row['answer']}."} for row in names]
    tree = tiny_config(
        folder,
        model={"vocabulary": 400},
        data={"length": 96},
        train={"steps": 250},
        eval={"block_sizes": []},
        objective={"ar_weight": 1.0},
    )
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(make_config(tree)).path / "checkpoint"


def test_local_tasks_run_offline(taught, trained, offline, tmp_path, capsys):
    """The examples: multiple choice, exact match of a written text, perplexity; by name and by file."""
    target = tmp_path / "h.json"
    names = ["--harness", "sums,repeat,texts", "--include-path", EXAMPLES, "--block-size", 1, "--json", target]
    results = []
    for model in (taught, trained / "checkpoint"):
        code, out, error = run("eval", "tasks", model, *names, capsys=capsys)
        assert code == 0, error
        results.append(json.loads(target.read_text()))
    found, untaught = ({(row["task"], row["metric"]): row for row in result["rows"]} for result in results)
    assert found[("sums", "acc")]["value"] >= 0.8 > untaught[("sums", "acc")]["value"]
    assert found[("repeat", "exact_match")]["value"] >= 0.8 > untaught[("repeat", "exact_match")]["value"]
    assert found[("sums", "acc")]["n"] == 12
    assert found[("sums", "acc")]["likelihood"] == "exact likelihood at block size 1"
    assert found[("repeat", "exact_match")]["likelihood"] is None
    assert "texts: bits_per_byte" in out
    # lm-eval's bits per byte are the model's nats over the texts' bytes
    texts = [json.loads(line)["text"] for line in (EXAMPLES / "texts.jsonl").read_text().splitlines()]
    lm = wrapped(blockdiff.load(taught, device="cpu"), 1)
    nats = -sum(lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts])))
    size = sum(len(text.encode()) for text in texts)
    assert found[("texts", "bits_per_byte")]["value"] == pytest.approx(nats / size / np.log(2), rel=1e-6)
    # a file instead of a name, elsewhere, at a larger block size
    shutil.copytree(EXAMPLES, tmp_path / "mine")
    options = ["--harness", tmp_path / "mine" / "sums.yaml", "--block-size", 4, "--limit", 5, "--draws", 2]
    code, out, _ = run("eval", "tasks", taught, *options, capsys=capsys)
    assert code == 0
    assert "of 5 (bound at block size 4, 2 draws)" in out


def test_unknown_tasks_and_a_missing_package_are_one_line(trained, offline, monkeypatch, capsys):
    base = ["eval", "tasks", trained / "checkpoint", "--harness"]
    for options, message in (
        (["sum", "--include-path", EXAMPLES], "--harness sum: no such task in"),
        (["sum", "--include-path", EXAMPLES], "did you mean sums?"),
        (["nowhere.yaml"], "--harness nowhere.yaml: no such file"),
    ):
        code, _, error = run(*base, *options, capsys=capsys)
        assert code == 2
        assert message in error
    monkeypatch.delitem(sys.modules, "blockdiff.harness")
    monkeypatch.delattr(blockdiff, "harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    code, _, error = run(*base, "sums", capsys=capsys)
    assert code == 2
    assert "pip install 'blockdiff[evaluation]'" in error
