"""Measurements that processes share: every number is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from test_cli import run

from blockdiff.shards import Shard, Split

# both commands in one start of the two processes, as torchrun would run each
TWO_COMMANDS = """
import json, sys
from blockdiff.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as error:
        assert not error.code, arguments
"""


def test_two_processes_measure_what_one_does(trained, tmp_path, capsys):
    model, data = str(trained / "checkpoint"), str(trained.parent / "valid.jsonl")
    sums = [{"prompt": f"{number} + 1 =", "answer": str(number + 1)} for number in range(7)]
    program = {"prompt": "def one():\n", "test": "def check(one):\n    assert one() == 1\n", "entry_point": "one"}
    for name, rows in (("sums.jsonl", sums), ("programs.jsonl", [program] * 3)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    bound = ["eval", "bound", model, "--data", data, "--block-sizes", "1,4", "--orders", "3", "--against", model]
    tasks = ["eval", "tasks", model, "--data", str(tmp_path / "sums.jsonl"), "--data", str(tmp_path / "programs.jsonl")]
    tasks += ["--run-code", "--batch", "2", "--samples", "2", "--temperature", "1", "--max-new-tokens", "8"]

    def saved(folder: str, at: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / folder / f"{at}.json").read_text())
        for row in found["rows"]:
            row.pop("seconds", None)
        return found

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    for at, command in enumerate((bound, tasks)):
        assert run(*command, "--json", tmp_path / "one" / f"{at}.json", capsys=capsys)[0] == 0
    commands = [[*command, "--json", str(tmp_path / "two" / f"{at}.json")] for at, command in enumerate((bound, tasks))]
    (tmp_path / "both.py").write_text(TWO_COMMANDS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "both.py"), json.dumps(commands)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits/byte") == 2  # the first process alone speaks
    for at, keys in enumerate((("rows", "compared"), ("rows", "outputs"))):
        one, two = saved("one", at), saved("two", at)
        assert (one["processes"], two["processes"]) == (1, 2)
        assert [one[key] for key in keys] == [two[key] for key in keys]
    other = tmp_path / "other.json"
    run(*bound[:-2], "--seed", 1, "--json", other, capsys=capsys)
    assert json.loads(other.read_text())["rows"] != saved("two", 0)["rows"]


def test_shares_are_disjoint_and_whole(monkeypatch):
    done: dict[int, list[list[int]]] = {}

    def gather(shares: list[list[int]], own: list[int]) -> None:
        done.setdefault(len(shares), []).append(own)
        for place, held in enumerate(done[len(shares)]):
            shares[place] = held

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for count in (1, 2, 3):
        for number in range(count - 1):
            with pytest.raises(IndexError):  # the others have not come yet
                Split(Shard(number, count)).map(lambda at: at * at, 7)
        assert Split(Shard(count - 1, count)).map(lambda at: at * at, 7) == [at * at for at in range(7)]
    assert [sorted(map(len, shares)) for shares in done.values()] == [[3, 4], [2, 2, 3]]
    assert Split().map(lambda at: at, 0) == []


@pytest.mark.parametrize("command", [["length", "x.yaml"], ["generation", "x.yaml"], ["tasks", "m", "--harness", "a"]])
def test_what_is_not_shared_is_refused_under_torchrun(command, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = run("eval", *command, capsys=capsys)
    assert (code, "start it without torchrun" in error) == (2, True)
