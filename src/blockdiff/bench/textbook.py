"""Block decoding as it is usually written: the baseline of `bench decode`, and the slow truth of its fast path.

For every block the whole text so far is read again into a fresh cache, logits and all; every step is a pass over the
whole block; the most certain positions are filled. Transformers' own attention and cache, one row beside the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def decode_blocks(network: Any, prompts: Tensor, new: int, block_size: int, per_step: int, mask_id: int) -> Tensor:
    """Greedy texts int64 [B, new] after prompts [B, P]: blocks of `block_size`, `per_step` positions filled a step.

    Logits at i predict token i + 1, and a block's first token comes from the text before it (boundary `clean`).
    """
    text = prompts
    while text.shape[1] < prompts.shape[1] + new:
        size = min(block_size, prompts.shape[1] + new - text.shape[1])
        text = torch.cat([text, _block(network, text, size, block_size, per_step, mask_id)], 1)
    return text[:, prompts.shape[1] :]


def _block(network: Any, text: Tensor, size: int, block_size: int, per_step: int, mask_id: int) -> Tensor:
    rows, before = text.shape
    read = network(input_ids=text, use_cache=True)
    cache = read.past_key_values
    block = torch.full((rows, block_size), mask_id, device=text.device)
    block[:, 0] = _allowed(read.logits[:, -1], mask_id).argmax(-1)
    masked = torch.ones_like(block, dtype=torch.bool)
    masked[:, 0] = False
    place = torch.arange(before, before + block_size, device=text.device).expand(rows, -1)
    every = torch.ones(rows, 1, block_size, before + block_size, dtype=torch.bool, device=text.device)
    while bool(masked.any()):
        logits = network(
            input_ids=block, position_ids=place, attention_mask=every, past_key_values=cache, use_cache=True
        ).logits
        cache.crop(-block_size)
        logits = _allowed(torch.cat([logits[:, :1], logits[:, :-1]], 1), mask_id)
        confidence, token = logits.float().softmax(-1).max(-1)
        best = confidence.masked_fill(~masked, -1.0).topk(min(per_step, block_size), -1).indices
        chosen = torch.zeros_like(masked).scatter_(1, best, True) & masked
        block = torch.where(chosen, token, block)
        masked &= ~chosen
    return block[:, :size]


def _allowed(logits: Tensor, mask_id: int) -> Tensor:
    logits[..., mask_id] = -torch.inf
    return logits
