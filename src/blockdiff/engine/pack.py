"""What goes into one pass: the tokens of every group's share, clean ones first, and what is read of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.engine.pages import Pages
from blockdiff.engine.ragged import RaggedPass
from blockdiff.engine.share import Share
from blockdiff.model import BlockDiffusionModel, Streams


@dataclass(frozen=True)
class Pack:
    """ids and position [T], of which the first `clean` are clean tokens; read [R] slots whose logits are wanted.

    blend: token ids and weights [T, K] whose embeddings take that much of a token's own (`decode.inputs.Soft`).
    counts: how many of R are each share's clean ones, then its noisy ones.
    """

    seen: RaggedPass
    ids: Tensor
    position: Tensor
    read: Tensor
    clean: int
    blend: tuple[Tensor, Tensor] | None
    counts: tuple[int, ...]

    @staticmethod
    def of(shares: Sequence[Share], pages: Pages, model: BlockDiffusionModel) -> Pack:
        """The tokens of all shares, side by side."""
        device = model.device
        clean_at = [at for share in shares for at in share.clean_at]
        noisy_at = [at for share in shares for at in share.noisy_at]
        ids = [torch.tensor([i for share in shares for i in share.clean_ids], dtype=torch.int64, device=device)]
        ids += [part for share in shares for part in share.noisy_ids]
        read, first = [], 0
        for share in shares:
            read += [first + at for at in share.read_clean]
            first += len(share.clean_at)
        for share in shares:
            read += [first + at for at in share.read_noisy]
            first += len(share.noisy_at)
        segments = [s for share in shares for s in share.clean] + [s for share in shares for s in share.noisy]
        return Pack(
            RaggedPass(pages, segments, model.spec.clean_context, device, model.cache_window),
            torch.cat(ids),
            torch.tensor(clean_at + noisy_at, device=device),
            torch.tensor(read, dtype=torch.int64, device=device),
            len(clean_at),
            _blend(shares, len(clean_at), len(noisy_at), device),
            (*(len(share.read_clean) for share in shares), *(len(share.read_noisy) for share in shares)),
        )

    @property
    def streams(self) -> Streams:
        """Which tokens there are."""
        return "noisy" if self.clean == 0 else "clean" if self.clean == len(self.ids) else "both"

    def split(self, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The rows of logits [R, V] that each share asked for: of its clean tokens, of its noisy ones."""
        parts = logits.split(self.counts)
        half = len(self.counts) // 2
        return list(zip(parts[:half], parts[half:], strict=True))


def _blend(shares: Sequence[Share], clean: int, noisy: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    found, first = [], clean
    for share in shares:
        found += [(first + offset, ids, weights) for offset, ids, weights in share.blends]
        first += len(share.noisy_at)
    if not found:
        return None
    width = max(ids.shape[1] for _, ids, _ in found)
    ids = torch.zeros(clean + noisy, width, dtype=torch.int64, device=device)
    weight = torch.zeros(clean + noisy, width, device=device)
    for start, own, own_weight in found:
        ids[start : start + len(own), : own.shape[1]] = own
        weight[start : start + len(own), : own.shape[1]] = own_weight.to(weight.dtype)
    return ids, weight
