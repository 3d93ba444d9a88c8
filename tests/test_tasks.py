"""Questions with right answers, from files: kinds, templates, pass@k, programs, and the command."""

from __future__ import annotations

import gzip
import json
from itertools import combinations

import pytest
from conftest import tiny_config
from test_cli import run

from blockdiff.config import make_config
from blockdiff.datafiles import DataError
from blockdiff.evaluate import read_questions, read_task
from blockdiff.statistics import interval_of_share, pass_at_k, wilson
from blockdiff.training import train

PROGRAM = {
    "task_id": "Own/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
GSM8K = {"question": "one and one", "answer": "One and one is <<1+1=2>>2.\n#### 2"}


def write(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model that has learned an answer and a program by heart, the program with a line too many."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [
        {"prompt": "Q: one and one\nA:", "completion": " 2\n#### 2"},
        {"prompt": PROGRAM["prompt"], "completion": "    return 1\nprint(one(), 1 / 0)"},
    ] * 8
    tree = tiny_config(folder, train={"steps": 150}, eval={"block_sizes": []}, objective={"ar_weight": 1.0})
    for split in ("train", "valid"):
        write(folder / f"{split}.jsonl", rows)
    return train(make_config(tree)).path / "checkpoint"


def measured(*arguments, path, capsys):
    code, out, error = run("eval", "tasks", *arguments, "--block-size", 1, "--json", path, capsys=capsys)
    assert code == 0, error
    return json.loads(path.read_text()), out


def test_kinds_are_recognised_and_asked_as_they_should_be(tmp_path):
    ours = write(tmp_path / "ours.jsonl", [{"prompt": "a\n", "completion": "x\n#### 3"}, {"prompt": "b", "answer": 4}])
    task = read_task(ours)
    assert (task.kind.name, task.name) == ("arithmetic", "ours.jsonl")
    assert [(q.prompt, q.answer) for q in task.questions] == [("a\n", "x\n#### 3"), ("b", "4")]
    assert len(read_task(ours, limit=1).questions) == 1
    grade = write(tmp_path / "grade.jsonl.gz", [GSM8K])
    assert read_task(grade).kind.name == "gsm8k"
    assert read_task(grade).questions[0].prompt == "Question: one and one\nAnswer:"
    assert read_task(grade, template="Q: {question}\nA:").questions[0].prompt == "Q: one and one\nA:"
    code = write(tmp_path / "code.jsonl", [PROGRAM])
    problem = read_task(code).questions[0]
    assert (read_task(code).kind.name, problem.prompt) == ("humaneval", "def one():\n")
    asked = read_task(code, template="# Complete\n{prompt}").questions[0]
    assert asked.prompt == "# Complete\ndef one():\n"
    assert asked.program("    return 1") == problem.program("    return 1")
    # a kind that is named wins over the keys
    both = write(tmp_path / "both.jsonl", [{"prompt": "p", **GSM8K}])
    assert read_task(both).questions[0].prompt != read_task(both, kind="arithmetic").questions[0].prompt == "p"
    assert [q.answer for q in read_questions([ours, grade])] == ["x\n#### 3", "4", GSM8K["answer"]]


def test_rows_and_options_that_make_no_question_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    for row, options, message in (
        ({"text": "a"}, {}, "q.jsonl:1: has 'text'; a question needs"),
        ({"prompt": "a", "answer": None}, {}, "q.jsonl:1: a question needs a prompt, and an answer"),
        ({"question": "a", "answer": "many"}, {}, "q.jsonl:1: answer 'many' is no number"),
        (PROGRAM | {"test": 3}, {}, "q.jsonl:1: a HumanEval row needs prompt, test, entry_point, and test is no text"),
        (PROGRAM | {"entry_point": "a b"}, {}, "q.jsonl:1: entry_point 'a b' is no name of a function"),
        (GSM8K, {"kind": "gsm9k"}, "--kind gsm9k: unknown; give one of humaneval, gsm8k, arithmetic"),
        (GSM8K, {"template": "{problem}"}, "the key 'problem' is not in the rows; .*q.jsonl:1 has question, answer"),
        (GSM8K, {"template": "plain"}, "--template 'plain': it names no key"),
        (GSM8K, {"template": "{question"}, "--template '{question': expected '}'"),
    ):
        write(path, [row])
        with pytest.raises(ValueError, match=message.replace("{", "\\{").replace("}", "\\}")):
            read_task(path, **options)
    write(path, [])
    with pytest.raises(DataError, match="no questions in it"):
        read_task(path)
    write(path, [GSM8K | {"hint": "x"}, GSM8K])
    with pytest.raises(DataError, match=r"q\.jsonl:2: has no key 'hint', which --template names"):
        read_task(path, template="{question} {hint}")
    with pytest.raises(DataError, match="programs to complete, not questions with a number"):
        read_questions([write(path, [PROGRAM])])


def test_pass_at_k_counts_all_choices():
    """Against enumeration of every k of the drawn texts."""
    for drawn in range(1, 7):
        for right in range(drawn + 1):
            texts = [number < right for number in range(drawn)]
            for k in range(1, drawn + 1):
                chosen = list(combinations(texts, k))
                share = sum(map(any, chosen)) / len(chosen)
                assert pass_at_k(drawn, right, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(4, 1, 4) == 1 != pass_at_k(4, 1, 3)


def test_intervals_of_shares():
    assert interval_of_share([1.0, 0.0, 1.0]) == wilson(2, 3)
    assert interval_of_share([1.0] * 5)[0] < 1  # no certainty from five
    low, high = interval_of_share([0.25, 0.5, 0.75] * 20)
    assert 0.43 < low < 0.48 < 0.52 < high < 0.57
    assert interval_of_share([0.25, 0.75] * 3) != interval_of_share([0.25, 0.75] * 30)


def test_gsm8k_is_asked_by_a_template_and_sampled(taught, tmp_path, capsys):
    data = write(tmp_path / "q.jsonl", [GSM8K, GSM8K | {"answer": "#### 3"}])
    asked = ["--data", data, "--template", "Q: {question}\\nA:", "--max-new-tokens", 24]
    result, out = measured(taught, *asked, path=tmp_path / "a.json", capsys=capsys)
    row = result["rows"][0]
    assert (result["command"], row["task"], row["kind"]) == ("eval tasks", "q.jsonl", "gsm8k")
    assert (row["n"], row["samples"], row["correct"], row["exact_match"]) == (2, 1, 1, 0.5)
    assert (row["pass_at"], row["majority"], row["outcomes"]) == ({"1": 0.5}, None, None)
    assert row["exact_match_ci"] == row["pass_at_ci"]["1"] == pytest.approx(wilson(1, 2))
    assert "1 of 2 right, pass@1 50.0%" in out
    # another form of the prompt is another question
    other = ["--data", data, "--template", "def {question}():\\n", "--max-new-tokens", 24]
    apart, _ = measured(taught, *other, path=tmp_path / "b.json", capsys=capsys)
    assert apart["outputs"][0]["text"] != result["outputs"][0]["text"]
    many = [*asked, "--temperature", 2.1, "--samples", 6, "--at", "1,3,6", "--batch", 5]
    result, _ = measured(taught, *many, path=tmp_path / "c.json", capsys=capsys)
    row, outputs = result["rows"][0], result["outputs"]
    assert [(o["question"], o["sample"]) for o in outputs] == [(q, s) for q in range(2) for s in range(6)]
    assert len({o["text"] for o in outputs[:6]}) > 1
    right = [sum(o["correct"] for o in outputs[:6]), sum(o["correct"] for o in outputs[6:])]
    assert row["correct"] == sum(right)
    for k in (1, 3, 6):
        assert row["pass_at"][str(k)] == pytest.approx(sum(pass_at_k(6, c, k) for c in right) / 2)
    assert 0 <= row["pass_at"]["1"] < row["pass_at"]["6"]
    assert row["majority"] in (0.0, 0.5)
    # samples are told apart by their seeds alone: the first is what a single sample is, and the batch changes nothing
    single, _ = measured(taught, *asked, "--temperature", 2.1, path=tmp_path / "d.json", capsys=capsys)
    assert [o["text"] for o in single["outputs"]] == [o["text"] for o in outputs if o["sample"] == 0]


def test_programs_run_only_with_leave(taught, tmp_path, capsys):
    good = write(tmp_path / "good.jsonl.gz", [PROGRAM])
    bad = write(tmp_path / "bad.jsonl", [PROGRAM | {"test": PROGRAM["test"].replace("== 1", "== 2")}])
    asked = ["--data", good, "--data", bad, "--max-new-tokens", 32]
    code, _, error = run("eval", "tasks", "no-model-is-read", *asked, capsys=capsys)
    assert code == 2
    assert "good.jsonl.gz: judging these answers runs programs that the model wrote; give --run-code" in error
    result, out = measured(taught, *asked, "--run-code", path=tmp_path / "a.json", capsys=capsys)
    passed, failed = result["rows"]
    assert (passed["pass_at"], passed["outcomes"], passed["exact_match"]) == ({"1": 1.0}, {"passed": 1}, None)
    assert (failed["pass_at"], failed["outcomes"], failed["unanswered"]) == ({"1": 0.0}, {"failed": 1}, None)
    assert "good.jsonl.gz: block size 1: 1 of 1 right, pass@1 100.0%" in out
    # the text ends before the line that would have failed
    assert result["outputs"][0]["text"] == "    return 1"
    assert result["outputs"][1]["error"] == "AssertionError"
    assert "limits" in result["outputs"][0]["layers"]


def test_options_that_do_not_fit_are_refused(tmp_path, capsys):
    data = write(tmp_path / "q.jsonl", [GSM8K])
    for options, message in (
        ([], "give --data FILE or --harness TASKS, one of them"),
        (["--data", data, "--harness", "a"], "give --data FILE or --harness TASKS, one of them"),
        (["--data", data, "--samples", 3, "--temperature", 0], "--samples 3: greedy texts are all the same"),
        (["--data", data, "--at", "1,2"], "--at 1,2: pass@k needs k from 1 to the 1 texts of --samples"),
        (["--data", data, "--at", "some"], "--at some: give whole numbers"),
        (["--data", data, "--exact"], "--exact has no effect on --data"),
        (["--harness", "a", "--run-code"], "--run-code has no effect on --harness"),
    ):
        code, _, error = run("eval", "tasks", "no-model", *options, capsys=capsys)
        assert code == 2
        assert message in error, error
