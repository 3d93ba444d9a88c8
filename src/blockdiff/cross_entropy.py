"""Cross-entropy straight from hidden states: logits exist a chunk of rows at a time.

Where the logits fit into one chunk they are kept and turned into their own gradient in place, otherwise the backward
computes each chunk again from the rows' log-sum-exp. Either way one buffer of `CHUNK` numbers takes the place of three
tensors [R, V] (logits, log-softmax and gradient).

Shapes: R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1 << 24  # logits at a time


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each row, unweighted, in at least float32: logits [R, V], target [R] -> [R]."""
    return F.cross_entropy(logits.to(_precise(logits)), target, reduction="none")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, excluded: int | None = None
) -> Tensor:
    """`cross_entropy` of the logits hidden [R, H] @ weight [V, H] + bias [V], column `excluded` being -inf: [R].

    Gradients reach hidden, weight and bias, once: there are no second derivatives. Under autocast the products run in
    its precision, as a linear layer's do.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (hidden, weight))
        bias = None if bias is None else bias.to(hidden.dtype)
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, target, excluded)  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, excluded: int | None
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            rows = max(1, CHUNK // len(weight))
            losses = torch.empty(len(hidden), dtype=_precise(hidden), device=hidden.device)
            sums, logits = torch.empty_like(losses), None
            for at in range(0, len(hidden), rows):
                here = slice(at, at + rows)
                logits = _logits(hidden[here], weight, bias, excluded)
                sums[here] = logits.logsumexp(1)
                losses[here] = sums[here] - logits.gather(1, target[here, None])[:, 0]
        kept = logits if len(hidden) <= rows and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, target, sums)
        ctx.rows, ctx.excluded, ctx.kept = rows, excluded, kept
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, sums = ctx.saved_tensors
        to_hidden, to_weight, to_bias = torch.empty_like(hidden), None, None
        if not len(hidden):  # zeros: other processes may have rows, and wait to add up
            to_weight, to_bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        whole = len(hidden) <= ctx.rows
        for at in range(0, len(hidden), ctx.rows):
            here = slice(at, at + ctx.rows)
            logits = _logits(hidden[here], weight, bias, ctx.excluded) if ctx.kept is None else ctx.kept
            share = logits.sub_(sums[here, None]).exp_()
            share.scatter_add_(1, target[here, None], share.new_full((len(share), 1), -1.0))
            share.mul_(grad[here, None])
            if ctx.needs_input_grad[2]:
                to_bias = share.sum(0) if to_bias is None else to_bias.add_(share.sum(0))
            share = share.to(weight.dtype)
            to_hidden[here] = share @ weight
            if ctx.needs_input_grad[1]:
                part = share.T @ hidden[here]
                if not whole:  # many chunks add up: not in a low precision
                    part = part.to(_precise(part))
                to_weight = part if to_weight is None else to_weight.add_(part)
        ctx.kept = None  # it is a gradient now
        to_weight = None if to_weight is None else to_weight.to(weight.dtype)
        return to_hidden, to_weight, None if to_bias is None else to_bias.to(bias.dtype), None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, excluded: int | None) -> Tensor:
    logits = F.linear(hidden, weight, bias).to(_precise(hidden))
    if excluded is not None:
        logits[:, excluded] = -torch.inf
    return logits


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, tensor.dtype)
