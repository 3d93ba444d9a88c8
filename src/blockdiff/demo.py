"""The demo: the whole way on text that every Python carries, in a few minutes on two cores.

The text is `pydoc_data.topics`, the reference behind Python's own `help("for")`. A small Llama is trained on it first
as an AR model, then onward to a block diffusion model of every block size: context-causal, AR loss on the clean
stream, a scale mixture of layouts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from blockdiff import report
from blockdiff.api import Model, documents_of, load
from blockdiff.config import RunConfig, make_config
from blockdiff.decode import parse
from blockdiff.engine import Output, Request, generate
from blockdiff.engine.stream import pieces
from blockdiff.evaluate import bound, unigram
from blockdiff.files import write_json, write_text
from blockdiff.progress import Progress
from blockdiff.run_directory import RunDirectory
from blockdiff.runtime import record
from blockdiff.training import train

BLOCK_SIZES = [1, 2, 4, 8, 16, 32]
PROMPT = 'The "for" statement is used to'
_LENGTH = 256
_SECTION = 1500  # characters of a document: sections of the topics, cut at blank lines
_ARCHITECTURE = {
    "type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def run_demo(out: Path, *, minutes: float, seed: int, console: Console) -> dict[str, Any]:
    """Train, adapt, measure, generate, report; returns the record that `--json` writes."""
    train_file, valid_file = write_data(out / "data")
    console.rule("1. an AR model, from scratch")
    ar_run = _train(_ar_config(out, minutes, seed), console)
    console.rule("2. onward to block diffusion")
    run = _train(_diffusion_config(out, ar_run, minutes, seed), console)

    console.rule("3. measure")
    model, ar_model = load(run.checkpoint), load(ar_run.checkpoint)
    documents = documents_of(model, valid_file)
    draws = max(2, min(8, round(4 * minutes)))
    rows = [row.to_json() for row in bound(model, documents, BLOCK_SIZES, draws=draws, seed=seed)]
    ar_row = bound(ar_model, documents, [1])[0]
    words = unigram(documents_of(model, train_file), documents, model.vocabulary)
    baselines = [
        {"name": "unigram", "nats_per_token": words, "ppl": math.exp(words)},
        {"name": "AR model of step 1", "nats_per_token": ar_row.nats_per_token, "ppl": ar_row.ppl, "se": ar_row.se},
    ]
    write_json(run.result("bound"), record("demo", seed, rows=rows))
    write_json(run.result("baselines"), record("demo", seed, rows=baselines))
    console.print(report.bound_table(rows))
    for baseline in baselines:
        console.print(f"{baseline['name']}: {baseline['nats_per_token']:.4f} nats/token, PPL {baseline['ppl']:.2f}")

    console.rule("4. generate")
    speed, samples = _generate(model, seed)
    write_json(run.result("speed"), record("demo", seed, rows=speed))
    write_json(run.result("samples"), record("demo", seed, rows=samples))
    for sample in samples:
        console.print(sample["name"], style="bold", markup=False, highlight=False)
        console.print(sample["prompt"] + "".join(sample["pieces"]), markup=False, highlight=False)
    for row in speed:
        console.print(
            f"{row['name']}: {row['tokens_per_second']:.0f} tokens/s ({row['speed_over_ar']:.2f} x AR), "
            f"{row['tokens_per_forward']:.2f} tokens per forward with commits",
            highlight=False,
        )
    page = report.write(run.path)
    console.rule("done")
    console.print(f"model:  {run.checkpoint}\nreport: {page}", highlight=False)
    return record("demo", seed, minutes=minutes, rows=rows, baselines=baselines, speed=speed, samples=samples)


def write_data(directory: Path) -> tuple[Path, Path]:
    """The topics as sections of about 1,500 characters; every tenth section is held out for validation."""
    from pydoc_data.topics import topics

    sections: list[str] = []
    for topic in sorted(topics):
        section = ""
        for paragraph in topics[topic].split("\n\n"):
            if section and len(section) + len(paragraph) > _SECTION:
                sections.append(section)
                section = ""
            section += ("\n\n" if section else "") + paragraph
        sections.append(section)
    sections = [section.strip() for section in sections if len(section.strip()) > 40]
    files = directory / "train.jsonl", directory / "valid.jsonl"
    for file, held_out in zip(files, (False, True), strict=True):
        chosen = [text for number, text in enumerate(sections) if (number % 10 == 9) == held_out]
        write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in chosen))
    return files


def _ar_config(out: Path, minutes: float, seed: int) -> RunConfig:
    return make_config(
        {
            "preset": "ar",
            "output": str(out / "ar"),
            "seed": seed,
            "model": {"architecture": _ARCHITECTURE, "vocabulary": 1024},
            "data": {"train": str(out / "data" / "train.jsonl"), "length": _LENGTH},
            "train": {"minutes": 0.4 * minutes, "rows": 4, "learning_rate": 3e-3, "weight_decay": 0.1, "log_every": 20},
        },
        "demo",
    )


def _diffusion_config(out: Path, ar_run: RunDirectory, minutes: float, seed: int) -> RunConfig:
    return make_config(
        {
            "output": str(out),
            "seed": seed,
            "model": {"init": str(ar_run.checkpoint), "clean_context": "context_causal", "prediction": "shift"},
            "data": {"train": str(out / "data" / "train.jsonl"), "length": _LENGTH},
            "layout": {"kind": "scale_mixture", "max_size": 32, "atoms": {4: 0.1, 8: 0.15, 16: 0.15, 32: 0.1}},
            "objective": {"ar_weight": 0.5},
            "train": {
                "minutes": 0.6 * minutes,
                "rows": 4,
                "learning_rate": 1.5e-3,
                "weight_decay": 0.1,
                "log_every": 20,
            },
        },
        "demo",
    )


def _train(config: RunConfig, console: Console) -> RunDirectory:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    return train(config, overwrite=True, say=say, callbacks=[Progress(console)])


def _generate(model: Model, seed: int, repeats: int = 5) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Greedy AR and block decoding of the same weights, interleaved: speed rows, and samples with their fill order."""
    prompt = tuple(model.encode(PROMPT))
    shared: dict[str, Any] = {"prompt": prompt, "max_new_tokens": 128, "seed": seed}
    ways = {
        "AR (block size 1)": Request(block_size=1, **shared),
        "block size 8, threshold 0.9": Request(block_size=8, **shared),
        "block size 8, threshold 0.5": Request(block_size=8, policy=parse("threshold(0.5)"), **shared),
        "block size 8, 4 tokens a step": Request(block_size=8, policy=parse("fixed(4)"), **shared),
    }
    outputs: dict[str, list[Output]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, request in ways.items():
            outputs[name].append(generate(model, [request])[0])
    assert model.tokenizer is not None
    speed, samples = [], []
    base = _median(outputs["AR (block size 1)"][1:], lambda output: len(output.tokens) / output.seconds)
    for name, runs in outputs.items():
        rate = _median(runs[1:], lambda output: len(output.tokens) / output.seconds)
        first = runs[0]
        speed.append(
            {
                "name": name,
                "tokens_per_second": rate,
                "speed_over_ar": rate / base,
                "tokens_per_forward": first.tokens_per_forward,
                "forwards": first.forwards,
                "tokens": len(first.tokens),
                "repeats": repeats,
            }
        )
        parts = pieces(model.tokenizer, prompt, first.tokens)
        samples.append({"name": name, "prompt": PROMPT, "pieces": parts, "steps": first.steps})
    return speed, samples


def _median(runs: list[Output], measure: Callable[[Output], float]) -> float:
    return median(map(measure, runs))
