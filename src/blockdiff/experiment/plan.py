"""An experiment file, and the training runs that it asks for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from blockdiff.config import ConfigError, RunConfig, apply_change, make_config, nearest, put, read_tree, sentence
from blockdiff.decode import named
from blockdiff.experiment.claims import Claim
from blockdiff.run_directory import RunDirectory


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Decode(_Group):
    """One way of decoding."""

    block_size: int = Field(ge=1)
    policy: str = Field("threshold", description="a name of `blockdiff policies`, or parts joined by +")
    temperature: float = Field(0.0, ge=0)
    lossless: bool = Field(False, description="verify every block against the AR stream")

    @field_validator("policy")
    @classmethod
    def _known(cls, text: str) -> str:
        named(text)
        return text


class Generation(_Group):
    """Texts that every run writes: answers scored by exact match, or free texts scored by a judge."""

    decodes: dict[str, Decode] = Field(min_length=1)
    questions: str | None = Field(None, description="file of prompts and answers; none: texts without a prompt")
    judge: str | None = Field(None, description="AR model that scores the texts; needed where nothing else does")
    count: int = Field(100, ge=2, description="texts of each decode")
    max_new_tokens: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _scored(self) -> Generation:
        if self.questions is None and self.judge is None:
            raise ValueError("generation needs questions with answers, or a judge")
        return self


class Variance(_Group):
    """Variance of the run's own training gradient at its final weights."""

    draws: int = Field(16, ge=2)
    vary: Literal["noise", "both"] = "noise"


class Evaluate(_Group):
    """What every run is measured by, on the first documents of its validation data.

    All runs share the seed, so they meet the same noise and their differences are not blurred by it.
    """

    block_sizes: list[int] = Field(min_length=1)
    offsets: list[int] = Field([0], min_length=1)
    left_bias: list[float] = Field([0.0], min_length=1, description="of the reveal order whose bound is measured")
    draws: int = Field(4, ge=1)
    documents: int | None = Field(None, ge=1, description="none: all of them")
    seed: int = 0
    variance: Variance | None = None
    generation: Generation | None = None

    @model_validator(mode="after")
    def _possible(self) -> Evaluate:
        if min(self.block_sizes) < 1 or min(self.offsets) < 0:
            raise ValueError("block sizes are 1 or more, offsets 0 or more")
        if max(self.offsets) >= max(self.block_sizes) and max(self.offsets) > 0:
            raise ValueError(f"offset {max(self.offsets)} shortens no block; give offsets below the largest block size")
        return self


class Experiment(_Group):
    """A whole experiment: one configuration, the changes each setting makes to it, and the seeds."""

    name: str = Field(min_length=1)
    about: str = Field(min_length=1, description="one sentence: what is compared, and why")
    output: str
    config: dict[str, Any]
    settings: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    evaluate: Evaluate
    compare: list[tuple[str, str]] = []
    correlate: dict[str, list[str]] = Field(
        {}, description="groups of settings among which gradient noise and final bound are correlated"
    )
    claims: list[Claim] = []

    @field_validator("settings", mode="before")
    @classmethod
    def _no_changes_are_changes(cls, settings: Any) -> Any:
        """`label:` with nothing after it is the configuration as it stands."""
        if not isinstance(settings, dict):
            return settings
        return {label: {} if changes is None else changes for label, changes in settings.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for label in self.settings:
            if "/" in label or label in (".", "..") or not label:
                raise ValueError(f"setting {label!r} names a directory: use a label without /")
        named = [("compare", label) for pair in self.compare for label in pair]
        named += [("correlate", label) for group in self.correlate.values() for label in group]
        named += [("claims", label) for claim in self.claims for label in claim.settings]
        for key, label in named:
            if label not in self.settings:
                raise ValueError(f"{key} names {label!r}, which is no setting; {nearest(label, self.settings)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} has one twice, and the same run twice is no second run")
        return self


@dataclass(frozen=True)
class Run:
    """One training run of an experiment."""

    setting: str
    seed: int
    config: RunConfig

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(Path(self.config.output))

    @property
    def name(self) -> str:
        return f"{self.setting}/seed{self.seed}"


def load_experiment(path: str | Path, changes: list[str] | None = None) -> tuple[Experiment, list[Run]]:
    """Read an experiment file and resolve the configuration of all its runs, setting after setting.

    `changes` are `--set` changes of the file's keys, e.g. "config.data.length=64" or "seeds=[0]". `config` is a tree,
    or the path of a config file relative to the experiment's; its own paths stay relative to the working directory, as
    in every config. Raises ConfigError, naming the file and the key, before anything is trained.
    """
    tree = read_tree(path)
    _resolve_config(tree, Path(path))
    for change in changes or []:
        apply_change(tree, change)
    if isinstance(tree.get("name"), str):
        tree.setdefault("output", f"runs/experiments/{tree['name']}")
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error, Experiment)}") from error
    runs = [_run(experiment, label, seed, path) for label in experiment.settings for seed in experiment.seeds]
    return experiment, runs


def _resolve_config(tree: dict[str, Any], path: Path) -> None:
    """Put the tree of the config file, with the `set` changes, in the place of its name."""
    if isinstance(tree.get("config"), str):
        tree["config"] = read_tree(path.parent / tree["config"])
    changes = tree.pop("set", None) or {}
    if not isinstance(changes, dict):
        raise ConfigError(f"{path}: set: give dotted keys and their values, e.g. {{train.steps: 100}}")
    if changes and not isinstance(tree.get("config"), dict):
        raise ConfigError(f"{path}: config is missing; give a config tree, or the path of a config file")
    _put_all(tree.get("config", {}), changes, f"{path}: set")


def _run(experiment: Experiment, label: str, seed: int, path: str | Path) -> Run:
    where = f"{path}: settings.{label}"
    tree = copy.deepcopy(experiment.config)
    if not experiment.config.get("eval"):
        tree["eval"] = {"block_sizes": []}  # the experiment measures; a run's own bounds would be measured twice
    _put_all(tree, experiment.settings[label], where)
    for key in ("output", "seed"):
        if key in experiment.settings[label]:
            raise ConfigError(
                f"{where}: {key} is the experiment's to set; change {key if key == 'output' else 'seeds'}"
            )
    tree |= {"output": str(Path(experiment.output) / label / f"seed{seed}"), "seed": seed}
    config = make_config(tree, where)
    if config.data.valid is None:
        raise ConfigError(f"{where}: data.valid is missing; the experiment measures its runs on it")
    largest = max(experiment.evaluate.block_sizes)
    if largest >= config.data.length:
        raise ConfigError(f"{where}: evaluate.block_sizes: {largest} does not fit data.length = {config.data.length}")
    return Run(label, seed, config)


def _put_all(tree: dict[str, Any], changes: dict[str, Any], where: str) -> None:
    for dotted, value in changes.items():
        try:
            put(tree, dotted, copy.deepcopy(value))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
