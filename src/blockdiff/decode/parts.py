"""What every part of a policy has in common."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from blockdiff.decode.blocks import OpenBlocks, View


class Part:
    """One replaceable piece of a decoder: a frozen dataclass, pure functions of a `View`.

    name: as a composition calls it; needs: what the engine must supply for it beyond the logits (`attention`,
    `unconditional`, `uniform_state`); everywhere: it reads logits at filled positions, too, or keeps them for later.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    everywhere: ClassVar[bool] = False

    def remember(self, view: View, blocks: OpenBlocks) -> OpenBlocks:
        """The blocks after a step, with what this part will want to know at the next."""
        return blocks

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)]  # type: ignore[arg-type]
        return self.name + (f"({', '.join(shown)})" if shown else "")


def positive(part: Part, **values: Any) -> None:
    """Refuse values that are not above 0, in one line."""
    for key, value in values.items():
        if not value > 0:
            raise ValueError(f"policy: {part.name}: {key} is {value}; give a number above 0")


def fraction(part: Part, **values: float) -> None:
    """Refuse values outside [0, 1], in one line."""
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"policy: {part.name}: {key} {value} is out of range; give a number from 0 to 1")
