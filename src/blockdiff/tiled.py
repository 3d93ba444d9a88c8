"""Attention in tiles with a backward of its own: exact attention that touches only the keys that somebody sees.

Automatic differentiation of a slice writes a gradient as large as what was sliced, for every tile and layer, and adds
them all up; at 2048 tokens that took as long as the attention itself. Here every tile adds its part to one gradient.
The kernels are torch's own for the CPU, which also read fewer key heads than query heads without copies of them.

Shapes: B rows, H heads, G key/value heads, Q queries, K keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockdiff.masks import Tile

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch has the kernels for these tensors."""
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    on_cpu = query.device.type == "cpu" and query.dtype in floats and _forward is not None and _backward is not None
    return on_cpu and query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]


def attend(query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float) -> Tensor:
    """Attention of query [B, H, Q, D] over key and value [B, G, K, D] within `tiles`, which cover every query once."""
    out: Tensor = _Tiled.apply(query, key, value, tiles, scale)  # type: ignore[no-untyped-call]
    return out


def pick(tensor: Tensor, ranges: tuple[slice, ...]) -> Tensor:
    """The tokens of some ranges, side by side; a view where there is one range."""
    if len(ranges) == 1:
        return tensor[:, :, ranges[0]]
    return torch.cat([tensor[:, :, keys] for keys in ranges], 2)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float) -> Tensor:
        ctx.tiles, ctx.scale = tiles, scale
        out, sums = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2), []
        for tile in tiles:
            keys, values = pick(key, tile.keys), pick(value, tile.keys)
            mask = tile.additive(query.dtype)
            part, logsumexp = _forward(  # type: ignore[misc]
                query[:, :, tile.queries], keys, values, 0.0, tile.causal, attn_mask=mask, scale=scale
            )
            out[:, :, tile.queries] = part
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for tile, logsumexp in zip(ctx.tiles, sums, strict=True):
            at = tile.queries
            tensors = (grad[:, :, at], query[:, :, at], pick(key, tile.keys), pick(value, tile.keys), out[:, :, at])
            mask = tile.additive(query.dtype)
            of_query, of_key, of_value = _backward(  # type: ignore[misc]
                *tensors, logsumexp, 0.0, tile.causal, attn_mask=mask, scale=ctx.scale
            )
            to_query[:, :, at] = of_query
            done = 0
            for keys in tile.keys:
                width = keys.stop - keys.start
                to_key[:, :, keys] += of_key[:, :, done : done + width]
                to_value[:, :, keys] += of_value[:, :, done : done + width]
                done += width
        return to_query, to_key, to_value, None, None
