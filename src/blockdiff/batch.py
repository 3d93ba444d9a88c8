"""Batch generation: every row of a file answered exactly once, by any number of processes that may be killed.

Processes share nothing but the output directory (`blockdiff.parts`): part p belongs to shard p % count. The answer to
row i is a function of the row, the options and seed + i, never of the sharding or of what was decoded beside it. Rows
are read one by one and enter the engine as places get free; what is held at a time are the texts being written and the
answers of parts that wait for one of them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from blockdiff.api import Model
from blockdiff.data import is_message
from blockdiff.datafiles import DataError, json_row, numbered_lines
from blockdiff.diffusion_gemma import DiffusionGemma, OneByOne
from blockdiff.engine import Engine, Output, Request, limits_in
from blockdiff.engine.network import prepared
from blockdiff.parts import Parts, Totals
from blockdiff.runtime import free_memory, record
from blockdiff.shards import WHOLE, Shard

OnProgress = Callable[["Progress"], None]
OnAnswer = Callable[[int, int], None]
Line = tuple[int, str, bytes]  # row number, name for messages, and what the file holds there
_SAMPLED = 64  # values of each weight that tell two models apart


@dataclass(frozen=True)
class Progress:
    """This process so far: rows of its share, those answered by now (before it began, too), its tokens and seconds."""

    rows: int
    answered: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """found: rows of this share that an earlier run had answered; own: what this process wrote in `seconds`; share:
    both; whole: the totals of all shares, None while a part is missing. uncovered: rows that training does not cover,
    and what it does not."""

    rows: int
    found: int
    own: Totals
    share: Totals
    whole: Totals | None
    seconds: float
    uncovered: int
    problem: str | None

    @property
    def tokens_per_second(self) -> float:
        return self.own.tokens / max(self.seconds, 1e-9)


def answer_file(
    model: Model | DiffusionGemma,
    input: Path,
    output: Path,
    *,
    regex: str | None = None,
    json_schema: str | None = None,
    strict_coverage: bool = False,
    shard: Shard = WHOLE,
    running: int = 64,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Outcome:
    """Answer a shard's rows of a .jsonl file ({"prompt"} or {"messages"}; "id", "max_new_tokens", "seed" and "stop" of
    their own) into a directory, where it goes on with what is missing.

    running: texts written at once; options: as `Model.request`. A row that cannot be served gets an error for an
    answer. Raises ValueError for options that the model cannot serve, DataError for an input or an output that cannot
    be used.
    """
    answerer = Answerer(
        model, running, regex=regex, json_schema=json_schema, strict_coverage=strict_coverage, **options
    )
    parts = answerer.open(input, output)
    held = Held.of(parts, shard)
    began = time.perf_counter()

    def tell(answered: int, tokens: int) -> None:
        if on_progress is not None:
            on_progress(Progress(held.rows, held.before.rows + answered, tokens, time.perf_counter() - began))

    found = answerer.answer(parts, lines_of(input, parts, held.missing), tell)
    return held.outcome(input, parts, found, time.perf_counter() - began)


@dataclass(frozen=True)
class Answered:
    """Totals of parts that were written, the rows that training does not cover, and what it does not of the first."""

    totals: Totals
    uncovered: int
    problem: str | None

    def __add__(self, other: Answered) -> Answered:
        return Answered(self.totals + other.totals, self.uncovered + other.uncovered, self.problem or other.problem)


@dataclass(frozen=True)
class Held:
    """A share before it is worked on: its rows, the totals of those that are answered, and the parts to do."""

    rows: int
    before: Totals
    missing: frozenset[int]

    @classmethod
    def of(cls, parts: Parts, shard: Shard) -> Held:
        mine = range(shard.number, len(parts), shard.count)
        found = {part: held[1] for part in mine if (held := parts.read(part)) is not None}
        rows = sum(len(parts.numbers(part)) for part in mine)
        return cls(rows, sum(found.values(), Totals()), frozenset(mine) - frozenset(found))

    def outcome(self, input: Path, parts: Parts, found: Answered, seconds: float) -> Outcome:
        """Merges the parts where all are there. Raises DataError where rows stayed without an answer."""
        share = self.before + found.totals
        if share.rows < self.rows:
            raise DataError(f"{input}: has fewer rows than when this began; leave it as it is, and run again")
        return Outcome(
            parts.rows,
            self.before.rows,
            found.totals,
            share,
            parts.merge(),
            seconds,
            found.uncovered,
            found.problem,
        )


class Answerer:
    """A model with an engine that answers rows into parts, as the options of `answer_file` say."""

    def __init__(
        self,
        model: Model | DiffusionGemma,
        running: int = 64,
        *,
        regex: str | None = None,
        json_schema: str | None = None,
        strict_coverage: bool = False,
        **options: Any,
    ) -> None:
        self.request = model.request(constraint=model.constraint(regex, json_schema), **options)
        self.engine = _engine(model, running, strict_coverage)
        self.engine.check(self.request)
        self.reader = _Reader(model, self.request, strict_coverage)
        self.running = running
        self.asked = {
            "model": _fingerprint(model),
            **_described(self.request),
            "regex": regex,
            "json_schema": json_schema,
            "strict_coverage": strict_coverage,
        }

    def open(self, input: Path, output: Path) -> Parts:
        """The parts of a run that begins or goes on. Raises DataError."""
        checksum, rows = _scan(input)
        asked = {"input": checksum, **self.asked}
        return Parts.open(output, rows, asked, record("generate", self.request.seed, file=str(input)))

    def answer(
        self, parts: Parts, lines: Iterable[Line], on_answer: OnAnswer = lambda answered, tokens: None
    ) -> Answered:
        """Answer rows and write every part that is whole; on_answer is told the rows and the written tokens so far."""
        work = _Work(self.reader, self.engine, parts, self.running, on_answer)
        with nullcontext() if isinstance(self.engine, OneByOne) else prepared(self.engine.model):
            work.serve(iter(lines))
        return Answered(work.written, work.uncovered, work.problem)


def lines_of(input: Path, parts: Parts, missing: Collection[int]) -> Iterator[Line]:
    """Every row that a missing part holds, in order."""
    last = max(missing, default=-1)
    for number, (at, line) in enumerate(numbered_lines(input)):
        part = number // parts.size
        if part > last:
            return
        if part in missing and number < parts.rows:
            yield number, f"{input.name}:{at}", line


class _Reader:
    """Makes requests of rows."""

    def __init__(self, model: Model | DiffusionGemma, request: Request, strict: bool) -> None:
        self.model, self.request, self.strict = model, request, strict
        self._known: dict[tuple[int, int], str | None] = {}

    def read(self, number: int, row: dict[str, Any]) -> tuple[Request, str | None]:
        """A row's request, and what training does not cover of it. Raises ValueError for a row that is none."""
        most, seed = row.get("max_new_tokens"), row.get("seed")
        stop = row.get("stop", list(self.request.stop))
        stop = [stop] if isinstance(stop, str) else stop
        for name, value in (("max_new_tokens", most), ("seed", seed)):
            if value is not None and type(value) is not int:
                raise ValueError(f"{name}: give a whole number")
        if not (isinstance(stop, list) and all(isinstance(text, str) for text in stop)):
            raise ValueError("stop: give a text or a list of them")
        request = replace(
            self.request,
            prompt=tuple(self._ids(row)),
            max_new_tokens=self.request.max_new_tokens if most is None else most,
            seed=self.request.seed + number if seed is None else seed,
            stop=tuple(stop),
        )
        return request, self._uncovered(request)

    def _ids(self, row: dict[str, Any]) -> list[int]:
        prompt, messages = row.get("prompt"), row.get("messages")
        if isinstance(prompt, str) and messages is None:
            return self.model.encode(prompt)
        if isinstance(messages, list) and messages and all(map(is_message, messages)) and prompt is None:
            return self.model.encode_chat(messages)
        raise ValueError("a row needs the text 'prompt', or 'messages' with role and content, and not both")

    def _uncovered(self, request: Request) -> str | None:
        lengths = len(request.prompt), request.max_new_tokens
        if len(request.prompt) >= self.model.context_length:  # refused for that
            return None
        if lengths not in self._known:
            self._known[lengths] = self.model.uncovered(request)
        problem = self._known[lengths]
        if problem is not None and self.strict:
            raise ValueError(problem)
        return problem


