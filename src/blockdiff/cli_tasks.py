"""`eval tasks`: questions with right answers, from files of their own or through lm-eval."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockdiff.cli_generate import ChosenPolicy, MaybeTemperature
from blockdiff.cli_options import (
    BlockSize,
    JsonFile,
    Lossless,
    ModelPath,
    PerStep,
    Seed,
    Threshold,
    asked_policy,
    chosen_sampling,
    load_writer,
    measuring_together,
    one_process_only,
    out,
    progress,
    whole_numbers,
    write_result,
)

if TYPE_CHECKING:
    from blockdiff.api import Model
    from blockdiff.diffusion_gemma import DiffusionGemma
    from blockdiff.engine import Request
    from blockdiff.evaluate import Answer, AnswerRow, Asking, Task
    from blockdiff.harness import BlockDiffusionLM


def eval_tasks(
    path: ModelPath,
    data: Annotated[list[Path] | None, typer.Option(help="File of questions, a row of the result each.")] = None,
    kind: Annotated[str | None, typer.Option(help="arithmetic, gsm8k or humaneval; default: by the keys.")] = None,
    template: Annotated[str | None, typer.Option(help="What is asked, e.g. 'Question: {question}\\nAnswer:'.")] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval instead: YAML files or names, by commas.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of the YAML files that --harness names.")] = None,
    block_size: BlockSize = None,
    policy: ChosenPolicy = None,
    threshold: Threshold = None,
    per_step: PerStep = None,
    temperature: MaybeTemperature = None,
    samples: Annotated[int, typer.Option(help="Texts drawn for a question; with --temperature.", min=1)] = 1,
    at: Annotated[str, typer.Option(help="Comma-separated k of pass@k, up to --samples.")] = "1",
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Allow programs that the model wrote to run, in a subprocess with limits."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256,
    draws: Annotated[int, typer.Option(help="With --harness: noise draws of each text.", min=1)] = 8,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --harness: enumerate the masks of small blocks.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of a task.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Texts decoded at once.", min=1)] = 32,
    lossless: Lossless = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Questions with right answers: exact match, pass@k, majority vote, with 95 % intervals, and the decoding's speed.

    Files: rows with `#### number` answers, GSM8K's, HumanEval's; or any task of lm-eval (--harness).
    """
    from blockdiff.api import Model
    from blockdiff.diffusion_gemma import CanvasRequest
    from blockdiff.evaluate import Asking, check_asking, read_task
    from blockdiff.runtime import record

    if (data is None) == (harness is None):
        raise ValueError("give --data FILE or --harness TASKS, one of them")
    of_files = {"--kind": kind, "--template": template, "--samples": samples > 1, "--run-code": run_code}
    of_harness = {"--include-path": include_path, "--exact": exact}
    for option, given in (of_files if data is None else of_harness).items():
        if given:
            raise ValueError(f"{option} has no effect on {'--harness' if data is None else '--data'}; leave it out")
    asking = Asking(samples, tuple(whole_numbers(at, "--at")), batch, run_code)
    form_of_prompt = None if template is None else template.replace("\\n", "\n")  # a shell has no escapes
    tasks = [read_task(file, kind, form_of_prompt, limit) for file in data or ()]
    for task in tasks:  # what can be told before the model is read; its own temperature cannot
        check_asking(task, asking, 1.0 if temperature is None else temperature)
    options: dict[str, Any] = {"policy": asked_policy(policy, threshold, per_step), **chosen_sampling(temperature)}
    options |= {"max_new_tokens": max_new_tokens, "block_size": block_size, "seed": seed, "lossless": lossless}
    if harness is not None:
        one_process_only("--harness")
    model = load_writer(path)
    form = _form(model, options)
    settings: dict[str, Any] = {"model": path, "policy": asdict(form.policy), "sampling": asdict(form.sampling)}
    settings["max_new_tokens"] = max_new_tokens
    if isinstance(form, CanvasRequest):
        settings["temperatures"] = form.temperatures
    if harness is not None:
        from blockdiff.evaluate.bounds import estimator_of
        from blockdiff.harness import BlockDiffusionLM

        if not isinstance(model, Model):
            raise ValueError("--harness asks for likelihoods, and DiffusionGemma has none here; give --data FILE")
        lm = BlockDiffusionLM(model, form, estimator_of(draws, exact, 0, 0.0, seed), batch)
        contents = _harness(lm, harness.split(","), include_path, limit)
    else:
        contents = _files(model, form, asking, tasks) | {"data": [str(file) for file in data or ()]}
    write_result(json_file, record("eval tasks", seed, **settings, **contents))


