"""Texts that answer questions, scored: pass@k, exact match, majority vote, and what the decoding cost.

N texts are drawn for a question, c of them right. pass@k is the chance that of k texts drawn from these N without
replacement at least one is right, 1 - C(N - c, k) / C(N, k), averaged over the questions: the unbiased estimate of
arXiv 2107.03374, equation 1. Its 95 % interval is over questions (`statistics.interval_of_share`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from statistics import fmean
from typing import Any

from blockdiff.arithmetic import exact_match, final_number
from blockdiff.diffusion_gemma import DiffusionGemma
from blockdiff.engine import Output, Request
from blockdiff.evaluate.questions import CodeProblem, Question, Task
from blockdiff.evaluate.sandbox import Ran, run_programs
from blockdiff.evaluate.writing import write
from blockdiff.model import BlockDiffusionModel
from blockdiff.shards import ALONE, Split
from blockdiff.statistics import interval_of_share, pass_at_k

_STRIDE = 1_000_003  # between the seeds of a question's samples: more than there are questions


@dataclass(frozen=True)
class Asking:
    """How questions are asked: texts drawn for each, the k of pass@k, texts decoded at once, and whether programs that
    the model wrote may run."""

    samples: int = 1
    at: tuple[int, ...] = (1,)
    batch: int = 32
    run_code: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"--samples {self.samples}: give 1 or more")
        if not self.at or any(not 1 <= k <= self.samples for k in self.at):
            raise ValueError(
                f"--at {','.join(map(str, self.at))}: pass@k needs k from 1 to the {self.samples} texts of --samples"
            )


@dataclass(frozen=True)
class Score:
    """What is right. correct: of all texts; exact_match: the share of them (numbers alone); pass_at and its intervals
    by k; majority: share of questions whose most frequent number (the first drawn, where several are) is right, None
    for a single text; unanswered: texts without `#### number`; outcomes: of programs, how many ended how."""

    correct: int
    exact_match: float | None
    exact_match_ci: tuple[float, float] | None
    pass_at: dict[str, float]
    pass_at_ci: dict[str, tuple[float, float]]
    majority: float | None
    unanswered: int | None
    outcomes: dict[str, int] | None


@dataclass(frozen=True)
class Speed:
    """What the texts cost. unended: texts that ran into the token limit; mean_tokens: generated tokens of a text, its
    end token included; tokens_per_forward counts commit and verify forwards, and not the pass over the prompt;
    tokens_per_verify: tokens that a verification lets through (None without lossless)."""

    unended: int
    mean_tokens: float
    forwards: int
    tokens_per_forward: float
    tokens_per_verify: float | None
    seconds: float


@dataclass(frozen=True)
class AnswerRow:
    """How well and how fast the n questions of a task were answered, `samples` texts each."""

    task: str
    kind: str
    block_size: int
    n: int
    samples: int
    score: Score
    speed: Speed

    def to_json(self) -> dict[str, Any]:
        """All fields on one level."""
        row = asdict(self)
        return {key: value for key, value in row.items() if key not in ("score", "speed")} | row["score"] | row["speed"]


@dataclass(frozen=True)
class Answer:
    """One text: to which question, the how manieth, and whether it is right; ran: how its program ended."""

    question: int
    sample: int
    output: Output
    correct: bool
    ran: Ran | None = None


def answer_task(
    model: BlockDiffusionModel | DiffusionGemma,
    task: Task,
    form: Request,
    asking: Asking = Asking(),
    on_progress: Callable[[float], None] | None = None,
    split: Split = ALONE,
) -> tuple[AnswerRow, list[Answer]]:
    """Decode the questions as `form` says (block size, policy, sampling, token limit, stops) and score the texts.

    The form's own prompt is not used; question number i draws its first text with the form's seed + i, so the batch
    does not matter; the processes of a split share the batches, and the programs that they wrote, and all get the whole
    result. Prompts are encoded as training encodes them. Raises ValueError for a prompt that the model cannot
    read, and what `check_asking` refuses.
    """
    check_asking(task, asking, form.sampling.temperature)
    outputs, seconds = _decode(model, task, form, asking, split, on_progress)
    answers = _judged(task, outputs, asking, split)
    row = AnswerRow(
        task=task.name,
        kind=task.kind.name,
        block_size=form.block_size,
        n=len(task.questions),
        samples=asking.samples,
        score=_score(answers, asking),
        speed=_speed(outputs, seconds),
    )
    return row, answers


def check_asking(task: Task, asking: Asking, temperature: float) -> None:
    """Raise ValueError for several samples without a temperature, and for programs without leave to run them."""
    if asking.samples > 1 and temperature == 0:
        raise ValueError(f"--samples {asking.samples}: greedy texts are all the same; give --temperature above 0")
    if isinstance(task.questions[0], CodeProblem) and not asking.run_code:
        raise ValueError(
            f"{task.name}: judging these answers runs programs that the model wrote; give --run-code to allow it "
            "(they run in a subprocess with limits, which is a guard rail and no security boundary)"
        )


def _decode(
    model: BlockDiffusionModel | DiffusionGemma,
    task: Task,
    form: Request,
    asking: Asking,
    split: Split,
    on_progress: Callable[[float], None] | None,
) -> tuple[list[Output], float]:
    """All texts of question 0, of question 1, ...; and the seconds they took, of all processes together."""
    assert model.tokenizer is not None
    form = replace(form, end_ids=model.end_ids, stop=(*form.stop, *task.kind.stop))
    requests = []
    for number, asked in enumerate([question.prompt for question in task.questions]):
        prompt = tuple(model.tokenizer(asked, verbose=False)["input_ids"])
        seeds = [form.seed + number + sample * _STRIDE for sample in range(asking.samples)]
        requests += [replace(form, prompt=prompt, seed=seed) for seed in seeds]
    starts = range(0, len(requests), asking.batch)

    def decode(number: int) -> list[Output]:
        found = write(model, requests[starts[number] : starts[number] + asking.batch], asking.batch)
        if on_progress is not None:
            on_progress((number + 1) / len(starts))
        return found

    parts = split.map(decode, len(starts))
    # every output of a call carries the whole call's time
    return [output for part in parts for output in part], sum(part[0].seconds for part in parts)


def _judged(task: Task, outputs: Sequence[Output], asking: Asking, split: Split) -> list[Answer]:
    """The texts, in order, each with whether it is right."""
    places = [(question, sample) for question in range(len(task.questions)) for sample in range(asking.samples)]
    questions = [task.questions[question] for question, _ in places]
    texts = [
        one.program(output.text) for one, output in zip(questions, outputs, strict=True) if isinstance(one, CodeProblem)
    ]
    programs = list(dict.fromkeys(texts))
    starts = range(0, len(programs), asking.batch)
    parts = split.map(
        lambda number: run_programs(programs[starts[number] : starts[number] + asking.batch]), len(starts)
    )
    ran = dict(zip(programs, chain.from_iterable(parts), strict=True))
    answers = []
    for place, one, output in zip(places, questions, outputs, strict=True):
        if isinstance(one, Question):
            answers.append(Answer(*place, output, exact_match(output.text, one.answer)))
        else:
            found = ran[one.program(output.text)]
            answers.append(Answer(*place, output, found.passed, found))
    return answers


def _score(answers: Sequence[Answer], asking: Asking) -> Score:
    samples = asking.samples
    asked = [answers[start : start + samples] for start in range(0, len(answers), samples)]
    right = [sum(answer.correct for answer in one) for one in asked]
    shares = {k: [pass_at_k(samples, found, k) for found in right] for k in {1, *asking.at}}
    ran = [answer.ran for answer in answers if answer.ran is not None]
    numbers = not ran
    return Score(
        correct=sum(right),
        exact_match=fmean(shares[1]) if numbers else None,
        exact_match_ci=interval_of_share(shares[1]) if numbers else None,
        pass_at={str(k): fmean(shares[k]) for k in asking.at},
        pass_at_ci={str(k): interval_of_share(shares[k]) for k in asking.at},
        majority=fmean(map(_majority, asked)) if numbers and samples > 1 else None,
        unanswered=sum(final_number(answer.output.text) is None for answer in answers) if numbers else None,
        outcomes=None if numbers else dict(Counter(one.outcome for one in ran)),
    )


def _majority(answers: Sequence[Answer]) -> bool:
    """Whether the number that most of a question's texts end in is right."""
    numbers = [final_number(answer.output.text) for answer in answers]
    given = Counter(number for number in numbers if number is not None)
    return bool(given) and answers[numbers.index(given.most_common(1)[0][0])].correct


def _speed(outputs: Sequence[Output], seconds: float) -> Speed:
    tokens, forwards = sum(len(output.tokens) for output in outputs), sum(output.forwards for output in outputs)
    verified = sum(output.verify_forwards for output in outputs)
    return Speed(
        unended=sum(output.finish_reason == "length" for output in outputs),
        mean_tokens=tokens / len(outputs),
        forwards=forwards,
        tokens_per_forward=tokens / max(forwards, 1),
        tokens_per_verify=tokens / verified if verified else None,
        seconds=seconds,
    )
