"""What a server allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blockdiff.engine import Limits
from blockdiff.model import BlockDiffusionModel

_MEMORY_SHARE = 0.25  # of the free memory, for keys and values


@dataclass(frozen=True)
class Settings:
    """name: of the model, in requests and answers; api_keys: any of them is accepted, none are asked for where empty;
    max_tokens: of one text (0: the model's context); largest_block: block size (0: the largest that training had);
    choices: texts of one request; threads: of a pass (0: one or all processors, whichever is faster); running, waiting:
    texts served at once, and beyond them; timeout: seconds for a request, from its last byte to its last token;
    body_bytes, body_seconds: of a request's body; send_seconds: after which a stream that nobody takes is ended;
    keep_alive: seconds between comments in a silent stream; grace: seconds for running requests after a stop; hosts:
    names that the Host header may have (empty: any); origins: of other sites' pages that may call (CORS);
    strict_coverage: refuse what training does not cover; log_prompts: whether prompts and texts go into the log."""

    name: str
    api_keys: tuple[str, ...] = ()
    max_tokens: int = 0
    largest_block: int = 0
    choices: int = 16
    threads: int = 0
    running: int = 64
    waiting: int = 256
    timeout: float = 300.0
    body_bytes: int = 2**20
    body_seconds: float = 20.0
    send_seconds: float = 30.0
    keep_alive: float = 15.0
    grace: float = 20.0
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    strict_coverage: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ValueError(f"--name {self.name!r}: give a name of printable characters")
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable() and key and " " not in key):
                raise ValueError("--api-key: give printable ASCII characters without spaces")
        above = ("choices", "running", "body_bytes", "timeout", "body_seconds", "send_seconds", "keep_alive")
        for name in (*above, "max_tokens", "largest_block", "threads", "waiting", "grace"):
            value, least = getattr(self, name), "above 0" if name in above else "of 0 or more"
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name not in above))):
                raise ValueError(f"serve: {name} is {value}; give a number {least}")


def engine_limits(model: BlockDiffusionModel, settings: Settings, cache_tokens: int, free_bytes: int) -> Limits:
    """The engine's limits: room for `cache_tokens` tokens of keys and values, or (0) for as many as all running texts
    may need, up to a quarter of the free memory."""
    tokens = cache_tokens
    if not tokens:
        wanted = settings.running * model.context_length
        tokens = max(min(wanted, int(_MEMORY_SHARE * free_bytes) // bytes_per_token(model)), 2 * model.context_length)
    size = Limits().page_size
    return Limits(pages=max(-(-tokens // size), 1), requests=settings.running)


def bytes_per_token(model: BlockDiffusionModel) -> int:
    """Memory of one token's keys and values in all layers."""
    config = model.backbone.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(model.backbone.parameters()).element_size()
    return int(2 * config.num_hidden_layers * heads * width * size)