def _form(model: Model | DiffusionGemma, options: dict[str, Any]) -> Request:
    """How every question is asked; its prompt is not used."""
    from blockdiff.api import Model
    from blockdiff.decode import named
    from blockdiff.engine import Request

    if not isinstance(model, Model):
        return model.request(**options)
    size, policy = options["block_size"], options["policy"]
    size = model.spec.default_block_size if size is None else size
    return Request(prompt=(0,), **{**options, "block_size": size, "policy": policy or named("threshold")})


def _files(model: Model | DiffusionGemma, form: Request, asking: Asking, tasks: list[Task]) -> dict[str, Any]:
    from blockdiff.evaluate import answer_task

    rows, outputs = [], []
    split = measuring_together()
    for task in tasks:
        with progress(task.name) as on_progress:
            row, answers = answer_task(model, task, form, asking, on_progress, split)
        out.print(_sentence(row, task.name if len(tasks) > 1 else ""), highlight=False, soft_wrap=True)
        rows.append(row.to_json())
        outputs += [_answer(task, answer) for answer in answers]
    return {"rows": rows, "outputs": outputs, "processes": split.shard.count}


def _harness(lm: BlockDiffusionLM, tasks: list[str], include_path: Path | None, limit: int | None) -> dict[str, Any]:
    from blockdiff.harness import measure

    rows = measure(lm, tasks, include_path, limit)
    for row in rows:
        error = "" if row["se"] is None else f" ± {row['se']:.4f}"
        how = f"block size {row['block_size']}" if row["likelihood"] is None else row["likelihood"]
        out.print(f"{row['task']}: {row['metric']} {row['value']:.4f}{error} of {row['n']} ({how})")
    return {"harness": tasks, "lm_eval": importlib.metadata.version("lm_eval"), "rows": rows}


def _sentence(row: AnswerRow, name: str) -> str:
    score, speed = row.score, row.speed
    texts = row.n * row.samples
    words = [f"{name}: " if name else "", f"block size {row.block_size}: {score.correct} of {texts} right"]
    words += [
        f", pass@{k} {share:.1%} ({score.pass_at_ci[k][0]:.1%} – {score.pass_at_ci[k][1]:.1%})"
        for k, share in score.pass_at.items()
    ]
    if score.majority is not None:
        words.append(f", majority of {row.samples} {score.majority:.1%}")
    words.append("; ")
    if score.unanswered is not None:
        words.append(f"{score.unanswered} without ####, ")
    if score.outcomes is not None:
        words.append("".join(f"{count} {outcome}, " for outcome, count in score.outcomes.items()))
    words.append(
        f"{speed.unended} without an end; {speed.mean_tokens:.1f} tokens an answer, "
        f"{speed.tokens_per_forward:.2f} tokens per forward with commits"
    )
    words.append("" if speed.tokens_per_verify is None else f", {speed.tokens_per_verify:.2f} a verification")
    return "".join(words)


def _answer(task: Task, answer: Answer) -> dict[str, Any]:
    """An answer as JSON: what was asked for, what was written, and whether it is right."""
    from blockdiff.evaluate import Question

    question, output = task.questions[answer.question], answer.output
    asked = {"answer": question.answer} if isinstance(question, Question) else {"name": question.name}
    ran = {} if answer.ran is None else asdict(answer.ran)
    place = {"task": task.name, "question": answer.question, "sample": answer.sample}
    return (
        place
        | asked
        | ran
        | {
            "correct": answer.correct,
            "text": output.text,
            "tokens": len(output.tokens),
            "forwards": output.forwards,
        }
    )
