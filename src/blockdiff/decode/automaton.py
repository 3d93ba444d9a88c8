"""Regular expressions over tokens, and the dynamic programme that fills a block in agreement with one.

A pattern becomes a deterministic automaton over characters (`interegular`), and that one over tokens: tokens that take
every state to the same state share a class. Filling n masked slots from their independent distributions so that the
whole text can still match is then a best-path, or a backward-filtering and forward-sampling, problem over positions
and states, exact for the factorised distribution of the block (DINGO, arXiv 2505.23061).

Shapes: R rows, n slots, V vocabulary, S states, C classes of tokens, E edges of the automaton.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEVER = 1 << 40
"""The distance of a state from which nothing can be accepted."""

_OPAQUE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # escapes and character classes
_LOOKS = re.compile(r"\(\?<?[=!]")

_UNSAID = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("uniqueItems", "contains", "not", "if", "dependentRequired"),
)

States = NDArray[np.int32]
"""The next state [S] of every state."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """A pattern over tokens.

    token_class int64 [V]; step int64 [S, C]: the next state; the last state but one is dead, the last has ended.
    accepting bool [S]; distance int64 [S]: the least number of further tokens to acceptance, `NEVER` where there is
    none; start: the first state.
    """

    pattern: str
    token_class: Tensor
    step: Tensor
    accepting: Tensor
    distance: Tensor
    start: int = 0

    @cached_property
    def edges(self) -> Tensor:
        """State, class and next state of every step that leads to acceptance, int64 [3, E]: few of all S x C."""
        source, of_class = (self.distance[self.step] < NEVER).nonzero(as_tuple=True)
        return torch.stack([source, of_class, self.step[source, of_class]])

    def to(self, device: torch.device) -> Automaton:
        """The same on another device, moved there once; itself where it is there already."""
        if self.step.device == device:
            return self
        if device not in self._elsewhere:
            moved = {name: getattr(self, name).to(device) for name in ("token_class", "step", "accepting", "distance")}
            self._elsewhere[device] = replace(self, **moved)
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Automaton]:
        return {}


def schema_pattern(schema: str | dict[str, Any]) -> str:
    """The regular expression of a JSON schema's texts, through `outlines_core`.

    Properties come in the order of the schema, and no others. A "pattern" is taken over as it is: one that can write
    a quotation mark (".") breaks the JSON. Raises ValueError for a schema that is not understood, or not kept to.
    """
    try:
        from outlines_core import json_schema  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError("a JSON schema needs the package outlines_core; pip install 'blockdiff[constrain]'") from None
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        _refuse_unsaid(json.loads(text))
        return str(json_schema.build_regex_from_schema(text))
    except Exception as error:
        raise ValueError(f"JSON schema: {_first_line(error)}") from None


def compile_pattern(pattern: str, pieces: Sequence[str | None], end_ids: Sequence[int]) -> Automaton:
    """The automaton of a pattern for tokens that add these pieces (None or empty: the token never matches).

    The whole text must match, as with `re.fullmatch` and `re.ASCII`. An end token may follow a match only, and after
    it nothing but end tokens. Equal arguments give the same object. Raises ValueError for a pattern that is not
    understood, or that no text of these tokens matches.
    """
    return _compiled(pattern, tuple(pieces), tuple(end_ids))


@lru_cache(maxsize=16)
def _compiled(pattern: str, pieces: tuple[str | None, ...], end_ids: tuple[int, ...]) -> Automaton:
    letters, finals = _characters(pattern)
    states = len(finals)
    dead, ended = states, states + 1
    closing = np.full(states + 2, dead, dtype=np.int32)
    closing[:states][finals] = ended
    closing[ended] = ended
    columns: dict[bytes, int] = {np.full_like(closing, dead).tobytes(): 0}
    token_class = torch.zeros(len(pieces), dtype=torch.int64)
    for token, column in _walks(pieces, letters, states):
        if token not in end_ids:
            token_class[token] = columns.setdefault(column, len(columns))
    for token in end_ids:
        token_class[token] = columns.setdefault(closing.tobytes(), len(columns))
    step = torch.from_numpy(np.stack([np.frombuffer(column, np.int32) for column in columns], 1)).long()
    accepting = torch.from_numpy(np.concatenate([finals, [False, True]]))
    automaton = Automaton(pattern, token_class, step, accepting, _distance(step, accepting))
    if int(automaton.distance[automaton.start]) >= NEVER:
        raise ValueError(f"pattern {_short(pattern)}: no text that this tokenizer can write matches it")
    return automaton


def best_fill(
    log_probability: Tensor, given: Tensor, used: Tensor, state: Tensor, room: Tensor, automaton: Automaton
) -> Tensor:
    """The likeliest tokens int64 [R, n] of the used slots that agree with the given ones and can still be finished.

    log_probability [R, n, V]; given int64 [R, n], -1 where free; used bool [R, n], elsewhere the answer is 0; state
    int64 [R] before the block; room int64 [R]: how many more tokens may follow the block. Raises ValueError where
    nothing of positive probability fits.
    """
    return _fill(log_probability, given, used, state, room, automaton, None)


def sampled_fill(
    log_probability: Tensor, given: Tensor, used: Tensor, state: Tensor, room: Tensor, automaton: Automaton, u: Tensor
) -> Tensor:
    """A draw of the same tokens from the factorised distribution, given that they fit; u float64 [R, n] in (0, 1)."""
    return _fill(log_probability, given, used, state, room, automaton, u)


def advance(automaton: Automaton, state: Tensor, tokens: Tensor, used: Tensor) -> Tensor:
    """The states int64 [R] after the used ones of tokens [R, n]."""
    automaton = automaton.to(state.device)
    classes = automaton.token_class[tokens]
    for at in range(tokens.shape[1]):
        state = torch.where(used[:, at], automaton.step[state, classes[:, at]], state)
    return state


def _fill(
    log_p: Tensor, given: Tensor, used: Tensor, state: Tensor, room: Tensor, automaton: Automaton, u: Tensor | None
) -> Tensor:
    automaton = automaton.to(log_p.device)
    log_p = _only_given(log_p.double(), given, used)
    to_go = _to_go(log_p, used, room, automaton, summed=u is not None)
    rows = torch.arange(len(log_p), device=log_p.device)
    stuck = ~torch.isfinite(to_go[0][rows, state])
    if bool(stuck.any()):
        row = int(stuck.nonzero()[0])
        raise ValueError(
            f"constraint {_short(automaton.pattern)} cannot be met in the {int(used[row].sum() + room[row])} tokens "
            "that are left; allow more new tokens"
        )
    filled = []
    for at in range(log_p.shape[1]):
        following = automaton.step[state][:, automaton.token_class]
        worth = log_p[:, at] + to_go[at + 1].gather(1, following)
        token = worth.argmax(-1) if u is None else _drawn(worth, u[:, at])
        filled.append(torch.where(used[:, at], token, 0))
        state = torch.where(used[:, at], following[rows, token], state)
    return torch.stack(filled, 1) if filled else given.clone()


def _to_go(log_p: Tensor, used: Tensor, room: Tensor, automaton: Automaton, *, summed: bool) -> list[Tensor]:
    """Before each slot and after the last: what the rest of the block is worth from every state, n + 1 times [R, S].

    The log-probability of its best continuation that can be finished, or of all of them together.
    """
    source, of_class, target = automaton.edges
    states, classes = automaton.step.shape
    worth = torch.where(automaton.distance <= room[:, None], 0.0, -torch.inf).double()
    found = [worth]
    for at in range(log_p.shape[1] - 1, -1, -1):
        slot = _pooled(log_p[:, at], automaton.token_class, classes, summed=summed)
        before = _pooled(slot[:, of_class] + worth[:, target], source, states, summed=summed)
        worth = torch.where(used[:, at, None], before, worth)
        found.append(worth)
    return found[::-1]


def _pooled(values: Tensor, index: Tensor, size: int, *, summed: bool) -> Tensor:
    """Log-weights [R, K] put together by index [K], to [R, size]: the largest of each, or the log of their sum."""
    index = index.expand_as(values)
    empty = values.new_full((len(values), size), -torch.inf)
    largest = empty.scatter_reduce(-1, index, values, "amax")
    if not summed:
        return largest
    floor = torch.where(torch.isfinite(largest), largest, 0.0)  # -inf less -inf would be nan
    share = (values - floor.gather(-1, index)).exp()
    return torch.zeros_like(empty).scatter_add(-1, index, share).log() + floor


def _only_given(log_p: Tensor, given: Tensor, used: Tensor) -> Tensor:
    """Log-probabilities [R, n, V] in which a given token is certain, and 0 at slots that are not used."""
    known = torch.full_like(log_p, -torch.inf).scatter(-1, given.clamp(min=0)[..., None], 0.0)
    return torch.where((given >= 0)[..., None], known, log_p).masked_fill(~used[..., None], 0.0)


def _drawn(worth: Tensor, u: Tensor) -> Tensor:
    """A token [R] from unnormalised log-weights [R, V], by the inverse of their distribution function at u [R]."""
    mass = worth.softmax(-1).cumsum(-1)
    # `right`: the first token beyond u, so one whose own mass is positive; scaled, as the last sum may miss 1
    token = torch.searchsorted(mass, (u.double() * mass[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=worth.shape[-1] - 1)


@lru_cache(maxsize=32)
def _characters(pattern: str) -> tuple[dict[str | None, States], NDArray[np.bool_]]:
    """A pattern's automaton over characters: the step of every letter (None: of any other), and the final states.

    Each step is [S + 2]: behind the pattern's own states, of which 0 is the first, a dead one and one that has ended.
    """
    try:
        import interegular
    except ImportError:
        raise ValueError("a pattern needs the package interegular; pip install 'blockdiff[constrain]'") from None
    if _LOOKS.search(_OPAQUE.sub("", pattern)):
        # interegular accepts them, but its automaton is then another pattern's: (ab|a)(?!b) takes aa and not a
        raise ValueError(f"pattern {_short(pattern)}: lookahead and lookbehind are not supported; write it without")
    try:
        fsm: Any = interegular.parse_pattern(_bare(pattern)).to_fsm()
        fsm = fsm.reduce()
    except Exception as error:
        raise ValueError(f"pattern {_short(pattern)} is not understood: {_first_line(error)}") from None
    number = {state: at for at, state in enumerate(sorted(fsm.states, key=lambda state: state != fsm.initial))}
    dead = len(number)
    steps = {symbol: np.full(dead + 2, dead, dtype=np.int32) for symbol in fsm.alphabet.values()}
    for state, moves in fsm.map.items():
        for symbol, target in moves.items():
            steps[symbol][number[state]] = number[target]
    letters: dict[str | None, States] = {
        letter if isinstance(letter, str) else None: steps[symbol] for letter, symbol in fsm.alphabet.items()
    }
    finals = np.zeros(dead, dtype=np.bool_)
    finals[[number[state] for state in fsm.finals]] = True
    return letters, finals


def _walks(pieces: Sequence[str | None], letters: dict[str | None, States], states: int) -> list[tuple[int, bytes]]:
    """Of every token with a piece: the state to which it takes each state.

    In order of the alphabet, so that what a token shares with the one before it is walked once.
    """
    ordered = sorted((piece, token) for token, piece in enumerate(pieces) if piece)
    path: list[States] = [np.append(np.arange(states + 1, dtype=np.int32), np.int32(states))]
    before, found = "", []
    for piece, token in ordered:
        shared = next((at for at, (a, b) in enumerate(zip(before, piece)) if a != b), min(len(before), len(piece)))
        del path[shared + 1 :]
        for letter in piece[shared:]:
            path.append(letters.get(letter, letters[None])[path[-1]])
        before = piece
        found.append((token, path[-1].tobytes()))
    return found


def _distance(step: Tensor, accepting: Tensor) -> Tensor:
    """Least number of tokens from every state to an accepting one, int64 [S]."""
    dead = len(step) - 2
    source, of_class = (step != dead).nonzero(as_tuple=True)
    pairs = torch.unique(torch.stack([source, step[source, of_class]]), dim=1)
    distance = torch.where(accepting, 0, NEVER)
    while True:
        shorter = distance.scatter_reduce(0, pairs[0], distance[pairs[1]] + 1, "amin").clamp(max=NEVER)
        if torch.equal(shorter, distance):
            return distance
        distance = shorter


def _bare(pattern: str) -> str:
    """The pattern less the anchors around it, which say nothing where the whole text must match.

    A bracket that opens a class ([]a], [^]a]) is escaped: interegular would read it as the end of an empty class.
    """
    pattern = _OPAQUE.sub(lambda part: re.sub(r"^(\[\^?)\]", r"\1\\]", part[0]), pattern)
    body = pattern[1:] if pattern.startswith("^") else pattern
    if body.endswith("$") and (len(body) - 1 - len(body[:-1].rstrip("\\"))) % 2 == 0:
        return body[:-1]
    return body


def _refuse_unsaid(schema: Any) -> None:
    """Raises ValueError for keywords that outlines_core passes over in silence, so that texts would break them."""
    if not isinstance(schema, dict):
        return
    found = [key for key in _UNSAID if key in schema]
    if len(schema.get("allOf", ())) > 1:
        found.append("allOf of several")
    if "properties" in schema:
        found += [key for key in ("minProperties", "maxProperties") if key in schema]
    if found:
        raise ValueError(f"{found[0]} cannot be asked for; leave it out and check it in the text")
    inside = [schema.get("items"), schema.get("additionalProperties")]
    inside += [one for key in ("anyOf", "oneOf", "allOf", "prefixItems") for one in schema.get(key, ())]
    inside += [one for key in ("properties", "$defs", "definitions") for one in schema.get(key, {}).values()]
    for one in inside:
        _refuse_unsaid(one)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").strip() or "it is not well formed"


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
