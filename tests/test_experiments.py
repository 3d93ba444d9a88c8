"""The experiment runner as a user meets it: settings x seeds, killed and resumed, changed, failing, summed up."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from conftest import tiny_config
from test_cli import run

from blockdiff import cli
from blockdiff.experiment import load_experiment, markdown
from blockdiff.experiment.plots import plot


def experiment(folder: Path, **changes) -> Path:
    """Two settings x two seeds of a second each, in a file."""
    config = tiny_config(folder, train={"steps": 12, "save_every": 4, "log_every": 4})
    del config["output"], config["layout"], config["eval"]
    tree = {
        "name": "tiny",
        "about": "Two layouts.",
        "output": str(folder / "out"),
        "config": config,
        "settings": {
            "ar": {"layout": {"kind": "ar"}},
            "fixed4": {"layout": {"kind": "random_offset", "size": 4}, "train.learning_rate": 0.02},
        },
        "seeds": [0, 1],
        "evaluate": {"block_sizes": [1, 4], "offsets": [0, 1], "draws": 2, "documents": 6},
        "compare": [["fixed4", "ar"]],
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an experiment that has run to its end in this process."""
    folder = tmp_path_factory.mktemp("experiment")
    experiment(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["blockdiff", "experiment", str(folder / "tiny.yaml")])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 0
    return folder


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "summary.json").read_text())


def stamps(folder: Path) -> dict[str, int]:
    """When each checkpoint was written."""
    files = (folder / "out").glob("*/seed*/checkpoint/model.safetensors")
    return {str(file.parent.parent.relative_to(folder / "out")): file.stat().st_mtime_ns for file in files}


def test_the_summary_is_what_the_runs_say(finished):
    summary = summary_of(finished)
    assert {"command", "seed", "versions", "threads", "rows", "compare", "runs", "missing"} <= set(summary)
    by_run = {
        (label, seed): json.loads(
            (finished / "out" / label / f"seed{seed}" / "results" / "experiment.json").read_text()
        )
        for label in ("ar", "fixed4")
        for seed in (0, 1)
    }
    bounds = [row for row in summary["rows"] if row["measure"] == "bound"]
    found = {(row["setting"], row["place"]["block_size"], row["place"]["offset"]): row for row in bounds}
    assert list(found) == [("ar", 1, 0), ("fixed4", 1, 0), ("fixed4", 4, 0), ("fixed4", 4, 1)]
    for (label, size, offset), row in found.items():
        rows = [
            next(
                r
                for r in by_run[label, seed]["rows"]
                if (r["place"]["block_size"], r["place"]["offset"]) == (size, offset)
            )
            for seed in (0, 1)
        ]
        nats = [r["value"] for r in rows]
        assert row["value"] == pytest.approx(mean(nats))
        assert row["sd"] == pytest.approx(stdev(nats)) != 0
        assert row["se"] == pytest.approx(mean(r["se"] for r in rows))
        assert row["se_mc"] == pytest.approx(mean(r["se_mc"] for r in rows))
        assert (row["n"], row["counts"]["documents"]) == (2, 6)
    assert found["ar", 1, 0]["se_mc"] == 0 < found["fixed4", 4, 0]["se_mc"] < found["fixed4", 4, 0]["se"]
    (test,) = summary["compare"]  # block size 1 is all they share
    a, b = (list(found[label, 1, 0]["by_seed"].values()) for label in ("fixed4", "ar"))
    differences = [x - y for x, y in zip(a, b)]
    assert test["mean"] == pytest.approx(mean(differences))
    assert test["se"] == pytest.approx(stdev(differences) / 2**0.5)
    assert test["ci"][1] - test["mean"] == pytest.approx(12.706205 * test["se"], rel=1e-6)
    assert [(one["setting"], one["seed"], one["steps"]) for one in summary["runs"]] == [(*key, 12) for key in by_run]


def test_every_run_is_an_ordinary_run_directory(finished, capsys):
    folder = finished / "out" / "fixed4" / "seed1"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["seed"], config["train"]["learning_rate"], config["layout"]["size"]) == (1, 0.02, 4)
    assert not (folder / "results" / "bound.json").exists()  # measured once, by the experiment
    assert run("report", folder, capsys=capsys)[0] == 0


