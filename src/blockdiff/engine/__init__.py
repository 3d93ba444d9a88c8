"""The engine: requests in, text out."""

from blockdiff.engine.drafting import can_draft_ahead
from blockdiff.engine.request import Output, Request, Step
from blockdiff.engine.runner import generate

__all__ = ["Output", "Request", "Step", "can_draft_ahead", "generate"]
