"""A Hugging Face Trainer that trains on two streams.

Only what block diffusion changes is overridden: the loss, the evaluation (a bound, not a loss), and how checkpoints are
written (whole or not at all) and read. Devices, precision, accumulation, schedules and optimizers are the Trainer's.

Noise and layouts are functions of (seed, optimizer step, pass), never of a generator's history, so a resumed run draws
what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Generator, Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from blockdiff.curriculum import ShareSearch, adaptive
from blockdiff.data import PackedRows, collate
from blockdiff.distributions import AdaptiveMixture
from blockdiff.files import sync_tree
from blockdiff.masking import Corruption
from blockdiff.model import BlockDiffusionModel
from blockdiff.noise import ExactCount
from blockdiff.objectives import Terms
from blockdiff.passes import Objective, Schedule
from blockdiff.rng import uniform

_DRAW, _SCHEDULE = 5, 6  # purposes of random numbers
_CURRICULUM_FILE = "curriculum.json"

Validate = Callable[[BlockDiffusionModel], dict[str, float]]


class BlockDiffusionTrainer(Trainer):
    """Train a `BlockDiffusionModel` on packed rows.

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
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=rows,
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
        self._pass = (-1, 0)
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
        spec = self._bare().spec
        generator = self._generator()
        objective = self._objective(new_step=self._pass[1] == 0)
        observe = self.adaptive.observe if self.adaptive is not None else None
        terms = objective.terms(model, inputs, spec.alignment, spec.mask_id or 0, generator, observe)
        self._note(terms)
        total = terms.tokens.sum() if num_items_in_batch is None else num_items_in_batch
        loss = terms.loss(total, objective.ar_weight)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over devices afterwards
        return (loss, terms) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The bound on the validation documents, as `validate` measures it."""
        if self.validate is None:
            return {}
        metrics = {f"eval_{name}": value for name, value in self.validate(self._bare()).items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means())
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower train.learning_rate, or look "
                    "for broken rows in data.train"
                )
        super().log(logs, start_time)

    def _bare(self) -> BlockDiffusionModel:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, BlockDiffusionModel)
        return model

    def _objective(self, *, new_step: bool) -> Objective:
        """The objective of this step, with what was learned about the layouts and the noise so far."""
        step = self.state.global_step
        u = float(uniform(self.args.seed, step, _SCHEDULE))
        now = self.schedule.at(self.objective, step / max(self.state.max_steps, 1), u)
        if self.shares is not None:
            if new_step and self.shares.due(step):
                self.shares.search(step, lambda layout: self._held_out(Objective(layout, ExactCount())))
                self.log({f"share_b{size}": share for size, share in self.shares.shares.items()})
            now = replace(now, layout=self.shares.layout())
        if self.adaptive is None:
            return now
        if new_step and self.adaptive.due(step):
            self.adaptive.search(lambda noise: self._block_losses(replace(now, noise=noise)))
        return replace(now, noise=self.adaptive.noise())

    @torch.no_grad()
    def _held_out(self, objective: Objective) -> float:
        """Nats per token of some held-out batches, the same ones with the same draws for every objective."""
        bridge = self._bare()
        assert self.shares is not None
        total = tokens = 0.0
        for number, batch in enumerate(self._search_batches(self.shares.settings.batches)):
            generator = Generator().manual_seed(number)
            terms = objective.terms(bridge, batch, bridge.spec.alignment, bridge.spec.mask_id or 0, generator)
            total, tokens = total + float(terms.blocks.sum()), tokens + float(terms.tokens.sum())
        return total / tokens

    def _search_batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        rows = self.args.per_device_train_batch_size
        for number in range(count):
            chosen = [self.search_rows[(number * rows + i) % len(self.search_rows)] for i in range(rows)]
            yield {name: tensor.to(self._bare().device) for name, tensor in collate(chosen).items()}

    @torch.no_grad()
    def _block_losses(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Number of maskable tokens and weighted mean loss of every block of some held-out batches."""
        bridge = self._bare()
        sizes, losses = [], []

        def keep(draw: Corruption, loss: Tensor, block: Tensor) -> None:
            size = torch.bincount(block)
            total = torch.zeros(len(size), dtype=torch.float64, device=block.device)
            total.index_add_(0, block[draw.masked], loss.double() * draw.weight[draw.masked])
            sizes.append(size.cpu())
            losses.append((total / size).cpu())

        for number, batch in enumerate(self._search_batches(getattr(self.objective.noise, "batches", 1))):
            generator = Generator().manual_seed(number)  # the same draws for every candidate
            objective.terms(bridge, batch, bridge.spec.alignment, bridge.spec.mask_id or 0, generator, keep)
        return torch.cat(sizes), torch.cat(losses)

    def _generator(self) -> Generator:
        """A generator for this pass of this step on this device."""
        step, number = self._pass
        self._pass = (step, number + 1) if step == self.state.global_step else (self.state.global_step, 0)
        key = uniform(self.args.seed, *self._pass, self.args.process_index, _DRAW)
        return Generator().manual_seed(int(key * 2**53))

    def _note(self, terms: Terms) -> None:
        for name in ("blocks", "tokens", "ar", "ar_tokens"):
            value = getattr(terms, name).detach().sum().double()
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def _means(self) -> dict[str, float]:
        summed = {name: self.accelerator.reduce(value, "sum") for name, value in self._sums.items()}
        sums, self._sums = {name: float(value) for name, value in summed.items()}, {}
        means = {}
        if sums.get("tokens"):
            name = "bound" if self.objective.is_bound(self._bare().spec.alignment) else "block_loss"
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
            self.accelerator.wait_for_everyone()
            self._staging = str(staging)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                sync_tree(staging)
                shutil.rmtree(home / name, ignore_errors=True)
                (staging / name).rename(home / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = last_checkpoint(home)
            where = (
                f"the last whole checkpoint is {kept}; make room and go on with --resume" if kept else "none is whole"
            )
            raise OSError(
                f"could not write the checkpoint of step {self.state.global_step} in {home}: {error}; {where}"
            ) from error
        finally:
            self._staging = None
            if main:
                shutil.rmtree(staging, ignore_errors=True)
        if main:
            for old in checkpoints(home)[: -(self.args.save_total_limit or 1)]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        bridge = self._bare()
        bridge.save_into(directory)
        if bridge.adapter is not None and self._staging is not None:
            bridge.adapter.save(directory, bridge.backbone)
        learned = {name: part.state() for name, part in self._learned().items()}
        if learned and self._staging is not None:
            (directory / _CURRICULUM_FILE).write_text(json.dumps(learned))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        bridge = self._bare()
        if bridge.adapter is not None:  # everything else is as `build_model` made it
            bridge.adapter.load(Path(resume_from_checkpoint), bridge.backbone)
        else:
            kind, dtype = type(bridge.backbone), bridge.backbone.dtype
            saved = kind.from_pretrained(resume_from_checkpoint, dtype=dtype, use_safetensors=True)
            bridge.backbone.load_state_dict(saved.state_dict())
        for name, part in self._learned().items():
            part.restore(json.loads((Path(resume_from_checkpoint) / _CURRICULUM_FILE).read_text())[name])

    def _learned(self) -> dict[str, Any]:
        """What this training learns beside the weights."""
        parts = {"noise": self.adaptive, "layout": self.shares}
        return {name: part for name, part in parts.items() if part is not None}


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