class _Work:
    """Rows on their way through the engine."""

    def __init__(
        self, reader: _Reader, engine: Engine | OneByOne, parts: Parts, running: int, on_answer: OnAnswer
    ) -> None:
        self.reader, self.engine, self.parts, self.most, self.on_answer = reader, engine, parts, running, on_answer
        self.running: dict[int, tuple[int, dict[str, Any]]] = {}  # by number of the job: the answer's row and beginning
        self.open: dict[int, dict[int, dict[str, Any]]] = {}  # by part: its answers so far
        self.written = Totals()
        self.answered = self.uncovered = 0
        self.problem: str | None = None

    def serve(self, lines: Iterator[Line]) -> None:
        while True:
            while len(self.running) < self.most and (item := next(lines, None)) is not None:
                self._enter(*item)
            if not self.running:
                return
            for job in self.engine.step():
                assert job.output is not None
                number, head = self.running.pop(job.number)
                self._answer(number, {**head, **_answer(job.request, job.output)})

    def _enter(self, number: int, name: str, line: bytes) -> None:
        head: dict[str, Any] = {"row": number}
        try:
            row = json_row(name, line)
            if "id" in row:
                head["id"] = row["id"]
            request, problem = self.reader.read(number, row)
            job = self.engine.add(request)
        except DataError as error:
            self._answer(number, {**head, "error": str(error)})
        except ValueError as error:
            self._answer(number, {**head, "error": f"{name}: {error}"})
        else:
            self.running[job.number] = (number, head)
            self.uncovered += problem is not None
            self.problem = self.problem or problem

    def _answer(self, number: int, answer: dict[str, Any]) -> None:
        part = number // self.parts.size
        answers = self.open.setdefault(part, {})
        answers[number] = answer
        self.answered += 1
        if len(answers) == len(self.parts.numbers(part)):
            self.written += self.parts.write(part, [answers[row] for row in sorted(answers)])
            del self.open[part]
        self.on_answer(self.answered, self.written.tokens)


