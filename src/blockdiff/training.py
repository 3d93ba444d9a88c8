"""A whole training run: config -> model, data, trainer -> run directory.

A run directory holds config.yaml (fully resolved), metrics.jsonl, results/*.json, checkpoint/ (the finished model),
trainer/ (resumable checkpoints) and report.html.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import yaml
from torch import Generator
from transformers import TrainerCallback, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff import data, model
from blockdiff.config import ConfigError, RunConfig
from blockdiff.data import Corpus, Encoder, PackedRows
from blockdiff.evaluate import BoundRow, bound
from blockdiff.explain import draw_example
from blockdiff.files import write_json, write_text
from blockdiff.model import BlockDiffusionModel, Spec
from blockdiff.runtime import record, use_available_threads
from blockdiff.tokenizer import train_tokenizer
from blockdiff.trainer import BlockDiffusionTrainer, MetricsFile, Objective, last_checkpoint

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer"

    def result(self, name: str) -> Path:
        return self.path / "results" / f"{name}.json"


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
    callbacks: list[TrainerCallback] | None = None,
) -> RunDirectory:
    """Run the training that `config` describes.

    With `resume` the run goes on from its last whole checkpoint, with the same noise and data order. Raises ConfigError
    where the output already holds a run and neither `resume` nor `overwrite` is given.
    """
    use_available_threads()
    run = RunDirectory(Path(config.output))
    resumed = _prepare(run, config, resume, overwrite)
    bridge, tokenizer = build_model(config)
    corpus, rows = _rows(config, bridge, tokenizer)
    say(f"data: {corpus.summary()} -> {len(rows)} rows of {config.data.length}")
    for note in bridge.notes:
        say(f"model: {note}")
    valid = _validation(config, bridge, tokenizer)
    objective = Objective(config.layout, config.noise, config.objective.weighting, config.objective.ar_weight)
    steps = _steps(run, config, bridge, objective, rows, resumed)
    picture = draw_example(config.layout, bridge.spec.alignment, bridge.spec.clean_context, config.seed)
    write_text(run.path / "results" / "mask.txt", picture + "\n")
    say(
        f"training: {steps} steps on {torch.get_num_threads()} threads, {bridge.backbone.num_parameters():,} parameters"
    )

    trainer = BlockDiffusionTrainer(
        bridge,
        objective,
        rows,
        _arguments(config, run, steps),
        validate=_validator(config, valid),
        callbacks=[MetricsFile(run.metrics, _step_of(resumed)), *(callbacks or [])],
    )
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    seconds = time.perf_counter() - began
    if not trainer.is_world_process_zero():
        return run
    bridge.save(run.checkpoint)
    done = steps - _step_of(resumed)
    tokens = done * config.train.rows * config.train.accumulation * corpus_tokens_per_row(rows)
    write_json(
        run.result("train"),
        record(
            "train", config.seed, steps=steps, seconds=seconds, tokens=int(tokens), tokens_per_second=tokens / seconds
        ),
    )
    if valid:
        measure(run, bridge, valid, config.eval.block_sizes, draws=max(config.eval.draws, 4), seed=config.seed)
    return run


def build_model(config: RunConfig) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """The model that the config starts from, ready to be trained as the config says."""
    settings = config.model
    bridge: BlockDiffusionModel
    wants_mask = config.layout.kind != "ar"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.init is not None:
        bridge = model.load(
            settings.init,
            dtype=getattr(torch, settings.dtype),
            device=device,
            add_mask=wants_mask,
            implementation=settings.attention,
        )
        _agree(bridge.spec, config)
        tokenizer = model.load_tokenizer(settings.tokenizer) if settings.tokenizer else bridge.tokenizer
    else:
        assert settings.architecture is not None
        tokenizer = model.load_tokenizer(settings.tokenizer) if settings.tokenizer else _new_tokenizer(config)
        if tokenizer is None:
            raise ConfigError(f"model.tokenizer: {settings.tokenizer} holds no tokenizer")
        backbone = model.from_architecture(
            settings.architecture,
            vocabulary=len(tokenizer) + 1,  # one row more, for [MASK]
            seed=config.seed,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
        backbone = backbone.to(device=device, dtype=getattr(torch, settings.dtype))
        bridge = model.attach(backbone, tokenizer, add_mask=wants_mask, implementation=settings.attention)
    if tokenizer is None:
        raise ConfigError(f"model.init: {settings.init} holds no tokenizer; name one with model.tokenizer")
    bridge.tokenizer = tokenizer
    causal = settings.clean_context == "context_causal"
    bridge.spec = replace(
        bridge.spec,
        clean_context=settings.clean_context,
        alignment=settings.alignment,
        layout=config.layout,
        noise=config.noise,
        trained_length=config.data.length,
        ar_trained=causal and (config.objective.ar_weight > 0 or config.layout.kind == "ar"),
    )
    if config.data.length > bridge.context_length:
        raise ConfigError(
            f"data.length: {config.data.length} tokens do not fit the model's context of {bridge.context_length}"
        )
    return bridge, tokenizer


def encoder_of(bridge: BlockDiffusionModel, end_token: str | None = None) -> Encoder:
    """How this model's documents are made: its tokenizer, and the token that ends them.

    Raises ConfigError where the tokenizer lacks the end token, or none is known.
    """
    if bridge.tokenizer is None:
        raise ConfigError("the model has no tokenizer: save one beside it, or name one with model.tokenizer")
    if end_token is not None:
        found = bridge.tokenizer.convert_tokens_to_ids(end_token)
        if found is None or found == bridge.tokenizer.unk_token_id != bridge.tokenizer.convert_tokens_to_ids("<unk>"):
            found = bridge.tokenizer.get_vocab().get(end_token)
        if found is None:
            raise ConfigError(f"data.end_token: the tokenizer has no token {end_token!r}")
        return Encoder(bridge.tokenizer, int(found), (int(found), *bridge.end_ids))
    if not bridge.end_ids:
        raise ConfigError(
            "neither the model nor its tokenizer names an end token, so no document could end; set data.end_token"
        )
    return Encoder(bridge.tokenizer, bridge.end_ids[0], bridge.end_ids)


def measure(
    run: RunDirectory, bridge: BlockDiffusionModel, valid: Corpus, sizes: list[int], *, draws: int, seed: int
) -> list[BoundRow]:
    """Bounds on the validation documents, written to results/bound.json."""
    sizes = [size for size in sizes if size == 1 or bridge.spec.is_diffusion]
    rows = bound(bridge, valid.documents, sizes, draws=draws, seed=seed)
    write_json(run.result("bound"), record("eval bound", seed, rows=[row.to_json() for row in rows]))
    return rows


def corpus_tokens_per_row(rows: PackedRows) -> float:
    return sum(len(document) for row in rows.rows for document in row) / len(rows.rows)


def _prepare(run: RunDirectory, config: RunConfig, resume: bool, overwrite: bool) -> Path | None:
    """Make the run directory; returns the checkpoint to go on from, if there is one."""
    found = last_checkpoint(run.trainer)
    if resume:
        if run.config.exists() and (key := _difference(yaml.safe_load(run.config.read_text()), config)):
            raise ConfigError(f"--resume: {key} differs from {run.config}; a resumed run must keep its configuration")
    elif (run.checkpoint.exists() or found) and not overwrite:
        raise ConfigError(
            f"output: {run.path} already holds a run; go on with --resume, start anew with --overwrite, "
            "or set another output"
        )
    else:
        found = None
    try:
        run.trainer.mkdir(parents=True, exist_ok=True)
        write_text(run.config, config.dump())
    except OSError as error:
        raise ConfigError(f"output: cannot write to {run.path}: {error.strerror or error}") from error
    return found


def _difference(saved: object, config: RunConfig) -> str | None:
    """The first key whose value differs, dotted."""
    now = yaml.safe_load(config.dump())

    def walk(a: object, b: object, place: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            found = (walk(a.get(key), b.get(key), f"{place}.{key}".lstrip(".")) for key in {**a, **b})
            return next((key for key in found if key), None)
        return None if a == b else place

    return walk(saved, now, "")


def _agree(spec: Spec, config: RunConfig) -> None:
    """A checkpoint that is a block diffusion model already keeps its way of reading tokens."""
    if not spec.trained_length:  # an AR decoder that we have just given a [MASK] row
        return
    for key, kept, asked in (
        ("prediction", spec.alignment.prediction, config.model.prediction),
        ("boundary", spec.alignment.boundary, config.model.boundary),
    ):
        if kept != asked and (key == "prediction" or spec.alignment.shift):
            raise ConfigError(f"model.{key}: the checkpoint {config.model.init} was trained with {kept}, not {asked}")


def _new_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    paths = [config.data.train] if isinstance(config.data.train, str) else config.data.train

    def texts() -> list[str]:
        found = []
        for path in paths:
            for _, row in data.read_rows(Path(path), config.data.bad_rows):
                turns = row["messages"] if isinstance(row.get("messages"), list) else [row]
                found += [
                    str(v)
                    for turn in turns
                    for k, v in turn.items()
                    if k in ("text", "prompt", "completion", "content")
                ]
        return found

    return train_tokenizer(texts(), config.model.vocabulary)


def _rows(
    config: RunConfig, bridge: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Corpus, PackedRows]:
    corpus = data.read_corpus(config.data.train, encoder_of(bridge, config.data.end_token), config.data.bad_rows)
    corpus.documents = corpus.documents[: config.data.limit]
    pieces, _ = data.cut(corpus.documents, config.data.length)
    return corpus, PackedRows(data.pack(pieces, config.data.length))


def _validation(config: RunConfig, bridge: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase) -> Corpus | None:
    if config.data.valid is None:
        return None
    return data.read_corpus(config.data.valid, encoder_of(bridge, config.data.end_token), config.data.bad_rows)


def _validator(config: RunConfig, valid: Corpus | None) -> Callable[[BlockDiffusionModel], dict[str, float]] | None:
    if valid is None:
        return None
    documents = valid.documents[: config.eval.documents]

    def validate(bridge: BlockDiffusionModel) -> dict[str, float]:
        sizes = [size for size in config.eval.block_sizes if size == 1 or bridge.spec.is_diffusion]
        rows = bound(bridge, documents, sizes, draws=config.eval.draws, seed=config.seed)
        metrics = {f"bound_b{row.block_size}": row.nats_per_token for row in rows}
        return metrics | {f"bound_b{row.block_size}_se": row.se for row in rows if row.se is not None}

    return validate


def _steps(
    run: RunDirectory,
    config: RunConfig,
    bridge: BlockDiffusionModel,
    objective: Objective,
    rows: PackedRows,
    resumed: Path | None,
) -> int:
    """Optimizer steps of the whole run; a budget in minutes is measured once and kept in plan.yaml for resumed runs."""
    plan = run.path / "plan.yaml"
    if resumed is not None and plan.exists():
        return int(yaml.safe_load(plan.read_text())["steps"])
    budget = config.train
    passes = budget.rows * budget.accumulation
    if budget.steps is not None:
        steps = budget.steps
    elif budget.tokens is not None:
        steps = max(1, round(budget.tokens / (passes * corpus_tokens_per_row(rows))))
    else:
        assert budget.minutes is not None
        steps = max(
            1, int(budget.minutes * 60 / (budget.accumulation * _seconds_per_pass(config, bridge, objective, rows)))
        )
    write_text(plan, yaml.safe_dump({"steps": steps}))
    return steps


def _seconds_per_pass(config: RunConfig, bridge: BlockDiffusionModel, objective: Objective, rows: PackedRows) -> float:
    """Measured on a few passes whose gradients are thrown away."""
    times = []
    spec = bridge.spec
    for trial in range(5):
        batch = data.collate([rows[(trial * config.train.rows + i) % len(rows)] for i in range(config.train.rows)])
        batch = {name: tensor.to(bridge.device) for name, tensor in batch.items()}
        began = time.perf_counter()
        terms = objective.terms(bridge, batch, spec.alignment, spec.mask_id or 0, Generator().manual_seed(trial))
        torch.autograd.backward(terms.loss(terms.tokens.sum(), objective.ar_weight))
        times.append(time.perf_counter() - began)
    bridge.zero_grad()
    return median(times[1:]) * 1.1  # the optimizer's share


def _arguments(config: RunConfig, run: RunDirectory, steps: int) -> TrainingArguments:
    settings = config.train
    save = settings.save_every
    try:
        import tensorboard  # noqa: F401

        report_to = ["tensorboard"]
    except ImportError:
        report_to = []
    return TrainingArguments(
        output_dir=str(run.trainer),
        max_steps=steps,
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=int(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.clip,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no" if save is None else "steps",
        save_steps=save or steps,
        save_total_limit=settings.keep,
        eval_strategy="no" if config.eval.every is None or config.data.valid is None else "steps",
        eval_steps=config.eval.every,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.model.dtype == "bfloat16" and torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=report_to,
    )


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
