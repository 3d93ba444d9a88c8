"""Work that processes share: whose share is which, and how what they found comes together again."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed

T = TypeVar("T")
WAIT = timedelta(days=7)  # for the slowest; where one fails, torchrun ends the others


@dataclass(frozen=True)
class Shard:
    """Share number `number` of `count`, from 0."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"shard {self}: shards are numbered from 0, e.g. 0/4 to 3/4")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """'0/4': the first of four. Raises ValueError."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise ValueError(f"--shard {text}: give a number and a count, e.g. 0/4 to 3/4")
        return cls(int(number), int(count))

    @classmethod
    def of_process(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """What torchrun gave this process, RANK of WORLD_SIZE; without it, the whole."""
        return cls(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))


WHOLE = Shard()


@dataclass(frozen=True)
class Split:
    """Who does a list of work: alone, or (`together`) every process its shard, and all get all of it."""

    shard: Shard = WHOLE

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks for all."""
        return self.shard.number == 0

    def map(self, do: Callable[[int], T], count: int) -> list[T]:
        """What `do` gives for 0 to count - 1, in order, the same in every process."""
        own = [do(number) for number in range(self.shard.number, count, self.shard.count)]
        if self.shard.count == 1:
            return own
        shares: list[list[T]] = [[] for _ in range(self.shard.count)]
        distributed.all_gather_object(shares, own)
        return [shares[number % self.shard.count][number // self.shard.count] for number in range(count)]


ALONE = Split()


def together(shard: Shard) -> Split:
    """The processes that torchrun started, connected from now to their end."""
    if shard.count > 1 and not distributed.is_initialized():  # a second group would find the first one's addresses
        distributed.init_process_group("gloo", timeout=WAIT)
        atexit.register(distributed.destroy_process_group)
    return Split(shard)
