"""mu against pi: what is uncovered and why, and how much more often the rest is asked for than trained.

Shapes: C cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockdiff.coverage.order import log_ways
from blockdiff.coverage.requested import Calls
from blockdiff.coverage.set_ratios import SetsAsked
from blockdiff.coverage.trained import TOLERANCE, Cell, Trained, masks_of

RARE_VISITS = 1.0


@dataclass(frozen=True)
class Violation:
    """Calls that training never made, for one reason. share is of all calls asked for."""

    kind: str
    calls: float
    share: float
    example: Cell
    sentence: str


@dataclass(frozen=True)
class Coverage:
    """What `compare` found.

    uncovered: share of the calls that training never made. Ratios are pi / mu over the other calls (None where there
    are none), percentiles weighted by pi. rare: share of the calls whose configuration training could have met but is
    expected to have met less than RARE_VISITS times (None: how much was trained is unknown). octaves: the same by
    octaves of p and w, JSON-ready.

    Where pi's order is known ratios are those of (p, w, k, M), M the masked tokens. order_ratio: the largest
    pi(M | n, k) / mu(M | n, k) of them; order_exact: whether that is the true maximum or the largest over some sets
    (`set_ratios`). Where sets are drawn the percentiles and `rare` are estimates. For `rare` a set whose ratio is r > 1
    counts as met r times less often than its (p, w, k). order_sentence: what is rare, where order_ratio is large. All
    three are None for an unknown order: then ratios are those of (p, w, k), and the bound is one on losses averaged
    over the sets that training draws.

    order_gain: of traces, where the sets are known, in nats: the mean over the calls with a choice (0 < k < n) of

        log( P_mu(M | n, k) * C(n, k) )  =  how much likelier training makes the set than a uniform order would,

    on average KL(sets asked for || uniform) - KL(sets asked for || training's): 0 for a model trained in uniform order,
    above 0 where training's order suits the decoder better. None where no set is known.

    prompt_sentence: what is asked is not covered for a reason beside the configurations, namely how prompts are read
    (`evaluate.coverage`).
    """

    calls: float
    uncovered: float
    violations: tuple[Violation, ...]
    max_ratio: float | None
    ratio_p95: float | None
    ratio_p99: float | None
    rare: float | None
    octaves: tuple[dict[str, Any], ...]
    order_ratio: float | None = None
    order_exact: bool | None = None
    order_sentence: str | None = None
    order_gain: float | None = None
    prompt_sentence: str | None = None

    @property
    def covered(self) -> bool:
        return not self.violations and self.prompt_sentence is None

    @property
    def worst(self) -> Violation:
        """The kind of violation with the most calls; only where something is uncovered."""
        return max(self.violations, key=lambda violation: violation.calls)

    @property
    def problem(self) -> str | None:
        """What is not covered, in a sentence; None where all is."""
        return problem_of(self.violations) or not_covered(self.prompt_sentence)

    def excess_risk_bound(self, excess_under_mu: float) -> float:
        """Largest excess risk under pi of a model with this one under mu; infinite where something is uncovered.

        Proven unless order_exact is False; where the order is unknown, of risks averaged over training's sets.
        """
        if self.max_ratio is None or not self.covered:
            return math.inf
        return self.max_ratio * excess_under_mu

    def to_json(self) -> dict[str, Any]:
        violations = [{**vars(v), "example": v.example._asdict()} for v in self.violations]
        rest = {name: value for name, value in vars(self).items() if name not in ("violations", "octaves")}
        return {"covered": self.covered, **rest, "violations": violations, "rows": list(self.octaves)}


def compare(mu: Trained, pi: Calls) -> Coverage:
    """Does training cover these calls?"""
    asked = pi.times / pi.total
    visits = mu.visits(pi.cells)
    share = visits / mu.calls
    known = share > TOLERANCE
    ratio = asked[known] / share[known]
    sizes, masks = pi.cells[known][:, 1:].T
    order = SetsAsked.of(pi.order, mu.order, torch.tensor([masks_of(mu.alignment, w) for w in sizes.tolist()]), masks)
    max_ratio = order.exp(float((ratio.log() + order.largest).max())) if len(ratio) else None
    rare = None
    if mu.tokens:
        met = visits[known] * mu.spans_trained / RARE_VISITS
        rare = float(asked[known] @ torch.where(met < 1, 1.0, order.share_above(met.log())))

    def percentile(level: float) -> float | None:
        return None if max_ratio is None else order.quantile(ratio.log(), asked[known], level)

    return Coverage(
        calls=pi.total,
        uncovered=float(asked[~known].sum()),
        violations=_violations(mu, pi, ~known),
        max_ratio=max_ratio,
        ratio_p95=percentile(0.95),
        ratio_p99=percentile(0.99),
        rare=rare,
        octaves=_octaves(mu, pi.cells, asked, known),
        order_ratio=order.ratio,
        order_exact=order.exact,
        order_sentence=order.sentence,
        order_gain=_order_gain(mu, pi),
    )


def violations_of(mu: Trained, pi: Calls) -> tuple[Violation, ...]:
    """What training does not cover of these calls, the most frequent first: that of `compare` without its ratios."""
    return _violations(mu, pi, mu.visits(pi.cells) / mu.calls <= TOLERANCE)


def problem_of(violations: Sequence[Violation]) -> str | None:
    """The most frequent violation in a sentence; None where there is none."""
    if not violations:
        return None
    worst = max(violations, key=lambda violation: violation.calls)
    return f"not covered by training ({worst.kind}, {worst.share:.0%} of the calls): {worst.sentence}"


def not_covered(prompt_sentence: str | None) -> str | None:
    """The problem of a prompt that is read otherwise than in training."""
    return None if prompt_sentence is None else f"not covered by training (prompt): {prompt_sentence}"


def _order_gain(mu: Trained, pi: Calls) -> float | None:
    gains = []
    for n, sets in pi.sets.items():
        chosen = sets[~sets.all(1)]
        gains.append(mu.order.log_probability(chosen) + log_ways(n, chosen.sum(1)))
    every = torch.cat(gains) if gains else torch.zeros(0)
    return float(every.mean()) if len(every) else None


def _violations(mu: Trained, pi: Calls, unknown: Tensor) -> tuple[Violation, ...]:
    """Each uncovered cell under the first reason that holds for it, the most frequent reason first."""
    before, size, masks = pi.cells.T
    places = {w: mu.places(w) for w in size[unknown].unique().tolist()}
    never = torch.tensor([w for w, found in places.items() if not len(found)], dtype=torch.int64)
    placed = torch.zeros_like(unknown)
    for w, found in places.items():
        placed |= (size == w) & torch.isin(before, found)
    block = masks > 0
    reasons: list[tuple[str, Tensor, Callable[[Cell], str]]] = [
        ("size", block & torch.isin(size, never), lambda cell: _no_size(mu, cell)),
        ("length", before + size > mu.longest, lambda cell: _too_long(mu, cell)),
        ("next token", ~block, _no_read),
        ("offset", ~placed, lambda cell: _no_place(places[cell.size], cell)),
        ("mask count", placed, lambda cell: _no_count(mu, cell)),
    ]
    out, left = [], unknown
    for kind, holds, sentence in reasons:
        mine = left & holds
        left = left & ~holds
        if bool(mine.any()):
            example = Cell(*pi.cells[mine][0].tolist())
            calls = float(pi.times[mine].sum())
            out.append(Violation(kind, calls, calls / pi.total, example, sentence(example)))
    return tuple(sorted(out, key=lambda violation: -violation.calls))


def _no_size(mu: Trained, cell: Cell) -> str:
    sizes = mu.sizes
    if not len(sizes):
        return f"no block of {cell.size} tokens was trained: this model was trained at block size 1 only"
    return f"no block of {cell.size} tokens was trained; the nearest trained size is {_nearest(sizes, cell.size)}"


def _too_long(mu: Trained, cell: Cell) -> str:
    return f"{_block(cell)} ends at token {cell.before + cell.size}; training went no further than {mu.longest} tokens"


def _no_read(cell: Cell) -> str:
    return (
        f"the token after {cell.before} others is read from the clean stream, which was never trained to predict it "
        "(objective.ar_weight trains it everywhere)"
    )


def _no_place(places: Tensor, cell: Cell) -> str:
    nearest = _nearest(places, cell.before)
    return f"{_block(cell)}: this size was trained, but not at this place; the nearest is after {nearest}"


def _no_count(mu: Trained, cell: Cell) -> str:
    n = masks_of(mu.alignment, cell.size)
    return f"{_block(cell)} with {cell.masks} of {n} masked: this block was trained, but never with that many masks"


def _block(cell: Cell) -> str:
    tokens = "1 token" if cell.size == 1 else f"{cell.size} tokens"
    return f"a block of {tokens} after {cell.before}"


def _nearest(values: Tensor, value: int) -> int:
    return int(values[(values - value).abs().argmin()])


def _octaves(mu: Trained, cells: Tensor, asked: Tensor, known: Tensor) -> tuple[dict[str, Any], ...]:
    """Shares of pi and mu by octaves of p and w, where something is asked."""
    distinct, which = torch.stack([_octave(cells[:, 0]), _octave(cells[:, 1])], 1).unique(dim=0, return_inverse=True)
    sums = torch.zeros(len(distinct), 2, dtype=torch.float64)
    sums.index_add_(0, which, torch.stack([asked, asked * ~known], 1))
    rows = []
    for (p, w), (share, uncovered) in zip(distinct.tolist(), sums.tolist(), strict=True):
        before, size = _range(p), _range(w)
        rows.append(
            {
                "before": [before[0], before[-1]],
                "size": [size[0], size[-1]],
                "asked": share,
                "trained": mu.share(before, size),
                "uncovered": uncovered,
            }
        )
    return tuple(rows)


def _octave(values: Tensor) -> Tensor:
    """Whole part of log2; -1 for 0."""
    return torch.frexp(values.double()).exponent.long() - 1


def _range(octave: int) -> range:
    return range(1) if octave < 0 else range(2**octave, 2 ** (octave + 1))
