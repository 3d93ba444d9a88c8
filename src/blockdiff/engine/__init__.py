"""The engine: requests in, text out."""

from blockdiff.engine.drafting import can_draft_ahead
from blockdiff.engine.engine import Engine, Job
from blockdiff.engine.limits import Limits, limits_in
from blockdiff.engine.request import Output, Request, Step
from blockdiff.engine.runner import generate, generate_batches

__all__ = [
    "Engine",
    "Job",
    "Limits",
    "Output",
    "Request",
    "Step",
    "can_draft_ahead",
    "generate",
    "generate_batches",
    "limits_in",
]
