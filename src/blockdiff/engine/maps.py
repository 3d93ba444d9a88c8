"""Token maps of segments that are more than one run: [1, q] tokens of one text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockdiff.layout import TokenMap


def clean_blocks(first: int, starts: Sequence[int], device: torch.device) -> TokenMap:
    """Clean tokens from position `first` on, each in the block that begins at its start."""
    start = torch.tensor(starts, device=device)[None]
    return _map(first + torch.arange(len(starts), device=device)[None], start, start, noisy=False)


def branch_map(first: int, size: int, length: int, device: torch.device) -> TokenMap:
    """For each of `size` clean tokens from `first` on a noisy block that begins with it."""
    start = (first + torch.arange(size, device=device))[:, None].expand(size, length)
    place = start + torch.arange(length, device=device)
    return _map(place.reshape(1, -1), start.reshape(1, -1), start.reshape(1, -1), noisy=True)


def state_map(first: int, size: int, depth: int, device: torch.device) -> TokenMap:
    """`depth` states of one noisy block that do not see one another."""
    place = (first + torch.arange(size, device=device)).expand(depth, size)
    block = torch.arange(depth, device=device)[:, None].expand(depth, size)
    return _map(place.reshape(1, -1), torch.full_like(place, first).reshape(1, -1), block.reshape(1, -1), noisy=True)


def _map(position: Tensor, start: Tensor, block: Tensor, *, noisy: bool) -> TokenMap:
    no = torch.zeros_like(position, dtype=torch.bool)
    return TokenMap(torch.zeros_like(position), position, block, start, no, ~no if noisy else no)
