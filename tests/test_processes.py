"""Training on several processes, over gloo: every topology draws and learns what one process does, and goes on from
another's checkpoints.

In float64, and with LayerNorm: transformers computes RMSNorm in float32 whatever the weights are, where a last bit of a
gradient can move 1e-8.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import tiny_config
from safetensors.torch import load_file

from blockdiff.config import ConfigError, make_config
from blockdiff.training import train

NETWORK = {
    "type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
STEPS, SAVED = 40, 10


def config(folder: Path, parallel: str = "ddp", steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    """Steps of 8 rows, noise that learns from the losses of all of them, and documents of several lengths."""
    folder.mkdir(exist_ok=True)
    tree = tiny_config(folder, **{"noise": {"kind": "learned_count"}, "seed": 3} | changes)
    tree["model"] = {"architecture": NETWORK, "vocabulary": 300, "dtype": "float64"}
    tree["train"] |= {"steps": steps, "rows": 4, "global_rows": 8, "log_every": 1, "save_every": SAVED}
    tree["train"] |= {"parallel": parallel, "keep": 9, "learning_rate": 0.003}
    tree["eval"] |= {"every": steps // 2}
    return tree


WATCHED = """
import sys, yaml
from accelerate.state import AcceleratorState
from transformers import TrainerCallback
from blockdiff.config import make_config
from blockdiff.training import train

class Watch(TrainerCallback):
    def on_substep_end(self, args, state, control, model=None, **_):
        sharded = list(model.parameters())
        held = sum(p.grad.to_local().numel() for p in sharded if p.grad is not None)
        if state.is_world_process_zero:
            print(AcceleratorState().distributed_type.value, held, sum(p.numel() for p in sharded), flush=True)

train(make_config(yaml.safe_load(open(sys.argv[1]))), callbacks=[Watch()])
"""


def launch(tree: dict[str, Any], processes: int, *options: str, most: int | None = None) -> subprocess.Popen[str]:
    path = Path(tree["output"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return started(["--standalone", "--nproc_per_node", str(processes)], path, *options, most=most)


def started(
    topology: list[str],
    path: Path,
    *options: str,
    most: int | None = None,
    program: str = "-m blockdiff train",
    folder: Path | None = None,
) -> subprocess.Popen[str]:
    """most: bytes of the largest file that can be written; folder: to work in."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *topology, *program.split(), str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=most and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))),
    )


def run(tree: dict[str, Any], processes: int, *options: str) -> tuple[Path, str]:
    process = launch(tree, processes, *options)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return Path(tree["output"]), out


def on_two_machines(path: Path, processes: int, *folders: Path) -> list[tuple[int, str, str]]:
    """Two launchers that meet at a port, each with half of the processes: what they returned and said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "1", "--rdzv_endpoint", f"localhost:{free.getsockname()[1]}"]
    half = ["--nnodes", "2", "--nproc_per_node", str(processes // 2), *meeting]
    machines = [
        started(["--node_rank", str(rank), *half], path, folder=folders[rank] if folders else None) for rank in range(2)
    ]
    said = [machine.communicate(timeout=240) for machine in machines]
    return [(machine.returncode, *streams) for machine, streams in zip(machines, said, strict=True)]


def run_on_two_machines(tree: dict[str, Any], processes: int) -> tuple[Path, str]:
    path = Path(tree["output"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    ended = on_two_machines(path, processes)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return Path(tree["output"]), "".join(out for _, out, _ in ended)


def curve(run: Path, key: str = "loss") -> list[dict[str, float]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in line]


def assert_same(run: Path, other: Path, within: float) -> None:
    """The loss of every step, the weights and the bound that was measured at the end."""
    assert [line["step"] for line in curve(run)] == [line["step"] for line in curve(other)]
    assert curve(run, "eval_bound_b4")
    for key in ("loss", "bound", "ar", "grad_norm"):
        values = [line.get(key, math.nan) for line in curve(other)]  # no AR term where the blocks' has read it all
        assert [line.get(key, math.nan) for line in curve(run)] == pytest.approx(values, abs=within, nan_ok=True), key
    for line, same in zip(curve(run, "eval_bound_b4"), curve(other, "eval_bound_b4"), strict=True):
        assert line == pytest.approx(same, abs=within)  # on the way; shared where each process has the whole model
    weights, others = (load_file(path / "checkpoint" / "model.safetensors") for path in (run, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert float((tensor - others[name]).abs().max()) < within, name
    bounds, theirs = (json.loads((path / "results" / "bound.json").read_text())["rows"] for path in (run, other))
    for row, same in zip(bounds, theirs):
        assert row["nats_per_token"] == pytest.approx(same["nats_per_token"], abs=within)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, in steps of two passes."""
    return train(make_config(config(tmp_path_factory.mktemp("single")))).path


