"""Decoding policies: pure tensor functions over rows and slots, put together from few parts."""

from blockdiff.decode.blocks import FILLED, FIXED, MASK, OUTSIDE, OpenBlocks, View
from blockdiff.decode.expression import PARTS, changed, parse
from blockdiff.decode.policy import Policy, one_step
from blockdiff.decode.registry import POLICIES, TABLE, named
from blockdiff.decode.sampling import Sampling, SamplingBatch, gumbel, propose

__all__ = [
    "FILLED",
    "FIXED",
    "MASK",
    "OUTSIDE",
    "PARTS",
    "POLICIES",
    "TABLE",
    "OpenBlocks",
    "Policy",
    "Sampling",
    "SamplingBatch",
    "View",
    "changed",
    "gumbel",
    "named",
    "one_step",
    "parse",
    "propose",
]
