"""Training: normalisation, resuming, whole checkpoints, and errors that lose nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
import yaml
from conftest import full_disk, tiny_config
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import blockdiff
from blockdiff.config import ConfigError, make_config
from blockdiff.run_directory import RunDirectory
from blockdiff.training import train


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[dict[str, float]]:
    """Metrics without the clock."""
    return [
        {k: v for k, v in m.items() if "second" not in k and "runtime" not in k} for m in metrics(run) if "loss" in m
    ]


def test_training_learns_and_leaves_a_whole_run_directory(trained):
    files = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "results/bound.json", "results/train.json", "results/mask.txt"} <= files
    assert "checkpoint/block_diffusion.json" in files
    assert not [name for name in files if name.startswith("checkpoint/") and name.endswith((".bin", ".pt", ".pth"))]
    logged = numbers(trained)
    assert logged[-1]["bound"] < 0.6 * logged[0]["bound"]
    result = json.loads((trained / "results" / "bound.json").read_text())
    assert {"command", "seed", "versions", "threads", "rows"} <= set(result)
    assert [row["block_size"] for row in result["rows"]] == [1, 4]
    assert all(row["se"] > 0 for row in result["rows"])
    assert blockdiff.load(trained / "checkpoint").spec.ar_trained


def test_a_dict_a_file_and_a_config_train_alike(tmp_path):
    tree = tiny_config(tmp_path, train={"steps": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    first = blockdiff.train(tree)
    losses = numbers(first) or metrics(first)
    again = blockdiff.train(tmp_path / "c.yaml", overwrite=True)
    assert first == again
    assert (numbers(again) or metrics(again))[-1]["train_loss"] == losses[-1]["train_loss"]


@pytest.mark.parametrize("layout", [{"kind": "ar"}, {"kind": "fixed", "size": 2}])
def test_accumulated_passes_equal_one_large_pass(tmp_path, layout):
    """The loss is normalised by the tokens of the whole step, so 4 rows equal 2 x 2 rows of other token counts.

    Both layouts are free of noise under the clean boundary (a lone maskable token is always masked).
    """
    runs = []
    for rows, accumulation in ((4, 1), (2, 2)):
        folder = tmp_path / f"{rows}"
        folder.mkdir()
        tree = tiny_config(folder, layout=layout, model={"dtype": "float64"}, objective={"ar_weight": 0.0})
        tree["train"] |= {"steps": 6, "rows": rows, "accumulation": accumulation, "log_every": 1}
        runs.append(train(make_config(tree)).path)
    one, two = numbers(runs[0]), numbers(runs[1])
    assert [m["loss"] for m in one] == pytest.approx([m["loss"] for m in two], rel=1e-6)
    assert [m["grad_norm"] for m in one] == pytest.approx([m["grad_norm"] for m in two], rel=1e-6)
    lines = (tmp_path / "4" / "train.jsonl").read_text().splitlines()
    assert len({len(line.split()) for line in lines}) > 1  # the documents do differ in length


def test_noise_is_a_function_of_seed_and_step(tmp_path):
    losses = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        tree = tiny_config(folder, train={"steps": 4, "log_every": 1}, seed=seed)
        losses[name] = [m["loss"] for m in numbers(train(make_config(tree)).path)]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


def run_cli(config: Path, *options: str) -> subprocess.Popen[bytes]:
    with (config.parent / "log").open("ab") as log:
        command = [sys.executable, "-m", "blockdiff", "train", str(config), *options]
        return subprocess.Popen(command, stdout=log, stderr=log)


def test_a_killed_run_resumes_to_the_same_end(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        tree = tiny_config(folder, train={"steps": 120, "save_every": 10, "log_every": 4})
        (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    process = run_cli(killed / "c.yaml")
    deadline = time.monotonic() + 120
    while not (killed / "run" / "trainer" / "checkpoint-20").exists():
        assert process.poll() is None, (killed / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "run" / "checkpoint").exists()
    resumed = run_cli(killed / "c.yaml", "--resume")
    train(make_config(tree | {"output": str(whole / "run")}))  # the same texts are in both folders
    assert resumed.wait(timeout=120) == 0, (killed / "log").read_text()
    assert numbers(killed / "run") == numbers(whole / "run")
    a, b = weights(killed / "run"), weights(whole / "run")
    assert all(torch.equal(a[name], b[name]) for name in b)
    # twin: with another seed the numbers differ
    (tmp_path / "other").mkdir()
    other = train(make_config(tiny_config(tmp_path / "other", train={"steps": 10, "log_every": 5}, seed=9))).path
    assert numbers(other)[0]["loss"] != numbers(whole / "run")[0]["loss"]


class FillTheDisk(TrainerCallback):
    """From the first checkpoint on, no file may grow beyond a few kilobytes (as on a full disk)."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.disk = ExitStack()

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= self.after:
            self.disk.enter_context(full_disk())


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
    config = make_config(tiny_config(tmp_path, train={"steps": 30, "save_every": 10, "log_every": 5}))
    run = RunDirectory(Path(config.output))
    full = FillTheDisk(10)
    with (
        full.disk,
        pytest.raises(
            OSError, match=r"could not write the checkpoint of step 20 .*checkpoint-10; make room if"
        ) as caught,
    ):
        train(config, callbacks=[full])
    assert "\n" not in str(caught.value)
    assert [path.name for path in run.trainer.iterdir() if path.name != "runs"] == ["checkpoint-10"]
    resumed = train(config, resume=True)
    (tmp_path / "again").mkdir()
    again = train(make_config({**tiny_config(tmp_path / "again"), "train": yaml.safe_load(config.dump())["train"]}))
    a, b = weights(resumed.path), weights(again.path)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_an_unwritable_output_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    config = make_config({**tiny_config(tmp_path), "output": str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match=r"output: cannot write to .*file/run"):
        train(config)


def test_a_run_is_never_overwritten_unasked(trained):
    config = make_config(yaml.safe_load((trained / "config.yaml").read_text()))
    with pytest.raises(ConfigError, match="already holds a run; go on with --resume, start anew with --overwrite"):
        train(config)
    tree = yaml.safe_load((trained / "config.yaml").read_text())
    tree["train"]["learning_rate"] = 0.5
    changed = make_config(tree)
    with pytest.raises(ConfigError, match=r"--resume: train\.learning_rate differs"):
        train(changed, resume=True)


def test_a_run_goes_on_with_smaller_passes_and_not_on_other_texts(tmp_path):
    tree = tiny_config(tmp_path, train={"steps": 8, "save_every": 4, "log_every": 1}, noise={"kind": "exact_count"})
    tree["model"]["dtype"] = "float64"
    run = train(make_config(tree))
    whole = [line["loss"] for line in metrics(run.path) if "loss" in line]
    shutil.rmtree(run.trainer / "checkpoint-8")
    shutil.rmtree(run.checkpoint)
    tree["train"] |= {"rows": 1, "gradient_checkpointing": True}
    texts = Path(tree["data"]["train"])
    kept = texts.read_text()
    texts.write_text("".join(kept.splitlines(keepends=True)[:-1]))
    with pytest.raises(
        ConfigError, match=r"--resume: data\.train: .* gives other rows than .*run began with; put them"
    ):
        train(make_config(tree), resume=True)
    texts.write_text(kept)
    train(make_config(tree), resume=True)
    assert [line["loss"] for line in metrics(run.path) if "loss" in line] == pytest.approx(whole, rel=1e-6)


def test_a_machine_of_several_gpus_trains_on_one_unless_processes_are_started(tmp_path, monkeypatch):
    """Otherwise the Trainer would double the rows of a step and cut batches up by threads."""
    devices = TrainingArguments._setup_devices.func

    def two(arguments: TrainingArguments) -> torch.device:
        device = devices(arguments)
        arguments._n_gpu = 2
        return device

    tree = tiny_config(tmp_path, train={"steps": 6, "log_every": 1})
    losses, said = [], []
    for gpus in (0, 2):
        if gpus:
            seen = cached_property(two)
            seen.__set_name__(TrainingArguments, "_setup_devices")
            monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        run = train(make_config(tree), overwrite=True, say=said.append)
        losses.append([line["loss"] for line in metrics(run.path) if "loss" in line])
    assert losses[0] == losses[1]
    assert [line for line in said if "GPU" in line] == [
        "model: one of 2 GPUs is used; torchrun --nproc_per_node 2 -m blockdiff train ... uses all"
    ]


def test_adapting_a_checkpoint_keeps_its_conventions(trained, tmp_path):
    tree = tiny_config(tmp_path, train={"steps": 2})
    tree["model"] = {"init": str(trained / "checkpoint"), "prediction": "same"}
    with pytest.raises(ConfigError, match=r"model\.prediction: the checkpoint .* was trained with shift, not same"):
        train(make_config(tree))
    for other in ("block_causal", "context_causal"):
        kept, checkpoint = blockdiff.load(trained / "checkpoint"), tmp_path / f"not {other}"
        known = "context_causal" if other == "block_causal" else "block_causal"
        kept.spec = replace(kept.spec, clean_context=known, ar_trained=False)
        kept.save(checkpoint)
        tree["model"] = {"init": str(checkpoint), "clean_context": other}
        said = rf"model\.clean_context: .* was trained with {known}, not {other}; set model\.clean_context={known}"
        with pytest.raises(ConfigError, match=said):
            train(make_config({**tree, "objective": {}}))
        tree["model"]["clean_context"] = known
        agreed = train(make_config({**tree, "objective": {}, "output": str(tmp_path / f"run {known}")}))
        assert blockdiff.load(agreed.checkpoint).spec.clean_context == known
    tree["model"] = {"init": str(trained / "checkpoint")}
    tree["data"]["length"] = 200
    with pytest.raises(ConfigError, match=r"data\.length: 200 tokens do not fit the model's context of 128"):
        train(make_config(tree))
    tree["data"] |= {"length": 64, "end_token": "<nothing>"}
    with pytest.raises(ConfigError, match=r"data\.end_token: the tokenizer has no token '<nothing>'"):
        train(make_config(tree))


def test_a_model_without_an_end_token_is_refused(trained, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(trained / "checkpoint", bare)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((bare / name).read_text())
        content |= {"eos_token_id": None, "eos_token": None}
        (bare / name).write_text(json.dumps(content))
    tree = tiny_config(tmp_path, train={"steps": 2})
    tree["model"] = {"init": str(bare)}
    with pytest.raises(ConfigError, match=r"names an end token, so no document could end; set data\.end_token"):
        train(make_config(tree))


def test_checkpointed_activations_change_nothing(tmp_path):
    runs = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        settings = {"steps": 4, "gradient_checkpointing": checkpointing}
        runs.append(train(make_config(tiny_config(folder, model={"dtype": "float64"}, train=settings))))
    a, b = (weights(run.path) for run in runs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["ce", [1.0, 0.5, 0.25]])
def test_other_weightings_train(tmp_path, weighting):
    tree = tiny_config(tmp_path, objective={"weighting": weighting}, train={"steps": 10, "log_every": 5})
    logged = numbers(train(make_config(tree)).path)
    assert logged[-1]["loss"] < logged[0]["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"prediction": "same"}, "layout": {"kind": "full"}, "noise": {"kind": "bernoulli"}},
        {"model": {"boundary": "seed"}, "layout": {"kind": "uniform", "max_size": 6}},
        {"model": {"boundary": "noisy"}, "layout": {"kind": "random_offset", "size": 4}},
        {
            "model": {"prediction": "same", "clean_context": "block_causal"},
            "layout": {"kind": "fixed", "size": 4},
            "noise": {"kind": "clipped", "low": 0.3, "high": 0.8},
            "objective": {"ar_weight": 0.0},
        },
        {"model": {"attention": "eager"}, "train": {"accumulation": 2}},
    ],
    ids=["mdlm", "seed", "noisy boundary", "bd3lm", "eager"],
)
def test_every_convention_trains_measures_and_generates(tmp_path, changes):
    tree = tiny_config(tmp_path, **changes)
    tree["train"] |= {"steps": 6, "log_every": 3}
    run = train(make_config(tree)).path
    logged = numbers(run)
    assert logged[-1]["loss"] < logged[0]["loss"]
    model = blockdiff.load(run / "checkpoint")
    assert model.spec.alignment.prediction == tree["model"].get("prediction", "shift")
    output = model.generate("the cat", max_new_tokens=9, block_size=4)[0]
    assert len(output.tokens) <= 9
    rows = json.loads((run / "results" / "bound.json").read_text())["rows"]
    assert rows[1]["nats_per_token"] > 0


def test_a_time_budget_becomes_steps_that_a_resumed_run_keeps(tmp_path):
    tree = tiny_config(tmp_path)
    tree["train"] = {"minutes": 0.02, "rows": 4, "log_every": 5, "learning_rate": 0.01}
    run = train(make_config(tree))
    steps = yaml.safe_load((run.path / "plan.yaml").read_text())["steps"]
    assert steps >= 1
    assert metrics(run.path)[-1]["step"] == steps
    tree["train"]["save_every"] = 1
    tree["train"]["minutes"] = 0.03
    kept = train(make_config(tree), overwrite=True)
    planned = (kept.path / "plan.yaml").read_text()
    last = max((kept.path / "trainer").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.rmtree(last)
    shutil.rmtree(kept.checkpoint)
    train(make_config(tree), resume=True)
    assert (kept.path / "plan.yaml").read_text() == planned
    assert metrics(kept.path)[-1]["step"] == yaml.safe_load(planned)["steps"]


def test_validation_during_training_is_logged(tmp_path):
    tree = tiny_config(tmp_path, train={"steps": 10, "log_every": 5}, eval={"every": 5, "block_sizes": [1, 4]})
    found = [m for m in metrics(train(make_config(tree)).path) if "eval_bound_b4" in m]
    assert [m["step"] for m in found] == [5, 10]
    assert all(m["eval_bound_b4_se"] > 0 for m in found)


@pytest.mark.parametrize("adapter", [False, True])
def test_mixed_precision_computes_in_bfloat16_and_keeps_the_weights(tmp_path, adapter):
    """Losses a rounding away from float32's: not further, and not the same."""
    changes = {}
    if adapter:
        base = train(make_config(tiny_config(tmp_path, output=str(tmp_path / "base"), train={"steps": 4})))
        changes = {"model": {"init": str(base.checkpoint), "adapter": {"kind": "noisy"}}}

    def losses(precision: str) -> list[float]:
        tree = tiny_config(
            tmp_path, output=str(tmp_path / precision), train={"steps": 10, "mixed_precision": precision}
        )
        finished = train(make_config({**tree, **changes}))
        tensors = load_file(finished.checkpoint / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        lines = [json.loads(line) for line in finished.metrics.read_text().splitlines()]
        return [line["bound"] for line in lines if "bound" in line]

    full, mixed = losses("no"), losses("bf16")
    assert not torch.is_autocast_enabled("cpu")  # what comes after is computed as it was
    assert mixed == pytest.approx(full, rel=0.01)
    assert mixed != pytest.approx(full, rel=1e-6)


def test_block_diffusion_starts_from_full_diffusion(tmp_path):
    """BD3-LM's way: a masked diffusion model of the whole text first, then blocks, its logits read as before."""
    small = {"steps": 4, "rows": 2, "log_every": 2, "learning_rate": 0.01}
    tree = tiny_config(tmp_path, output=str(tmp_path / "full"), preset="mdlm", train=small, eval={"block_sizes": []})
    for key in ("layout", "objective"):
        tree.pop(key)
    full = train(make_config(tree)).checkpoint
    blocks = {**tree, "preset": "bd3lm", "output": str(tmp_path / "blocks"), "model": {"init": str(full)}}
    model = blockdiff.load(train(make_config({**blocks, "layout": {"kind": "fixed", "size": 4}})).checkpoint)
    assert (model.spec.alignment.prediction, model.spec.clean_context) == ("same", "block_causal")
    before = load_file(full / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(tmp_path / "blocks" / "checkpoint" / "model.safetensors")["model.embed_tokens.weight"]
    assert before.shape == after.shape  # its [MASK] row is the one it had
    assert 0 < float((after - before).abs().max()) < 0.1
    with pytest.raises(ConfigError, match="was trained with same, not shift"):
        train(make_config({**blocks, "preset": "abd", "output": str(tmp_path / "other")}))
