"""Policies as text: a name of the table, or parts joined by `+`, each with its settings in brackets.

    threshold                                  a named policy
    threshold(level=0.8)                       ... a single part does the rest by default (score: confidence)
    entropy + entropy_budget(0.05)             score and count
    margin + even(steps=4) + subblocks(8) + edit(0.95) + max_steps(16)

Every part knows its own slot, so their order does not matter, but for modifiers and changes of the logits, which are
applied from left to right. Only names, numbers, strings and lists are read; nothing is executed.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import fields, replace
from typing import Any

from blockdiff.decode import counts, inputs, regions, remasking, scores
from blockdiff.decode.counts import Count, Fixed, Threshold
from blockdiff.decode.inputs import LogitChange, Soft
from blockdiff.decode.parts import Part
from blockdiff.decode.policy import Particles, Policy, Refine
from blockdiff.decode.regions import Planner, Region
from blockdiff.decode.remasking import Reviser
from blockdiff.decode.scores import Modifier, Random, Score

SLOTS: dict[str, type[Part]] = {
    "score": Score,
    "modifiers": Modifier,
    "counts": Count,
    "region": Region,
    "logits": LogitChange,
    "soft": Soft,
    "planner": Planner,
    "reviser": Reviser,
    "search": Particles,
    "refine": Refine,
}
_LARGEST = 1e6  # of a setting: far beyond what makes sense, and logits stay finite
_SEVERAL = ("modifiers", "counts", "logits")


def _concrete() -> dict[str, type[Part]]:
    found: list[Any] = [Particles, Refine]
    for module in (scores, counts, regions, inputs, remasking):
        found += [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return {cls.name: cls for cls in found if issubclass(cls, Part) and hasattr(cls, "name")}


PARTS: dict[str, type[Part]] = _concrete()


def slot_of(part: type[Part]) -> str:
    """Which slot of a policy a part fills."""
    return next(slot for slot, base in SLOTS.items() if issubclass(part, base))


def compose(*parts: Part, max_steps: int | None = None) -> Policy:
    """A policy of these parts; raises ValueError where two want the same place."""
    chosen: dict[str, Any] = {}
    for part in parts:
        slot = slot_of(type(part))
        if slot in _SEVERAL:
            chosen[slot] = (*chosen.get(slot, ()), part)
        elif slot in chosen:
            raise ValueError(f"policy: {chosen[slot].name} and {part.name} are both its {slot}; keep one")
        else:
            chosen[slot] = part
    if "counts" not in chosen:
        names = ", ".join(name for name, cls in PARTS.items() if issubclass(cls, Count))
        raise ValueError(f"policy: nothing says how many positions a step fills; add one of {names}")
    return Policy(**chosen, max_steps=max_steps)


def parse(text: str) -> Policy:
    """The policy that an expression describes; raises ValueError with what is wrong and what is known."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise ValueError(f"policy {text!r}: write parts joined by +, e.g. entropy + entropy_budget(0.1)") from None
    parts, steps = [], None
    for node in _terms(tree):
        name, args, named = _call(node, text)
        if name == "max_steps":
            if len(args) != 1 or named or type(args[0]) is not int or args[0] >= 2**31:
                raise ValueError(f"policy {text!r}: max_steps takes one whole number")
            steps = args[0]
        else:
            parts.append(_part(name, args, named))
    return compose(*parts, max_steps=steps)


def changed(
    policy: Policy, threshold: float | None = None, per_step: int | None = None, left_bias: float | None = None
) -> Policy:
    """The policy with another threshold level, at least `per_step` positions a step, or another left bias.

    Raises ValueError where it has no such part."""
    if threshold is not None:
        if not any(isinstance(c, Threshold) for c in policy.counts):
            raise ValueError(f"policy {policy}: has no threshold to change; give its parts instead (--policy)")
        own = tuple(Threshold(threshold) if isinstance(c, Threshold) else c for c in policy.counts)
        policy = replace(policy, counts=own)
    if per_step is not None:
        others = tuple(c for c in policy.counts if not isinstance(c, Fixed | counts.Even))
        policy = replace(policy, counts=(*others, Fixed(per_step)))
    if left_bias is not None:
        if not isinstance(policy.score, Random):
            raise ValueError(f"policy {policy}: its order is not random, so it has no left bias")
        policy = replace(policy, score=Random(left_bias))
    return policy


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _call(node: ast.expr, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        try:
            args = [ast.literal_eval(value) for value in node.args]
            named = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            return node.func.id, args, named
        except (ValueError, TypeError, SyntaxError):
            pass
    raise ValueError(f"policy {text!r}: write parts joined by +, e.g. entropy + entropy_budget(0.1)")


def _part(name: str, args: list[Any], named: dict[str, Any]) -> Part:
    if name not in PARTS:
        near = difflib.get_close_matches(name, PARTS, 1)
        hint = f"did you mean {near[0]}?" if near else "`blockdiff policies` lists what there is"
        raise ValueError(f"policy: no part is called {name!r}; {hint}")
    known = {f.name: f for f in fields(PARTS[name])}  # type: ignore[arg-type]
    given = {**dict(zip(known, args, strict=False)), **named}
    if len(args) > len(known) or set(named) - set(known):
        raise ValueError(f"policy: {name} takes {', '.join(known) or 'nothing'}")
    for key, value in given.items():
        given[key] = _checked(name, key, value, known[key].default)
    return PARTS[name](**given)


def _checked(name: str, key: str, value: Any, default: Any) -> Any:
    """The value in the type of the part's default."""
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and abs(value) <= _LARGEST
        value = float(value) if fits else value
    elif isinstance(default, tuple):
        value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else value
        fits = isinstance(value, tuple) and all(isinstance(one, str) and one for one in value)
    else:
        fits = isinstance(value, type(default)) and not (isinstance(value, int) and abs(value) >= 2**31)
    if not fits:
        raise ValueError(f"policy: {name}: {key} is {value!r}; give something like {default!r}")
    return value