@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 4), ("fsdp", 2)])
def test_several_processes_train_as_one(single, tmp_path, parallel, processes):
    """Four of them on two machines, as far as they know; a row a pass, and several passes a step."""
    tree = config(tmp_path, parallel)
    tree["train"]["rows"] = 1
    found, out = (run if processes == 2 else run_on_two_machines)(tree, processes)
    assert_same(found, single, 1e-8)
    assert out.count(f"8 rows a step ({processes} processes x {8 // processes} passes x 1)") == 1
    assert out.count(f"step {STEPS - 1}/{STEPS}") == 1  # said once
    saved = {path.name for path in (found / "trainer" / f"checkpoint-{STEPS}").iterdir()}
    assert ("pytorch_model_fsdp_0" in saved) == (parallel == "fsdp")  # sharded, and whole elsewhere
    assert ("model.safetensors" in saved) == (parallel == "ddp")
    assert not list((found / "trainer").glob(".saving-*"))
    if parallel == "fsdp":
        shards = list((found / "trainer" / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0").glob("*.distcp"))
        assert len(shards) == processes


def test_gradients_are_sharded_between_the_passes_of_a_step_too(tmp_path):
    """As `explain` reckons; and accelerate takes the ways of FSDP2, on CPUs as on GPUs."""
    tree = config(tmp_path, "fsdp", steps=2)
    tree["train"] |= {"rows": 1, "save_every": None}
    (tmp_path / "watched.py").write_text(WATCHED)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    topology = ["--standalone", "--nproc_per_node", "2"]
    process = started(topology, tmp_path / "config.yaml", program=str(tmp_path / "watched.py"))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    seen = [line.split() for line in out.splitlines() if line.startswith("FSDP ")]
    assert len(seen) == 2 * 3  # steps, and passes before the last
    assert all(0.45 < int(held) / int(total) < 0.55 for _, held, total in seen)


def test_machines_that_share_no_folder_are_told(tmp_path):
    """Also where each has an old run of its own at that place."""
    tree = config(tmp_path, steps=2) | {"output": "run"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "plan.yaml").write_text("{steps: 2, rows: 8}\n")
    ended = on_two_machines(tmp_path / "config.yaml", 2, *folders)
    assert all(code for code, _, _ in ended)
    assert "blockdiff: output: run is not shared by all machines of this run; put it where all can write" in ended[1][2]
    assert not any((folder / "run" / "checkpoint").exists() for folder in folders)


def test_another_seed_trains_otherwise(single, tmp_path):
    other = train(make_config(config(tmp_path, steps=STEPS, seed=4))).path
    with pytest.raises(AssertionError, match="loss"):
        assert_same(other, single, 1e-3)


@pytest.mark.parametrize(("parallel", "before", "after"), [("fsdp", 2, 4), ("ddp", 2, 1)])
def test_a_process_killed_and_the_run_resumed_on_another_number_ends_the_same(
    single, tmp_path, parallel, before, after
):
    tree = config(tmp_path, parallel)
    process = launch(tree, before)
    saved = Path(tree["output"]) / "trainer" / f"checkpoint-{SAVED}"
    deadline = time.monotonic() + 120
    while not saved.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "train" in child.cmdline()]
    os.kill(workers[-1].pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (Path(tree["output"]) / "checkpoint").exists()  # it had not ended
    found, _ = run(tree, after, "--resume")
    assert_same(found, single, 1e-6)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path, parallel):
    """Files of at most 40 KB can be written, which is less than the weights take."""
    tree = config(tmp_path, parallel)
    process = launch(tree, 2, most=40_000)
    err = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("blockdiff: ")]
    assert all(f"could not write the checkpoint of step {SAVED} in " in line for line in said)
    assert all(line.endswith("; none is whole; make room if the disk is full, and begin again") for line in said)
    reasons = [re.search("File too large|another process stopped", line) for line in said]
    assert all(reasons)
    assert "File too large" in {reason.group() for reason in reasons if reason}
    assert "blockdiff/trainer.py" not in err  # no traceback of ours; torchrun prints its own
    assert not list((Path(tree["output"]) / "trainer").iterdir())


