"""Settings and shared models of the tests: one thread each, no network, nothing written outside pytest's folders."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from serving import TEMPLATE, Server, serving

from blockdiff.runtime import quiet_libraries

torch.set_num_threads(1)
quiet_libraries()


@contextmanager
def full_disk(most: int = 20_000) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the real checkpoint and data of ../shared")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser: apt-get install --no-install-recommends chromium (`make test` tries to)"
)

_WORDS = "the cat sat on the mat . a dog ate the hat . one bird saw two cats . the mat was red . we all ran home . "


def write_corpus(directory: Path) -> tuple[Path, Path]:
    """A small corpus with some structure to learn: train.jsonl and valid.jsonl."""
    sentences = [sentence.strip() + " ." for sentence in _WORDS.split(" .") if sentence.strip()]
    for name, count, shift in (("train", 40, 0), ("valid", 8, 3)):
        lines = []
        for number in range(count):
            picks = [
                sentences[(number * 3 + i * (number % 4 + 1) + shift) % len(sentences)] for i in range(5 + number % 4)
            ]
            lines.append(json.dumps({"text": " ".join(picks)}))
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory / "train.jsonl", directory / "valid.jsonl"


def tiny_config(directory: Path, **changes: Any) -> dict[str, Any]:
    """A configuration that trains a tiny Llama from scratch in a second or two."""
    train, valid = write_corpus(directory)
    tree: dict[str, Any] = {
        "output": str(directory / "run"),
        "model": {
            "architecture": {
                "type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
            },
            "vocabulary": 300,
        },
        "data": {"train": str(train), "valid": str(valid), "length": 64},
        "layout": {"kind": "scale_mixture", "max_size": 8, "atoms": {4: 0.3}},
        "objective": {"ar_weight": 0.5},
        "train": {"steps": 30, "rows": 4, "learning_rate": 0.01, "log_every": 5},
        "eval": {"block_sizes": [1, 4], "draws": 2},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree and "kind" not in value else value
    return tree


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny model trained on the small corpus."""
    from blockdiff.config import make_config
    from blockdiff.training import train

    return train(make_config(tiny_config(tmp_path_factory.mktemp("trained")))).path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a chat template."""
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture(scope="session")
def server(trained: Path, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the tiny model, which chats by that template."""
    folder = tmp_path_factory.mktemp("server")
    with serving(trained / "checkpoint", folder, "--chat-template", str(template), "--name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, for the tests of one module."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright, which the extra `dev` brings")
    with driver.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        except driver.Error as error:
            pytest.skip(f"{BROWSER} does not start: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
