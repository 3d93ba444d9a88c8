"""Requests between the event loop and the engine: places, deadlines, and what is sent of each."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from sse_starlette import ServerSentEvent
from starlette.requests import Request as HttpRequest

from blockdiff.engine import Output
from blockdiff.serve.guards import error_of
from blockdiff.serve.metrics import Metrics
from blockdiff.serve.orders import Order, Refused
from blockdiff.serve.replies import Reply
from blockdiff.serve.settings import Settings
from blockdiff.serve.worker import Done, Draft, Event, Fault, Piece, Ticket, Worker

_LOOK_SECONDS = 1.0  # between looks at whether the engine still runs
_ENDED = "the engine has ended by a fault; the server stops"
log = logging.getLogger("blockdiff.serve")


class Desk:
    """Takes orders while there are places, and answers them."""

    def __init__(self, worker: Worker, settings: Settings, metrics: Metrics) -> None:
        self.worker, self.settings, self.metrics = worker, settings, metrics
        self.stopping = False
        self._visits: set[Visit] = set()
        metrics.open.set_function(lambda: len(self._visits))
        self._recent: deque[float] = deque([1.0], maxlen=32)  # seconds of the last texts

    @property
    def texts(self) -> int:
        """Texts that have a place."""
        return sum(visit.open for visit in self._visits)

    @property
    def wait(self) -> int:
        """Seconds after which a place may be free: those that the texts before took, as often as the queue is long."""
        mean = sum(self._recent) / len(self._recent)
        return min(max(math.ceil(mean * self.settings.waiting / self.settings.running), 1), 60)

    def look(self, texts: int) -> None:
        """Raises Refused where so many texts have no place, or the server stops."""
        most = self.settings.running + self.settings.waiting
        if self.stopping or self.worker.died:
            raise Refused("the server is stopping", status=503, code="stopping", wait=5)
        if self.texts + texts > most:
            text = f"{self.texts} texts are being written or wait, of {most} possible; try again in {self.wait} s"
            raise Refused(text, status=429, code="queue_full", wait=self.wait)

    def open(self, order: Order) -> Visit:
        """Hand an order to the engine. Raises Refused as `look` does."""
        self.look(len(order.requests))
        visit = Visit(self, order)
        self._visits.add(visit)
        self.worker.submit(visit.tickets)
        return visit

    def close(self, visit: Visit) -> None:
        """Whatever of it still runs is given up."""
        self._visits.discard(visit)
        if visit.open:
            self.worker.cancel(visit.tickets)

    def ended(self, visit: Visit, index: int, output: Output, reason: str) -> None:
        self._recent.append(time.perf_counter() - visit.began)
        if self.settings.log_prompts:
            prompt = self.worker.engine.tokenizer.decode(visit.order.requests[index].prompt)
            log.info("%s %d prompt %r text %r", visit.reply.id, index, prompt, output.text)
        self.metrics.text(output, len(visit.order.requests[index].prompt), reason)

    async def stop(self) -> None:
        """Take nothing more; after the time of grace end what still runs with what it has."""
        self.stopping = True
        deadline = time.monotonic() + self.settings.grace
        while self._visits and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for visit in list(self._visits):
            self.worker.end(visit.tickets, "shutdown")


class Visit:
    """One HTTP request at the desk."""

    def __init__(self, desk: Desk, order: Order) -> None:
        self.desk, self.order = desk, order
        self.reply = Reply(order, desk.settings.name)
        self.began = time.perf_counter()
        self.open = self._unread = len(order.requests)  # texts that the engine has not ended, and whose end is unread
        self._inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._timed_out = False
        self.tickets = [
            Ticket(request, partial(self._deliver, index), order.detailed, order.drafts)
            for index, request in enumerate(order.requests)
        ]

    def _deliver(self, index: int, event: Event) -> None:
        """From the engine, whether or not somebody still reads: an ended text is counted, and its place is free."""
        if isinstance(event, Done):
            self.desk.ended(self, index, event.output, event.reason)
        if isinstance(event, Fault):
            self.desk.metrics.ended.labels("fault").inc()
        self.open -= isinstance(event, Done | Fault)
        self._inbox.put_nowait((index, event))

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens to the texts, until all have ended; at the deadline they are ended."""
        deadline = self.began + self.desk.settings.timeout
        first = True
        while self._unread:
            left = deadline - time.perf_counter()
            try:
                async with asyncio.timeout(_LOOK_SECONDS if self._timed_out else min(max(left, 0), _LOOK_SECONDS)):
                    index, event = await self._inbox.get()
            except TimeoutError:
                if self.desk.worker.died:
                    raise Refused(_ENDED, status=500, code="engine_fault") from None
                if not self._timed_out and time.perf_counter() >= deadline:
                    self._timed_out = True
                    self.desk.worker.end(self.tickets, "timeout")
                continue
            if isinstance(event, Piece) and first:
                first = False
                self.desk.metrics.first.observe(time.perf_counter() - self.began)
            if isinstance(event, Fault):
                raise Refused(event.message, status=500, code="engine_fault")
            if isinstance(event, Done):
                self._end(index, event)
            yield index, event

    def _end(self, index: int, event: Done) -> None:
        self._unread -= 1
        self.reply.choices[index].output = event.output
        says = {
            "timeout": f"ended early: a request may take {self.desk.settings.timeout:g} s here",
            "shutdown": "ended early: the server stops",
        }
        if event.reason in says and says[event.reason] not in self.reply.warnings:
            self.reply.warnings.append(says[event.reason])

    def _refuse_if_never_begun(self) -> None:
        """Raises Refused where the time was up before the engine had a place."""
        outputs = [choice.output for choice in self.reply.choices if choice.output is not None]
        if self._timed_out and not any(output.forwards or output.tokens for output in outputs):
            text = f"the server was too busy to begin this request within {self.desk.settings.timeout:g} s"
            raise Refused(text, status=429, code="queue_full", wait=self.desk.wait)

    # ---- the two ways to answer

    async def whole(self, http: HttpRequest) -> dict[str, Any] | None:
        """The whole answer; None where the client has gone away."""
        gone = asyncio.create_task(_gone(http))
        writing = asyncio.create_task(self._write())
        try:
            await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                return None
            writing.result()
            self._refuse_if_never_begun()
            return self.reply.whole()
        finally:
            gone.cancel()
            writing.cancel()
            self.desk.close(self)

    async def _write(self) -> None:
        async for index, event in self._events():
            if isinstance(event, Piece):
                self.reply.take(index, event)

    async def stream(self) -> AsyncIterator[ServerSentEvent]:
        """The answer piece by piece. Who reads it closes the visit."""
        try:
            for index in range(len(self.reply.choices)):
                yield _sent(self.reply.first(index))
            async for index, event in self._events():
                if isinstance(event, Piece) and (chunk := self.reply.piece(index, event)) is not None:
                    yield _sent(chunk)
                elif isinstance(event, Draft):
                    yield _sent(self.reply.draft(index, event), "draft")
                elif isinstance(event, Done):
                    yield _sent(self.reply.last(index))
            self._refuse_if_never_begun()
            if self.order.include_usage:
                yield _sent(self.reply.usage_chunk())
            yield ServerSentEvent("[DONE]", sep="\n")
        except Refused as refusal:
            yield _sent(error_of(refusal.status, refusal.message, refusal.param, refusal.code))


def _sent(chunk: dict[str, Any], event: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")), event=event, sep="\n")


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
