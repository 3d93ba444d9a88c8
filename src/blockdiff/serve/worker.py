"""The engine in a thread of its own: texts are asked for and given up from the event loop, and what happens to them
comes back there.

The thread takes what the loop has asked between two steps of the engine, so a text that is given up is out of the
engine, and its pages free, before the next step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from blockdiff.decode.pieces import PieceReader
from blockdiff.engine import Engine, Job, Output, Request, Step
from blockdiff.engine.network import prepared
from blockdiff.engine.stream import TextStream
from blockdiff.serve.warming import trial, warm_up

log = logging.getLogger("blockdiff.serve")
_STATS_SECONDS = 0.25
_LEAST = -9999.0  # log-probability, since JSON knows neither infinity nor NaN


@dataclass(frozen=True)
class Token:
    """A final token: the text that it adds, the step of its block that filled it, its log-probability then."""

    text: str
    step: int
    log_probability: float


@dataclass(frozen=True)
class Piece:
    """Final text of a text's open end: tokens (where details are wanted) from place `start` on; forwards so far."""

    text: str
    start: int
    tokens: tuple[Token, ...]
    forwards: int


@dataclass(frozen=True)
class Draft:
    """An open block as it stands: the text of each token, None where still masked. Never final."""

    start: int
    step: int
    tokens: tuple[str | None, ...]
    forwards: int


@dataclass(frozen=True)
class Done:
    """A text is whole, or was ended early for a `reason` that the client should know."""

    output: Output
    reason: str = ""


@dataclass(frozen=True)
class Fault:
    """The engine failed on it."""

    message: str


Event = Piece | Draft | Done | Fault


@dataclass(frozen=True)
class Stats:
    """The engine as the last step left it."""

    running: int = 0
    waiting: int = 0
    pages: int = 0
    iterations: int = 0
    preemptions: int = 0


@dataclass(eq=False)
class Ticket:
    """A text that was asked for. deliver is called in the event loop."""

    request: Request
    deliver: Callable[[Event], None]
    detailed: bool
    drafts: bool
    job: Job | None = None
    text: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    told: int = 0  # tokens
    stream: TextStream | None = None


