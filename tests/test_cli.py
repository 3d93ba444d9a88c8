"""The command line as a user meets it: results, JSON, exit codes, one-line errors; the report and the demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from conftest import tiny_config

from blockdiff import cli, report


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command, run in this process."""
    old, sys.argv = sys.argv, ["blockdiff", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = old
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_help_lists_the_commands(capsys):
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0
    for command in ("demo", "train", "explain", "generate", "eval", "report"):
        assert command in out
    code, out, _ = run("--version", capsys=capsys)
    assert (code, out.strip()) == (0, "0.1.0")
    completed = subprocess.run([sys.executable, "-m", "blockdiff", "eval", "--help"], capture_output=True, check=True)
    assert b"bound" in completed.stdout


def test_bound_prints_a_table_and_writes_json(trained, tmp_path, capsys):
    data = yaml.safe_load((trained / "config.yaml").read_text())["data"]["valid"]
    target = tmp_path / "bound.json"
    options = ["--data", data, "--block-sizes", "1,3,4", "--offsets", "0,1", "--draws", 2, "--json", target]
    code, out, _ = run("eval", "bound", trained / "checkpoint", *options, capsys=capsys)
    assert code == 0
    result = json.loads(target.read_text())
    assert {"command", "seed", "versions", "threads", "rows"} <= set(result)
    assert [(row["block_size"], row["offset"]) for row in result["rows"]] == [(1, 0), (3, 0), (3, 1), (4, 0), (4, 1)]
    needed = {"block_size", "offset", "nats_per_token", "se", "ppl", "ppl_ci", "tokens", "estimator", "draws"}
    for row in result["rows"]:
        assert needed <= set(row)
        assert f"{row['nats_per_token']:.4f}" in out
    code, out, _ = run(
        "eval", "bound", trained / "checkpoint", "--data", data, "--block-sizes", 4, "--exact", capsys=capsys
    )
    assert code == 0
    assert "exact NLL" in out


def test_generate_streams_text_and_writes_json(trained, tmp_path, capsys):
    target = tmp_path / "out.json"
    options = ["--prompt", "the cat", "--max-new-tokens", 12, "--block-size", 4, "--json", target]
    code, out, error = run("generate", trained / "checkpoint", *options, capsys=capsys)
    assert code == 0
    result = json.loads(target.read_text())
    assert out == "the cat" + result["text"] + "\n"
    assert result["forwards"] == result["denoise_forwards"] + result["commit_forwards"] + result["verify_forwards"]
    assert result["tokens_per_forward"] == pytest.approx(len(result["tokens"]) / result["forwards"])
    assert f"{result['forwards']} forwards" in error
    again = [*options, "--prompt", "a dog"]
    code, out, _ = run("generate", trained / "checkpoint", *again, capsys=capsys)
    outputs = json.loads(target.read_text())["outputs"]
    assert [outputs[0]["text"], len(outputs)] == [result["text"], 2]


def test_every_decoding_option_does_something(trained, capsys):
    base = ["generate", trained / "checkpoint", "--prompt", "the", "--max-new-tokens", 24, "--block-size", 8]
    plain = run(*base, capsys=capsys)[1]
    for options in (["--temperature", 3], ["--policy", "first_hitting", "--temperature", 2], ["--stop", "a"]):
        code, out, _ = run(*base, *options, capsys=capsys)
        assert code == 0
        assert out != plain, options
    hot = ["--temperature", 3]
    assert run(*base, *hot, "--top-k", 1, capsys=capsys)[1] != run(*base, *hot, capsys=capsys)[1]
    assert run(*base, *hot, "--top-p", 0.1, capsys=capsys)[1] != run(*base, *hot, capsys=capsys)[1]
    assert run(*base, *hot, "--seed", 5, capsys=capsys)[1] != run(*base, *hot, capsys=capsys)[1]
    forwards = [
        int(re.search(r"(\d+) forwards", run(*base, *options, capsys=capsys)[2]).group(1))
        for options in (["--threshold", 1.0], ["--threshold", 0.0], ["--policy", "fixed_count", "--per-step", 4])
    ]
    assert forwards[1] < forwards[2] < forwards[0]


def test_steps_can_be_watched(trained, capsys):
    options = ["--prompt", "the cat", "--max-new-tokens", 8, "--block-size", 4, "--show-steps"]
    code, out, _ = run("generate", trained / "checkpoint", *options, capsys=capsys)
    assert code == 0
    assert "step  0: " in out
    assert "░░░" in out


def test_a_plain_ar_checkpoint_can_be_measured_and_decoded(trained, tmp_path, capsys):
    from blockdiff.loading import load_tokenizer

    network = tiny.backbone("llama", dtype=torch.float32, vocab_size=320)
    network.save_pretrained(tmp_path / "ar")
    load_tokenizer(trained / "checkpoint").save_pretrained(tmp_path / "ar")
    data = yaml.safe_load((trained / "config.yaml").read_text())["data"]["valid"]
    code, _, _ = run("eval", "bound", tmp_path / "ar", "--data", data, "--block-sizes", 1, capsys=capsys)
    assert code == 0
    code, out, _ = run("generate", tmp_path / "ar", "--prompt", "the", "--max-new-tokens", 5, capsys=capsys)
    assert code == 0
    assert out.startswith("the")
    code, _, error = run("generate", tmp_path / "ar", "--prompt", "the", "--block-size", 4, capsys=capsys)
    assert code == 2
    assert "which decodes at block size 1 only" in error


def test_bad_input_is_one_line_and_exit_code_two(trained, tmp_path, capsys):
    model, valid = trained / "checkpoint", yaml.safe_load((trained / "config.yaml").read_text())["data"]["valid"]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "ok"}\n{oops\n')
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**tiny_config(tmp_path), "layuot": {}}))
    cases = [
        (["eval", "bound", model, "--data", tmp_path / "no.jsonl"], "no.jsonl: no such file"),
        (["eval", "bound", model, "--data", tmp_path / "empty.jsonl"], "empty.jsonl: no documents in it"),
        (["eval", "bound", model, "--data", tmp_path / "bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["eval", "bound", model, "--data", valid, "--block-sizes", "0"], "block size 0 is not possible"),
        (["eval", "bound", model, "--data", valid, "--block-sizes", "500"], "block size 500 is longer than the data"),
        (["eval", "bound", model, "--data", valid, "--block-sizes", "4,x"], "--block-sizes 4,x: give whole numbers"),
        (["eval", "bound", tmp_path / "nothing" / "here", "--data", valid], "no such model directory"),
        (["eval", "bound", tmp_path / "pickle", "--data", valid], "pytorch_model.bin is a pickle"),
        (["generate", model, "--prompt", "the " * 200], "tokens and the model's context holds 128: shorten"),
        (["generate", model, "--prompt", "a", "--policy", "magic"], "policy 'magic' is unknown; `blockdiff policies`"),
        (["generate", model, "--prompt", "a", "--temperature", "-1"], "temperature -1.0 is out of range"),
        (["train", tmp_path / "c.yaml"], "unknown key layuot; did you mean layout?"),
        (["train", tmp_path / "none.yaml"], "none.yaml: no such config file"),
        (["report", tmp_path], "no config.yaml in it"),
    ]
    for arguments, message in cases:
        code, _, error = run(*arguments, capsys=capsys)
        assert code == 2, arguments
        assert message in error.replace("\n", " "), (arguments, error)
        assert "Traceback" not in error
    skipped = ["--data", tmp_path / "bad.jsonl", "--skip-bad-rows", "--block-sizes", 1]
    assert run("eval", "bound", model, *skipped, capsys=capsys)[0] == 0
    code, _, error = run("generate", model, "--promt", "a", capsys=capsys)
    assert code == 2
    assert "--promt" in error


def test_explain_shows_keys_shares_and_the_mask(trained, capsys):
    code, out, _ = run("explain", trained / "config.yaml", "--set", "layout={kind: fixed, size: 4}", capsys=capsys)
    assert code == 0
    assert "clean_context: context_causal" in out
    assert re.search(r"4-7\s+95", out)
    assert "noisy   2   ■  ■  ■  ■  ·" in out


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]
        self.images += tag == "svg"


def test_the_report_is_one_self_contained_page(trained, capsys):
    code, out, _ = run("report", trained, capsys=capsys)
    assert code == 0
    page = (trained / "report.html").read_text()
    links = _Links()
    links.feed(page)
    assert links.images == 2
    assert all(link.startswith(("data:", "#")) for link in links.found)
    for words in (
        "Bounds on the validation text",
        "block size 4",
        "What a training pass sees",
        "■",
        "scale_mixture",
        "torch",
    ):
        assert words in page
    assert "report.html" in out


def test_the_report_escapes_what_it_shows(tmp_path):
    (tmp_path / "config.yaml").write_text("a: <script>alert(1)</script>\n")
    (tmp_path / "results").mkdir()
    rows = [{"name": "<b>", "prompt": "<i>", "pieces": ["<script>x</script>"], "steps": [3]}]
    record = {"versions": {}, "threads": 1, "device": "", "seed": 0, "rows": rows}
    (tmp_path / "results" / "samples.json").write_text(json.dumps(record))
    page = report.write(tmp_path).read_text()
    assert "<script>alert" not in page
    assert "<script>x" not in page


def test_the_demo_goes_the_whole_way(tmp_path, capsys):
    target = tmp_path / "demo.json"
    code, out, error = run("demo", "--out", tmp_path / "demo", "--minutes", 0.05, "--json", target, capsys=capsys)
    assert code == 0, error
    result = json.loads(target.read_text())
    assert [row["block_size"] for row in result["rows"]] == [1, 2, 4, 8, 16, 32]
    assert all(row["se"] > 0 for row in result["rows"])
    assert [row["name"] for row in result["baselines"]] == ["unigram", "AR model of step 1"]
    assert result["speed"][0]["speed_over_ar"] == 1
    for sample in result["samples"]:
        assert len(sample["pieces"]) == len(sample["steps"])
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") >= 1
    assert "tokens per forward" in out
    assert Path(tmp_path / "demo" / "checkpoint" / "block_diffusion.json").exists()
    assert (tmp_path / "demo" / "ar" / "checkpoint" / "model.safetensors").exists()
