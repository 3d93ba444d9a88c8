"""Ratios of training speed, measured side by side: a step of block diffusion over a plain AR step of the same tokens.

A step is forward, backward and AdamW. The ways take turns, round after round, and a ratio is taken within a round, so
what else the machine does falls on all of them alike; medians over the rounds and their range are reported, and a first
round is not counted.

    ar             the Hugging Face model as it is, next-token cross-entropy at every position
    textbook       two streams, a dense mask in the model's own attention, logits of every slot (`reference.textbook`)
    ours           `Objective.terms`, the code that trains
    ours, n draws  the same with n noise draws over one clean pass; its cost per draw is the whole cost over n

The floor is the matrix products alone (forward and backward, the shapes of that way's own linear layers), timed in the
same rounds. Memory is measured in a process of its own for each way: the highest resident memory while it trains, all
of it and above what was there once model and data were built (on CUDA: allocated memory).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from blockdiff.bench.memory import peak_memory
from blockdiff.bench.models import random_network
from blockdiff.distributions import Fixed
from blockdiff.loading import attach
from blockdiff.model import BlockDiffusionModel, Spec
from blockdiff.noise import ExactCount
from blockdiff.objectives import Alignment
from blockdiff.passes import Objective
from blockdiff.reference import textbook
from blockdiff.runtime import keep_freed_memory

AR, TEXTBOOK, OURS = "ar", "textbook", "ours"
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Case:
    """One comparison: rows of `length` tokens in blocks of `block_size`, `draws` noise draws in the last of the ways.

    path: a checkpoint; none: a random Llama of 8 million parameters.
    """

    length: int
    batch: int
    block_size: int
    draws: int
    path: str | None = None

    @property
    def ways(self) -> tuple[str, ...]:
        more = (f"{OURS}, {self.draws} draws",) if self.draws > 1 else ()
        return (AR, TEXTBOOK, OURS, *more)

    def draws_of(self, way: str) -> int:
        return self.draws if way.endswith("draws") else 1


class Trained:
    """A model that trains in one way on random tokens, a document a row."""

    def __init__(self, case: Case, way: str) -> None:
        self.case, self.way = case, way
        network = _network(case)
        self.vocabulary = int(network.get_input_embeddings().weight.shape[0])
        self.bridge: BlockDiffusionModel | None = None
        if way not in (AR, TEXTBOOK):
            spec = Spec(mask_id=self.vocabulary - 1, layout=Fixed(case.block_size), trained_length=case.length)
            self.bridge = attach(network, spec=spec)
        self.network = network.train()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        self.objective = Objective(Fixed(case.block_size), ExactCount(), draws=case.draws_of(way))
        shape = (case.batch, case.length)
        self.batch = {
            "input_ids": torch.randint(self.vocabulary - 1, shape, generator=Generator().manual_seed(0)),
            "doc": torch.arange(case.batch)[:, None].expand(shape).contiguous(),
            "prompt": (torch.arange(case.length) == 0).expand(shape).contiguous(),
        }
        self.batch = {name: tensor.to(network.device) for name, tensor in self.batch.items()}

    def step(self, seed: int) -> None:
        """One optimizer step; the same seed draws the same noise in every way."""
        torch.autograd.backward(self.loss(seed))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, seed: int) -> Tensor:
        if self.way == AR:
            ids = self.batch["input_ids"]
            logits = self.network(input_ids=ids).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        mask_id = self.vocabulary - 1
        model = self.bridge or textbook(self.network, "context_causal", mask_id)
        terms = self.objective.terms(model, self.batch, Alignment(), mask_id, seed)
        return terms.loss(terms.tokens.sum(), 0.0)

    def products(self) -> list[tuple[int, nn.Linear]]:
        """The rows that each linear layer sees in a step."""
        seen: list[tuple[int, nn.Linear]] = []

        def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            seen.append((output.numel() // output.shape[-1], layer))

        hooks = [m.register_forward_hook(note) for m in self.network.modules() if isinstance(m, nn.Linear)]
        fused = self.bridge is not None and self.bridge.reading.plain_head
        if self.bridge is not None:
            self.bridge.reading.plain_head = False  # the head's rows are to be seen
        try:
            with torch.no_grad():
                self.loss(0)
        finally:
            if self.bridge is not None:
                self.bridge.reading.plain_head = fused
            for hook in hooks:
                hook.remove()
        return seen


def bench_train(
    cases: Sequence[Case], *, rounds: int = 5, memory: bool = True, on_progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A row for every way of every case: seconds of a step, its cost over the AR step of the same round, per draw, over
    its own matrix products, and peak memory.

    Raises ValueError for a length that no block fits, or that the model cannot address.
    """
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        if case.length <= case.block_size:
            raise ValueError(f"length {case.length} has no room for blocks of {case.block_size}; give longer rows")

        def say(done: float, number: int = number) -> None:
            if on_progress is not None:
                on_progress((number + done) / len(cases))

        seconds, floors = _time(case, rounds, say)
        peaks = {way: peak_memory(_steps, case, way) for way in case.ways} if memory else {}
        rows += [_row(case, way, seconds, floors, peaks.get(way)) for way in case.ways]
    return rows


