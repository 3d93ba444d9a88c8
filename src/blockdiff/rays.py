"""Batch generation over Ray Data: `map_batches` over actors that each hold a model with its engine.

Ray hands out the rows of missing parts and restarts actors that die; what counts are the files (`blockdiff.parts`),
which an actor writes as `batch.answer_file` does. So a run may begin here and end under torchrun, or the other way
around, and a stretch that Ray hands out twice is answered once.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa

from blockdiff.api import load_writer
from blockdiff.batch import Answered, Answerer, Held, Line, OnProgress, Outcome, Progress, lines_of
from blockdiff.datafiles import DataError
from blockdiff.parts import Parts, Totals
from blockdiff.runtime import available_processors
from blockdiff.shards import WHOLE

_LOCAL_STORE = 128 * 2**20  # bytes for the rows in flight; what does not fit goes to Ray's own files
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_LOG_LEVEL": "ERROR"}
_NOTHING = Answered(Totals(), 0, None)
_TRIES = 8  # actors that may die over a stretch
_REFILLS = 4  # stretch of rows that an actor is given: its texts at once, so many times


@dataclass(frozen=True)
class Cluster:
    """Where to answer: address of a Ray cluster (`auto`, host:port), or `local` for one of its own on this machine;
    actors that hold a model each, and GPUs of each. None: one actor for each GPU; one without a GPU where there is
    none."""

    address: str
    actors: int | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class _Work:
    """What an actor is told: the model, the parts that it fills, and how (`Answerer`)."""

    path: str
    chat_template: Path | None
    parts: Parts
    model: str
    options: dict[str, Any]
    run: str = field(default_factory=lambda: uuid4().hex)


def answer_on_ray(
    cluster: Cluster,
    path: str,
    input: Path,
    output: Path,
    *,
    chat_template: Path | None = None,
    running: int = 64,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Outcome:
    """What `batch.answer_file` does, by the actors of a Ray cluster, with the model at a path.

    Path, output and chat template are read on the machines of the cluster. This process loads the model on its CPU once
    to check the options. Raises ValueError and DataError as `batch.answer_file`, ValueError where Ray or the cluster is
    missing, and DataError for a machine that cannot answer.
    """
    path = str(Path(path).absolute()) if Path(path).exists() else path
    template = None if chat_template is None else chat_template.absolute()
    options["running"] = running
    found = _NOTHING
    with _connected(cluster) as (actors, gpus):
        answerer = _answerer(path, template, options, device="cpu")
        parts, model = answerer.open(input, output.absolute()), answerer.asked["model"]
        del answerer
        held, began = Held.of(parts, WHOLE), time.perf_counter()
        size = max(1, min(_REFILLS * running // parts.size, len(held.missing) // (_REFILLS * actors)))
        work = _Work(path, template, parts, model, options)
        for one in _mapped(work, _stretches(input, held, parts, size), actors, gpus):
            found += one
            if on_progress is not None:
                done = held.before.rows + found.totals.rows
                on_progress(Progress(held.rows, done, found.totals.tokens, time.perf_counter() - began))
    return held.outcome(input, parts, found, time.perf_counter() - began)


class _Actor:
    """A model that answers a stretch of rows at a time, where `map_batches` puts it."""

    def __init__(self, work: _Work) -> None:
        self.work, self.parts = work, work.parts

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        """One row: what is written now of a stretch's rows, or why this machine cannot."""
        (stretch,) = batch["stretch"].to_pylist()
        rows = pa.ipc.open_stream(stretch).read_all().to_pylist()
        try:
            with self._tried(rows[0]["number"]):
                found, refusal = self._answered(rows), ""
        except (ValueError, OSError, RuntimeError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            found, refusal = _NOTHING, f"{said[0]} (on {platform.node()})"
        row = {**asdict(found.totals), "uncovered": found.uncovered, "problem": found.problem or "", "refusal": refusal}
        return {name: [value] for name, value in row.items()}

    @contextmanager
    def _tried(self, number: int) -> Iterator[None]:
        """Counts in a file who began with a stretch: Ray would start actors that die over it again without end."""
        if not self.parts.directory.exists():
            raise DataError(f"{self.parts.directory}: is not there; give a directory that all machines share")
        begun = self.parts.file(0).with_name(f".begun-{number:08}.jsonl.{self.work.run}")
        begun.parent.mkdir(exist_ok=True)
        with begun.open("ab") as file:
            file.write(b".")
        if begun.stat().st_size > _TRIES:
            raise DataError(
                f"{_TRIES} actors died over the rows from {number + 1} on; where memory ran out, lower --batch "
                "(what was answered is kept, and the same command goes on from there)"
            )
        try:
            yield
        finally:
            begun.unlink(missing_ok=True)

    def _answered(self, rows: list[dict[str, Any]]) -> Answered:
        wanted = {row["number"] // self.parts.size for row in rows}
        there = {part: held[1] for part in wanted if (held := self.parts.read(part))}  # handed out a second time
        lines = ((row["number"], row["name"], row["line"]) for row in rows)
        missing = (line for line in lines if line[0] // self.parts.size not in there)
        return self.answerer.answer(self.parts, missing) + Answered(sum(there.values(), Totals()), 0, None)

    @cached_property
    def answerer(self) -> Answerer:
        answerer = _answerer(self.work.path, self.work.chat_template, self.work.options)
        if answerer.asked["model"] != self.work.model:
            raise DataError(f"{self.work.path}: is another model there; give a path that all machines share")
        return answerer


def _answerer(path: str, template: Path | None, options: Mapping[str, Any], device: str | None = None) -> Answerer:
    model = load_writer(path, device=device)
    if template is not None:
        model.set_chat_template(template)
    return Answerer(model, **options)


def _stretches(input: Path, held: Held, parts: Parts, size: int) -> Iterator[pa.Table]:
    """The rows of missing parts, `size` parts at a time: tables of one row, which Ray cannot cut or put together."""
    place = {part: number // size for number, part in enumerate(sorted(held.missing))}

    def stretch(line: Line) -> int:
        return place[line[0] // parts.size]

    kinds = pa.schema([("number", pa.int64()), ("name", pa.string()), ("line", pa.large_binary())])
    for _, lines in groupby(lines_of(input, parts, held.missing), stretch):
        columns = [pa.array(column, kind) for column, kind in zip(zip(*lines), kinds.types)]
        packed = pa.BufferOutputStream()
        with pa.ipc.new_stream(packed, kinds) as stream:
            stream.write_table(pa.Table.from_arrays(columns, schema=kinds))
        yield pa.table({"stretch": pa.array([packed.getvalue().to_pybytes()], pa.large_binary())})


def _mapped(work: _Work, stretches: Iterator[pa.Table], actors: int, gpus: float) -> Iterator[Answered]:
    """What actors wrote, stretch by stretch as they finish. Raises DataError where a machine cannot."""
    import ray.data

    blocks = [ray.put(table) for table in stretches]
    if not blocks:
        return
    rows = ray.data.from_arrow_refs(blocks).map_batches(
        _Actor,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=(work,),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in rows.iter_rows():
        if refusal := row.pop("refusal"):
            raise DataError(refusal)
        uncovered, problem = row.pop("uncovered"), row.pop("problem")
        yield Answered(Totals(**row), uncovered, problem or None)


@contextmanager
def _connected(cluster: Cluster) -> Iterator[tuple[int, float]]:
    """Ray for as long as this is open; yields the number of actors and the GPUs of each."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data
    except ImportError:
        raise ValueError("--ray needs Ray Data; pip install 'blockdiff[ray]'") from None
    local = cluster.address == "local"
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _LOCAL_STORE} if local else {}
    if local:  # more actors than processors take turns
        own["num_cpus"] = max(available_processors(), cluster.actors or 1)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        _reach(cluster.address)
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ray {cluster.address}: no such cluster ({error}); start one, or give local (a cluster that asks for a "
            "token wants RAY_AUTH_MODE=token here too)"
        ) from error
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        there = ray.cluster_resources().get("GPU", 0.0)
        gpus = (1.0 if there else 0.0) if cluster.gpus is None else cluster.gpus
        if local and gpus > there:
            raise ValueError(f"--gpus-per-actor {gpus:g}: this machine has {there:g}; give 0 for actors without one")
        yield cluster.actors or max(int(there // gpus) if gpus else 1, 1), gpus
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
