"""Every command and every printed result in README and docs is run here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import write_corpus

from blockdiff.experiment.page import page as page_of_results
from blockdiff.loading import load_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what a reader replaces by their own, and what stands in for it here; training commands also get a small budget
STAND_INS = {
    "Qwen/Qwen3-0.6B": "my-model",
    "../shared/models/stories260K": "my-model",
    "../shared/data/stories-synthetic/train.jsonl.gz": "my-text.jsonl",
    "../shared/data/stories-synthetic/valid.jsonl.gz": "my-valid.jsonl",
    "runs/demo/data/valid.jsonl": "my-valid.jsonl",
    "runs/base-stories/checkpoint": "my-model",
    "runs/data/arithmetic/valid.jsonl": "my-questions.jsonl",
}
BUDGET = "--set train.steps=2 --set train.tokens=null --set train.minutes=null --set data.length=64 --set train.rows=2"
SMALL_EXPERIMENT = (
    "--set config.train.steps=2 --set config.train.tokens=null --set config.data.limit=20 --set seeds=[0] "
    "--set evaluate.block_sizes=[1,4] --set evaluate.documents=4 --only scale_mixture"
)
SMALL_LENGTH = (
    "--set data=my-long.jsonl --set length=8 --set times=3 --set documents=2 --set texts.judge=runs/demo/checkpoint "
    '--set texts.count=2 --set texts.prompt_tokens=4 --set "ways={b4: {model: runs/demo/checkpoint, block_size: 4}}"'
)
SMALL_FRONTIER = (
    "--set data=my-long.jsonl --set judge=runs/demo/checkpoint --set new_tokens=8 --set prompt_tokens=4 --set texts=2 "
    '--set budgets=[8] --set "ways={b4: {model: runs/demo/checkpoint, block_size: 4}}"'
)
ELSEWHERE = (
    "make ",
    "git clone",
    "pip install",
    "python -m venv",
    "gpu.sh",
)  # run by CI, or by hand: see the page


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, match in enumerate(
            re.finditer(rf"```{language}\n(.*?)```(?:\n```text\n(.*?)```)?", page.read_text(), re.S)
        ):
            found.append(pytest.param(page, match, id=f"{page.stem}-{number}"))
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_python_examples_print_what_is_shown(page, trained, tmp_path, monkeypatch):
    workspace(tmp_path, trained)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for match in re.finditer(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", page.read_text(), re.S):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(match.group(1), names)
        if match.group(2) is not None:
            assert printed.getvalue() == match.group(2)


def workspace(folder: Path, trained: Path) -> None:
    """The files that the pages speak of: a model, a run, texts and chats."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    shutil.copytree(ROOT / "evaluations", folder / "evaluations")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(trained, folder / "runs" / "demo")
    shutil.copytree(trained, folder / "runs" / "adapt" / "before")
    tokenizer = load_tokenizer(trained / "checkpoint")
    assert tokenizer is not None
    network = tiny.backbone("qwen3", dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=512)
    network.save_pretrained(folder / "my-model")
    tokenizer.save_pretrained(folder / "my-model")
    train, valid = write_corpus(folder)
    train.rename(folder / "my-text.jsonl")
    valid.rename(folder / "my-valid.jsonl")
    row = {"prompt": "the cat sat on", "completion": " the mat ."}
    (folder / "my-long.jsonl").write_text((json.dumps({"text": "the cat sat on the mat . " * 9}) + "\n") * 3)
    (folder / "my-questions.jsonl").write_text('{"prompt": "one and one", "answer": "2"}\n' * 4)
    program = {"prompt": "def one():\n", "test": "def check(one):\n    assert one() == 1\n", "entry_point": "one"}
    (folder / "my-programs.jsonl").write_text(json.dumps(program) + "\n")
    (folder / "my-pairs.jsonl").write_text((json.dumps(row) + "\n") * 8)


def test_commands_run(trained, tmp_path):
    """In order, page by page, in one folder, as a reader would."""
    workspace(tmp_path, trained)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    ran = 0
    for page in PAGES:
        for match in re.finditer(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in match.group(1).replace("\\\n", " ").splitlines():
                command = line.split("  #")[0].strip()
                if not command or command.startswith("#") or any(word in command for word in ELSEWHERE):
                    continue
                command = command.replace("python benchmarks/", f"{sys.executable} {ROOT}/benchmarks/")
                for name, stand_in in STAND_INS.items():
                    command = command.replace(name, stand_in)
                if command.startswith("blockdiff train"):
                    command += f" {BUDGET} --overwrite"
                if command.startswith("blockdiff experiment"):
                    command += f" {SMALL_EXPERIMENT}"
                if command.startswith("blockdiff bench decode"):
                    command += " --rounds 1 --prompt-tokens 4 --new-tokens 6 --batch 1"
                    command += " --prompts 1" if "/checkpoint" in command else " --no-memory"
                if command.startswith("blockdiff bench train"):
                    command += " --lengths 32 --tokens 64 --rounds 1 --no-memory"
                if command.startswith("blockdiff bench serve"):
                    command += " --requests 3 --new-tokens 4 --rounds 1"
                if command.startswith("blockdiff data own"):
                    command += " --documents 4 --max-new-tokens 12"
                if command.startswith("blockdiff data pack"):
                    command += " --characters 50"
                if command.startswith("blockdiff eval length"):
                    command += f" {SMALL_LENGTH}"
                if command.startswith("blockdiff eval generation evaluations"):
                    command += f" {SMALL_FRONTIER}"
                if "oracle_bounds" in command:
                    command += " --repeats 1 --documents 5 --block-sizes 4"
                if "noise_variance" in command:
                    command += " --repeats 2 --block-sizes 4"
                if "lossless_acceptance" in command:
                    command += " --prompts 3 --block-sizes 4 --new-tokens 12"
                if "attention_mechanism" in command:
                    command += " --repeats 1 --lengths 32 --tokens 64"
                if command.startswith("blockdiff demo"):
                    command += " --minutes 0.02"
                done = subprocess.run(
                    command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{page.name}: {command}\n{done.stderr}"
                ran += 1
    assert ran >= 8


def test_make_demo_is_the_demo(tmp_path):
    """`make demo`, with a small budget."""
    done = subprocess.run(
        ["make", "demo", f"DEMO={tmp_path}/demo", "DEMO_OPTIONS=--minutes 0.02"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "report.html").exists()


def test_the_tests_that_pages_name_exist():
    for page in PAGES:
        for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text()):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{page.name}: {file}::{name}"


def test_the_page_of_results_is_made_from_the_saved_summaries():
    """Words beside them, every number from the JSON: an edited or outdated page fails."""
    folder = ROOT / "docs" / "results"
    assert (ROOT / "docs" / "results.md").read_text() == page_of_results(folder, "results")
    for summary in folder.glob("*.json"):
        assert (folder / f"{summary.stem}.png").exists()
        assert (ROOT / "experiments" / f"{summary.stem}.yaml").exists()
