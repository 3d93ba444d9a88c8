"""What decoding costs: fixed numbers of tokens a step, against the AR decoding of the same network in transformers.

Random or real weights make no difference here: every way writes equally many tokens, as many a step as it is told.

    hf generate   transformers' `generate`, greedy, with its cache: the AR baseline of every ratio
    textbook      block decoding as it is usually written (`bench.textbook`)
    ours, AR      block size 1
    ours          blocks opened by the commit's logits (`clean`), or seeded with the token before them and committed in
                  their successor's first pass (`seed`)

The ways take turns, round after round, and a ratio is taken within a round; medians and their range are reported, and a
first round is not counted. matmul_ms: the matrix products of one of its forwards alone, timed in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from blockdiff.api import Model
from blockdiff.bench.memory import peak_memory
from blockdiff.bench.models import random_model, random_network
from blockdiff.bench.textbook import decode_blocks
from blockdiff.decode import Policy
from blockdiff.decode.counts import Fixed
from blockdiff.engine import Engine, Limits, Request
from blockdiff.engine.limits import limits_for
from blockdiff.engine.network import prepared
from blockdiff.objectives import Boundary

HUGGING_FACE, TEXTBOOK, AR = "hf generate", "textbook", "ours, AR"
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Schedule:
    """One comparison: `batch` texts of `new_tokens` after prompts of `prompt_tokens`."""

    batch: int
    new_tokens: int
    block_size: int
    tokens_per_step: tuple[int, ...]
    prompt_tokens: int = 16
    textbook: bool = True


@dataclass
class Timed:
    """seconds of every round, matrix products of one forward, forwards and tokens of them."""

    seconds: list[float]
    products: list[float]
    forwards: int = 0
    positions: float = 0.0


def bench_schedules(
    schedules: Sequence[Schedule],
    *,
    rounds: int = 5,
    seed: int = 0,
    memory: bool = True,
    on_progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row for every way of every schedule, on the random network of `bench.models`; with peak memory, each way's in a
    process of its own. Raises ValueError for texts that the network's context does not hold."""
    network = random_network(seed)
    boundaries: tuple[Boundary, ...] = ("clean", "seed")
    models = {boundary: random_model(boundary, seed) for boundary in boundaries}
    rows: list[dict[str, Any]] = []
    for number, schedule in enumerate(schedules):
        limit = network.config.max_position_embeddings
        if schedule.prompt_tokens + schedule.new_tokens + schedule.block_size > limit:
            raise ValueError(
                f"{schedule.prompt_tokens} prompt tokens, {schedule.new_tokens} new ones and a block of "
                f"{schedule.block_size} do not fit the network's context of {limit}"
            )
        timed = _time(schedule, network, models, rounds, seed)
        peaks = {way: peak_memory(_alone, schedule, way, seed) for way in timed} if memory else {}
        rows += [_row(schedule, way, timed) | _peaks(peaks.get(way)) for way in timed]
        if on_progress is not None:
            on_progress((number + 1) / len(schedules))
    return rows


def _alone(schedule: Schedule, way: str, seed: int) -> Callable[[], None]:
    """One way, with nothing else in memory."""
    boundary: Boundary = "seed" if ", seed" in way else "clean"
    ours = way.startswith("ours")
    network = None if ours else random_network(seed)
    models = {boundary: random_model(boundary, seed)} if ours else {}
    prompts = torch.randint(4000, (schedule.batch, schedule.prompt_tokens))
    write = _ways(schedule, network, models, prompts)[way]

    def run() -> None:
        write()

    return run


def _peaks(peak: tuple[float, float] | None) -> dict[str, Any]:
    return {"peak_mb": None if peak is None else peak[0], "peak_above_model_mb": None if peak is None else peak[1]}


