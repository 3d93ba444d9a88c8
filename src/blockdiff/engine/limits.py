"""What an engine may use, and what requests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockdiff.engine.request import Request
from blockdiff.engine.rows import Kind
from blockdiff.model import BlockDiffusionModel

_MEMORY_SHARE = 0.25  # of the free memory, for keys and values


@dataclass(frozen=True)
class Limits:
    """pages of page_size tokens: the memory for keys and values; clean_tokens: of prompts and blocks, in one pass;
    requests: served at once; fused: finished blocks are committed in their successor's first pass, where that is exact;
    sharing: texts that begin alike share pages; text_pages: every text gets so many pages at once, so that texts lie at
    equal distances and one call of attention reads them all (0: as many as its next block needs)."""

    pages: int = 4096
    page_size: int = 16
    clean_tokens: int = 2048
    requests: int = 256
    fused: bool = True
    sharing: bool = True
    text_pages: int = 0

    def __post_init__(self) -> None:
        for name in ("page_size", "clean_tokens", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits: {name} is {getattr(self, name)}; give 1 or more")
        if min(self.pages, self.text_pages) < 0:
            raise ValueError("limits: pages and text_pages cannot be negative")


def slots_for_block(request: Request, length: int) -> int:
    """Slots that a text of `length` tokens needs for its next block."""
    ahead = request.block_size if request.lossless and request.drafting != "policy" else request.stepwise
    return length + request.block_size * (1 + ahead)


def slots_of(model: BlockDiffusionModel, request: Request, limits: Limits) -> int:
    """Slots that a request may come to need."""
    end = min(len(request.prompt) + request.max_new_tokens, model.context_length)
    own = max(slots_for_block(request, end) + limits.page_size, limits.text_pages * limits.page_size)
    return texts_of(model, request) * own


def texts_of(model: BlockDiffusionModel, request: Request) -> int:
    """Texts that a request is: its particles, each with an unconditional twin where it is guided."""
    return (request.policy.search.count if request.policy.search else 1) * (1 + Kind.of(model, request).guided)


def limits_for(model: BlockDiffusionModel, requests: Sequence[Request], limits: Limits) -> Limits:
    """These limits with the pages that all the requests need at once: as many for every text, unless lengths differ so
    much that this would take twice the memory."""
    pages = [-(-slots_of(model, request, limits) // limits.page_size) for request in requests]
    texts = [texts_of(model, request) for request in requests]
    most = max(-(-count // own) for count, own in zip(pages, texts, strict=True))
    if most * sum(texts) <= 2 * sum(pages):
        return replace(limits, pages=most * sum(texts), text_pages=most)
    return replace(limits, pages=sum(pages))


def limits_in(model: BlockDiffusionModel, running: int, free_bytes: int, cache_tokens: int = 0) -> Limits:
    """Limits for so many texts at once: room for `cache_tokens` tokens of keys and values, or (0) for as many as all of
    them may need, up to a quarter of the free memory."""
    tokens = cache_tokens
    if not tokens:
        wanted = running * model.context_length
        tokens = max(min(wanted, int(_MEMORY_SHARE * free_bytes) // bytes_per_token(model)), 2 * model.context_length)
    return Limits(pages=max(-(-tokens // Limits().page_size), 1), requests=running)


def bytes_per_token(model: BlockDiffusionModel) -> int:
    """Memory of one token's keys and values in all layers."""
    config = model.backbone.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def rope_follows_length(model: BlockDiffusionModel) -> bool:
    """Whether transformers chooses the rotary frequencies of a pass by its largest position (longrope, dynamic)."""
    config = model.backbone.config.get_text_config(decoder=True)
    settings = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    nested = [value for own in settings for value in own.values() if isinstance(value, dict)]
    kinds = {own.get("rope_type", own.get("type")) for own in (*settings, *nested)}
    return bool(kinds & {"longrope", "dynamic"})
