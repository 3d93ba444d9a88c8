"""A Hugging Face Trainer that trains on two streams.

Only what block diffusion changes is overridden: the loss, the evaluation (a bound, not a loss), and how checkpoints are
written (whole or not at all) and read. Devices, precision, accumulation, schedules and optimizers are the Trainer's.

Rows, layouts and noise are functions of the seed and of a row's place in the training stream, never of a generator's
history, of processes or of passes: a resumed run, on however many processes, draws what the uninterrupted one would
have drawn. (Dropout alone is torch's own.)
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blockdiff.curriculum import ShareSearch, adaptive
from blockdiff.data import PackedRows, TrainingStream, collate_numbered
from blockdiff.distributions import AdaptiveMixture
from blockdiff.files import sync_tree
from blockdiff.masking import Corruption
from blockdiff.model import BlockDiffusionModel
from blockdiff.noise import ExactCount
from blockdiff.objectives import Terms
from blockdiff.passes import Objective, Schedule
from blockdiff.rng import uniform

_SCHEDULE = 6  # purpose of random numbers
_STATE_FILE = "blockdiff_state.json"  # what training knows beside weights, optimizer and the Trainer's state

Validate = Callable[[BlockDiffusionModel], dict[str, float]]


class BlockDiffusionTrainer(Trainer):
    """Train a `BlockDiffusionModel` on packed rows, `args.max_steps` steps of as many rows as `args` say.

    `schedule` changes the objective on the way; `search_rows` (default: the training rows) are what a search for noise
    or for the shares of layouts tries its candidates on. `validate` returns the metrics of an evaluation. Checkpoints
    appear in `args.output_dir` as checkpoint-<step>.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        objective: Objective,
        rows: PackedRows,
        args: TrainingArguments,
        *,
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        search_rows: PackedRows | None = None,
        validate: Validate | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_numbered,
            train_dataset=TrainingStream(rows, args.seed, args.max_steps * self.step_rows),
            eval_dataset=PackedRows([]),  # the Trainer wants one to evaluate at all; `evaluate` asks `validate`
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # progress is the caller's affair
        self.objective = objective
        self.schedule = schedule
        self.adaptive = adaptive(objective.noise)
        self.shares = ShareSearch(objective.layout) if isinstance(objective.layout, AdaptiveMixture) else None
        self.search_rows = search_rows or rows
        self.validate = validate
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole optimizer step
        self._step, self._steps_noted = -1, 0
        self._sums: dict[str, Tensor] = {}
        self._staging: str | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted bound and the AR term over the scored tokens of all passes and devices of this step."""
        spec = self.bridge.spec
        objective = self._objective()
        observe = self.adaptive.observe if self.adaptive is not None else None
        terms = objective.terms(model, inputs, spec.alignment, spec.mask_id or 0, self.args.seed, observe)
        total = terms.tokens.sum() if num_items_in_batch is None else num_items_in_batch
        loss = terms.loss(total, objective.ar_weight)
        self._note(terms, loss)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over devices afterwards
        return (loss, terms) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The bound on the validation documents, as `validate` measures it."""
        if self.validate is None:
            return {}
        metrics = {f"eval_{name}": value for name, value in self.validate(self.bridge).items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means())
            if self.shares is not None:
                logs.update({f"share_b{size}": share for size, share in self.shares.shares.items()})
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower train.learning_rate, or look "
                    "for broken rows in data.train"
                )
        super().log(logs, start_time)

    @property
    def bridge(self) -> BlockDiffusionModel:
        """The model, without what wraps it for training."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, BlockDiffusionModel)
        return model

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if self.args.fsdp_plugin_args is not None and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards over accelerators alone; torch does it over CPUs just so
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for shared in (state._shared_state, PartialState._shared_state):  # the second would overwrite the first
                shared["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and state.mixed_precision == "bf16":
            # accelerate's own would round the losses and the sums of gradients to bfloat16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            state.fsdp_plugin.mixed_precision_policy = policy

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # the stream has its order already

    def _objective(self) -> Objective:
        """The objective of this step, with what was learned about the layouts and the noise so far."""
        step = self.state.global_step
        new_step, self._step = step != self._step, step
        self._steps_noted += new_step
        if self.adaptive is not None and new_step:
            self.adaptive.settle(self._total)
        u = float(uniform(self.args.seed, step, _SCHEDULE))
        now = self.schedule.at(self.objective, step / max(self.state.max_steps, 1), u)
        if self.shares is not None:
            if new_step and self.shares.due(step):
                self.shares.search(step, lambda layout: self._held_out(Objective(layout, ExactCount())))
            now = replace(now, layout=self.shares.layout())
        if self.adaptive is None:
            return now
        if new_step and self.adaptive.due(step):
            self.adaptive.search(lambda noise: self._block_losses(replace(now, noise=noise)))
        return replace(now, noise=self.adaptive.noise())

    @torch.no_grad()
    def _held_out(self, objective: Objective) -> float:
        """Nats per token of some held-out batches, the same ones with the same draws for every objective."""
        bridge = self.bridge
        assert self.shares is not None
        total = tokens = 0.0
        for batch in self._search_batches(self.shares.settings.batches):
            terms = objective.terms(bridge, batch, bridge.spec.alignment, bridge.spec.mask_id or 0, 0)
            total, tokens = total + float(terms.blocks.sum()), tokens + float(terms.tokens.sum())
        total, tokens = self._total(torch.tensor([total, tokens], dtype=torch.float64)).tolist()
        return total / tokens

    def _search_batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """This process's part of `count` steps' rows, always the same ones, each with its number."""
        rows = self.args.per_device_train_batch_size
        for first in range(self.args.process_index * rows, count * self.step_rows, self.args.world_size * rows):
            numbers = range(first, first + rows)
            batch = collate_numbered([(n, self.search_rows[n % len(self.search_rows)]) for n in numbers])
            yield {name: tensor.to(self.bridge.device) for name, tensor in batch.items()}

    @torch.no_grad()
    def _block_losses(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Number of maskable tokens and weighted mean loss of every block of some held-out batches."""
        bridge = self.bridge
        sizes, losses = [], []

        def keep(draw: Corruption, loss: Tensor, block: Tensor) -> None:
            size = torch.bincount(block)
            total = torch.zeros(len(size), dtype=torch.float64, device=block.device)
            total.index_add_(0, block[draw.masked], loss.double() * draw.weight[draw.masked])
            sizes.append(size.cpu())
            losses.append((total / size).cpu())

        for batch in self._search_batches(getattr(self.objective.noise, "batches", 1)):
            # seed 0: the same draws for every candidate
            objective.terms(bridge, batch, bridge.spec.alignment, bridge.spec.mask_id or 0, 0, keep)
        return torch.cat(gather_object(sizes)), torch.cat(gather_object(losses))

    def _total(self, values: Tensor) -> Tensor:
        """Sums over all processes."""
        summed: Tensor = self.accelerator.reduce(values.to(self.args.device), "sum")
        return summed.cpu()

    def _note(self, terms: Terms, loss: Tensor) -> None:
        noted = {name: getattr(terms, name) for name in ("blocks", "tokens", "ar", "ar_tokens")} | {"loss": loss}
        for name, value in noted.items():
            value = value.detach().sum().double()
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def _unlogged(self) -> tuple[dict[str, float], int]:
        """Sums over all processes of what was noted since the last log line, and the steps that it is of."""
        if not self._sums:
            return {}, 0
        total = self._total(torch.stack(list(self._sums.values())))
        return dict(zip(self._sums, total.tolist(), strict=True)), self._steps_noted

    def _means(self) -> dict[str, float]:
        """Over the steps since the last call and all processes, in float64 (the Trainer's own sum is float32)."""
        sums, steps = self._unlogged()
        means = {"loss": sums["loss"] / steps}
        self._sums, self._steps_noted = {}, 0
        if sums.get("tokens"):
            name = "bound" if self.objective.is_bound(self.bridge.spec.alignment) else "block_loss"
            means[name] = sums["blocks"] / sums["tokens"]
        if sums.get("ar_tokens"):
            means["ar"] = sums["ar"] / sums["ar_tokens"]
        return means

    # ---- checkpoints: whole or not at all ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside the others under another name, then rename it into place.

        All processes write into the same staging directory; the main one makes it and puts it into place.
        """
        home = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = home / f".saving-{self.state.global_step}"
        main = self.is_world_process_zero()
        try:
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self._meet()
            self._staging = str(staging)
            if self.adaptive is not None:
                self.adaptive.settle(self._total)
            super()._save_checkpoint(model, trial)
            state = {what: part.state() for what, part in self._learned().items()} | {"unlogged": self._unlogged()}
            if main:
                (staging / name / _STATE_FILE).write_text(json.dumps(state))
            self._meet()
            if main:
                sync_tree(staging)
                shutil.rmtree(home / name, ignore_errors=True)
                (staging / name).rename(home / name)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            kept = last_checkpoint(home)
            where = (
                f"the last whole checkpoint is {kept}; make room if the disk is full, and go on with --resume"
                if kept
                else "none is whole; make room if the disk is full, and begin again"
            )
            raise OSError(
                f"could not write the checkpoint of step {self.state.global_step} in {home}: {_cause(error)}; {where}"
            ) from error
        finally:
            self._staging = None
            if main:
                shutil.rmtree(staging, ignore_errors=True)
        if main:
            for old in checkpoints(home)[: -(self.args.save_total_limit or 1)]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _meet(self) -> None:
        try:
            self.accelerator.wait_for_everyone()
        except RuntimeError as error:  # of the connection that broke off
            raise OSError("another process stopped") from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # the Trainer asks every process
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        bridge = self.bridge
        bridge.save_into(directory)
        if bridge.adapter is not None and self._staging is not None:
            bridge.adapter.save(directory, bridge.backbone)

    def gathered(self) -> dict[str, Tensor] | None:
        """The weights of a model that is sharded over the processes, on the main one (empty elsewhere); None for one
        that is not. All processes take part."""
        if not self.is_fsdp_enabled:
            return None
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=whole))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        bridge = self.bridge
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif bridge.adapter is not None:  # everything else is as `build_model` made it
            bridge.adapter.load(Path(resume_from_checkpoint), bridge.backbone)
        else:
            kind, dtype = type(bridge.backbone), bridge.backbone.dtype
            saved = kind.from_pretrained(resume_from_checkpoint, dtype=dtype, use_safetensors=True)
            bridge.backbone.load_state_dict(saved.state_dict())
        state = json.loads((Path(resume_from_checkpoint) / _STATE_FILE).read_text())
        for name, part in self._learned().items():
            part.restore(state[name])
        sums, self._steps_noted = state["unlogged"]
        if self.is_world_process_zero():  # the processes' sums are added up
            as_noted = partial(torch.tensor, dtype=torch.float64, device=self.args.device)
            self._sums = {name: as_noted(value) for name, value in sums.items()}

    def _learned(self) -> dict[str, Any]:
        """What this training learns beside the weights."""
        parts = {"noise": self.adaptive, "layout": self.shares}
        return {name: part for name, part in parts.items() if part is not None}


def _cause(error: BaseException) -> BaseException:
    """The error itself, or, of one that sharded writing wraps together with its tracebacks, the first process's."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return failures[min(failures)][0] if failures else error


def checkpoints(directory: Path) -> list[Path]:
    """The resumable checkpoints in a directory, oldest first."""
    found = [path for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / "trainer_state.json").exists()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def last_checkpoint(directory: Path) -> Path | None:
    """The newest resumable checkpoint, if there is one."""
    found = checkpoints(directory)
    return found[-1] if found else None


class MetricsFile(TrainerCallback):
    """Appends every log line to `metrics.jsonl`; a resumed run first drops the lines that it will write again."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        if not PartialState().is_main_process:
            return
        lines = path.read_text().splitlines(keepends=True) if path.exists() and resumed_at else []
        whole = [line for line in lines if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= resumed_at))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            kept = {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **kept}) + "\n")
