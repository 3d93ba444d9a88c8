"""What a model can be asked for, as /v1/models tells and the page offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from blockdiff.api import Model
from blockdiff.decode import Sampling
from blockdiff.decode.counts import Threshold
from blockdiff.decode.registry import TABLE
from blockdiff.engine import Request
from blockdiff.serve.settings import Settings

_LEAST_SHARE = 1e-3  # of training's tokens, for a block size to be offered


def capabilities(model: Model, check: Callable[[Request], None], settings: Settings) -> dict[str, Any]:
    """Its block sizes, policies and limits, JSON-ready."""
    request = Request(prompt=(0,), max_new_tokens=1, sampling=Sampling(temperature=1.0))
    policies = [
        {
            "name": name,
            "parts": entry.composition,
            "note": entry.note,
            "threshold": any(isinstance(count, Threshold) for count in entry.policy.counts),
        }
        for name, entry in TABLE.items()
        if _serves(check, replace(request, policy=entry.policy))
    ]
    sizes = block_sizes(model, settings)
    return {
        "diffusion": model.spec.is_diffusion,
        "context_length": model.context_length,
        "max_tokens": min(settings.max_tokens or model.context_length, model.context_length),
        "default_block_size": min(model.spec.default_block_size, sizes[-1]),
        "block_sizes": sizes,
        "lossless": _serves(check, replace(request, lossless=True)),
        "chat": bool(model.tokenizer is not None and model.tokenizer.chat_template),
        "policies": policies,
    }


def block_sizes(model: Model, settings: Settings) -> list[int]:
    """Sizes worth offering: 1, the default, and the powers of two that training had, as far as they are allowed."""
    spec = model.spec
    sizes = {1, spec.default_block_size}
    if spec.is_diffusion and spec.trained_length:
        share = spec.layout.token_share(spec.trained_length)
        powers = (2**k for k in range(1, spec.trained_length.bit_length()))
        sizes |= {size for size in powers if size < len(share) and float(share[size]) > _LEAST_SHARE}
    most = settings.largest_block
    return sorted(size for size in sizes if not most or size <= most)


def _serves(check: Callable[[Request], None], request: Request) -> bool:
    try:
        check(request)
    except ValueError:
        return False
    return True
