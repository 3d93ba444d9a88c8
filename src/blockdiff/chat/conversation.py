"""What was said, and how answers are decoded."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """turns: user and assistant by turns, the user first. plain: no chat, but one text that both write."""

    system: str = ""
    turns: tuple[str, ...] = ()
    plain: bool = False

    def __post_init__(self) -> None:
        if self.plain and self.system:
            raise ValueError("a system text belongs to a chat; leave it out, or leave --plain out")

    def with_turn(self, text: str) -> Conversation:
        return replace(self, turns=(*self.turns, text))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as OpenAI's messages, the system's first."""
        roles = ("user", "assistant")
        said = [{"role": roles[number % 2], "content": text} for number, text in enumerate(self.turns)]
        return [{"role": "system", "content": self.system}, *said] if self.system else said

    @property
    def text(self) -> str:
        """The turns as one text: what the user adds to an answer is a new line, nothing goes on where it stands."""
        text = ""
        for number, turn in enumerate(self.turns):
            text += "\n" * (number > 0 and number % 2 == 0 and bool(turn)) + turn
        return text


@dataclass(frozen=True)
class Settings:
    """How answers are decoded; None leaves it to the model (or its server)."""

    policy: str | None = None
    block_size: int | None = None
    threshold: float | None = None
    temperature: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0
    lossless: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} is not possible; give 0 (greedy) or more")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold {self.threshold} is not possible; give a number")
        for name in ("block_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not possible; give 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is not possible; give 0 to {2**32 - 1}")

    def changed(self, change: str) -> Settings:
        """These settings after a change, key=value; `none` leaves a choice to the model. Raises ValueError."""
        key, equals, text = (part.strip() for part in change.partition("="))
        if not equals or not text:
            raise ValueError(f"/set {change}: give key=value, e.g. /set temperature=0.7")
        if key not in _READERS:
            near = difflib.get_close_matches(key, _READERS, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_READERS)}"
            raise ValueError(f"/set {change}: no setting is called {key}{meant}")
        optional = getattr(Settings, key) is None
        try:
            value: Any = None if optional and text.lower() == "none" else _READERS[key](text)
        except ValueError:
            wanted = _WANTED[_READERS[key]] + (", or none" if optional else "")
            raise ValueError(f"/set {change}: {key} takes {wanted}") from None
        return replace(self, **{key: value})

    @property
    def described(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {True: "true", False: "false", None: "none"}
        return "  ".join(
            f"{name}={shown[value] if value is None or isinstance(value, bool) else value}"
            for name, value in values.items()
        )


def _yes_or_no(text: str) -> bool:
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


_READERS: dict[str, Callable[[str], Any]] = {
    "policy": str,
    "block_size": int,
    "threshold": float,
    "temperature": float,
    "max_new_tokens": int,
    "seed": int,
    "lossless": _yes_or_no,
}
_WANTED = {str: "a name of `blockdiff policies`", int: "a whole number", float: "a number", _yes_or_no: "true or false"}
