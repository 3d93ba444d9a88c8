"""Token maps of the engine's passes. Shapes: R rows, W slots of the widest open block."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdiff.layout import TokenMap


def clean_map(position: Tensor, start: Tensor, used: Tensor, prompt: bool = False) -> TokenMap:
    """Clean tokens of one document a row; tokens that are not used belong to none."""
    no = torch.zeros_like(used)
    return TokenMap(
        doc=torch.where(used, 0, -1),
        position=position,
        block=start,
        start=start,
        prompt=~no if prompt else no,
        noisy=no,
    )


def branches(ids: Tensor, tokens: TokenMap, rows: Tensor, length: int, mask_id: int) -> tuple[Tensor, TokenMap]:
    """For every slot of the blocks, a noisy block that begins after it: its token as the seed, then masks.

    ids and tokens [R, W] of the clean pass, rows bool [R]: which rows draft ahead. Returns ids and map
    [R, W * length].
    """
    count, width = ids.shape
    slot = torch.arange(length, device=ids.device)
    inputs = torch.where(slot == 0, ids[..., None], mask_id)
    start = tokens.position[..., None].expand(count, width, length)
    doc = torch.where(rows[:, None], tokens.doc, -1)[..., None].expand(count, width, length)
    no = torch.zeros_like(doc, dtype=torch.bool)
    found = TokenMap(doc=doc, position=start + slot, block=start, start=start, prompt=no, noisy=~no)
    return inputs.flatten(1), found.map(lambda tensor: tensor.flatten(1))
