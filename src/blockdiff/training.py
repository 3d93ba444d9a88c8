"""A whole training run: config -> model, data, trainer -> run directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainingArguments

from blockdiff.budget import Budget, plan, step_rows
from blockdiff.building import (
    build_model,
    encoder_of,
    objective_of,
    packed,
    trained_documents,
    training_rows,
    validation_corpus,
)
from blockdiff.config import ConfigError, RunConfig
from blockdiff.data import Corpus
from blockdiff.evaluate import BoundRow, bound, check_bound
from blockdiff.explain import draw_example
from blockdiff.files import write_json, write_text
from blockdiff.model import BlockDiffusionModel
from blockdiff.passes import Schedule
from blockdiff.run_directory import RunDirectory
from blockdiff.runtime import keep_freed_memory, record, use_available_threads
from blockdiff.shards import ALONE, WAIT, Shard, Split
from blockdiff.trainer import BlockDiffusionTrainer, MetricsFile, last_checkpoint

Say = Callable[[str], None]


def _silent(line: str) -> None:
    pass


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = _silent,
    callbacks: list[TrainerCallback] | None = None,
) -> RunDirectory:
    """Run the training that `config` describes.

    With `resume` the run goes on from its last whole checkpoint, with the same noise and data order. Raises ConfigError
    where the output already holds a run and neither `resume` nor `overwrite` is given.
    """
    use_available_threads()
    keep_freed_memory()
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
    if not processes.is_main_process:
        say = _silent
    if config.train.parallel == "fsdp" and processes.distributed_type == DistributedType.NO:
        raise ConfigError(
            "train.parallel: fsdp needs processes to shard over; start the training with torchrun --nproc_per_node N "
            "-m blockdiff train ... (N may be 1), or use ddp"
        )
    run = RunDirectory(Path(config.output))
    resumed = run.resumable(config, resume, overwrite)
    bridge = build_model(config)
    encoder = encoder_of(bridge)
    corpus, rows = training_rows(config, encoder)
    say(f"data: {corpus.summary()} -> {len(rows)} rows of {config.data.length}")
    for note in bridge.notes:
        say(f"model: {note}")
    if processes.num_processes > 1 and (dropped := _dropout(bridge)):
        say(f"model: dropout of {dropped:g} is drawn by each process for itself: on other processes another run")
    if resumed is not None:
        run.check_data(config, rows)
    if processes.num_processes == 1 and (gpus := torch.cuda.device_count()) > 1:
        say(f"model: one of {gpus} GPUs is used; torchrun --nproc_per_node {gpus} -m blockdiff train ... uses all")
    bridge.spec = replace(bridge.spec, documents=trained_documents(rows))
    valid = validation_corpus(config, encoder)
    _check_sizes(config, bridge, valid)
    if resumed is None:
        Budget(1, step_rows(config, processes.num_processes)).passes(config.train.rows, processes.num_processes)
    # everything that can be wrong with the input was read by now: only then is an earlier run's output replaced
    if processes.is_main_process:
        run.open(config, fresh=resumed is None)
    processes.wait_for_everyone()
    objective = objective_of(config)
    if processes.is_main_process:
        if not run.plan.exists():
            plan(config, bridge, objective, rows, processes.num_processes).write(run.plan)
        picture = draw_example(config.layout, bridge.spec.alignment, bridge.spec.clean_context, config.seed)
        write_text(run.path / "results" / "mask.txt", picture + "\n")
    run.check_shared(processes)
    budget = Budget.read(run.plan)
    arguments = _arguments(config, run, budget, processes.num_processes, bridge)
    say(_heading(budget, arguments, bridge.backbone.num_parameters()))

    # where each process has the whole model they share the validation; a sharded one runs on all of them together
    split = Split(Shard.of_process()) if config.train.parallel == "ddp" else ALONE
    trainer = BlockDiffusionTrainer(
        bridge,
        objective,
        rows,
        arguments,
        schedule=Schedule(config.growth, config.objective.ar_weight_end),
        search_rows=packed(valid, config.data.length) if valid else None,
        validate=_validator(config, valid, split),
        callbacks=[MetricsFile(run.metrics, _step_of(resumed)), *(callbacks or [])],
    )
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    seconds = time.perf_counter() - began
    scored = budget.steps * budget.rows * rows.scored / len(rows)
    bridge.spec = replace(bridge.spec, trained_tokens=int(scored))
    if trainer.shares is not None:
        bridge.spec = replace(bridge.spec, layout=trainer.shares.trained(budget.steps))
    _save_finished(run, config, trainer)
    if trainer.is_world_process_zero():
        tokens = (budget.steps - _step_of(resumed)) * budget.rows * rows.tokens / len(rows)
        write_json(
            run.result("train"),
            record(
                "train",
                config.seed,
                steps=budget.steps,
                global_rows=budget.rows,
                processes=processes.num_processes,
                seconds=seconds,
                tokens=int(tokens),
                tokens_per_second=tokens / seconds,
            ),
        )
    if valid and config.eval.block_sizes:
        draws = max(config.eval.draws, 4)
        measure(run, bridge, valid, config.eval.block_sizes, draws=draws, seed=config.seed, split=split)
    return run


def _dropout(bridge: BlockDiffusionModel) -> float:
    """The largest share of activations or attention weights that training drops."""
    layers = [module.p for module in bridge.modules() if isinstance(module, torch.nn.Dropout)]
    attention = getattr(bridge.backbone.config.get_text_config(), "attention_dropout", 0.0)
    return max([float(p) for p in layers] + [float(attention or 0.0)])


def _save_finished(run: RunDirectory, config: RunConfig, trainer: BlockDiffusionTrainer) -> None:
    """Write the model as a checkpoint that any machine loads. All processes take part."""
    state = trainer.gathered()
    if trainer.is_world_process_zero():
        bridge = trainer.bridge
        if state is not None:  # sharded over the processes
            spec, bridge = bridge.spec, build_model(config, "cpu")
            bridge.load_state_dict(state)
            bridge.spec = spec
        try:
            bridge.save(run.checkpoint)
        except (OSError, RuntimeError) as error:
            kept = last_checkpoint(run.trainer)
            then = (
                f"--resume goes on from {kept}"
                if kept
                else "nothing of the training is kept (train.save_every is none)"
            )
            raise OSError(f"could not write the finished model: {error}; {then}") from error
    PartialState().wait_for_everyone()


def measure(
    run: RunDirectory,
    bridge: BlockDiffusionModel,
    valid: Corpus,
    sizes: list[int],
    *,
    draws: int,
    seed: int,
    split: Split = ALONE,
) -> list[BoundRow]:
    """Bounds on the validation documents, written to results/bound.json. All processes take part."""
    rows = bound(bridge, valid.documents, measurable(bridge, sizes), draws=draws, seed=seed, split=split)
    if PartialState().is_main_process:
        write_json(run.result("bound"), record("eval bound", seed, rows=[row.to_json() for row in rows]))
    return rows


def measurable(bridge: BlockDiffusionModel, sizes: list[int]) -> list[int]:
    """The block sizes of a list at which this model can be scored: an AR model has 1 alone."""
    return [size for size in sizes if size == 1 or bridge.spec.is_diffusion]


def _check_sizes(config: RunConfig, bridge: BlockDiffusionModel, valid: Corpus | None) -> None:
    """Refuse what the validation could not measure, before the training rather than after it."""
    if valid is not None and (sizes := measurable(bridge, config.eval.block_sizes)):
        check_bound(bridge, valid.documents, sizes)


def _validator(
    config: RunConfig, valid: Corpus | None, split: Split
) -> Callable[[BlockDiffusionModel], dict[str, float]] | None:
    if valid is None or not config.eval.block_sizes:
        return None
    documents = valid.documents[: config.eval.documents]

    def validate(bridge: BlockDiffusionModel) -> dict[str, float]:
        sizes = measurable(bridge, config.eval.block_sizes)
        rows = bound(bridge, documents, sizes, draws=config.eval.draws, seed=config.seed, split=split)
        metrics = {f"bound_b{row.block_size}": row.nats_per_token for row in rows}
        return metrics | {f"bound_b{row.block_size}_se": row.se for row in rows if row.se is not None}

    return validate


def _heading(budget: Budget, arguments: TrainingArguments, parameters: int) -> str:
    """What is about to run, on how much."""
    rows, passes, processes = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.world_size,
    )
    shape = f"{budget.rows} rows a step" + (
        f" ({processes} processes x {passes} passes x {rows})" if processes > 1 else ""
    )
    return f"training: {budget.steps} steps of {shape} on {torch.get_num_threads()} threads, {parameters:,} parameters"


def _arguments(
    config: RunConfig, run: RunDirectory, budget: Budget, processes: int, bridge: BlockDiffusionModel
) -> TrainingArguments:
    settings = config.train
    save = settings.save_every
    rows, passes = budget.passes(settings.rows, processes)
    try:
        import tensorboard  # noqa: F401

        report_to = ["tensorboard"]
    except ImportError:
        report_to = []
    arguments = TrainingArguments(
        output_dir=str(run.trainer),
        max_steps=budget.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=int(settings.warmup * budget.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.clip,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no" if save is None else "steps",
        save_steps=save or budget.steps,
        save_total_limit=settings.keep,
        eval_strategy="no" if config.eval.every is None or config.data.valid is None else "steps",
        eval_steps=config.eval.every,
        seed=config.seed,
        data_seed=config.seed,
        bf16=settings.mixed_precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=report_to,
        **(_sharding(bridge) if settings.parallel == "fsdp" else {}),
    )
    # a process works on one GPU: over more the Trainer would cut batches up by threads, and a step be another
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _sharding(bridge: BlockDiffusionModel) -> dict[str, Any]:
    """FSDP2 over whole layers, its checkpoints sharded as the weights are."""
    layer = bridge.reading.last_layer
    if layer is None:
        raise ConfigError("train.parallel: fsdp shards decoder layers, and this model has no list of them; use ddp")
    return {
        "fsdp": "full_shard auto_wrap",
        # or every process would hold the gradients of the whole model between the passes of a step
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        "fsdp_config": {
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": [type(layer).__name__],
        },
    }


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
