"""Training with two processes on one machine: the same step as one process with twice the rows, whole checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config
from safetensors.torch import load_file

from blockdiff.config import make_config
from blockdiff.training import train


def run_two(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "-m", "blockdiff", "train", str(config), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )


def test_two_processes_train_as_one_with_twice_the_rows(tmp_path):
    """Blocks of two under the clean boundary hold no noise, so losses and weights can be compared."""
    runs = {}
    for name, rows in (("one", 4), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        tree = tiny_config(folder, layout={"kind": "fixed", "size": 2}, model={"dtype": "float64"})
        tree["train"] |= {"steps": 6, "rows": rows, "log_every": 2, "save_every": 3}
        if name == "one":
            runs[name] = train(make_config(tree)).path
        else:
            (folder / "c.yaml").write_text(yaml.safe_dump(tree))
            done = run_two(folder / "c.yaml")
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("training: 6 steps") == 1
            runs[name] = folder / "run"
    logged = {
        name: [m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in m]
        for name, run in runs.items()
    }
    assert len(logged["two"]) == 3  # written once
    for key in ("loss", "bound", "ar", "grad_norm"):
        assert [m[key] for m in logged["two"]] == pytest.approx([m[key] for m in logged["one"]], rel=1e-6), key
    weights = [load_file(run / "checkpoint" / "model.safetensors") for run in runs.values()]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-6
    for step in (3, 6):
        files = {path.name for path in (runs["two"] / "trainer" / f"checkpoint-{step}").iterdir()}
        assert {
            "model.safetensors",
            "optimizer.pt",
            "trainer_state.json",
            "rng_state_0.pth",
            "rng_state_1.pth",
        } <= files
    assert not list((runs["two"] / "trainer").glob(".saving-*"))
    tokens = [json.loads((run / "results" / "train.json").read_text())["tokens"] for run in runs.values()]
    assert tokens[0] == tokens[1]