def test_a_mixture_that_follows_the_losses_is_the_same_on_all(tmp_path):
    """Shares of layouts and intervals of noise are searched on held-out rows, split over the processes, here sharded
    and in bfloat16 too."""
    searched: dict[str, Any] = {
        "layout": {"kind": "adaptive_mixture", "sizes": [1, 2, 4], "every": 2},
        "noise": {"kind": "searched_clip", "every": 2, "widths": [0.5], "batches": 1},
    }
    whole = train(make_config(config(tmp_path / "one", steps=5, **searched))).path
    tree = config(tmp_path / "two", "fsdp", steps=5, **searched)
    found, _ = run(tree, 2)
    assert_same(found, whole, 1e-8)
    shares = [
        json.loads((path / "checkpoint" / "block_diffusion.json").read_text())["layout"] for path in (whole, found)
    ]
    assert shares[0]["shares"] == pytest.approx(shares[1]["shares"], abs=1e-9)
    tree["model"]["dtype"], tree["train"]["mixed_precision"] = "float32", "bf16"
    tree["train"]["gradient_checkpointing"] = True
    tree["output"] += "-bf16"
    rounded, _ = run(tree, 2)
    assert curve(rounded)[-1]["loss"] == pytest.approx(curve(whole)[-1]["loss"], rel=0.02)
    assert curve(rounded)[-1]["loss"] != pytest.approx(curve(whole)[-1]["loss"], rel=1e-9)


def test_processes_of_which_one_has_nothing_noisy_run_the_same_layers(tmp_path):
    """Of two rows a step often one alone has a block of 4, and a second pass: a sharded layer waits for all."""
    layout = {"kind": "mixture", "shares": {"1": 0.6, "4": 0.4}}
    changes = {"layout": layout, "objective": {"passes": 2, "ar_weight": 0.5}, "noise": {"kind": "exact_count"}}
    runs = []
    for folder, parallel in (("one", "ddp"), ("two", "fsdp")):
        tree = config(tmp_path / folder, parallel, steps=8, **changes)
        tree["train"] |= {"rows": 1, "global_rows": 2}
        runs.append(train(make_config(tree)).path if parallel == "ddp" else run(tree, 2)[0])
    assert_same(runs[1], runs[0], 1e-8)


def test_processes_of_which_one_reads_nothing_train_as_one(tmp_path):
    """Mask rates leave short texts without a mask now and then: the head of a process then has no rows to read."""
    texts = ["a", "the cat sat on a mat and we ran", "b", "on", "it", "we", "two cats ate the hat", "c"]
    changes = {"noise": {"kind": "bernoulli"}, "objective": {"ar_weight": 0.0}}
    runs = []
    for folder, parallel in (("one", "ddp"), ("two", "fsdp")):
        tree = config(tmp_path / folder, parallel, steps=12, **changes)
        tree["model"] |= {"clean_context": "block_causal", "prediction": "same"}
        Path(tree["data"]["train"]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tree["data"]["length"] = 12
        tree["train"] |= {"rows": 1, "global_rows": 2}
        runs.append(train(make_config(tree)).path if parallel == "ddp" else run(tree, 2)[0])
    assert_same(runs[1], runs[0], 1e-8)


def test_rows_that_do_not_divide_and_sharding_alone_are_refused_before_anything_is_cleared(tmp_path):
    tree = config(tmp_path)
    kept = Path(tree["output"]) / "checkpoint" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier run")
    tree["train"]["parallel"] = "fsdp"
    with pytest.raises(
        ConfigError, match=r"train\.parallel: fsdp needs processes to shard over; start the training with"
    ):
        train(make_config(tree), overwrite=True)
    tree["train"] |= {"parallel": "ddp", "global_rows": 7}
    process = launch(tree, 2, "--overwrite")
    err = process.communicate(timeout=120)[1]
    assert "train: 7 rows a step do not divide over 2 processes; start 1, 7 of them, or" in err
    assert kept.read_text() == "an earlier run"
    for changes, message in (
        ({"accumulation": 2}, "train.accumulation follows from train.global_rows; give one of the two"),
        ({"parallel": "fsdp", "steps": None, "minutes": 1}, "train.minutes is measured on the whole model"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config({**tree, "train": {**tree["train"], **changes}})
