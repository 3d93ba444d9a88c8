"""Answers to prompts, scored by exact match of their last `#### number`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blockdiff.arithmetic import exact_match, final_number
from blockdiff.datafiles import DataError, read_rows
from blockdiff.engine import Output, Request, generate
from blockdiff.model import BlockDiffusionModel
from blockdiff.statistics import wilson


@dataclass(frozen=True)
class Question:
    """A prompt and the answer it should lead to (a number, or a text that ends in `#### number`)."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class GenerationRow:
    """How well and how fast the questions were answered.

    exact_match is correct / n with its Wilson 95 % interval; unanswered texts hold no `#### number`, unended ones ran
    into the token limit. mean_tokens counts generated tokens of an answer, its end token included; tokens_per_forward
    counts commit and verify forwards, and not the pass over the prompt; tokens_per_verify: tokens that a verification
    lets through (None without lossless).
    """

    block_size: int
    n: int
    correct: int
    exact_match: float
    exact_match_ci: tuple[float, float]
    unanswered: int
    unended: int
    mean_tokens: float
    forwards: int
    tokens_per_forward: float
    tokens_per_verify: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_questions(paths: Sequence[Path]) -> list[Question]:
    """Rows with a prompt and an answer, or a completion that ends in `#### number`; DataError names a row without."""
    questions = []
    for path in paths:
        for name, row in read_rows(path):
            prompt, answer = row.get("prompt"), row.get("answer", row.get("completion"))
            if not isinstance(prompt, str) or not isinstance(answer, str | int | float):
                raise DataError(
                    f"{name}: a question needs a prompt, and an answer or a completion that ends in #### 42"
                )
            try:
                exact_match("", str(answer))
            except ValueError as error:
                raise DataError(f"{name}: {error}") from error
            questions.append(Question(prompt, str(answer)))
    if not questions:
        raise DataError(f"{', '.join(map(str, paths))}: no questions in it; give rows with prompt and answer")
    return questions


def answer_questions(
    model: BlockDiffusionModel,
    questions: Sequence[Question],
    form: Request,
    *,
    batch: int = 32,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[GenerationRow, list[Output]]:
    """Decode all prompts as `form` says (block size, policy, sampling, token limit, stops) and score the answers.

    The form's own prompt is not used; question number i draws with the form's seed + i, so the batch does not matter.
    Prompts are encoded as training encodes them. Raises ValueError for a prompt that the model cannot read.
    """
    assert model.tokenizer is not None
    requests = [
        replace(
            form,
            prompt=tuple(model.tokenizer(question.prompt, verbose=False)["input_ids"]),
            seed=form.seed + number,
            end_ids=model.end_ids,
        )
        for number, question in enumerate(questions)
    ]
    outputs: list[Output] = []
    seconds = 0.0
    for start in range(0, len(requests), batch):
        part = generate(model, requests[start : start + batch])
        seconds += part[0].seconds  # every output of a call carries the whole call's time
        outputs += part
        if on_progress is not None:
            on_progress(len(outputs) / len(requests))
    correct = sum(exact_match(o.text, q.answer) for o, q in zip(outputs, questions, strict=True))
    tokens, forwards = sum(len(output.tokens) for output in outputs), sum(output.forwards for output in outputs)
    verified = sum(output.verify_forwards for output in outputs)
    row = GenerationRow(
        block_size=form.block_size,
        n=len(questions),
        correct=correct,
        exact_match=correct / len(questions),
        exact_match_ci=wilson(correct, len(questions)),
        unanswered=sum(final_number(output.text) is None for output in outputs),
        unended=sum(output.finish_reason == "length" for output in outputs),
        mean_tokens=tokens / len(questions),
        forwards=forwards,
        tokens_per_forward=tokens / max(forwards, 1),
        tokens_per_verify=tokens / verified if verified else None,
        seconds=seconds,
    )
    return row, outputs
