"""Uniform numbers that are a pure function of integer keys.

Noise in evaluation and sampling in decoding must not depend on how requests or documents are batched.
So every number is `uniform(seed, key, key, ...)`: the keys (a document, an absolute position, a step) say
*which* number it is, and the same keys always give the same number, on any device and in any batch.

The mixer is SplitMix64's finaliser (Steele, Lea & Flood 2014), applied once for each key.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; clearing the copied sign bits makes it the logical shift the mixer needs
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(*keys: int | Tensor) -> Tensor:
    """Independent float64 numbers in the open interval (0, 1), one for each combination of keys.

    `keys` are integers or int64 tensors that broadcast against each other; the result has the broadcast shape.
    """
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        key = key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int64)
        if key.device != state.device and state.dim() == 0:
            state = state.to(key.device)
        state = _mix(state * 31 + key.to(torch.int64) + _GOLDEN)
    return (_shift_right(_mix(state + _GOLDEN), 11).to(torch.float64) + 0.5) * 2.0**-53
