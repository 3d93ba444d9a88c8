"""The arithmetic task: right by an independent reading, split cleanly, and scored as a person would score it."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest
from conftest import tiny_config
from test_cli import run

from blockdiff.arithmetic import exact_match, final_number, problems
from blockdiff.config import make_config
from blockdiff.training import train

ADDS = ("finds", "gives", "buys")
TAKES = ("loses", "sells")


def solve(prompt: str) -> int:
    """The answer from the words alone: whose things the question asks for, and what happens to them."""
    things, name = re.search(r"How many (\w+) does (\w+) have now\?\n$", prompt).groups()
    sentences = re.findall(r"[^.?]+[.?]", prompt)
    assert re.match(rf"{name} has \d+ {things} ", sentences[0])
    value = int(re.search(r"\d+", sentences[0])[0])
    for sentence in sentences[1:-1]:
        if things not in sentence:
            continue  # a detail
        number = int(re.search(r"\d+", sentence)[0])
        words = sentence.split()
        if "times as many" in sentence:
            value *= number
        elif any(word in words for word in TAKES) or words[:2] == [name, "gives"]:
            value -= number
        else:
            assert any(word in words for word in ADDS), sentence
            value += number
    return value


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_completion_is_right(split):
    kinds, lengths, details = set(), set(), 0
    for row in islice(problems(split), 400):
        *steps, last = row["completion"].split("\n")
        value = None
        for step in steps:
            a, operation, b, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
            assert value is None or int(a) == value
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation]
            assert value == int(result)
            kinds.add(operation)
        assert last == f"#### {value}" == f"#### {row['answer']}"
        assert solve(row["prompt"]) == value
        assert exact_match(row["completion"], row["answer"])
        lengths.add(len(steps))
        details += row["prompt"].count(".") - 1 > len(steps)
    assert kinds == set("+-*")
    assert lengths == {1, 2, 3, 4}
    assert 200 < details < 400


def calculation(row: dict[str, str]) -> str:
    return re.sub(r"= \d+\n|####.*", "", row["completion"])


def test_train_and_validation_share_no_problem_and_no_calculation():
    rows = {(split, seed): list(islice(problems(split, seed), 1500)) for split in ("train", "valid") for seed in (0, 1)}
    for seed in (0, 1):
        prompts = [row["prompt"] for row in rows["train", seed]]
        assert len(set(prompts)) == len(prompts)
        held_out = {calculation(row) for row in rows["valid", 0]}  # whatever the seed of the training problems
        assert not held_out & {calculation(row) for row in rows["train", seed]}
    again = {calculation(row) for row in rows["train", 0]} & {calculation(row) for row in rows["train", 1]}
    assert again  # twin: two draws of one split do meet


def test_the_command_writes_the_same_files_again(tmp_path, capsys):
    for name, options in (("a", ["--seed", 3]), ("b", ["--seed", 3]), ("c", ["--seed", 4])):
        code, out, _ = run(
            "data", "arithmetic", "--out", tmp_path / name, "--train", 30, "--valid", 5, *options, capsys=capsys
        )
        assert code == 0
        assert "train.jsonl" in out
    a, b, c = ((tmp_path / name / "train.jsonl").read_text() for name in "abc")
    assert a == b != c
    assert [len((tmp_path / "a" / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "valid")] == [
        30,
        5,
    ]
    run("data", "arithmetic", "--out", tmp_path / "more", "--train", 40, "--valid", 0, "--seed", 3, capsys=capsys)
    assert (tmp_path / "more" / "train.jsonl").read_text().startswith(a)
    assert not (tmp_path / "more" / "valid.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3 + 4 = 7\n#### 7", "7", True),
        ("#### 7", 7, True),
        ("#### 8\nno, wait\n#### 7", "7", True),
        ("#### 7\nno, wait\n#### 8", "7", False),
        ("####7", "7", True),
        ("#### 7.0", "7", True),
        ("#### $1,200.", "1200", True),
        ("#### -$3", "-3", True),
        ("#### -3", "3", False),
        ("#### 0.5", ".5", True),
        ("#### 72 clips", "72", True),
        ("#### 72", "so 48 + 24 = 72\n#### 72", True),
        ("#### 7\n####", "7", False),
        ("the answer is 7", "7", False),
        ("#### seven", "7", False),
        ("#### 77", "7", False),
        ("", "7", False),
    ],
)
def test_exact_match(text, answer, right):
    assert exact_match(text, answer) is right


def test_an_answer_that_is_no_number_is_an_error():
    assert final_number("no mark") is None
    with pytest.raises(ValueError, match="answer 'seven' is no number"):
        exact_match("#### 7", "seven")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny model that has learned one answer by heart."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [{"prompt": "one and one\n", "completion": "1 + 1\n#### 2"}] * 16
    tree = tiny_config(folder, train={"steps": 60}, eval={"block_sizes": []}, objective={"ar_weight": 1.0})
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(make_config(tree)).path


def test_answers_are_decoded_and_scored(tuned, tmp_path, capsys):
    data, target = tmp_path / "q.jsonl", tmp_path / "g.json"
    rows = [{"prompt": "one and one\n", "answer": "2"}, {"prompt": "one and one\n", "answer": "3"}]
    rows += [{"prompt": "one and one\n", "completion": "easy\n#### 2"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["eval", "tasks", tuned / "checkpoint", "--data", data, "--max-new-tokens", 40]
    results = []
    for options in (
        ["--block-size", 1],
        ["--block-size", 1, "--batch", 1],
        ["--policy", "fixed_count", "--per-step", 4],
    ):
        code, _, _ = run(*base, *options, "--json", target, capsys=capsys)
        assert code == 0
        results.append(json.loads(target.read_text()))
    row = results[0]["rows"][0]
    assert (row["n"], row["correct"], row["unanswered"], row["unended"]) == (3, 2, 0, 0)
    assert row["exact_match_ci"] == pytest.approx([0.2077, 0.9385], abs=1e-4)
    tokens = [output["tokens"] for output in results[0]["outputs"]]
    assert row["mean_tokens"] == pytest.approx(sum(tokens) / 3)
    assert row["tokens_per_forward"] == pytest.approx(sum(tokens) / row["forwards"])
    assert [o["text"] for o in results[1]["outputs"]] == [o["text"] for o in results[0]["outputs"]]
    assert results[2]["rows"][0]["forwards"] < row["forwards"]
    # twin: cut off before the answer, nothing is right
    run(*base, "--block-size", 1, "--max-new-tokens", 2, "--json", target, capsys=capsys)
    row = json.loads(target.read_text())["rows"][0]
    assert (row["correct"], row["unanswered"], row["unended"]) == (0, 3, 3)


def test_questions_without_an_answer_are_named(tuned, tmp_path, capsys):
    data = tmp_path / "q.jsonl"
    for row, message in (
        ({"prompt": "a"}, "q.jsonl:1: a question needs a prompt, and an answer"),
        ({"prompt": "a", "completion": "just words"}, "q.jsonl:1: answer 'just words' is no number"),
    ):
        data.write_text(json.dumps(row) + "\n")
        code, _, error = run("eval", "tasks", tuned / "checkpoint", "--data", data, capsys=capsys)
        assert code == 2
        assert message in error
