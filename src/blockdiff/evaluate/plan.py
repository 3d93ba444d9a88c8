"""Evaluation files: which models, decoded how, are measured on what, and what should come out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from blockdiff.config import ConfigError, apply_change, read_tree, sentence
from blockdiff.decode import named

Cache = Literal["full", "window"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Way(_Group):
    """One model, scored and decoded in blocks of one size; full: one block over the whole text."""

    model: str
    block_size: int | Literal["full"] = 1
    policy: str = Field("first_hitting", description="a name of `blockdiff policies`, or parts joined by +")

    @field_validator("block_size")
    @classmethod
    def _possible(cls, size: int | str) -> int | str:
        if isinstance(size, int) and size < 1:
            raise ValueError("block sizes are 1 or more")
        return size

    @field_validator("policy")
    @classmethod
    def _known(cls, text: str) -> str:
        named(text)
        return text

    def size_over(self, tokens: int) -> int:
        """The block size where the whole text has so many tokens."""
        return tokens if self.block_size == "full" else min(self.block_size, tokens)


def _once(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} has one twice")
    return values


class Criterion(_Group):
    """What is declared before the run: in this cache mode the last bin's NLL is at most `below` nats above bin 1's (bin
    0 has less context), and, where texts are written, the entropy of their last chunk at least `entropy` of chunk 1's.
    """

    cache: Cache = "window"
    below: float = Field(0.05, allow_inf_nan=False)
    entropy: float = Field(0.9, gt=0, le=1)


class Texts(_Group):
    """Texts that every way writes, and who judges them."""

    judge: str
    count: int = Field(16, ge=2, description="more than documents: prompts come again, with other seeds")
    prompt_tokens: int = Field(16, ge=1, description="of a document's beginning")
    temperature: float = Field(1.0, ge=0)
    batch: int = Field(16, ge=1)


class LengthPlan(_Group):
    """`eval length`: NLL, texts and caches out to `times` the trained length."""

    data: str | list[str] = Field(description="files of texts of at least times * length + 1 tokens")
    length: int = Field(ge=4, description="tokens that the models were trained on: the width of a bin")
    times: int = Field(8, ge=3)
    ways: dict[str, Way] = Field(min_length=1)
    caches: Annotated[list[Cache], AfterValidator(_once)] = Field(["full", "window"], min_length=1)
    draws: int = Field(4, ge=1)
    documents: int | None = Field(None, ge=2, description="none: all there are")
    texts: Texts | None = None
    criterion: Criterion = Criterion()
    seed: int = 0

    @model_validator(mode="after")
    def _measured(self) -> LengthPlan:
        if self.criterion.cache not in self.caches:
            raise ValueError(
                f"criterion.cache {self.criterion.cache} is not measured; caches: {', '.join(self.caches)}"
            )
        if self.texts is not None and self.texts.prompt_tokens >= self.length:
            raise ValueError(f"texts.prompt_tokens {self.texts.prompt_tokens}: give fewer than length, {self.length}")
        return self


class FrontierPlan(_Group):
    """`eval generation`: texts of one length by every way, at forward budgets and temperatures, under a judge."""

    data: str | list[str] = Field(
        description="texts of at least prompt_tokens + new_tokens; their own point is drawn, too"
    )
    judge: str
    ways: dict[str, Way] = Field(min_length=1)
    budgets: Annotated[list[int], AfterValidator(_once)] = Field(
        [16, 32, 64, 128, 256], min_length=1, description="forwards that denoise a text"
    )
    temperatures: Annotated[list[float], AfterValidator(_once)] = Field([0.7, 0.8, 0.9, 1.0, 1.1], min_length=1)
    new_tokens: int = Field(256, ge=8)
    prompt_tokens: int = Field(16, ge=1)
    groups: int = Field(3, ge=2, description="disjoint groups of texts: their spread is the interval")
    texts: int = Field(16, ge=2, description="of a group")
    batch: int = Field(32, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> FrontierPlan:
        if min(self.budgets) < 1 or min(self.temperatures) < 0:
            raise ValueError("budgets are 1 forward or more, temperatures 0 or more")
        if not any(self.per_step(label, budget) for label in self.ways for budget in self.budgets):
            raise ValueError(f"budgets {self.budgets}: no way's blocks can fill {self.new_tokens} tokens so")
        return self

    def per_step(self, label: str, budget: int) -> int:
        """Positions that a way fills a step for its blocks to take no more forwards than the budget; 0: they cannot."""
        size = self.ways[label].size_over(self.new_tokens)
        steps = budget // -(-self.new_tokens // size)  # of each block
        return -(-size // steps) if 0 < steps <= size else 0


Plan = TypeVar("Plan", LengthPlan, FrontierPlan)


def read_plan(kind: type[Plan], path: Path, changes: list[str] | None = None) -> Plan:
    """Read an evaluation file and apply `--set` changes. Raises ConfigError, naming the file and the key."""
    tree = read_tree(path)
    for change in changes or []:
        apply_change(tree, change)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error, kind)}") from error
