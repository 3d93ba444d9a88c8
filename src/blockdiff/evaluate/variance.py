"""How noisy a training gradient is: its variance over noise draws, for every group of parameters.

With g_1..g_M the gradients of M draws, the variance is the sum over parameters of 1/(M-1) * sum |g_m - mean|^2 (BD3-LM,
arXiv 2503.09573, eq. 10), once over noise and layouts at fixed data, once over both. Divided by |mean|^2 it is the
noise-to-signal ratio, which loss weights of different sizes do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from blockdiff.data import Document, collate
from blockdiff.model import BlockDiffusionModel
from blockdiff.passes import Objective
from blockdiff.rng import uniform

_DRAW = 8  # purpose of random numbers
Vary = Literal["noise", "both"]
GROUPS = ("embedding", "attention", "feed_forward", "norm", "head", "other")


@dataclass(frozen=True)
class VarianceRow:
    """group of parameters ("all": every one); variance of the gradient of the loss per token, summed over the group;
    ratio: variance over the squared norm of the mean gradient, that norm's own noise taken off (None where nothing of
    the mean stands out of it)."""

    group: str
    vary: Vary
    variance: float
    mean_norm: float
    ratio: float | None
    parameters: int
    draws: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gradient_variance(
    model: BlockDiffusionModel,
    rows: Sequence[Sequence[Document]],
    objective: Objective,
    *,
    rows_per_batch: int = 8,
    draws: int = 16,
    vary: Vary = "noise",
    seed: int = 0,
) -> list[VarianceRow]:
    """Variance of the training gradient at these weights, a row for every group of parameters and one for all.

    vary noise: one batch, drawn again and again; both: another batch for every draw. The model is put in evaluation
    mode, so dropout adds nothing. Raises ValueError for fewer than two draws, or rows for fewer than one batch.
    """
    if draws < 2:
        raise ValueError(f"draws is {draws}; a variance needs 2 or more")
    if not rows:
        raise ValueError("there are no rows to draw batches from")
    was_training = model.training
    model.eval()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for _, p in named]
    squares = torch.zeros(len(named), dtype=torch.float64)
    for gradients in _gradients(model, rows, objective, [p for _, p in named], rows_per_batch, draws, vary, seed):
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                total[index] += gradient
                squares[index] += float(gradient.double().square().sum())
    model.train(was_training)
    mean_square = torch.stack([(t / draws).square().sum().cpu() for t in total])
    variance = (squares - draws * mean_square) / (draws - 1)
    return _by_group([name for name, _ in named], [p.numel() for _, p in named], variance, mean_square, draws, vary)


def group_of(name: str) -> str:
    """The group of a parameter, from its name in a Hugging Face decoder."""
    words = name.lower()
    for group, marks in (
        ("head", ("lm_head", "embed_out")),
        ("norm", ("norm", "ln_", ".ln")),
        ("embedding", ("embed", "wte", "wpe", "mask_row")),
        ("attention", ("attn", "attention")),
        ("feed_forward", ("mlp", "feed_forward", "fc1", "fc2", "experts")),
    ):
        if any(mark in words for mark in marks):
            return group
    return "other"


def _gradients(
    model: BlockDiffusionModel,
    rows: Sequence[Sequence[Document]],
    objective: Objective,
    parameters: list[torch.nn.Parameter],
    rows_per_batch: int,
    draws: int,
    vary: Vary,
    seed: int,
) -> Iterator[tuple[Tensor | None, ...]]:
    for draw in range(draws):
        first = draw * rows_per_batch if vary == "both" else 0
        chosen = [rows[(first + i) % len(rows)] for i in range(rows_per_batch)]
        batch = {name: tensor.to(model.device) for name, tensor in collate(chosen).items()}
        key = int(uniform(seed, draw, _DRAW) * 2**53)
        terms = objective.terms(model, batch, model.spec.alignment, model.spec.mask_id or 0, key)
        loss = terms.loss(terms.tokens.sum(), objective.ar_weight)
        yield torch.autograd.grad(loss, parameters, allow_unused=True)


def _by_group(
    names: list[str], sizes: list[int], variance: Tensor, mean_square: Tensor, draws: int, vary: Vary
) -> list[VarianceRow]:
    groups = [group_of(name) for name in names]
    found = []
    for group in ("all", *(group for group in GROUPS if group in groups)):
        mine = torch.tensor([group in ("all", own) for own in groups])
        spread, square = float(variance[mine].sum()), float(mean_square[mine].sum())
        signal = square - spread / draws  # the mean of M draws keeps 1/M of the noise
        found.append(
            VarianceRow(
                group=group,
                vary=vary,
                variance=spread,
                mean_norm=square**0.5,
                ratio=spread / signal if signal > 0 else None,
                parameters=sum(size for size, own in zip(sizes, mine.tolist(), strict=True) if own),
                draws=draws,
            )
        )
    return found
