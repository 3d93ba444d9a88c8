"""Texts to be measured, whatever writes them."""

from __future__ import annotations

from collections.abc import Sequence

from blockdiff.diffusion_gemma import DiffusionGemma
from blockdiff.engine import Output, Request, generate_batches
from blockdiff.model import BlockDiffusionModel


def write(model: BlockDiffusionModel | DiffusionGemma, requests: Sequence[Request], batch: int) -> list[Output]:
    """Continue every request: by the engine, `batch` at once, or by DiffusionGemma. Raises ValueError."""
    if isinstance(model, BlockDiffusionModel):
        return generate_batches(model, requests, batch)
    return model.write(requests)
