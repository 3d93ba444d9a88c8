"""What a configuration trains, in words and in a drawing of its mask."""

from __future__ import annotations

import torch

from blockdiff.config import RunConfig
from blockdiff.distributions import LayoutDistribution
from blockdiff.layout import Layout, Spans, TokenMap
from blockdiff.masks import CleanContext, Visibility
from blockdiff.noise import ExactCount
from blockdiff.objectives import Alignment, block_numbers, maskable, two_streams
from blockdiff.presets import PRESETS


def explanation(config: RunConfig, seed: int = 0) -> str:
    """The preset's words, the resolved keys, the token shares of the block sizes, and the mask of a short document."""
    about = [f"{config.preset}: {PRESETS[config.preset].about}", ""] if config.preset else []
    return "\n".join(
        [
            *about,
            config.dump(),
            "share of the tokens by block size, in a document of data.length tokens:",
            shares(config.layout, config.data.length - 1),
            "",
            draw_example(config.layout, config.model.alignment, config.model.clean_context, seed),
        ]
    )


def shares(layout: LayoutDistribution, length: int) -> str:
    """Token shares by octave of the block size."""
    share = layout.token_share(length)
    lines, low = [], 1
    while low <= length:
        high = min(2 * low - 1, length)
        part = float(share[low : high + 1].sum())
        if part > 5e-4:
            sizes = str(low) if low == high else f"{low}-{high}"
            lines.append(f"  {sizes:>9}  {part:6.1%}  {'█' * round(part * 40)}".rstrip())
        low *= 2
    return "\n".join(lines)


def draw_example(
    layout: LayoutDistribution, alignment: Alignment, clean_context: CleanContext, seed: int = 0, length: int = 12
) -> str:
    """The two-stream mask of one document of `length` tokens with a layout drawn from the distribution."""
    generator = torch.Generator().manual_seed(seed)
    doc = torch.zeros(1, length, dtype=torch.int64)
    prompt = torch.arange(length)[None] < 2
    spans = Spans.of(doc, prompt)
    tokens = TokenMap.build(doc, prompt, spans.place(layout.draw(spans.lengths, generator)))
    corruption = ExactCount().draw(block_numbers(tokens, maskable(tokens, alignment)), generator)
    stream = two_streams(torch.zeros_like(doc), tokens, corruption, alignment, mask_id=1)
    drawn: Layout = tokens.layouts()[0][0]
    picture = Visibility(stream.tokens, stream.tokens, clean_context).draw()
    return f"who sees whom (rows look at columns), {drawn}, {clean_context}:\n\n{picture}"
