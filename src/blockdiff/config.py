"""The one configuration tree: YAML files, `--set a.b=c`, errors that name the nearest key.

It composes the frozen dataclasses that live beside their mathematics (layouts, noise); it defines none of their
meaning.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blockdiff.adapters import Adapter
from blockdiff.attention import Implementation
from blockdiff.curriculum import Growth
from blockdiff.datafiles import BadRows
from blockdiff.distributions import AR, DISTRIBUTIONS, AnyLayout, Fixed
from blockdiff.masks import CleanContext
from blockdiff.noise import NOISES, AnyNoise, ExactCount
from blockdiff.objectives import Alignment, Boundary, Prediction
from blockdiff.presets import PRESETS


class ConfigError(ValueError):
    """A configuration that cannot be used: which key, what is wrong, what to do."""


_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Group):
    """Where the weights come from and how the model reads them."""

    init: str | None = Field(None, description="checkpoint directory or hub name to start from; none: from scratch")
    architecture: dict[str, Any] | None = Field(
        None, description="from scratch: {type: llama, hidden_size: ...}, with transformers' own keys"
    )
    tokenizer: str | None = Field(
        None, description="directory of a tokenizer; none: the checkpoint's, or a trained one"
    )
    vocabulary: int = Field(4096, ge=258, description="size of the tokenizer trained where none is given")
    clean_context: CleanContext = "context_causal"
    prediction: Prediction = "shift"
    boundary: Boundary = "clean"
    attention: Implementation = "sdpa"
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        "float32", description="of the weights; bfloat16 weights lose small updates, see train.mixed_precision"
    )
    adapter: Adapter | None = Field(None, description="train a low-rank adapter instead of all weights")

    @property
    def alignment(self) -> Alignment:
        return Alignment(self.prediction, self.boundary)


class DataConfig(_Group):
    """Which text, and how it becomes rows."""

    train: str | list[str] = Field(description="files to train on")
    valid: str | list[str] | None = Field(None, description="files to validate on; none: no validation")
    length: int = Field(512, ge=2, description="tokens of a row; longer documents are cut")
    limit: int | None = Field(None, ge=1, description="use only the first so many training documents")
    bad_rows: BadRows = Field(
        "error", description="what to do with an unusable row: stop, or leave it out and count it"
    )
    eos_fill: Literal["none", "block", "canvas"] = Field(
        "none", description="repeat the end token, scored, to the end of its block, or of the row"
    )
    end_token: str | None = Field(None, description="token that ends a document; none: the model's first end token")


class ObjectiveConfig(_Group):
    """What is minimised."""

    weighting: Literal["nelbo", "ce"] | Annotated[list[_Weight], Field(min_length=1)] = Field(
        "nelbo",
        description="nelbo: the bound; ce: plain cross-entropy; a list: weight of k = 1, 2, ... masks in a block",
    )
    ar_weight: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight of the AR loss on the clean stream")
    ar_weight_end: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="AR weight at the last step, reached linearly"
    )
    draws_per_pass: int = Field(1, ge=1, description="noise draws that share one clean pass")
    active: Literal["all", "one"] = Field(
        "all", description="all: every block of a document in one pass; one: a random block (Blockwise SFT)"
    )
    complementary: bool = Field(False, description="two draws a pass, the second masking what the first leaves")
    passes: Literal[1, 2] = Field(
        1, description="1: both streams together; 2: the clean stream, then the noisy one over its keys and values"
    )
    prefix_noise: float = Field(0.0, ge=0, lt=1, description="ablation: share of earlier answer tokens shown masked")
    suffix_visible: float | None = Field(
        None, ge=0, le=1, description="ablation, active one: the block sees what follows it, this share unmasked"
    )

    @property
    def trains_ar(self) -> bool:
        """Whether the AR loss is part of training at some step."""
        return self.ar_weight > 0 or bool(self.ar_weight_end)


class TrainConfig(_Group):
    """Optimisation."""

    steps: int | None = Field(None, ge=1, description="optimizer steps")
    tokens: int | None = Field(None, ge=1, description="or: training tokens (steps follow from the rows)")
    minutes: float | None = Field(None, gt=0, description="or: minutes (steps follow from the measured speed)")
    rows: int = Field(8, ge=1, description="rows in a pass")
    accumulation: int = Field(1, ge=1, description="passes in an optimizer step")
    global_rows: int | None = Field(
        None,
        ge=1,
        description="or: rows in an optimizer step over all passes and processes; rows is then the most in a pass",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: ddp keeps the model on each; fsdp shards it, its gradients and optimizer"
    )
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.99, gt=0, lt=1)
    clip: float = Field(1.0, gt=0, description="gradient norm")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16: compute in bfloat16, weights as they are")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    log_every: int = Field(10, ge=1)
    save_every: int | None = Field(None, ge=1, description="steps between resumable checkpoints; none: only the end")
    keep: int = Field(2, ge=1, description="resumable checkpoints kept")

    @model_validator(mode="after")
    def _one_budget(self) -> TrainConfig:
        if sum(budget is not None for budget in (self.steps, self.tokens, self.minutes)) != 1:
            raise ValueError("give exactly one of steps, tokens, minutes")
        if self.global_rows is not None and self.accumulation != 1:
            raise ValueError("train.accumulation follows from train.global_rows; give one of the two")
        if self.parallel == "fsdp" and self.minutes is not None:
            raise ValueError("train.minutes is measured on the whole model, which fsdp shards; give steps or tokens")
        return self


class EvalConfig(_Group):
    """The bound on the validation set during training and at its end."""

    block_sizes: list[int] = Field([1, 4, 16], description="empty: no validation")
    documents: int = Field(64, ge=1, description="validation documents used during training")
    draws: int = Field(2, ge=1)
    every: int | None = Field(None, ge=1, description="steps between validations; none: only the end")


class RunConfig(_Group):
    """A whole run."""

    output: str = Field(min_length=1, description="run directory")
    preset: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    model: ModelConfig
    data: DataConfig
    layout: Annotated[AnyLayout, Field(discriminator="kind")] = AR()
    noise: Annotated[AnyNoise, Field(discriminator="kind")] = ExactCount()
    objective: ObjectiveConfig = ObjectiveConfig()
    growth: Growth | None = None
    train: TrainConfig
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.layout.largest_named > self.data.length - 1:
            raise ValueError(
                f"layout: block size {self.layout.largest_named} is longer than the data: a row of data.length = "
                f"{self.data.length} tokens scores {self.data.length - 1}; give a smaller block or longer rows"
            )
        if self.data.eos_fill == "block" and not (isinstance(self.layout, Fixed) and self.layout.offset == 0):
            raise ValueError(
                "data.eos_fill block needs layout fixed with offset 0: elsewhere the last block has no fixed end"
            )
        if self.layout.kind == "ar" and self.model.prediction == "same":
            raise ValueError(
                "model.prediction same cannot predict in layout ar: every token would see itself; use shift"
            )
        if self.growth is not None:
            self.growth.layout(self.layout, 0.0, 0.5)
        if self.objective.complementary and (
            not isinstance(self.noise, ExactCount) or self.noise.left_bias or self.objective.draws_per_pass != 1
        ):
            raise ValueError("objective.complementary needs noise exact_count, left_bias 0 and draws_per_pass 1")
        if self.objective.suffix_visible is not None and (
            self.objective.active != "one" or self.model.alignment.seeded
        ):
            raise ValueError("objective.suffix_visible needs objective.active one and another boundary than seed")
        if self.objective.passes == 2 and self.train.gradient_checkpointing:
            raise ValueError("train.gradient_checkpointing drops the cache that objective.passes 2 reads; use 1")
        if self.model.adapter is not None and self.model.adapter.kind == "noisy":
            if self.objective.prefix_noise > 0 or (self.growth is not None and self.growth.shape == "annealed"):
                raise ValueError(
                    "model.adapter noisy leaves the clean stream and the mask rule as they are: no "
                    "objective.prefix_noise and no growth annealed with it"
                )
            if self.model.clean_context == "block_causal":
                raise ValueError("model.adapter noisy needs clean_context context_causal: the clean stream stays AR")
            if self.train.gradient_checkpointing:
                raise ValueError(
                    "train.gradient_checkpointing drops the cache that model.adapter noisy reads; leave it out"
                )
            if self.layout.kind == "ar":
                raise ValueError("model.adapter noisy has nothing to train in layout ar: no block has a noisy token")
        if self.objective.trains_ar and self.model.clean_context == "block_causal":
            raise ValueError(
                "objective.ar_weight needs model.clean_context = context_causal: a block-causal clean stream already "
                "sees the token it would predict"
            )
        if (self.model.init is None) == (self.model.architecture is None):
            raise ValueError("model: give either init (a checkpoint) or architecture (from scratch)")
        return self

    def dump(self) -> str:
        """The resolved configuration as YAML, which `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_TAGGED: dict[str, Any] = {**DISTRIBUTIONS, **NOISES}  # kinds stand in pydantic's places but not in a user's keys


def load_config(path: str | Path, changes: list[str] | None = None, **extra: Any) -> RunConfig:
    """Read a YAML file and apply `--set` changes ("data.length=256", values in YAML). Raises ConfigError."""
    tree = read_tree(path)
    for change in changes or []:
        apply_change(tree, change)
    for dotted, value in extra.items():
        if value is not None:
            put(tree, dotted.replace("__", "."), value)
    return make_config(tree, str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file, not yet validated. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    return tree


def make_config(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a configuration tree, its preset beneath it. Raises ConfigError, naming the key."""
    preset = tree.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(f"{where}: preset {preset!r} is unknown; {nearest(str(preset), PRESETS)}")
        tree = _merge(PRESETS[preset].tree, tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {sentence(error, RunConfig)}") from error


def apply_change(tree: dict[str, Any], change: str) -> None:
    """Apply one `--set` change ("data.length=256", the value in YAML) to a tree. Raises ConfigError."""
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {change}: write it as key.subkey=value")
    try:
        put(tree, key, yaml.safe_load(value))
    except ConfigError as error:
        raise ConfigError(f"--set {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: the value is not YAML ({' '.join(str(error).split())})") from error


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value at a dotted key, making the groups on the way. Raises ConfigError where one of them is a value."""
    *parents, last = dotted.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted}: {key} is a value, not a group of keys")
    tree[last] = value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        same_kind = both and value.get("kind", merged[key].get("kind")) == merged[key].get("kind")
        merged[key] = _merge(merged[key], value) if same_kind else value
    return merged


def sentence(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem with a tree that should have been a `root`, as one line."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    problem = min(error.errors(), key=lambda p: p["type"] not in unknown)
    place = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in place if part not in _TAGGED) or "the configuration"
    if problem["type"] in unknown:
        return f"unknown key {key}; {nearest(place[-1], _keys_beside(place, root))}"
    if problem["type"] == "missing":
        return f"{key} is missing; set it in the file or with --set {key}=..."
    if problem["type"].startswith("union_tag"):
        return f"{key}: {problem['msg']}"
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith((place[0] if place else "", "objective", "layout", "model", "block size", "noise")):
        return message
    return f"{key}: {message}" + (f" (got {problem['input']!r})" if not isinstance(problem["input"], dict) else "")


def _keys_beside(place: list[str], root: type[BaseModel]) -> list[str]:
    """Keys that would have been right where an unknown one stands."""
    group: Any = root
    for part in place[:-1]:
        if isinstance(group, type) and issubclass(group, BaseModel) and part in group.model_fields:
            group = _group_in(group.model_fields[part].annotation)
        else:
            group = _TAGGED.get(part, group)
    if isinstance(group, type) and issubclass(group, BaseModel):
        return list(group.model_fields)
    return list(getattr(group, "__dataclass_fields__", {}))


def _group_in(annotation: Any) -> Any:
    """The group of keys that an annotation holds, in a list, a mapping or beside None."""
    for inside in get_args(annotation):
        found = _group_in(inside)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation


def nearest(word: str, known: Any) -> str:
    """ "did you mean ...?" with the closest of the known names, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