def _answer(request: Request, output: Output) -> dict[str, Any]:
    """What is kept of an output: nothing that follows the clock or the batch."""
    return {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(request.prompt),
        "new_tokens": len(output.tokens),
        "forwards": output.forwards,
        "seed": request.seed,
    }


def _scan(input: Path) -> tuple[str, int]:
    """Checksum of a file's rows and their number. Raises DataError for a file that is none of rows."""
    if not input.is_file() or not input.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"--input {input}: give a file of rows that exists, .jsonl or .jsonl.gz")
    checksum, rows = hashlib.sha256(), 0
    for _, line in numbered_lines(input):
        checksum.update(line)
        rows += 1
    if not rows:
        raise DataError(f"--input {input}: no rows in it")
    return checksum.hexdigest(), rows


def _described(request: Request) -> dict[str, Any]:
    """The options that a request stands for, as JSON."""
    left_out = ("prompt", "constraint", "given", "policy", "sampling")
    own = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in left_out}
    return {"policy": str(request.policy), **vars(request.sampling), **own}


def _engine(model: Model | DiffusionGemma, running: int, strict_coverage: bool) -> Engine | OneByOne:
    if isinstance(model, Model):
        return Engine(model, limits_in(model, running, _free_memory(model)))
    model.request(strict_coverage=strict_coverage)  # which refuses it
    return OneByOne(model)


def _fingerprint(model: Model | DiffusionGemma) -> str:
    """Tells a model from another: its conventions, its vocabulary and template, and a sample of every weight."""
    assert model.tokenizer is not None
    network = model if isinstance(model, Model) else model.network
    conventions = model.spec if isinstance(model, Model) else model.network.config.to_json_string()
    vocabulary = sorted(model.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    checksum = hashlib.sha256(f"{conventions} {model.tokenizer.chat_template} {vocabulary}".encode())
    for name, weight in network.named_parameters():
        flat = weight.detach().flatten()
        at = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLED, len(flat)), dtype=torch.float64).long()
        checksum.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        checksum.update(flat[at.to(flat.device)].double().cpu().numpy().tobytes())
    return checksum.hexdigest()


def _free_memory(model: Model) -> int:
    """Bytes that are free for this process: its share, where others of the machine run beside it."""
    beside = 1 if model.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free_memory(model.device) // beside
