"""Claims of papers, and of ours, as data: what should hold between settings, and whether the runs say so.

A claim is about a number of a setting, or its difference to a baseline, and a limit. With the seeds' 95 % interval
(Student's, paired by seed for a difference) it *holds* where the interval lies on the claimed side of the limit, *does
not hold* where it lies on the other, and is *not decided* where the limit is inside, or there is one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from blockdiff.statistics import paired

Place = dict[str, Any]
Find = Callable[[str, str, Place], Mapping[int, float]]
Outcome = Literal["holds", "does not hold", "not decided", "not measured"]
_WORST: tuple[Outcome, ...] = ("not measured", "does not hold", "not decided", "holds")


class Claim(BaseModel):
    """What somebody says, and how the experiment can tell."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    says: str = Field(min_length=1, description="the claim in a sentence")
    source: str = Field(min_length=1, description="the paper, or ours")
    setting: str
    baseline: str | None = Field(None, description="the claim is about setting minus baseline")
    measure: str = "bound"
    at: list[dict[str, Any]] = Field(
        [{}], min_length=1, description="places of the measure, e.g. {block_size: 4}; it must hold at all"
    )
    below: float | None = None
    above: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Claim:
        if (self.below is None) == (self.above is None):
            raise ValueError(f"claims: {self.says!r} needs one of below and above")
        return self

    @property
    def settings(self) -> list[str]:
        return [self.setting, *([] if self.baseline is None else [self.baseline])]

    @property
    def limit(self) -> float:
        limit = self.below if self.below is not None else self.above
        assert limit is not None
        return limit


@dataclass(frozen=True)
class Verdict:
    """Where one claim stands at one place: mean of the number or difference, its 95 % interval, seeds."""

    at: Place
    outcome: Outcome
    mean: float
    ci: tuple[float, float] | None
    n: int


def judge(claim: Claim, find: Find) -> dict[str, Any]:
    """The claim with its verdicts, JSON-ready.

    find(setting, measure, at) returns {seed: value}. The whole claim's outcome is the worst of its places; one place
    without a number of both settings makes it "not measured".
    """
    verdicts = []
    for at in claim.at:
        values = find(claim.setting, claim.measure, at)
        base = dict.fromkeys(values, 0.0) if claim.baseline is None else find(claim.baseline, claim.measure, at)
        both = [seed for seed in values if seed in base]
        if not both:
            return {**claim.model_dump(mode="json"), "outcome": "not measured", "verdicts": []}
        test = paired([values[seed] - base[seed] for seed in both])
        verdicts.append(Verdict(at, _outcome(claim, test.ci), test.mean, test.ci, test.n))
    outcome = min((verdict.outcome for verdict in verdicts), key=_WORST.index)
    return {**claim.model_dump(mode="json"), "outcome": outcome, "verdicts": [asdict(verdict) for verdict in verdicts]}


def _outcome(claim: Claim, ci: tuple[float, float] | None) -> Outcome:
    if ci is None or ci[0] < claim.limit < ci[1] or claim.limit in ci:
        return "not decided"
    below = ci[1] < claim.limit
    return "holds" if below == (claim.below is not None) else "does not hold"
