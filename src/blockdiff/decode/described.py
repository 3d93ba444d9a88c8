"""The policies and their parts as tables: for the terminal, and as docs/policies.md."""

from __future__ import annotations

from dataclasses import fields

from blockdiff.decode.expression import PARTS, SLOTS, slot_of
from blockdiff.decode.parts import Part
from blockdiff.decode.registry import TABLE

_SLOT_WORDS = {
    "score": "which position comes first",
    "modifiers": "a change of the score",
    "counts": "how many are filled at a step (of several, the largest)",
    "region": "where",
    "logits": "a change of the logits",
    "soft": "what masked positions are fed",
    "planner": "where a block ends",
    "reviser": "what becomes of filled positions",
    "search": "several copies of a text",
    "refine": "a second stage",
}


def policies_table() -> str:
    """Name, composition and source of every named policy, a line each."""
    wide, long = max(map(len, TABLE)), max(len(e.composition) for e in TABLE.values())
    return "\n".join(f"{name:<{wide}}  {e.composition:<{long}}  {e.source}" for name, e in TABLE.items())


def parts_table() -> str:
    """Every part under its slot, with its settings and what it does."""
    lines = []
    for slot in SLOTS:
        lines.append(f"{slot}: {_SLOT_WORDS[slot]}")
        lines += [f"  {signature(part):<58} {sentence(part)}" for part in _in_slot(slot)]
    return "\n".join(lines)


def page() -> str:
    """docs/policies.md."""
    rows = [
        f"| `{name}` | `{e.composition}` | {e.source}{'. ' + e.note[0].upper() + e.note[1:] if e.note else ''} |"
        for name, e in TABLE.items()
    ]
    parts = [f"| `{signature(part)}` | {slot} | {sentence(part)} |" for slot in SLOTS for part in _in_slot(slot)]
    return "\n".join(
        [
            "# Decoding policies",
            "",
            "Generated from the registry (`decode/registry.py`) by `blockdiff policies --markdown > docs/policies.md`.",
            "",
            "A policy is parts joined by `+`; a name stands for the published composition. Both go to `--policy`, to",
            "`model.generate(policy=...)` and to the `policy:` of an experiment. `max_steps(n)` may be added to any.",
            "",
            "| name | composition | source and notes |",
            "|---|---|---|",
            *rows,
            "",
            "## Parts",
            "",
            "| part and its settings | slot | what it does |",
            "|---|---|---|",
            *parts,
            "",
        ]
    )


def signature(part: type[Part]) -> str:
    """A part as an expression with its default settings."""
    shown = ", ".join(f"{f.name}={f.default!r}" for f in fields(part))  # type: ignore[arg-type]
    return part.name + (f"({shown})" if shown else "")


def sentence(part: type[Part]) -> str:
    """The first paragraph of what a part says of itself."""
    return " ".join((part.__doc__ or "").split("\n\n")[0].split())


def _in_slot(slot: str) -> list[type[Part]]:
    return [part for part in PARTS.values() if slot_of(part) == slot]
