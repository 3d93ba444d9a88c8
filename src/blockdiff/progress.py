"""Progress of a training run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Shows the step, the bound and the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, state="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.task is not None
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        words = [f"{name} {value:.4f}" for name, value in (logs or {}).items() if _interesting(name)]
        if self.console.is_terminal and self.task is not None:
            self.bar.update(self.task, state=", ".join(words[:2]))
        if words and (not self.console.is_terminal or any("eval" in word for word in words)):
            self.console.print(f"step {state.global_step}/{state.max_steps}: {', '.join(words)}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()


def _interesting(name: str) -> bool:
    return name in ("bound", "block_loss", "ar") or (name.startswith("eval_bound") and not name.endswith("_se"))
