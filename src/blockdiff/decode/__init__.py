"""Decoding policies: pure tensor functions over rows and positions."""

from blockdiff.decode.policy import POLICIES, Policy, fill, random_order
from blockdiff.decode.sampling import Sampling, SamplingBatch, propose

__all__ = ["POLICIES", "Policy", "Sampling", "SamplingBatch", "fill", "propose", "random_order"]
