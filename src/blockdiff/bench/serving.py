"""Continuous batching against one request at a time: requests of many kinds, the same ones in every way.

    one at a time   the engine, each request alone
    together        all of them handed in at once
    arriving        handed in at random moments (a Poisson process that keeps the engine about busy)

Every way's texts are compared with those of the first. The ways take turns; ratios are taken within a round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

from blockdiff.api import Model
from blockdiff.decode import Sampling, parse
from blockdiff.engine import Engine, Job, Limits, Request
from blockdiff.engine.limits import limits_for
from blockdiff.engine.network import prepared

ALONE, TOGETHER, ARRIVING = "one at a time", "together", "arriving"
_POLICIES = ("fixed(4)", "fixed(2)", "threshold(0.9)", "entropy + fixed(4)")
Progress = Callable[[float], None]


def ragged_requests(
    count: int, vocabulary: int, block_sizes: Sequence[int], new_tokens: int, prefix: int = 0, seed: int = 0
) -> list[Request]:
    """Requests with prompts of 8 to 64 tokens after `prefix` common ones, half to all of the new tokens, and block
    sizes, policies, temperatures and seeds of their own."""
    draw = random.Random(seed)
    common = tuple(draw.randrange(vocabulary) for _ in range(prefix))
    return [
        Request(
            (*common, *(draw.randrange(vocabulary) for _ in range(draw.randrange(8, 65)))),
            draw.randrange(max(1, new_tokens // 2), new_tokens + 1),
            draw.choice(list(block_sizes)),
            parse(draw.choice(_POLICIES)),
            Sampling(draw.choice([0.0, 1.0])),
            seed=number,
        )
        for number in range(count)
    ]


def bench_serve(
    model: Model,
    requests: Sequence[Request],
    *,
    rounds: int = 3,
    limits: Limits | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row for every way: tokens a second, its ratio to one at a time, and how long requests took and waited."""
    limits = limits or limits_for(model, requests, Limits())
    ways = {ALONE: replace(limits, requests=1), TOGETHER: limits, ARRIVING: limits}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    last: dict[str, _Served] = {}
    for turn in range(rounds + 1):
        for number, (way, own) in enumerate(ways.items()):
            gap = 0.0
            if way == ARRIVING:  # as fast as they are served together
                gap = last[TOGETHER].seconds / len(requests)
            last[way] = _serve(model, requests, own, gap, random.Random(seed + turn))
            if turn:
                seconds[way].append(last[way].seconds)
            if on_progress is not None:
                on_progress((turn * len(ways) + number + 1) / (len(ways) * (rounds + 1)))
    return [_row(way, seconds, last, len(requests)) for way in ways]


class _Served:
    """One way's round: its jobs, when each came, when it had its first text and when it was done."""

    def __init__(self, engine: Engine, jobs: list[Job], came: list[float], first: list[float], done: list[float]):
        self.engine, self.jobs, self.came, self.first, self.done = engine, jobs, came, first, done
        self.seconds = max(done)


def _serve(model: Model, requests: Sequence[Request], limits: Limits, gap: float, draw: random.Random) -> _Served:
    engine = Engine(model, limits)
    moments, now = [], 0.0
    for _ in requests:
        moments.append(now)
        now += draw.expovariate(1 / gap) if gap else 0.0
    first, done = [0.0] * len(requests), [0.0] * len(requests)
    jobs: list[Job] = []
    began = time.perf_counter()

    def heard(number: int) -> Callable[[str], None]:
        def hear(_: str) -> None:
            first[number] = first[number] or time.perf_counter() - began

        return hear

    with prepared(model):
        while len(jobs) < len(requests) or engine.busy:
            while len(jobs) < len(requests) and time.perf_counter() - began >= moments[len(jobs)]:
                jobs.append(engine.add(requests[len(jobs)], heard(len(jobs))))
            for job in engine.step():
                done[job.number] = time.perf_counter() - began
    return _Served(engine, jobs, moments, first, done)


def _row(way: str, seconds: dict[str, list[float]], last: dict[str, _Served], count: int) -> dict[str, Any]:
    own, alone = last[way], last[ALONE]
    tokens = sum(len(job.output.tokens) for job in own.jobs if job.output)
    ratios = [a / b for a, b in zip(seconds[ALONE], seconds[way], strict=True)]
    took = [done - came for done, came in zip(own.done, own.came, strict=True)]
    waited = [first - came for first, came in zip(own.first, own.came, strict=True)]
    same = sum(
        a.output is not None and b.output is not None and a.output.tokens == b.output.tokens
        for a, b in zip(own.jobs, alone.jobs, strict=True)
    )
    return {
        "way": way,
        "requests": count,
        "tokens": tokens,
        "rounds": len(ratios),
        "seconds": median(seconds[way]),
        "tokens_per_second": tokens / median(seconds[way]),
        "throughput_over_one": median(ratios),
        "throughput_over_one_range": [min(ratios), max(ratios)],
        "equal_to_alone": same / count,
        "forwards": own.engine.iterations,
        "ms_per_forward": 1e3 * median(seconds[way]) / own.engine.iterations,
        "prompt_tokens_read": own.engine.prompt_tokens,
        "prompt_tokens_shared": own.engine.shared_tokens,
        "preemptions": own.engine.preemptions,
        "first_text_seconds": median(waited),
        "request_seconds": median(took),
        "request_seconds_p95": quantiles(took, n=20)[-1] if count > 1 else took[0],
    }
