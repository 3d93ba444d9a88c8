"""What a finished run is measured by: bounds, the noise of its gradient, and the texts that it writes.

Every measure is a list of numbers with a name and a place (block size and offset of a bound, the decode of a text), so
that a summary can treat them all alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockdiff.api import documents_of, load
from blockdiff.building import encoder_of, objective_of, training_rows
from blockdiff.curriculum import adaptive
from blockdiff.data import Document
from blockdiff.decode import Sampling, named
from blockdiff.distributions import AdaptiveMixture
from blockdiff.engine import Request
from blockdiff.evaluate import (
    KINDS,
    AnswerRow,
    Asking,
    Question,
    Task,
    answer_task,
    bound,
    gradient_variance,
    judge_texts,
    read_questions,
)
from blockdiff.experiment.plan import Decode, Evaluate, Generation, Run, Variance
from blockdiff.model import BlockDiffusionModel
from blockdiff.training import measurable


@dataclass(frozen=True)
class Measured:
    """One number of a run. se, se_mc: its standard error and the part of it from random draws (None: unknown);
    counts: what it was computed from."""

    measure: str
    place: dict[str, Any]
    value: float
    se: float | None = None
    se_mc: float | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(run: Run, evaluate: Evaluate) -> tuple[list[Measured], int]:
    """All measures of a trained run, and the number of parameters of its model."""
    model = load(run.directory.checkpoint)
    found = _bounds(model, _documents(run, model), evaluate)
    if evaluate.variance is not None and model.spec.is_diffusion:
        found += _gradient_noise(model, run, evaluate.variance, evaluate.seed)
    if evaluate.generation is not None:
        found += _texts(model, evaluate.generation, evaluate.seed)
    for number in found:
        if not math.isfinite(number.value):
            raise ValueError(f"{number.measure} at {number.place} is {number.value}: the training diverged")
    return found, model.backbone.num_parameters()


def check_measures(evaluate: Evaluate) -> None:
    """Refuse questions that cannot be read and a judge that cannot be one, before anything is trained."""
    settings = evaluate.generation
    if settings is not None:
        _questions(settings)
        if settings.judge is not None:
            load(settings.judge)


def _questions(settings: Generation) -> list[Question]:
    if settings.questions is None:
        return [Question("", "0")] * settings.count
    return read_questions([Path(settings.questions)])[: settings.count]


def _documents(run: Run, model: BlockDiffusionModel) -> list[Document]:
    assert run.config.data.valid is not None
    paths = [run.config.data.valid] if isinstance(run.config.data.valid, str) else run.config.data.valid
    return [document for path in paths for document in documents_of(model, path, run.config.data.bad_rows)]


def _bounds(model: BlockDiffusionModel, documents: Sequence[Document], evaluate: Evaluate) -> list[Measured]:
    sizes = measurable(model, evaluate.block_sizes)
    if not sizes:  # a plain AR model of an experiment without block size 1 has nothing to measure
        return []
    offsets = [offset for offset in evaluate.offsets if offset == 0 or offset < max(sizes)]
    return [
        Measured(
            "bound",
            {"block_size": row.block_size, "offset": row.offset, "left_bias": row.left_bias},
            row.nats_per_token,
            row.se,
            row.se_mc,
            {"tokens": row.tokens, "documents": row.documents, "draws": row.draws},
        )
        for left_bias in evaluate.left_bias
        for row in bound(
            model,
            documents[: evaluate.documents],
            sizes,
            offsets=offsets,
            draws=evaluate.draws,
            left_bias=left_bias,
            seed=evaluate.seed,
        )
    ]


def _gradient_noise(model: BlockDiffusionModel, run: Run, settings: Variance, seed: int) -> list[Measured]:
    """Variance of the training gradient over the squared norm of its mean (`evaluate.variance`).

    None for noise or shares that were learned: what they were at the end is not part of a finished run.
    """
    if adaptive(run.config.noise) is not None or isinstance(run.config.layout, AdaptiveMixture):
        return []
    _, rows = training_rows(run.config, encoder_of(model))
    found = gradient_variance(
        model,
        rows.rows,
        objective_of(run.config),
        rows_per_batch=run.config.train.rows,
        draws=settings.draws,
        vary=settings.vary,
        seed=seed,
    )
    return [
        Measured(name, {"group": row.group}, value, counts={"draws": row.draws})
        for row in found
        for name, value in (("gradient_noise", row.ratio), ("gradient_variance", row.variance))
        if value is not None
    ]


def _texts(model: BlockDiffusionModel, settings: Generation, seed: int) -> list[Measured]:
    questions = _questions(settings)
    task = Task("questions", KINDS["arithmetic"], tuple(questions))
    judge = None if settings.judge is None else load(settings.judge)
    found = []
    for label, decode in settings.decodes.items():
        if decode.block_size > 1 and not model.spec.is_diffusion:
            continue
        row, answers = answer_task(model, task, _form(decode, settings, seed), Asking(batch=256))
        numbers = _scores(row, answered=settings.questions is not None)
        if judge is not None:
            judged = judge_texts(judge, [q.prompt for q in questions], [answer.output.text for answer in answers])
            numbers |= {} if judged is None else {"judge_nll": judged.nll, "judged_entropy": judged.entropy}
        found += [
            Measured(name, {"decode": label}, value, counts={"texts": len(questions)})
            for name, value in numbers.items()
        ]
    return found


def _form(decode: Decode, settings: Generation, seed: int) -> Request:
    return Request(
        prompt=(0,),
        max_new_tokens=settings.max_new_tokens,
        block_size=decode.block_size,
        policy=named(decode.policy),
        sampling=Sampling(decode.temperature),
        seed=seed,
        lossless=decode.lossless,
    )


def _scores(row: AnswerRow, *, answered: bool) -> dict[str, float]:
    speed = row.speed
    found = {"exact_match": row.score.pass_at["1"]} if answered else {}
    found |= {
        "tokens_per_forward": speed.tokens_per_forward,
        "tokens": speed.mean_tokens,
        "unended": speed.unended / row.n,
    }
    return found | ({} if speed.tokens_per_verify is None else {"tokens_per_verify": speed.tokens_per_verify})