def test_tables_and_plot_come_from_the_saved_summary(finished, tmp_path):
    summary = summary_of(finished)
    text = markdown(summary)
    assert text == (finished / "out" / "summary.md").read_text()
    first = summary["rows"][0]
    assert "|  | b = 1 | b = 4 |" in text
    assert f"| ar | {first['value']:.4f} ± {first['sd']:.4f} |  |" in text  # the AR model has no block size 4
    assert "fixed4 − ar" in text
    worst = next(row for row in summary["rows"] if row["measure"] == "worst_offset")
    assert f"| fixed4 | {worst['value']:.4f} ± {worst['sd']:.4f} |" in text
    plot(summary, tmp_path / "again.png")
    picture = (finished / "out" / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert (tmp_path / "again.png").read_bytes() == picture
    moved = {**summary, "rows": [{**row, "value": row["value"] + 1} for row in summary["rows"]]}
    plot(moved, tmp_path / "moved.png")
    assert (tmp_path / "moved.png").read_bytes() != picture
    assert markdown(moved) != text


def test_finished_runs_are_kept_and_another_evaluation_only_measures(finished, capsys):
    before, trained = summary_of(finished), stamps(finished)
    code, out, _ = run("experiment", finished / "tiny.yaml", capsys=capsys)
    assert code == 0
    assert out.count("done before") == 4
    assert summary_of(finished) == before
    code, out, _ = run("experiment", finished / "tiny.yaml", "--set", "evaluate.documents=3", capsys=capsys)
    assert code == 0
    assert "training" not in out
    assert {r["counts"]["documents"] for r in summary_of(finished)["rows"] if r["measure"] == "bound"} == {3}
    assert stamps(finished) == trained
    assert run("experiment", finished / "tiny.yaml", capsys=capsys)[0] == 0  # and back
    assert summary_of(finished) == before


def test_a_killed_experiment_goes_on_to_the_same_summary(finished, tmp_path, capsys):
    file = experiment(tmp_path)
    command = [sys.executable, "-m", "blockdiff", "experiment", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state, deadline = tmp_path / "out" / "ar" / "seed1", time.monotonic() + 60
    while not (state / "trainer" / "checkpoint-8").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (state / "checkpoint").exists()
    assert not (tmp_path / "out" / "summary.json").exists()
    code, out, _ = run("experiment", file, capsys=capsys)
    assert code == 0
    assert "[1/4] ar/seed0: done before" in out
    assert "[2/4] ar/seed1: training, going on from its last checkpoint" in out
    whole, resumed = summary_of(finished), summary_of(tmp_path)
    for part in ("rows", "compare", "runs", "missing"):
        assert resumed[part] == whole[part], part
    # twin: other seeds give another summary, and one seed has no spread
    code, _, _ = run(
        "experiment", file, "--set", "seeds=[5]", "--set", f"output={tmp_path / 'other'}", "--only", "ar", capsys=capsys
    )
    assert code == 0
    other = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert other["rows"][0]["value"] != whole["rows"][0]["value"]
    assert [(row["setting"], row["sd"], row["n"]) for row in other["rows"]] == [("ar", None, 1)]
    assert [(run["setting"], run["why"]) for run in other["missing"]] == [("fixed4", "not trained to its end yet")]
    assert "One seed, so its spread is unknown" in (tmp_path / "other" / "summary.md").read_text()


def test_a_changed_configuration_is_refused_and_redone_on_demand(finished, tmp_path, capsys):
    shutil.copytree(finished / "out", tmp_path / "out")  # runs may move
    base = ["experiment", finished / "tiny.yaml", "--set", f"output={tmp_path / 'out'}"]
    trained = stamps(tmp_path)
    change = ["--set", "settings.fixed4={layout: {kind: random_offset, size: 4}, train.learning_rate: 0.03}"]
    code, _, error = run(*base, *change, capsys=capsys)
    assert code == 2
    assert "fixed4/seed0: was trained with another train.learning_rate; train it anew with --overwrite" in error
    assert stamps(tmp_path) == trained
    code, _, error = run(*base, *change, "--summary-only", capsys=capsys)
    assert code == 0
    assert "not counted: fixed4, seed 1: was trained with another train.learning_rate" in error
    assert {row["setting"] for row in summary_of(tmp_path)["rows"]} == {"ar"}
    code, out, _ = run(*base, *change, "--overwrite", "--only", "fixed4", capsys=capsys)
    assert code == 0
    assert "[1/2] fixed4/seed0: training\n" in out
    now = stamps(tmp_path)
    assert {name for name in now if now[name] != trained[name]} == {"fixed4/seed0", "fixed4/seed1"}
    assert len(summary_of(tmp_path)["runs"]) == 4


def test_a_run_that_diverged_is_a_failure(tmp_path, capsys):
    file = experiment(tmp_path, settings={"wild": {"train.learning_rate": 1e30}}, compare=[], seeds=[0])
    code, _, error = run("experiment", file, "--set", "config.train.steps=3", capsys=capsys)
    assert code == 1
    assert "failed: wild/seed0: UnsupportedModel: llama: the logits are not finite" in error


def test_a_failing_run_stops_nothing_else(tmp_path, capsys):
    bad = {"model.architecture": None, "model.init": str(tmp_path / "nowhere" / "at" / "all")}
    file = experiment(tmp_path, settings={"broken": bad, "ar": {"layout": {"kind": "ar"}}}, compare=[["ar", "broken"]])
    quick = ["--set", "config.train.steps=2", "--set", "config.train.save_every=null"]
    code, out, error = run("experiment", file, *quick, "--json", tmp_path / "s.json", capsys=capsys)
    assert code == 1
    assert "[4/4] ar/seed1: done" in out
    assert error.count("failed: broken/seed") == 2
    assert "no such model directory" in error
    summary = json.loads((tmp_path / "s.json").read_text())
    assert [(row["setting"], row["n"]) for row in summary["rows"]] == [("ar", 2)]
    assert [(one["setting"], one["seed"]) for one in summary["missing"]] == [("broken", 0), ("broken", 1)]
    assert summary["compare"] == []
    assert "Traceback" in (tmp_path / "out" / "broken" / "seed0" / "error.txt").read_text()
    code, _, error = run(
        "experiment", file, *quick, "--only", "broken", "--set", f"output={tmp_path / 'x'}", capsys=capsys
    )
    assert code == 1
    assert error.count("failed: broken/seed") == 2


def test_wrong_files_are_one_line_before_anything_is_trained(tmp_path, capsys):
    cases = [
        ({"setings": {}}, "tiny.yaml: unknown key setings; did you mean settings?"),
        (
            {"settings": {"a": {"train.stpes": 3}}, "compare": []},
            "settings.a: unknown key train.stpes; did you mean steps?",
        ),
        ({"settings": {"a": {"train": 3}}, "compare": []}, "settings.a: train"),
        ({"settings": {"a": {"seed": 3}}, "compare": []}, "settings.a: seed is the experiment's to set; change seeds"),
        ({"compare": [["fixed5", "ar"]]}, "compare names 'fixed5', which is no setting; did you mean fixed4?"),
        ({"evaluate": {"block_sizes": [4], "drws": 1}}, "unknown key evaluate.drws; did you mean draws?"),
        ({"evaluate": {"block_sizes": [64]}}, "evaluate.block_sizes: 64 does not fit data.length = 64"),
        ({"evaluate": {"block_sizes": [4], "offsets": [4]}}, "offset 4 shortens no block"),
        ({"seeds": [0, 0]}, "has one twice"),
        ({"config": "no.yaml"}, "no.yaml: no such config file"),
        ({"set": {"data.valid": None}}, "data.valid is missing; the experiment measures its runs on it"),
    ]
    for changes, message in cases:
        code, _, error = run("experiment", experiment(tmp_path, **changes), capsys=capsys)
        assert code == 2, changes
        assert message in error.replace("\n", " "), (changes, error)
    code, _, error = run("experiment", experiment(tmp_path), "--only", "fixed", capsys=capsys)
    assert (code, "--only fixed: no such setting; did you mean fixed4?" in error) == (2, True)
    code, _, error = run("experiment", experiment(tmp_path), "--summary-only", capsys=capsys)
    assert (code, "no run of tiny has been measured yet" in error) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_config_file_stands_beside_the_experiment(tmp_path):
    file = experiment(tmp_path)
    tree = yaml.safe_load(file.read_text())
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text(yaml.safe_dump(tree["config"]))
    inside = load_experiment(file, ["config.train.rows=2"])[1]
    file.write_text(yaml.safe_dump({**tree, "config": "configs/base.yaml", "set": {"train.rows": 2}}, sort_keys=False))
    beside = load_experiment(file)[1]
    assert [run.config for run in beside] == [run.config for run in inside]
    assert beside[0].config.train.rows == 2
    assert load_experiment(file, ["config.train.rows=3"])[1][0].config.train.rows == 3


def test_the_experiments_that_we_ship_are_sound():
    files = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
    assert files
    for file in files:
        plan, runs = load_experiment(file)
        assert len(runs) == len(plan.settings) * len(plan.seeds)
