"""What a Prometheus server reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from blockdiff.engine import Output
from blockdiff.serve.worker import Stats, Worker

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_RATIOS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_REASONS = ("end", "stop", "length", "timeout", "shutdown", "disconnect", "fault")
_TOKENS = ("prompt", "cached_prompt", "completion")
_FORWARDS = ("denoise", "commit", "verify")


class Metrics:
    """The server's own numbers, in a registry of their own."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        own = self._registry = CollectorRegistry()
        own.register(self)
        self.requests = Counter(
            "blockdiff_requests", "Requests answered, by route and status.", ["route", "status"], registry=own
        )
        self.open = Gauge("blockdiff_open_requests", "Requests that are not answered yet.", registry=own)
        self.ended = Counter("blockdiff_texts", "Texts that ended, by reason.", ["reason"], registry=own)
        self.tokens = Counter("blockdiff_tokens", "Tokens read and written.", ["kind"], registry=own)
        self.forwards = Counter("blockdiff_forwards", "Forwards of texts, by kind.", ["kind"], registry=own)
        self.seconds = Histogram("blockdiff_text_seconds", "Seconds of a text.", buckets=_SECONDS, registry=own)
        self.first = Histogram(
            "blockdiff_first_text_seconds", "Seconds to the first final text.", buckets=_SECONDS, registry=own
        )
        self.tpf = Histogram(
            "blockdiff_tokens_per_forward", "Tokens per forward, commits counted.", buckets=_RATIOS, registry=own
        )
        self.steps = Histogram("blockdiff_steps_per_block", "Denoising steps.", buckets=_RATIOS, registry=own)
        for counter, labels in ((self.ended, _REASONS), (self.tokens, _TOKENS), (self.forwards, _FORWARDS)):
            for label in labels:
                counter.labels(label)  # so that each is there from the beginning

    def text(self, output: Output, prompt_tokens: int, reason: str) -> None:
        """Count a text that ended. reason: why, where it was ended from outside."""
        self.ended.labels(reason or output.finish_reason).inc()
        self.tokens.labels("prompt").inc(prompt_tokens)
        self.tokens.labels("cached_prompt").inc(output.cached_tokens)
        self.tokens.labels("completion").inc(len(output.tokens))
        for kind in _FORWARDS:
            self.forwards.labels(kind).inc(getattr(output, f"{kind}_forwards"))
        self.seconds.observe(output.seconds)
        if output.forwards:
            self.tpf.observe(output.tokens_per_forward)
        for steps in output.steps_per_block:
            self.steps.observe(steps)

    def collect(self) -> Iterable[Metric]:
        """The engine's state, read when asked for (prometheus-client calls this)."""
        stats: Stats = self._worker.stats
        engine = self._worker.engine
        for name, value, says in (
            ("running", stats.running, "Texts in the engine."),
            ("waiting", stats.waiting, "Texts that wait for room."),
            ("pages_in_use", stats.pages, "Pages of keys and values that texts hold."),
            ("pages", engine.pages.count, "Pages there are."),
            ("iterations", stats.iterations, "Passes of the network so far."),
            ("preemptions", stats.preemptions, "Texts put back for want of pages so far."),
        ):
            yield GaugeMetricFamily(f"blockdiff_{name}", says, value=value)

    def page(self) -> bytes:
        return generate_latest(self._registry)
