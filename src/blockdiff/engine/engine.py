"""Continuous batching: requests join and leave between passes, and every pass serves all of them.

One iteration is one ragged forward: parts of prompts are read, finished blocks committed, drafts verified and open
blocks denoised, each request at its own place. A request is admitted, first come first served, when there are pages for
its prompt and its first block; where pages run out, the one that came last gives up its own between two blocks and is
admitted again later. Its text does not change: it is a function of the request and its final tokens.

A prompt that begins like one that was read before takes that one's pages (`engine.pages`); one that begins like a
prompt that is being read waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from blockdiff.decode import MASK
from blockdiff.engine.checks import check
from blockdiff.engine.entry import Entry, OnStep, OnText, Phase
from blockdiff.engine.limits import Limits, rope_follows_length, slots_for_block, slots_of
from blockdiff.engine.network import Network
from blockdiff.engine.pack import Pack
from blockdiff.engine.pages import OutOfPages, Pages, Table
from blockdiff.engine.request import Output, Request, Step
from blockdiff.engine.rows import Kind, Rows
from blockdiff.engine.search import best_of, particles, refined, refinement, resample
from blockdiff.engine.share import Share
from blockdiff.engine.stream import TextStream
from blockdiff.model import BlockDiffusionModel


@dataclass
class Job:
    """A request that was handed in: its rows (several where it searches), and its output once it is done."""

    number: int
    request: Request
    on_text: OnText | None
    on_step: OnStep | None
    entries: list[Entry] = field(default_factory=list)
    output: Output | None = None
    draft: Output | None = None
    began: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    blocks: int = 0  # that particles have finished together

    @property
    def silent(self) -> bool:
        """Whether text is shown at the end only: it may still change."""
        return self.request.policy.search is not None or self.request.policy.refine is not None

    @property
    def so_far(self) -> Output | None:
        """What is final by now; None while all of it may still change."""
        return self.output or (None if self.silent else self.entries[0].output)


class Engine:
    """Serves requests: `add` them, `step` until they are done, `cancel` what is no longer wanted."""

    def __init__(self, model: BlockDiffusionModel, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: load it from a directory that holds one")
        if rope_follows_length(model):  # what shares a pass with a request would turn its positions
            limits = replace(limits, requests=1, sharing=False)
        self.model, self.limits, self.device = model, limits, model.device
        self.tokenizer = model.tokenizer
        self.pages = Pages(limits.pages, limits.page_size)
        self.network = Network.of(model)
        self.network.refresh(model)
        self.iterations = 0
        self.preemptions = 0
        self.prompt_tokens = 0  # that were read, and that were found in shared pages
        self.shared_tokens = 0
        self._jobs: dict[int, Job] = {}
        self._waiting: list[tuple[Job, Entry]] = []
        self._groups: dict[Kind, Rows] = {}
        self._count = 0
        self._idle = 0
        self._told: deque[tuple[Job, Callable[[Any], None], Any]] = deque()
        self._block_causal = model.spec.clean_context == "block_causal"

    # ---- the outside

    def add(self, request: Request, on_text: OnText | None = None, on_step: OnStep | None = None) -> Job:
        """Hand in a request. Raises ValueError for one that the model, or this engine's memory, cannot serve."""
        self.check(request)
        job = Job(self._count, request, on_text, on_step)
        self._count += 1
        self._jobs[job.number] = job
        self._enlist(job, request)
        return job

    def check(self, request: Request) -> None:
        """Refuse what the model, or this engine's memory, cannot serve: ValueError. From any thread."""
        check(self.model, request)
        if (most := slots_of(self.model, request, self.limits)) > self.limits.pages * self.limits.page_size:
            raise ValueError(
                f"the request needs room for {most} tokens and the engine's memory holds "
                f"{self.limits.pages * self.limits.page_size}; ask for less, or give the engine more pages"
            )

    def cancel(self, job: Job) -> None:
        """Forget a request; its pages are free at once. Between steps, or from a callback."""
        job.cancelled = True
        self._jobs.pop(job.number, None)
        self._waiting = [(other, entry) for other, entry in self._waiting if other is not job]
        for entry in job.entries:
            entry.phase = Phase.DONE
            self._release(entry)
        self._sweep()

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    @property
    def running(self) -> int:
        """Rows that hold pages."""
        return sum(len(rows.entries) for rows in self._groups.values())

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """One iteration; returns the jobs that it finished."""
        began = time.perf_counter()
        finished = [*self._sweep()]
        self._admit()
        self._open()
        finished += self._sweep()
        shares, budget = [], self.limits.clean_tokens
        for rows in self._groups.values():
            share = Share.of(rows, budget)
            budget -= len(share.clean_at)
            if share.count:
                shares.append(share)
        if shares:
            self._run(shares)
            self.iterations += 1
            seconds = time.perf_counter() - began
            for share in shares:
                if share.rows.pace is not None:
                    share.rows.pace.tick(share.kept, seconds)
        finished += self._sweep()
        self._idle = 0 if shares or finished else self._idle + 1
        if self.busy and self._idle > 100:
            raise RuntimeError("the engine has requests and serves none of them: a fault of its own, please report it")
        self._call()
        return finished

    def _tell(self, job: Job, call: Callable[[Any], None], what: Any) -> None:
        self._told.append((job, call, what))

    def _call(self) -> None:
        """Callbacks, when the iteration is whole: they may raise, or cancel."""
        while self._told:
            job, call, what = self._told.popleft()
            if not job.cancelled:
                call(what)

    # ---- entering

    def _enlist(self, job: Job, request: Request) -> None:
        for own in particles(request):
            stream = TextStream(self.tokenizer, own.prompt, own.stop)
            on_text = None if job.silent or job.on_text is None else partial(self._tell, job, job.on_text)
            on_step = None if job.silent or job.on_step is None else partial(self._tell, job, job.on_step)
            entry = Entry(own, job.number, self.model.context_length, stream, on_text, on_step)
            job.entries.append(entry)
            self._waiting.append((job, entry))

    def _admit(self) -> None:
        """Take in who has waited longest, while there are pages; nobody overtakes. Particles come in together."""
        reading = [entry for rows in self._groups.values() for entry in rows.entries if entry.pending > 1]
        while self._waiting:
            job = self._waiting[0][0]
            own = [entry for other, entry in self._waiting if other is job]
            if self.running and self.running + len(own) > self.limits.requests:
                return
            marks = own[0].marks(self._block_causal)
            if len(own) == 1 and self.limits.sharing and self._comes(marks[:-1], reading):
                return
            if not all(self._reserved(entry) for entry in own):
                for entry in own:
                    self._release(entry)
                return
            self._waiting = [(other, entry) for other, entry in self._waiting if other is not job]
            for entry in own:
                self._enter(entry)
            reading += own

    def _enter(self, entry: Entry) -> None:
        kind = Kind.of(self.model, entry.request)
        self.shared_tokens += entry.table.written
        if not entry.output.tokens:
            entry.output.cached_tokens = entry.table.written
        self.prompt_tokens += entry.pending
        if entry.phase is not Phase.MEET:
            left = entry.pending - kind.lag
            at_once = not kind.first_known and (left <= 0 or (self.limits.fused and left <= self.limits.clean_tokens))
            entry.phase = Phase.OPEN if at_once else Phase.FEED
        if kind not in self._groups:
            self._groups[kind] = Rows(self.model, kind)
        self._groups[kind].join(entry)

    def _comes(self, marks: Sequence[Any], reading: list[Entry]) -> bool:
        """Whether a longer beginning of these tokens than is filed now is being read for somebody else."""
        filed, size = self.pages.matched(marks), self.limits.page_size
        for entry in reading:
            theirs = entry.marks(self._block_causal)
            end = (filed // size + 1) * size
            if len(theirs) >= end and list(marks[:end]) == list(theirs[:end]) and entry.table.written < end:
                return True
        return False

    def _reserved(self, entry: Entry) -> bool:
        """Give an entry its pages, shared ones first; False where there are too few."""
        marks = entry.marks(self._block_causal)
        if self.limits.sharing and not entry.guided:
            self.pages.adopt(entry.table, marks[:-1])  # the last token is always read: what comes after it is wanted
        slots = max(slots_for_block(entry.request, len(entry.tokens)), self.limits.text_pages * self.limits.page_size)
        try:
            self.pages.reserve(entry.table, slots, packed=self.limits.text_pages > 0)
            if entry.guided:
                entry.shadow = Table()
                self.pages.reserve(entry.shadow, slots, packed=self.limits.text_pages > 0)
        except OutOfPages:
            return False
        return True

    # ---- blocks

    def _open(self) -> None:
        """Open the next block of every row that may, until each has something for the pass."""
        for kind in list(self._groups):
            rows = self._groups[kind]
            while True:
                self._meet(rows)
                ready = [row for row, entry in enumerate(rows.entries) if entry.phase is Phase.OPEN]
                ready = [row for row in ready if self._has_pages(rows.entries[row])]
                ready = [row for row in ready if rows.entries[row].phase is Phase.OPEN]
                if not ready:
                    break
                rows.open(ready)
                self._show(rows, ready)
                open_masks = (rows.blocks.status == MASK).any(1).tolist()
                self._finish(rows, [row for row in ready if not open_masks[row]])
                self._stop_spent(rows, ready)

    def _has_pages(self, entry: Entry) -> bool:
        """Pages for the next block. Where there are none, who came last goes back to the queue; until that is between
        two blocks, the others wait."""
        slots = slots_for_block(entry.request, len(entry.tokens))
        while True:
            try:
                self.pages.reserve(entry.table, slots)
                if entry.shadow is not None:
                    self.pages.reserve(entry.shadow, slots)
                return True
            except OutOfPages:
                pass
            others = [e for rows in self._groups.values() for e in rows.entries if e.phase is not Phase.DONE]
            last = max(others, key=lambda e: e.order)
            if last.phase not in (Phase.OPEN, Phase.FEED, Phase.MEET) and last is not entry:
                return False
            self._preempt(last)
            if last is entry:
                return False

    def _preempt(self, entry: Entry) -> None:
        """Take an entry's pages; it goes back to the queue with its tokens, and other particles of its with it."""
        job = self._jobs[entry.order]
        self.preemptions += 1
        place = sum(other.order <= entry.order for _, other in self._waiting)
        for number, own in enumerate(job.entries):
            if own.phase is not Phase.DONE:
                self._release(own)
                job.entries[number] = replace(own, table=Table(), shadow=None, size=0)
                self._waiting.insert(place, (job, job.entries[number]))
                place += 1
                own.phase = Phase.DONE

    def _finish(self, rows: Rows, done: list[int]) -> None:
        """Blocks with no mask left: drafts are verified next, the others delivered."""
        if not done:
            return
        if rows.kind.policy.planner is not None:
            inside = rows.blocks.inside.sum(1).tolist()
            for row in done:
                rows.entries[row].size = inside[row]
        if rows.kind.lossless:
            for row in done:
                rows.entries[row].phase = Phase.VERIFY
            return
        going = rows.delivered(done, [rows.entries[row].size for row in done])
        for row in done:
            entry = rows.entries[row]
            entry.phase = Phase.DONE
            if row in going and entry.spent:
                entry.cut_short()
            elif row in going:
                fused = self.limits.fused and not rows.kind.first_known
                entry.output.commit_forwards += not fused
                entry.output.positions += entry.size
                entry.phase = Phase.MEET if entry.request.policy.search else Phase.OPEN if fused else Phase.FEED

    def _stop_spent(self, rows: Rows, among: Sequence[int]) -> None:
        """End the texts whose open block would need a forward that they may not have."""
        for entry in (rows.entries[row] for row in among):
            if entry.spent and entry.phase in (Phase.DENOISE, Phase.VERIFY):
                entry.cut_short()
                entry.phase = Phase.DONE

    def _meet(self, rows: Rows) -> None:
        """Particles go on together: when all that live have finished their block, they may be resampled."""
        if rows.kind.policy.search is None:
            return
        fused = self.limits.fused and not rows.kind.first_known
        waiting = {job.number for job, _ in self._waiting}  # who was put back has no pages to be copied
        for job in self._jobs.values():
            if job.number in waiting:
                continue
            live = [entry for entry in job.entries if not entry.output.finish_reason]
            if live and all(entry.phase is Phase.MEET for entry in live):
                job.blocks += 1
                without = resample(live, job.request.seed, job.blocks, self.pages)
                for entry in live:
                    entry.phase = Phase.OPEN if fused else Phase.FEED
                if without:
                    self._preempt(live[0])

    # ---- the pass

    def _run(self, shares: list[Share]) -> None:
        pack = Pack.of(shares, self.pages, self.model)
        parts = pack.split(self.network.run(self.model, pack))
        for share, (clean, noisy) in zip(shares, parts, strict=True):
            done, ended = share.take(clean, noisy)
            for row in ended:
                share.rows.entries[row].phase = Phase.DONE
            self._show(share.rows, share.denoised)
            self._finish(share.rows, done)
            self._stop_spent(share.rows, share.denoised)
            for row, _ in share.fed:
                self._file(share.rows.entries[row])
            for row in share.verified:
                self._file(share.rows.entries[row])

    def _file(self, entry: Entry, *, ended: bool = False) -> None:
        """Offer what an entry has written to others."""
        size = self.limits.page_size
        if self.limits.sharing and not entry.guided and (ended or entry.table.written // size > entry.table.filed):
            self.pages.file(entry.table, entry.marks(self._block_causal), ended=ended)

    # ---- leaving

    def _sweep(self) -> list[Job]:
        """Let go of rows that are done; returns the jobs that this finishes."""
        for kind, rows in list(self._groups.items()):
            kept = [row for row, entry in enumerate(rows.entries) if entry.phase is not Phase.DONE]
            if len(kept) < len(rows.entries):
                for entry in rows.entries:
                    if entry.phase is Phase.DONE:
                        self._release(entry)
                rows.keep(kept)
            if not kept:
                del self._groups[kind]
        finished = []
        for job in list(self._jobs.values()):
            if all(entry.output.finish_reason for entry in job.entries) and self._done(job):
                del self._jobs[job.number]
                finished.append(job)
        return finished

    def _done(self, job: Job) -> bool:
        """Whether a job's rows are its end; one that refines begins its second stage."""
        output = best_of([entry.output for entry in job.entries])
        if job.draft is not None:
            output = refined(self.tokenizer, job.request, job.draft, output)
        elif job.request.policy.refine is not None and output.tokens:
            job.draft, job.entries = output, []
            self._enlist(job, refinement(job.request, output))
            return False
        job.output = output
        output.seconds = time.perf_counter() - job.began
        if job.silent and job.on_text is not None and output.text:
            self._tell(job, job.on_text, output.text)
        return True

    def _release(self, entry: Entry) -> None:
        if entry.table.pages:
            self._file(entry, ended=True)
            self.pages.release(entry.table)
        if entry.shadow is not None:
            self.pages.release(entry.shadow)

    def _show(self, rows: Rows, shown: Sequence[int]) -> None:
        for row in shown:
            entry = rows.entries[row]
            if entry.on_step is None:
                continue
            blocks, size = rows.blocks, entry.size
            ids, masked = blocks.ids[row, :size].tolist(), (blocks.status[row, :size] == MASK).tolist()
            tokens = tuple(None if hidden else token for token, hidden in zip(ids, masked, strict=True))
            entry.on_step(Step(entry.order, len(entry.tokens), int(blocks.step[row]), tokens))