def _time(
    schedule: Schedule, network: Any, models: Mapping[Boundary, Model], rounds: int, seed: int
) -> dict[str, Timed]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(4000, (schedule.batch, schedule.prompt_tokens), generator=generator)
    ways = _ways(schedule, network, models, prompts)
    timed = {name: Timed([], []) for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            own = timed[name]
            began = time.perf_counter()
            own.forwards, own.positions = way()
            if turn:
                own.seconds.append(time.perf_counter() - began)
                own.products.append(_products(network, round(own.positions / own.forwards)))
    return timed


def _ways(
    schedule: Schedule, network: Any, models: Mapping[Boundary, Model], prompts: Tensor
) -> dict[str, Callable[[], tuple[int, float]]]:
    """Every way, as something that writes the texts and says its forwards and the tokens they fed."""
    new, batch = schedule.new_tokens, schedule.batch

    def hugging_face() -> tuple[int, float]:
        with torch.inference_mode():
            network.generate(prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return new, float(new * batch)

    def textbook(per_step: int) -> Callable[[], tuple[int, float]]:
        def write() -> tuple[int, float]:
            counter = _Counter(network)
            with counter:
                decode_blocks(network, prompts, new, schedule.block_size, per_step, int(network.vocab_size) - 1)
            return counter.forwards, float(counter.positions)

        return write

    def ours(boundary: Boundary, block_size: int, per_step: int) -> Callable[[], tuple[int, float]]:
        policy = Policy(counts=(Fixed(per_step),))
        requests = [Request(tuple(row.tolist()), new, block_size, policy) for row in prompts]

        def write() -> tuple[int, float]:
            model = models[boundary]
            engine = Engine(model, limits_for(model, requests, Limits()))
            with prepared(model):
                jobs = [engine.add(request) for request in requests]
                while engine.busy:
                    engine.step()
            outputs = [job.output for job in jobs if job.output is not None]
            assert all(len(output.tokens) == new for output in outputs)
            return engine.iterations, float(sum(output.positions for output in outputs))

        return write

    ways: dict[str, Callable[[], tuple[int, float]]] = {HUGGING_FACE: hugging_face, AR: ours("clean", 1, 1)}
    for per_step in schedule.tokens_per_step:
        if schedule.textbook:
            ways[f"{TEXTBOOK}|{per_step}"] = textbook(per_step)
        for boundary in models:
            ways[f"ours, {boundary}|{per_step}"] = ours(boundary, schedule.block_size, per_step)
    return ways


class _Counter:
    """Counts a network's forwards and the tokens that they feed."""

    def __init__(self, network: Any) -> None:
        self.network, self.forwards, self.positions = network, 0, 0

    def __enter__(self) -> None:
        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.forwards += 1
            self.positions += kwargs["input_ids"].numel()

        self.hook = self.network.register_forward_pre_hook(count, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def _products(network: Any, tokens: int) -> float:
    """Seconds of a forward's matrix products over so many tokens, nothing else."""
    weights = [module.weight.detach() for module in network.modules() if isinstance(module, nn.Linear)]
    inputs = {width: torch.ones(max(tokens, 1), width) for width in {weight.shape[1] for weight in weights}}
    found = []
    with torch.inference_mode():
        for _ in range(5):  # the first pays for what was in the caches before
            began = time.perf_counter()
            for weight in weights:
                torch.mm(inputs[weight.shape[1]], weight.T)
            found.append(time.perf_counter() - began)
    return min(found)


def _row(schedule: Schedule, way: str, timed: dict[str, Timed]) -> dict[str, Any]:
    own, base = timed[way], timed[HUGGING_FACE]
    name, _, per_step = way.partition("|")
    ratios = [a / b for a, b in zip(base.seconds, own.seconds, strict=True)]
    written = schedule.batch * schedule.new_tokens
    return {
        "way": name,
        "batch": schedule.batch,
        "new_tokens": schedule.new_tokens,
        "block_size": schedule.block_size if per_step else 1,
        "tokens_per_step": int(per_step) if per_step else 1,
        "rounds": len(own.seconds),
        "seconds": median(own.seconds),
        "tokens_per_second": written / median(own.seconds),
        "speedup_over_ar": median(ratios),
        "speedup_over_ar_range": [min(ratios), max(ratios)],
        "forwards": own.forwards,
        "tokens_per_forward": schedule.new_tokens / own.forwards,
        "ms_per_forward": 1e3 * median(own.seconds) / own.forwards,
        "matmul_ms": 1e3 * median(own.products),
    }
