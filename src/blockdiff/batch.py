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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from blockdiff.api import Model
from blockdiff.data import is_message
from blockdiff.datafiles import DataError, json_row, numbered_lines
from blockdiff.engine import Engine, Output, Request, limits_in
from blockdiff.engine.network import prepared
from blockdiff.parts import Parts, Totals
from blockdiff.runtime import free_memory, record

OnProgress = Callable[["Progress"], None]
_SAMPLED = 64  # values of each weight that tell two models apart


@dataclass(frozen=True)
class Shard:
    """Share number `number` of `count`, from 0."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"shard {self}: shards are numbered from 0, e.g. 0/4 to 3/4")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """'0/4': the first of four. Raises ValueError."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise ValueError(f"--shard {text}: give a number and a count, e.g. 0/4 to 3/4")
        return cls(int(number), int(count))

    @classmethod
    def of_process(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """What torchrun gave this process, RANK of WORLD_SIZE; without it, the whole."""
        return cls(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))


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
    model: Model,
    input: Path,
    output: Path,
    *,
    regex: str | None = None,
    json_schema: str | None = None,
    strict_coverage: bool = False,
    shard: Shard = Shard(),
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
    request = model.request(constraint=model.constraint(regex, json_schema), **options)
    engine = Engine(model, limits_in(model, running, _free_memory(model)))
    engine.check(request)
    checksum, rows = _scan(input)
    asked = {
        "input": checksum,
        "model": _fingerprint(model),
        **_described(request),
        "regex": regex,
        "json_schema": json_schema,
        "strict_coverage": strict_coverage,
    }
    parts = Parts.open(output, rows, asked, record("generate", request.seed, file=str(input)))
    work = _Work(_Reader(model, request, strict_coverage), engine, parts, running, on_progress)
    return work.run(input, shard)


class _Reader:
    """Makes requests of rows, and counts those that training does not cover; problem: what it does not of the first."""

    def __init__(self, model: Model, request: Request, strict: bool) -> None:
        self.model, self.request, self.strict = model, request, strict
        self.uncovered = 0
        self.problem: str | None = None
        self._known: dict[tuple[int, int], str | None] = {}

    def read(self, number: int, row: dict[str, Any]) -> Request:
        """Raises ValueError for a row that is none."""
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
        self._check_coverage(request)
        return request

    def _ids(self, row: dict[str, Any]) -> list[int]:
        prompt, messages = row.get("prompt"), row.get("messages")
        if isinstance(prompt, str) and messages is None:
            return self.model.encode(prompt)
        if isinstance(messages, list) and messages and all(map(is_message, messages)) and prompt is None:
            return self.model.encode_chat(messages)
        raise ValueError("a row needs the text 'prompt', or 'messages' with role and content, and not both")

    def _check_coverage(self, request: Request) -> None:
        lengths = len(request.prompt), request.max_new_tokens
        if len(request.prompt) >= self.model.context_length:  # refused for that
            return
        if lengths not in self._known:
            self._known[lengths] = self.model.uncovered(request)
        problem = self._known[lengths]
        if problem is not None and self.strict:
            raise ValueError(problem)
        self.uncovered += problem is not None
        self.problem = self.problem or problem


class _Work:
    """A shard's rows on their way through the engine."""

    def __init__(
        self, reader: _Reader, engine: Engine, parts: Parts, running: int, on_progress: OnProgress | None
    ) -> None:
        self.reader, self.engine, self.parts, self.most, self.on_progress = reader, engine, parts, running, on_progress
        self.running: dict[int, tuple[int, dict[str, Any]]] = {}  # by number of the job: the answer's row and beginning
        self.open: dict[int, dict[int, dict[str, Any]]] = {}  # by part: its answers so far
        self.own = Totals()
        self.began = time.perf_counter()
        self.rows = self.found = self.answered = 0

    def run(self, input: Path, shard: Shard) -> Outcome:
        mine = range(shard.number, len(self.parts), shard.count)
        missing, before = set(), Totals()
        for part in mine:
            self.rows += len(self.parts.numbers(part))
            if (held := self.parts.read(part)) is None:
                missing.add(part)
            else:
                before += held[1]
        self.found = self.answered = before.rows
        with prepared(self.engine.model):
            self._serve(self._lines(input, missing))
        if self.answered < self.rows:
            raise DataError(f"{input}: has fewer rows than when this began; leave it as it is, and run again")
        seconds = time.perf_counter() - self.began
        return Outcome(
            self.parts.rows,
            self.found,
            self.own,
            before + self.own,
            self.parts.merge(),
            seconds,
            self.reader.uncovered,
            self.reader.problem,
        )

    def _lines(self, input: Path, missing: set[int]) -> Iterator[tuple[int, str, bytes]]:
        """(row number, name, line) of every row that a missing part holds, in order."""
        if not missing:
            return
        last = max(missing)
        for number, (at, line) in enumerate(numbered_lines(input)):
            part = number // self.parts.size
            if part > last:
                return
            if part in missing and number < self.parts.rows:
                yield number, f"{input.name}:{at}", line

    def _serve(self, lines: Iterator[tuple[int, str, bytes]]) -> None:
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
            if isinstance(row.get("id"), str | int):
                head["id"] = row["id"]
            job = self.engine.add(self.reader.read(number, row))
        except DataError as error:
            self._answer(number, {**head, "error": str(error)})
        except ValueError as error:
            self._answer(number, {**head, "error": f"{name}: {error}"})
        else:
            self.running[job.number] = (number, head)

    def _answer(self, number: int, answer: dict[str, Any]) -> None:
        part = number // self.parts.size
        answers = self.open.setdefault(part, {})
        answers[number] = answer
        self.answered += 1
        if len(answers) == len(self.parts.numbers(part)):
            self.own += self.parts.write(part, [answers[row] for row in sorted(answers)])
            del self.open[part]
        if self.on_progress is not None:
            seconds = time.perf_counter() - self.began
            self.on_progress(Progress(self.rows, self.answered, self.own.tokens, seconds))


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


def _fingerprint(model: Model) -> str:
    """Tells a model from another: its conventions, its template, and a sample of every weight."""
    assert model.tokenizer is not None
    checksum = hashlib.sha256(f"{model.spec} {model.tokenizer.chat_template} {model.vocabulary}".encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        at = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLED, len(flat)), dtype=torch.float64).long()
        checksum.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        checksum.update(flat[at.to(flat.device)].double().cpu().numpy().tobytes())
    return checksum.hexdigest()


def _free_memory(model: Model) -> int:
    """Bytes that are free for this process: its share, where others of the machine run beside it."""
    beside = 1 if model.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free_memory(model.device) // beside
