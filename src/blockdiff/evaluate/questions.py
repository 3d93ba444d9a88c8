"""Questions with a right answer, from files: rows that end in `#### number`, GSM8K's, HumanEval's.

A kind says by which keys a row is recognised, what the model is asked, and how its text is judged:

    arithmetic   prompt, completion or answer     the prompt as it is             last `#### number` of the text
    gsm8k        question, answer "... #### 42"   "Question: {question}\\nAnswer:"  last `#### number` of the text
    humaneval    task_id, prompt, test, entry_point   the prompt as it is         the tests run (`evaluate.sandbox`)

GSM8K: arXiv 2110.14168; HumanEval: arXiv 2107.03374.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from blockdiff.arithmetic import exact_match
from blockdiff.datafiles import DataError, read_rows


@dataclass(frozen=True)
class Question:
    """A prompt and the answer it should lead to (a number, or a text that ends in `#### number`)."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class CodeProblem:
    """A program to be completed, and the code that tests its function `entry_point`. prompt: what the model is asked;
    beginning: of the program, to which the completion is added."""

    name: str
    prompt: str
    beginning: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """What is run: the completed program, then its tests."""
        return f"{self.beginning}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Kind:
    """What rows of a kind hold, what the model is asked, and where its text ends. template: of the row's keys."""

    name: str
    keys: tuple[str, ...]
    template: str
    stop: tuple[str, ...] = ()


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "humaneval",
            ("prompt", "test", "entry_point"),
            "{prompt}",
            ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),  # arXiv 2107.03374, section 2.2
        ),
        Kind("gsm8k", ("question", "answer"), "Question: {question}\nAnswer:", ("\nQuestion:",)),
        Kind("arithmetic", ("prompt",), "{prompt}"),
    )
}


@dataclass(frozen=True)
class Task:
    """The questions of one file: all of them `Question`s, or all of them `CodeProblem`s."""

    name: str
    kind: Kind
    questions: tuple[Question, ...] | tuple[CodeProblem, ...]


def read_task(path: Path, kind: str | None = None, template: str | None = None, limit: int | None = None) -> Task:
    """The first `limit` questions of a file; kind by the keys of its first row where none is named.

    template: what the model is asked instead, with the row's keys in braces. Raises DataError for a row that has not
    the keys or no answer, ValueError for an unknown kind or template.
    """
    rows = list(islice(read_rows(path), limit))
    if not rows:
        raise DataError(f"{path}: no questions in it; give rows with prompt and answer")
    form = _kind_of(*rows[0], kind)
    wanted = form.template if template is None else template
    _check_template(wanted, *rows[0])
    if form.name == "humaneval":
        return Task(path.name, form, tuple(_problem(name, row, form, wanted) for name, row in rows))
    return Task(path.name, form, tuple(_question(name, row, form, wanted) for name, row in rows))


def read_questions(paths: Sequence[Path]) -> list[Question]:
    """The questions of files whose answers are numbers. Raises DataError."""
    found: list[Question] = []
    for path in paths:
        for question in read_task(path).questions:
            if isinstance(question, CodeProblem):
                raise DataError(
                    f"{path}: programs to complete, not questions with a number; use `blockdiff eval tasks`"
                )
            found.append(question)
    return found


def _kind_of(name: str, row: dict[str, Any], kind: str | None) -> Kind:
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"--kind {kind}: unknown; give one of {', '.join(KINDS)}")
        return KINDS[kind]
    for found in KINDS.values():
        if all(key in row for key in found.keys):
            return found
    raise DataError(
        f"{name}: has {', '.join(map(repr, row)) or 'no keys'}; a question needs a prompt, and an answer or a "
        "completion that ends in #### 42; question and answer (GSM8K); or prompt, test and entry_point (HumanEval)"
    )


def _check_template(template: str, name: str, row: dict[str, Any]) -> None:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(
            f"--template {template!r}: {error}; write keys in braces, e.g. 'Question: {{question}}'"
        ) from None
    unknown = [field for field in fields if field not in row]
    if unknown or not fields:
        what = f"the key {unknown[0]!r} is not in the rows" if unknown else "it names no key"
        raise ValueError(f"--template {template!r}: {what}; {name} has {', '.join(row)}")


def _question(name: str, row: dict[str, Any], kind: Kind, template: str) -> Question:
    answer = row.get("answer", row.get("completion"))
    if not all(isinstance(row.get(key), str) for key in kind.keys if key != "answer") or not isinstance(
        answer, str | int | float
    ):
        raise DataError(
            f"{name}: a question needs a {kind.keys[0]}, and an answer or a completion that ends in #### 42"
        )
    try:
        exact_match("", str(answer))
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    return Question(_filled(template, name, row), str(answer))


def _problem(name: str, row: dict[str, Any], kind: Kind, template: str) -> CodeProblem:
    for key in kind.keys:
        if not isinstance(row.get(key), str):
            raise DataError(f"{name}: a HumanEval row needs {', '.join(kind.keys)}, and {key} is no text")
    if not row["entry_point"].isidentifier():
        raise DataError(f"{name}: entry_point {row['entry_point']!r} is no name of a function")
    asked = _filled(template, name, row)
    return CodeProblem(str(row.get("task_id", name)), asked, row["prompt"], row["test"], row["entry_point"])


def _filled(template: str, name: str, row: dict[str, Any]) -> str:
    try:
        return template.format_map(row)
    except KeyError as error:
        raise DataError(f"{name}: has no key {error}, which --template names") from None
    except ValueError as error:
        raise ValueError(f"--template {template!r}: {error}") from None
