"""The attention function that blockdiff registers with transformers: one hook for training and decoding.

A Hugging Face decoder looks its attention up by name. Ours receives the `Visibility` of the pass through a keyword of
the model's forward call and renders it for itself, layer by layer. Measured against handing a 4D mask to the model's
own `sdpa` (docs/design.md, "Why a registered attention function"): tiles skip what nobody sees, so a two-stream step
costs about twice an AR step at any length instead of 2.4 to 3.4 times; and a layer's own sliding window, which a 4D
mask overrides, is kept.

Implementations: `sdpa` (in tiles), `eager` (explicit softmax), `flex` (FlexAttention: CUDA; torch has no CPU backward
for it).

Shapes: B rows, H heads, G key/value heads, Q queries, K keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from blockdiff import tiled
from blockdiff.masks import Visibility

Implementation = Literal["sdpa", "eager", "flex"]

# transformers refuses names that contain "sdpa" or "flex_attention" for models whose own code lacks those kernels
NAMES: dict[Implementation, str] = {"sdpa": "blockdiff_tiled", "eager": "blockdiff_eager", "flex": "blockdiff_flex"}


class UnsupportedModel(ValueError):
    """A model that cannot do what is asked of it, with the reason and, where one is to blame, the layers."""


@dataclass(frozen=True)
class Scores:
    """How a layer makes weights of queries and keys: scale, sliding window, soft cap (Gemma 2) and sinks (gpt-oss)."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether fused kernels have it."""
        return self.softcap is None and self.sinks is None


class PagedVisibility(Protocol):
    """Who sees whom in a pass whose keys and values live elsewhere (the engine's pages), and the attention over it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """query [B, H, Q, D] with the keys and values [B, G, Q, D] of the same tokens -> [B, H, Q, D]."""


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, window: int | None, scale: float, dropout: float
) -> Tensor:
    if dropout == 0 and tiled.runs(query, key, value):
        return tiled.attend(query, key, value, seen.tiles(window), scale)
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, tile.queries],
            tiled.pick(key, tile.keys),
            tiled.pick(value, tile.keys),
            attn_mask=tile.mask,
            dropout_p=dropout,
            is_causal=tile.causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for tile in seen.tiles(window)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Visibility,
    window: int | None,
    scale: float,
    dropout: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Explicit softmax, with Gemma 2's soft-capped scores and gpt-oss's attention sinks where a layer asks for them."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + seen.additive(scores.dtype, window)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    probability = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
    if seen.attention is not None:
        seen.attention.add(probability[..., : key.shape[2]])
    return F.dropout(probability[..., : key.shape[2]], dropout) @ value


def _flex(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, window: int | None, scale: float, dropout: float
) -> Tensor:
    if dropout > 0:
        raise UnsupportedModel("FlexAttention has no dropout: set the model's attention_dropout to 0 or use sdpa")
    groups = query.shape[1] != key.shape[1]
    kernel = _flex_kernel(query.device.type)
    out: Tensor = kernel(query, key, value, block_mask=seen.block_mask(window), scale=scale, enable_gqa=groups)
    return out


_flex_kernels: dict[str, Any] = {}


def _flex_kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device not in _flex_kernels:
        _flex_kernels[device] = torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
    return _flex_kernels[device]


def _registered(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """transformers' attention signature around one of our kernels: query [B, H, Q, D] ... -> [B, Q, H, D]."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        *,
        visibility: Visibility | PagedVisibility | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if visibility is None:
            raise UnsupportedModel(
                f"{type(module).__name__} got no visibility: call the BlockDiffusionModel rather than its backbone "
                "(or give the backbone another attention with set_attn_implementation('sdpa')); if you did, this "
                "architecture drops extra keyword arguments and cannot be used"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if not isinstance(visibility, Visibility):
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            out = visibility.attend(layer, query, key, value, Scores(scale, sliding_window, softcap, s_aux))
            return out.transpose(1, 2).contiguous(), None
        visibility.note_layer(getattr(module, "layer_idx", None), sliding_window)
        if visibility.held is not None:
            key, value = visibility.held.exchange(key, value)
        if softcap is not None or s_aux is not None or visibility.attention is not None:  # no fused kernel has these
            out = eager_attention(query, key, value, visibility, sliding_window, scale, dropout, softcap, s_aux)
        else:
            out = kernel(query, key, value, visibility, sliding_window, scale, dropout)
        return out.transpose(1, 2).contiguous(), None

    return attention


AttentionInterface.register(NAMES["sdpa"], _registered(_sdpa))
AttentionInterface.register(NAMES["eager"], _registered(eager_attention))
AttentionInterface.register(NAMES["flex"], _registered(_flex))
