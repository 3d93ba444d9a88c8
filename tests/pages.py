"""README and the pages of docs as a reader follows them: their blocks of code, run in order, in one folder.

What a reader replaces by their own has a stand-in, and what would take minutes gets a small budget. Commands run in
this process (a fresh one takes seconds to import torch), scripts and lines with pipes in a shell.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from conftest import write_corpus

from blockdiff import cli
from blockdiff.loading import load_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# docs/results/*.md are the words between the numbers of docs/results.md
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "results")]
INSTALLED = DOCS / "quickstart.md"  # run from an installed wheel, in an empty folder: test_packaging.py
STAND_INS = {
    "Qwen/Qwen3-0.6B-Base": "my-qwen3",
    "Qwen/Qwen3-0.6B": "my-model",
    "../shared/models/stories260K": "my-model",
    "../shared/data/stories-synthetic/train.jsonl.gz": "my-text.jsonl",
    "../shared/data/stories-synthetic/valid.jsonl.gz": "my-valid.jsonl",
    "runs/demo/data/valid.jsonl": "my-valid.jsonl",
    "runs/base-stories/checkpoint": "my-model",
    "runs/data/arithmetic/valid.jsonl": "my-questions.jsonl",
}
BUDGETS = {
    "blockdiff train": "--set train.steps=2 --set train.tokens=null --set train.minutes=null --set data.length=64 "
    "--set train.rows=2 --overwrite",
    "blockdiff train configs/adapt-qwen3": "--init my-qwen3 --set train.accumulation=1 --set eval.documents=2",
    "blockdiff train configs/scratch.yaml --set data.train=my-data": "--set eval.block_sizes=[]",
    "blockdiff eval bound runs/demo/checkpoint --data runs/demo": "--limit 2 --draws 1",
    "blockdiff experiment": "--set config.train.steps=2 --set config.train.tokens=null --set config.data.limit=20 "
    "--set seeds=[0] --set evaluate.block_sizes=[1,4] --set evaluate.documents=4 --only scale_mixture",
    "blockdiff bench decode": "--rounds 1 --prompt-tokens 4 --new-tokens 6 --batch 1",
    "blockdiff bench train": "--lengths 32 --tokens 64 --rounds 1 --no-memory",
    "blockdiff bench serve": "--requests 3 --new-tokens 4 --rounds 1",
    "blockdiff data own": "--documents 4 --max-new-tokens 12",
    "blockdiff data pack": "--characters 50",
    "blockdiff eval length": "--set data=my-long.jsonl --set length=8 --set times=3 --set documents=2 "
    "--set texts.judge=runs/demo/checkpoint --set texts.count=2 --set texts.prompt_tokens=4 "
    '--set "ways={b4: {model: runs/demo/checkpoint, block_size: 4}}"',
    "blockdiff eval generation evaluations": "--set data=my-long.jsonl --set judge=runs/demo/checkpoint "
    "--set new_tokens=8 --set prompt_tokens=4 --set texts=2 --set budgets=[8] "
    '--set "ways={b4: {model: runs/demo/checkpoint, block_size: 4}}"',
    "blockdiff demo": "--minutes 0.02",
    "python benchmarks/oracle_bounds.py": "--repeats 1 --documents 5 --block-sizes 4",
    "python benchmarks/noise_variance.py": "--repeats 2 --block-sizes 4",
    "python benchmarks/lossless_acceptance.py": "--prompts 3 --block-sizes 4 --new-tokens 12",
    "python benchmarks/attention_mechanism.py": "--repeats 1 --lengths 32 --tokens 64",
}
ELSEWHERE = ("make ", "git clone", "pip install", "python -m venv", "gpu.sh")  # run by CI, or by hand: see the page
_FENCE = re.compile(
    r"```(python|bash)( title=\"(?P<file>[^\"]+)\")?\n(?P<code>.*?)```(\n+```text\n(?P<shown>.*?)```)?", re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block; file: the name under which the page says to save it; shown: what it prints, where told."""

    language: str
    code: str
    file: str | None
    shown: str | None

    def commands(self) -> Iterator[str]:
        """The commands of a bash block, those that are run elsewhere left out."""
        for line in self.code.replace("\\\n", " ").splitlines():
            command = line.split("  #")[0].strip()
            if command and not command.startswith("#") and not any(word in command for word in ELSEWHERE):
                yield command


def blocks(text: str) -> list[Block]:
    """The blocks of Python and bash in a text, in order."""
    return [Block(match[1], match["code"], match["file"], match["shown"]) for match in _FENCE.finditer(text)]


def affordable(command: str) -> str:
    """A page's command with stand-ins and a small budget."""
    for name, stand_in in STAND_INS.items():
        command = command.replace(name, stand_in)
    return budgeted(command).replace("python benchmarks/", f"python {ROOT}/benchmarks/")


def budgeted(command: str) -> str:
    """A page's command with a small budget."""
    for start, budget in BUDGETS.items():
        if command.startswith(start):
            command += f" {budget}"
    if command.startswith("blockdiff bench decode"):
        command += " --prompts 1" if "/checkpoint" in command else " --no-memory"
    return command


def follow(text: str, form: Callable[[str], str] = affordable) -> int:
    """Run the blocks of a text in order, in the current folder, commands in another form; how many commands ran."""
    names: dict[str, object] = {"__name__": "page"}
    ran = 0
    for block in blocks(text):
        if block.language == "python":
            if block.file is not None:
                Path(block.file).write_text(block.code)
            printed = io.StringIO()
            code = compile(block.code, block.file or "page", "exec", dont_inherit=True)
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            said = printed.getvalue()
            assert block.shown in (None, said), f"shown:\n{block.shown}\nprinted:\n{said}"
        else:
            for command in block.commands():
                run_command(form(command))
                ran += 1
    return ran


def run_command(command: str) -> None:
    """Run one command in the current folder; it must succeed."""
    tokens = list(shlex.shlex(command, posix=True, punctuation_chars="|<>&"))
    if re.match(r"blockdiff |python \S+\.py ", command) and not {"|", "||", "<", ">", "&&"} & set(tokens):
        code = run_here(shlex.split(command))
        assert code == 0, command
        return
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def run_here(arguments: list[str]) -> int:
    """`blockdiff ...` or `python FILE ...` in this process: the exit code."""
    script = arguments[0] == "python"
    old, sys.argv = sys.argv, arguments[script:]
    try:
        if script:
            runpy.run_path(arguments[1], run_name="__main__")
        else:
            cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = old
    return 0


def workspace(folder: Path, trained: Path, qwen3: bool) -> None:
    """The files that the pages speak of: a model, runs, texts and chats; with qwen3 one of Qwen3's vocabulary."""
    for name in ("configs", "experiments", "evaluations", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    for run in ("demo", "adapt", "adapt/before"):
        shutil.copytree(trained, folder / "runs" / run)
    tokenizer = load_tokenizer(trained / "checkpoint")
    assert tokenizer is not None
    shape = {"dtype": torch.float32, "max_position_embeddings": 512}
    tiny.backbone("qwen3", vocab_size=len(tokenizer), **shape).save_pretrained(folder / "my-model")
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
    if not qwen3:
        return
    heads = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny.backbone("qwen3", vocab_size=151680, **heads, **shape).save_pretrained(folder / "my-qwen3")
    tokenizer.save_pretrained(folder / "my-qwen3")
    file = folder / "my-qwen3" / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"]["<|last|>"] = 151668  # so that row 151669 is the first that no text uses, as in Qwen3
    file.write_text(json.dumps(tree))
