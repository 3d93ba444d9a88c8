"""Batch generation over a Ray of this machine: the files of one process, through a kill.

Ray runs in processes of its own: its imports and its agents are not for the process of the tests.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import psutil
import pytest
from filelock import FileLock
from test_batch import DRAWN, answers, command, prompts, write_rows
from test_cli import run

from blockdiff.api import load
from blockdiff.batch import answer_file
from blockdiff.shards import Shard

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray Data: pip install 'blockdiff[ray]'")
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # end a minute after their node


@pytest.fixture
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No other test has a Ray at the same time: `auto` would find it."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


@contextmanager
def started(*arguments: str) -> Iterator[psutil.Popen]:
    """A run over a Ray of its own; nothing of it is left at the end."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with psutil.Popen([*arguments, "--batch", "2", "--ray", "local", "--actors", "1"], **given) as process:
        try:
            yield process
        finally:
            for one in [*process.children(recursive=True), process] if process.is_running() else []:
                one.kill()


@needs_ray
@pytest.mark.usefixtures("one_ray")
def test_killed_and_resumed_over_ray_is_the_single_run(trained, tmp_path):
    """Begun by one process, gone on with over Ray, killed there, and finished there."""
    model = load(trained / "checkpoint")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in prompts(200)] + ["{"])
    answer_file(model, rows, tmp_path / "single", **DRAWN)
    begun = answer_file(model, rows, tmp_path / "out", shard=Shard(0, 3), **DRAWN)
    assert (begun.own.rows, begun.whole) == (67, None)
    deadline = time.monotonic() + 300
    with started(*command(trained / "checkpoint", rows, tmp_path / "out")) as ray:
        while (done := len(list((tmp_path / "out" / "parts").glob("part-*")))) < 75:
            assert ray.poll() is None, ray.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        family = ray.children(recursive=True)
        ray.kill()
        ray.communicate()
    assert done < 201
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    working = psutil.wait_procs([one for one in family if one.name() not in AGENTS], timeout=60)[1]
    for one in psutil.wait_procs(family, timeout=0)[1]:
        one.kill()
    assert not working
    with started(*command(trained / "checkpoint", rows, tmp_path / "out")) as ray:
        said = ray.communicate(timeout=300)[0]
    assert (ray.returncode, "201 rows in" in said) == (1, True), said  # 1 for the bad row
    assert "1 of them errors" in said
    assert [row["row"] for row in answers(tmp_path / "out")] == list(range(201))
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (tmp_path / "single" / "answers.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--actors", 2], "go with --ray"),
        (["--gpus-per-actor", 0.5], "go with --ray"),
        (["--ray", "local", "--shard", "0/2"], "start it without torchrun and --shard"),
        (["--ray", "local"], "pip install 'blockdiff[ray]'"),
    ],
)
def test_what_ray_cannot_do_is_told(options, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat"}])
    asked = ["--input", rows, "--output", tmp_path / "out", *options]
    code, _, error = run("generate", trained / "checkpoint", *asked, capsys=capsys)
    assert (code, message in error) == (2, True), error
    assert not (tmp_path / "out").exists()


def test_rows_that_kill_every_actor_are_refused_in_the_end(trained, tmp_path):
    """As a lack of memory would; Ray itself would start actors for ever. Another run begins to count anew."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat"}, {"prompt": "a dog"}])
    code = f"""
import os, signal
from pathlib import Path
import blockdiff
from blockdiff import rays
from blockdiff.batch import Answerer, Held
from blockdiff.shards import WHOLE

class Dying(rays._Actor):
    def _answered(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)

path, rows = {str(trained / "checkpoint")!r}, Path({str(rows)!r})
answerer = Answerer(blockdiff.load(path), max_new_tokens=4)
parts, model = answerer.open(rows, Path("out")), answerer.asked["model"]
for run in range(2):
    work = rays._Work(path, None, parts, model, {{"max_new_tokens": 4}})
    for attempt in range(12):
        (stretch,) = rays._stretches(rows, Held.of(parts, WHOLE), parts, 2)
        if not os.fork():
            refusal = Dying(work)(stretch)["refusal"][0]
            print(attempt, refusal, flush=True)
            os._exit(0)
        os.wait()
print(rays._Actor(rays._Work(path, None, parts, model, {{"max_new_tokens": 4}}))(stretch)["rows"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    *refused, answered = done.stdout.splitlines()
    assert [line.split()[0] for line in refused] == ["8", "9", "10", "11"] * 2, done.stderr
    assert all("8 actors died over the rows from 1 on; where memory ran out, lower --batch" in line for line in refused)
    assert answered == "[2]"


@needs_ray
@pytest.mark.usefixtures("one_ray")
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path):
    """Before a model is read or anything written; and nothing imports Ray that does not need it."""
    code = """
import sys
from pathlib import Path
import blockdiff.cli, blockdiff.cli_batch
from blockdiff.rays import Cluster, answer_on_ray
assert 'ray' not in sys.modules
for address in sys.argv[1:]:
    try:
        answer_on_ray(Cluster(address), 'm', Path('rows.jsonl'), Path('out'))
    except ValueError as error:
        print(error)
"""
    of_this_machine = any(one.info["name"] == "gcs_server" for one in psutil.process_iter(["name"]))
    asked = ["127.0.0.1:9"] if of_this_machine else ["127.0.0.1:9", "auto"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [f"--ray {address}: no such cluster" in done.stdout for address in asked] == [True] * len(asked)
    assert not list(tmp_path.iterdir())