class Worker:
    """Runs the engine of a model until it is stopped. threads: of a pass (0: what is faster); on_death: called in the
    event loop where the thread ends by a fault. Raises ValueError where the engine has no room for any text."""

    def __init__(self, make_engine: Callable[[], Engine], threads: int = 0) -> None:
        self._threads = threads
        self._make = make_engine
        self.engine = make_engine()
        self.engine.check(trial(self.engine.model))
        self.died = False
        self.on_death: Callable[[], None] = lambda: None
        self.stats = Stats()
        self._pieces = PieceReader(self.engine.tokenizer)
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the number of their job
        self._outbox: list[tuple[Ticket, Event]] = []
        self._stopped = False
        self._counted_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- from the event loop

    def start(self) -> None:
        """Begin; what happens is delivered in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs now; what is unfinished is dropped."""

        def stop() -> None:
            self._stopped = True

        self._orders.put(stop)
        self._thread.join()

    def check(self, request: Request) -> None:
        """Refuse what the engine cannot serve: ValueError."""
        self.engine.check(request)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Ask for texts, which enter the engine together."""
        self._orders.put(lambda: self._add(tickets))

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Give texts up; those that are done are left alone."""
        self.end(tickets, "disconnect")

    def end(self, tickets: Sequence[Ticket], reason: str) -> None:
        """End texts with what is final by now, and say why."""
        self._orders.put(lambda: self._end(tickets, reason))

    # ---- in the thread

    def _run(self) -> None:
        try:
            with prepared(self.engine.model):
                log.info("%d threads", warm_up(self.engine, self._threads))
                while not self._stopped:
                    self._round()
        except BaseException:
            log.exception("the engine's thread ended")
            self.died = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.on_death)

    def _round(self) -> None:
        if not self.engine.busy:
            self._send()
            self._count(always=True)
            self._orders.get()()
        while not self._orders.empty():
            self._orders.get()()
        if self.engine.busy and not self._stopped:
            self._step()
        self._send()
        self._count()

    def _step(self) -> None:
        try:
            finished = self.engine.step()
            for ticket in self._tickets.values():
                self._tell(ticket)
        except Exception as error:  # whatever it is, the server goes on with an engine that is whole
            log.exception("the engine failed; its %d running texts are lost, and it is built anew", len(self._tickets))
            for ticket in self._tickets.values():
                self._outbox.append((ticket, Fault(f"the engine failed on this request ({type(error).__name__})")))
            self._tickets.clear()
            self.engine = self._make()
            return
        for job in finished:
            if job.number in self._tickets:
                assert job.output is not None
                self._outbox.append((self._tickets.pop(job.number), Done(job.output)))

    def _add(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            on_step = ticket.steps.append if ticket.drafts else None
            try:
                ticket.job = self.engine.add(ticket.request, ticket.text.append, on_step)
            except Exception as error:  # it was checked before, so this is a fault of ours
                log.exception("the engine refused a request that was checked")
                self._outbox.append((ticket, Fault(str(error))))
                continue
            ticket.stream = TextStream(self.engine.tokenizer, ticket.request.prompt, ticket.request.stop)
            self._tickets[ticket.job.number] = ticket

    def _drop(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Take texts out of the engine; returns those that were in it."""
        live = []
        for ticket in tickets:
            if ticket.job is not None and ticket.job.number in self._tickets:
                del self._tickets[ticket.job.number]
                self.engine.cancel(ticket.job)
                live.append(ticket)
        return live

    def _end(self, tickets: Sequence[Ticket], reason: str) -> None:
        for ticket in self._drop(tickets):
            assert ticket.job is not None
            output = ticket.job.so_far or Output()
            output.finish_reason = "length"
            output.seconds = time.perf_counter() - ticket.job.began
            self._outbox.append((ticket, Done(output, reason)))

    # ---- what is told

    def _tell(self, ticket: Ticket) -> None:
        """What a step has brought: drafts first, as they came before the text that they became."""
        assert ticket.job is not None
        output = ticket.job.so_far
        if output is None:
            return
        for step in ticket.steps:
            start = step.start - len(ticket.request.prompt)
            texts = tuple(None if token is None else self._pieces.text(token) for token in step.tokens)
            self._outbox.append((ticket, Draft(start, step.step, texts, output.forwards)))
        ticket.steps.clear()
        if not ticket.text and len(output.tokens) == ticket.told:
            return
        text, start = "".join(ticket.text), ticket.told
        tokens: tuple[Token, ...] = ()
        ticket.text.clear()
        if ticket.detailed:
            tokens = self._details(ticket, output)
            text = "".join(token.text for token in tokens) + self._rest(ticket, output)
        ticket.told = len(output.tokens)
        self._outbox.append((ticket, Piece(text, start, tokens, output.forwards)))

    def _details(self, ticket: Ticket, output: Output) -> tuple[Token, ...]:
        """The new tokens, each with the text that it adds (the last one of a character has all of it)."""
        assert ticket.stream is not None
        found, whole = [], bool(output.finish_reason)
        for at in range(ticket.told, len(output.tokens)):
            last = whole and at + 1 == len(output.tokens)
            if not (last and output.finish_reason == "end"):
                ticket.stream.feed(output.tokens[: at + 1])
            text = ticket.stream.new_text(final=last)
            value = output.log_probabilities[at]
            found.append(Token(text, output.steps[at], value if value > _LEAST else _LEAST))
        return tuple(found)

    @staticmethod
    def _rest(ticket: Ticket, output: Output) -> str:
        """Text that was held back until its end was certain."""
        assert ticket.stream is not None
        return ticket.stream.new_text(final=True) if output.finish_reason else ""

    def _send(self) -> None:
        """Hand over what has happened, with one wake-up of the loop."""
        if self._outbox and self._loop is not None:
            batch, self._outbox = self._outbox, []
            try:
                self._loop.call_soon_threadsafe(_hand_over, batch)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._stopped = True

    def _count(self, *, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self._counted_at > _STATS_SECONDS:
            self._counted_at = now
            engine = self.engine
            self.stats = Stats(
                engine.running, engine.waiting, engine.pages.in_use, engine.iterations, engine.preemptions
            )


def _hand_over(batch: Sequence[tuple[Ticket, Event]]) -> None:
    for ticket, event in batch:
        ticket.deliver(event)