def _time(case: Case, rounds: int, say: Progress) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every way's steps and of their matrix products, round by round."""
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    floors: dict[str, list[float]] = {way: [] for way in case.ways}
    trained = {way: Trained(case, way) for way in case.ways}
    shapes = {way: trained[way].products() for way in case.ways}
    for turn in range(rounds + 1):
        for number, (way, own) in enumerate(trained.items()):
            began = time.perf_counter()
            own.step(turn)
            _wait()
            took = time.perf_counter() - began
            floor = _multiply(shapes[way])
            if turn:
                seconds[way].append(took)
                floors[way].append(floor)
            say((turn + (number + 1) / len(trained)) / (rounds + 1))
    return seconds, floors


def _row(
    case: Case,
    way: str,
    seconds: dict[str, list[float]],
    floors: dict[str, list[float]],
    peak: tuple[float, float] | None,
) -> dict[str, Any]:
    draws = case.draws_of(way)
    cost = [own / ar for own, ar in zip(seconds[way], seconds[AR], strict=True)]
    one = [own / first / draws for own, first in zip(seconds[way], seconds[OURS], strict=True)]
    over = [own / floor for own, floor in zip(seconds[way], floors[way], strict=True)]
    row: dict[str, Any] = {
        "length": case.length,
        "batch": case.batch,
        "block_size": case.block_size,
        "variant": way,
        "draws": draws,
        "rounds": len(cost),
        "seconds": median(seconds[way]),
        "tokens_per_second": case.batch * case.length / median(seconds[way]),
        **_spread("cost_over_ar", cost),
        "cost_per_draw": median(cost) / draws,
        "matmul_seconds": median(floors[way]),
        "cost_over_matmul": median(over),
        "peak_mb": None,
        "peak_above_model_mb": None,
    }
    if way not in (AR, TEXTBOOK):
        row |= _spread("draw_over_one", one)
    if peak is not None:
        row |= {"peak_mb": peak[0], "peak_above_model_mb": peak[1]}
    return row


def _spread(name: str, ratios: Sequence[float]) -> dict[str, Any]:
    return {name: median(ratios), f"{name}_range": [min(ratios), max(ratios)]}


def _multiply(products: Sequence[tuple[int, nn.Linear]]) -> float:
    """Seconds of the products of linear layers, forward and backward, nothing else."""
    total = 0.0
    for rows, layer in products:
        weight = layer.weight.detach()
        x, grad = weight.new_ones(rows, weight.shape[1]), weight.new_ones(rows, weight.shape[0])
        _wait()
        began = time.perf_counter()
        torch.mm(x, weight.T)
        torch.mm(grad, weight)
        torch.mm(grad.T, x)
        _wait()
        total += time.perf_counter() - began
    return total


def _steps(case: Case, way: str) -> Callable[[], None]:
    trained = Trained(case, way)

    def run() -> None:
        for seed in range(2):
            trained.step(seed)

    return run


def _network(case: Case) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.path is None:
        network: Any = random_network()
    else:
        try:
            network = AutoModelForCausalLM.from_pretrained(case.path)
        except OSError as error:
            raise FileNotFoundError(
                f"{case.path}: no model can be read there ({str(error).splitlines()[0]})"
            ) from error
    limit = getattr(network.config, "max_position_embeddings", case.length)
    if case.length > limit:
        raise ValueError(f"length {case.length} does not fit the model's context of {limit}; give shorter ones")
    return network.to(device)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
