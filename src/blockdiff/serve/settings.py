"""What a server allows."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
