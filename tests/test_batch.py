"""Batch generation: every row answered once, as `Model.generate` answers it, through kills and other numbers of
processes."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import full_disk
from test_cli import run

from blockdiff.api import load
from blockdiff.batch import answer_file
from blockdiff.datafiles import DataError
from blockdiff.decode import Sampling
from blockdiff.parts import Parts
from blockdiff.shards import Shard

WORDS = ("the", "cat", "sat", "on", "a", "mat", "one", "red", "dog", "ate", "two", "hats", "and", "we", "ran")
DRAWN: dict[str, Any] = {"max_new_tokens": 10, "block_size": 4, "sampling": Sampling(0.9), "seed": 5}
FLAGS = ["--max-new-tokens", "10", "--block-size", "4", "--temperature", "0.9", "--seed", "5"]


def prompts(count: int) -> list[str]:
    return [" ".join(WORDS[(number + i * 3) % len(WORDS)] for i in range(1 + number % 7)) for number in range(count)]


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def answers(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]


def command(model: Path, rows: Path, out: Path, *options: str) -> list[str]:
    given = [str(model), "--input", str(rows), "--output", str(out), *FLAGS, *options]
    return [sys.executable, "-m", "blockdiff", "generate", *given]


@pytest.fixture(scope="module")
def model(trained):
    return load(trained / "checkpoint")


def test_rows_get_what_generate_gives_them(model, tmp_path):
    texts = prompts(70)
    ids = [*(f"q{i}" for i in range(66)), 1.5, None, ["a", 2], {"a": {"b": 1}}]  # of any kind
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": i, "prompt": text} for i, text in zip(ids, texts, strict=True)])
    outcome = answer_file(model, rows, tmp_path / "out", running=9, **DRAWN)
    expected = model.generate(texts, **DRAWN)
    found = answers(tmp_path / "out")
    assert [row["text"] for row in found] == [output.text for output in expected]
    assert [row["forwards"] for row in found] == [output.forwards for output in expected]
    assert [(row["row"], row["id"], row["seed"]) for row in found] == [(i, ids[i], 5 + i) for i in range(70)]
    assert outcome.whole is not None
    assert (outcome.whole.rows, outcome.whole.errors) == (70, 0)
    assert outcome.whole.tokens == sum(len(output.tokens) for output in expected)
    answer_file(model, rows, tmp_path / "other", **{**DRAWN, "seed": 6})
    differing = [a["text"] != b["text"] for a, b in zip(found, answers(tmp_path / "other"), strict=True)]
    assert sum(differing) > 35  # the seed reaches the rows
    part = rf"{tmp_path / 'full'}/.*: File too large; make room"
    with full_disk(500), pytest.raises(OSError, match=part):
        answer_file(model, rows, tmp_path / "full", running=9, **DRAWN)
    answer_file(model, rows, tmp_path / "full", **DRAWN)
    assert answers(tmp_path / "full") == found
    squeezed = tmp_path / "rows.jsonl.gz"
    squeezed.write_bytes(gzip.compress(rows.read_bytes()))
    assert answer_file(model, squeezed, tmp_path / "out", **DRAWN).found == 70  # the same rows


def test_a_row_may_ask_for_less_another_seed_or_a_stop(model, tmp_path):
    own = [{"max_new_tokens": 3}, {"seed": 99}, {"stop": " "}, {"stop": ["a", "e"]}, {}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", **changes} for changes in own])
    answer_file(model, rows, tmp_path / "out", **DRAWN)
    for number, (changes, row) in enumerate(zip(own, answers(tmp_path / "out"), strict=True)):
        asked = {**DRAWN, "seed": 5 + number, **changes}
        assert row["text"] == model.generate("the cat", **asked)[0].text, changes
    assert answers(tmp_path / "out")[0]["new_tokens"] == 3


def test_conversations_are_read_through_the_template(trained, template, tmp_path, capsys):
    messages = [{"role": "user", "content": "the cat"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}, {"prompt": "the cat"}])
    options = ["--input", rows, "--output", tmp_path / "out", *FLAGS, "--chat-template", template]
    assert run("generate", trained / "checkpoint", *options, capsys=capsys)[0] == 0
    chatting = load(trained / "checkpoint")
    chatting.set_chat_template(template)
    chat, plain = answers(tmp_path / "out")
    assert chat["prompt_tokens"] == len(chatting.encode_chat(messages)) != plain["prompt_tokens"]
    options[3] = tmp_path / "without"
    assert run("generate", trained / "checkpoint", *options[:-2], capsys=capsys)[0] == 1
    assert "has no chat template" in answers(tmp_path / "without")[0]["error"]


def test_rows_that_cannot_be_served_get_an_error(trained, tmp_path, capsys):
    cases: list[tuple[Any, str | None]] = [
        ({"prompt": "the cat"}, None),
        ("{not json", "rows.jsonl:2: not JSON"),
        ("[1]", "must be an object"),
        ({"id": 7, "prompt": "the " * 200}, "the model's context holds 128"),
        ({"text": "the"}, "needs the text 'prompt'"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "not both"),
        ({"messages": [{"role": "user"}]}, "needs the text 'prompt'"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a", "max_new_tokens": "5"}, "max_new_tokens: give a whole number"),
        ({"prompt": "a", "seed": 2**70}, "does not fit 64 bits"),
        ({"prompt": "a", "seed": True}, "seed: give a whole number"),
        ({"prompt": "a", "stop": [1]}, "stop: give a text"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "not JSON"),
        ({"prompt": "a dog"}, None),
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [row for row, _ in cases])
    asked = ["--input", rows, "--output", tmp_path / "out", *FLAGS, "--json", tmp_path / "r.json"]
    code, out, error = run("generate", trained / "checkpoint", *asked, capsys=capsys)
    assert code == 1
    assert "14 of them errors" in out
    assert "16 rows answered" in error
    found = answers(tmp_path / "out")
    for row, (_, message) in zip(found, cases, strict=True):
        assert ("text" in row) == (message is None)
        assert message is None or message in row["error"], row
    assert found[3]["id"] == 7
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"command", "seed", "versions", "threads", "whole", "tokens_per_second"} <= set(result)
    assert result["whole"]["errors"] == 14
    assert result["tokens_per_forward"] == pytest.approx(result["whole"]["tokens"] / result["whole"]["forwards"])


def test_what_training_does_not_cover_is_told_or_refused(trained, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", "max_new_tokens": 100}, {"prompt": "a dog"}])
    asked = ["--input", rows, "--block-size", 4, "--max-new-tokens", 12]
    code, _, error = run("generate", trained / "checkpoint", *asked, "--output", tmp_path / "a", capsys=capsys)
    assert code == 0
    assert "warning: 1 rows go beyond training; the first is not covered by training (length" in error
    strict = [*asked, "--strict-coverage", "--output", tmp_path / "b"]
    assert run("generate", trained / "checkpoint", *strict, capsys=capsys)[0] == 1
    refused, served = answers(tmp_path / "b")
    assert "not covered by training" in refused["error"]
    assert served == answers(tmp_path / "a")[1]


def test_two_processes_killed_twice_and_resumed_are_the_single_run(trained, model, tmp_path):
    """kill -9 in the middle, again on resuming, and the rest on three processes by hand."""
    count = 500
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in prompts(count)])
    answer_file(model, rows, tmp_path / "single", **DRAWN)
    parts = tmp_path / "out" / "parts"
    for least in (5, 20):
        processes = [
            subprocess.Popen(
                command(trained / "checkpoint", rows, tmp_path / "out", "--batch", "2"),
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        deadline = time.monotonic() + 90
        while (done := len(list(parts.glob("part-*")))) < least and time.monotonic() < deadline:
            time.sleep(0.01)
        assert done >= least
        for process in processes:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL  # neither was done
        assert not (tmp_path / "out" / "answers.jsonl").exists()
    found = 0
    for number in range(3):
        outcome = answer_file(model, rows, tmp_path / "out", shard=Shard(number, 3), **DRAWN)
        found += outcome.found
        assert (outcome.whole is None) == (number < 2)
    assert 0 < found < count
    assert [row["row"] for row in answers(tmp_path / "out")] == list(range(count))
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (tmp_path / "single" / "answers.jsonl").read_bytes()


def test_torchrun_shares_the_rows(trained, model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in prompts(40)] + ["{"])
    single = command(trained / "checkpoint", rows, tmp_path / "out", "--json", str(tmp_path / "r.json"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *single[1:]], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr  # for the bad row, once the others are there
    answer_file(model, rows, tmp_path / "single", **DRAWN)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (tmp_path / "single" / "answers.jsonl").read_bytes()
    assert json.loads((tmp_path / "r.json").read_text())["whole"]["rows"] == 41


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "foreign", "gone"])
def test_a_damaged_part_is_done_again(damage, model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in prompts(6)])
    answer_file(model, rows, tmp_path / "out", **DRAWN)
    whole = (tmp_path / "out" / "answers.jsonl").read_bytes()
    part = tmp_path / "out" / "parts" / "part-00000003.jsonl"
    content = part.read_bytes()
    if damage == "gone":
        part.unlink()
    else:
        other = part.with_name("part-00000002.jsonl").read_bytes()
        changed = content.replace(b'"text": "', b'"text": "x', 1)
        part.write_bytes({"cut": content[:-9], "empty": b"", "changed": changed, "foreign": other}[damage])
    (tmp_path / "out" / "answers.jsonl").unlink()
    begun = answer_file(model, rows, tmp_path / "out", shard=Shard(0, 2), **DRAWN)
    assert (begun.found, begun.own.rows, begun.whole) == (3, 0, None)  # part 3 belongs to the other
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    outcome = answer_file(model, rows, tmp_path / "out", **DRAWN)
    assert (outcome.found, outcome.own.rows) == (5, 1)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == whole
    assert part.read_bytes() == content
    assert answer_file(model, rows, tmp_path / "out", **DRAWN).own.rows == 0


def test_what_killed_processes_left_is_removed_when_it_is_old(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat"}])
    (tmp_path / "out" / "parts").mkdir(parents=True)
    old, fresh = tmp_path / "out" / "parts" / ".part-00000000.jsonl.x1", tmp_path / "out" / ".answers.jsonl.x2"
    for file, hours in ((old, 2), (fresh, 0)):
        file.write_text("half")
        os.utime(file, (time.time() - hours * 3600,) * 2)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not the manifest"):
        answer_file(model, rows, tmp_path / "out", **DRAWN)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds parts and no manifest"):
        answer_file(model, rows, tmp_path / "out", **DRAWN)
    answer_file(model, rows, tmp_path / "good", **DRAWN)
    (tmp_path / "good" / "manifest.json").rename(tmp_path / "out" / "manifest.json")
    answer_file(model, rows, tmp_path / "out", **DRAWN)
    assert (old.exists(), fresh.exists()) == (False, True)  # the fresh one may be a neighbour's


def swapped_vocabulary(checkpoint: Path, copy: Path) -> Path:
    """The same weights, and two words that changed places in the tokenizer."""
    shutil.copytree(checkpoint, copy)
    tree = json.loads((copy / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    one, other = [word for word in words if word.isalpha()][-2:]
    words[one], words[other] = words[other], words[one]
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    return copy


def test_resuming_what_was_not_asked_is_refused(trained, model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in prompts(4)])
    answer_file(model, rows, tmp_path / "out", **DRAWN)
    kept = (tmp_path / "out" / "answers.jsonl").read_bytes()
    for changes, message in [
        ({"seed": 6}, "seed 5, not 6"),
        ({"sampling": Sampling(0.5)}, "temperature 0.9, not 0.5"),
        ({"stop": ("x",)}, 'stop \\[\\], not \\["x"\\]'),
        ({"policy": "one_step"}, "policy"),
    ]:
        with pytest.raises(DataError, match=f"holds the answers of another run .{message}"):
            answer_file(model, rows, tmp_path / "out", **{**DRAWN, **changes})
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": text} for text in prompts(5)])
    with pytest.raises(DataError, match=r"another run \(input"):
        answer_file(model, other, tmp_path / "out", **DRAWN)
    changed = load(trained / "checkpoint")
    changed.backbone.get_input_embeddings().weight.data += 0.01
    renamed = load(swapped_vocabulary(trained / "checkpoint", tmp_path / "renamed"))
    for other_model in (changed, renamed):
        with pytest.raises(DataError, match=r"another run \(model"):
            answer_file(other_model, rows, tmp_path / "out", **DRAWN)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == kept
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not the manifest of a run"):
        answer_file(model, rows, tmp_path / "out", **DRAWN)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "answers.jsonl").write_text("precious")
    cases = [
        (["--input", rows, "--output", tmp_path / "mine"], "holds answers.jsonl and no manifest"),
        (["--input", rows], "--input needs --output"),
        (["--input", rows, "--output", rows], "is a file; give a directory"),
        (["--output", tmp_path / "x", "--prompt", "a"], "go with --input"),
        (["--input", rows, "--output", tmp_path / "x", "--prompt", "a"], "neither --prompt"),
        ([], "give a text to continue"),
        (["--input", rows, "--output", tmp_path / "x", "--shard", "4/4"], "numbered from 0"),
        (["--input", rows, "--output", tmp_path / "x", "--shard", "one"], "give a number and a count"),
        (["--input", tmp_path / "no.jsonl", "--output", tmp_path / "x"], "no.jsonl: give a file of rows"),
        (["--input", tmp_path, "--output", tmp_path / "x"], "give a file of rows"),
        (["--input", write_rows(tmp_path / "e.jsonl", [" "]), "--output", tmp_path / "x"], "no rows in it"),
        (["--input", rows, "--output", tmp_path / "x", "--block-size", 500], "block size 500 does not fit"),
    ]
    for arguments, message in cases:
        code, _, error = run("generate", trained / "checkpoint", *arguments, capsys=capsys)
        assert (code, message in error) == (2, True), (arguments, error)
    assert (tmp_path / "mine" / "answers.jsonl").read_text() == "precious"
    assert not (tmp_path / "x").exists()


def test_what_is_held_does_not_grow_with_the_file(model, tmp_path, monkeypatch):
    """One row that takes long holds up its part only; rows are read as places get free."""
    rows = [{"prompt": "the", "max_new_tokens": 100 if number == 3 else 4} for number in range(600)]
    seen = []
    whole = Parts.write

    def watched(parts: Parts, part: int, given: list[dict[str, Any]]) -> Any:
        seen.append(part)
        return whole(parts, part, given)

    monkeypatch.setattr(Parts, "write", watched)
    answer_file(model, write_rows(tmp_path / "r.jsonl", rows), tmp_path / "out", running=4, block_size=4)
    assert sorted(seen) == list(range(300))
    assert seen.index(1) > 10  # it did not hold up the others
    assert all(abs(part - place) <= 5 for place, part in enumerate(seen) if part != 1)


def test_a_file_that_shrinks_meanwhile_is_told(model, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in prompts(4)])
    real = Parts.open

    def shrink(*args: Any) -> Parts:
        write_rows(rows, [{"prompt": "the"}])
        return real(*args)

    monkeypatch.setattr(Parts, "open", shrink)
    with pytest.raises(DataError, match="fewer rows than when this began"):
        answer_file(model, rows, tmp_path / "out", **DRAWN)
