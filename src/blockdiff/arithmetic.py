"""A verifiable task of our own: arithmetic word problems, answered step by step.

A problem tells of somebody's things: how many there are at first, then one to four events that add, take away or
multiply, with details that do not matter in between. The completion works it out a line an event and ends with
`#### answer`. Problem number i of a split is a function of (seed, split, i).

Train and validation never share a calculation (start and events, whatever the names): which of the two a calculation
belongs to is decided by a hash of it, the same for every seed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

from blockdiff.files import write_lines

Split = Literal["train", "valid"]
Row = dict[str, str]

_HELD_OUT = 5  # one calculation in so many is the validation's
_LARGEST = 999
# fmt: off
_NAMES = [
    "Ada", "Ben", "Carla", "Dmitri", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mei", "Nils",
    "Olga", "Pablo", "Quinn", "Rosa", "Sven", "Tara", "Uma", "Victor", "Wanda", "Yusuf", "Zoe",
]
_THINGS = [
    "apples", "beads", "books", "buttons", "cards", "coins", "eggs", "flowers", "keys", "lemons", "marbles", "nuts",
    "pencils", "photos", "ribbons", "shells", "stamps", "stickers", "stones", "tickets",
]
_PLACES = ["in a box", "on a shelf", "in a bag", "at home", "in the garden", "under the bed", "in the kitchen"]
# fmt: on
_EVENTS = {
    "+": (
        "{name} finds {n} more {things}.",
        "{friend} gives {name} {n} {things}.",
        "{name} buys another {n} {things}.",
    ),
    "-": (
        "{name} gives {n} {things} to {friend}.",
        "{name} loses {n} of the {things}.",
        "{name} sells {n} {things} to {friend}.",
    ),
    "*": (
        "Then {name} wins a bet, and now there are {n} times as many {things}.",
        "{name} works hard and ends up with {n} times as many {things}.",
    ),
}
_DETAILS = (
    "{friend} has {n} {others}.",
    "{name} is {n} years old.",
    "{friend} lives {n} streets away.",
    "It has rained for {n} days.",
    "{name} also sees {n} {others} that nobody may take.",
)


@dataclass(frozen=True)
class Calculation:
    """start, then events (operation, number) in order."""

    start: int
    events: tuple[tuple[str, int], ...]

    def lines(self) -> list[str]:
        """The events worked out, "5 + 3 = 8"."""
        found, value = [], self.start
        for operation, number in self.events:
            after = _apply(value, operation, number)
            found.append(f"{value} {operation} {number} = {after}")
            value = after
        return found

    @property
    def answer(self) -> int:
        value = self.start
        for operation, number in self.events:
            value = _apply(value, operation, number)
        return value

    @property
    def split(self) -> Split:
        """The split that this calculation belongs to."""
        digest = hashlib.sha256(f"{self.start} {self.events}".encode()).digest()
        return "valid" if int.from_bytes(digest[:8], "big") % _HELD_OUT == 0 else "train"


def problems(split: Split, seed: int = 0) -> Iterator[Row]:
    """Endless rows {"prompt", "completion", "answer"} of a split, no two with the same prompt."""
    generator = random.Random(f"{seed} {split}")
    seen: set[str] = set()
    while True:
        calculation = _calculation(generator)
        if calculation.split != split:
            continue
        prompt = _story(calculation, generator)
        if prompt in seen:
            continue
        seen.add(prompt)
        reasoning = "\n".join([*calculation.lines(), f"#### {calculation.answer}"])
        yield {"prompt": prompt, "completion": reasoning, "answer": str(calculation.answer)}


def write_arithmetic(directory: Path, *, train: int, valid: int, seed: int = 0) -> list[Path]:
    """Write train.jsonl and valid.jsonl (where their count is above 0); fewer rows are the beginning of more."""
    counts: dict[Split, int] = {"train": train, "valid": valid}
    written = []
    for split, count in counts.items():
        if count > 0:
            written.append(directory / f"{split}.jsonl")
            write_lines(written[-1], islice(problems(split, seed), count))
    return written


def final_number(text: str) -> Fraction | None:
    """The number after the last `####` of a text; None where there is none.

    Thousands separators, a currency sign and a closing full stop are no part of it: "#### $1,200." is 1200.
    """
    after = text.rpartition("####")
    found = re.match(r"\s*\$?\s*(-?)\s*\$?((?:\d[\d,]*)?\.?\d+|\d[\d,]*)", after[2]) if after[1] else None
    if found is None:
        return None
    return Fraction(found[1] + found[2].replace(",", ""))


def exact_match(text: str, answer: str | int) -> bool:
    """Whether the last `#### number` of a text is the answer: a number, or a text that itself ends in `#### number`."""
    reference = str(answer)
    wanted = final_number(reference if "####" in reference else f"#### {reference}")
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no number; give one, or a text that ends in #### and a number")
    return final_number(text) == wanted


def _apply(value: int, operation: str, number: int) -> int:
    return {"+": value + number, "-": value - number, "*": value * number}[operation]


def _calculation(generator: random.Random) -> Calculation:
    start = value = generator.randint(2, 30)
    events = []
    for _ in range(generator.randint(1, 4)):
        operation = generator.choice([op for op in "+-*" if _possible(op, value)])
        number = generator.randint(*{"+": (2, 30), "-": (2, min(value, 30)), "*": (2, 5)}[operation])
        value = _apply(value, operation, number)
        events.append((operation, number))
    return Calculation(start, tuple(events))


def _possible(operation: str, value: int) -> bool:
    return {"+": value + 30 <= _LARGEST, "-": value >= 2, "*": 0 < value * 5 <= _LARGEST}[operation]


def _story(calculation: Calculation, generator: random.Random) -> str:
    """The calculation in words: events in order, up to three details anywhere after the first sentence."""
    name, friend = generator.sample(_NAMES, 2)
    things, others = generator.sample(_THINGS, 2)
    words = {"name": name, "friend": friend, "things": things, "others": others}
    sentences = [f"{name} has {calculation.start} {things} {generator.choice(_PLACES)}."]
    for operation, number in calculation.events:
        sentences.append(generator.choice(_EVENTS[operation]).format(n=number, **words))
    for detail in generator.sample(_DETAILS, generator.randint(0, 3)):
        place = generator.randint(1, len(sentences))
        sentences.insert(place, detail.format(n=generator.randint(2, 30), **words))
    return f"{' '.join(sentences)} How many {things} does {name} have now?\n"
