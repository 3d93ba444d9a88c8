"""Commands that write text: `generate`, `infill`, and the table of `policies`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockdiff.cli_batch import answer_rows
from blockdiff.cli_options import (
    BlockSize,
    JsonFile,
    LeftBias,
    Lossless,
    ModelPath,
    PerStep,
    Seed,
    Threshold,
    asked_policy,
    chosen_policy,
    chosen_sampling,
    err,
    load_model,
    load_writer,
    out,
    warn,
    write_result,
)

if TYPE_CHECKING:
    from blockdiff.api import Model
    from blockdiff.decode import Policy
    from blockdiff.diffusion_gemma import DiffusionGemma
    from blockdiff.engine import Output
    from blockdiff.engine.request import Step
    from blockdiff.rays import Cluster

    OnStep = Callable[[Step], None]

ChosenPolicy = Annotated[
    str | None,
    typer.Option("--policy", help="A name of `blockdiff policies`, or parts: 'entropy + entropy_budget(0.1)'."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
MaybeTemperature = Annotated[
    float | None, typer.Option(help="0 is greedy, and the default but for DiffusionGemma, which has its own.")
]
TopK = Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0: all.", max=2**31)]
TopP = Annotated[float, typer.Option(help="Draw from the smallest set with this probability; 1: all.")]
Steps = Annotated[bool, typer.Option("--show-steps", help="Show each block as it fills.")]


def generate(
    path: ModelPath,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue; give it several times for a batch.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option("--input", help="File of rows to answer instead (.jsonl): prompt or messages.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Directory of the answers to --input; it goes on where it stopped.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="Share of --input, e.g. 0/4 to 3/4; default: the process's own under torchrun.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Answer --input over Ray: address of a cluster (auto), or local for one here.")
    ] = None,
    actors: Annotated[int | None, typer.Option(help="Models at work on Ray; default: one for each GPU.", min=1)] = None,
    gpus_per_actor: Annotated[
        float | None, typer.Option(help="GPUs of each; default: 1 where the cluster has any.", min=0)
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts of --input written at once.", min=1)] = 64,
    chat_template: Annotated[Path | None, typer.Option(help="File of a chat template (Jinja).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    block_size: BlockSize = None,
    policy: ChosenPolicy = None,
    threshold: Threshold = None,
    per_step: PerStep = None,
    left_bias: LeftBias = None,
    temperature: MaybeTemperature = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; repeatable.")] = None,
    lossless: Lossless = False,
    stepwise: Annotated[
        int, typer.Option(help="Guess so many one-token steps of the policy in one pass; 0: off.", min=0, max=64)
    ] = 0,
    max_forwards: Annotated[int, typer.Option(help="End the text after so many forwards; 0: no limit.", min=0)] = 0,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole continuation matches.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="JSON schema that it follows, or a file of one.")] = None,
    show_steps: Steps = False,
    trace: Annotated[
        Path | None, typer.Option(help="Also write every step as JSON to this file, for `blockdiff report`.")
    ] = None,
    strict_coverage: Annotated[
        bool, typer.Option("--strict-coverage", help="Refuse what training does not cover, instead of warning.")
    ] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Continue a prompt, several tokens at a time; or answer the rows of a file into a directory (--input)."""
    from blockdiff.api import Model
    from blockdiff.runtime import record
    from blockdiff.trace import Recorder

    chosen = asked_policy(policy, threshold, per_step, left_bias)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "block_size": block_size,
        "policy": chosen,
        **chosen_sampling(temperature, top_k, top_p),
        "seed": seed,
        "stop": tuple(stop or ()),
        "lossless": lossless,
        "stepwise": stepwise,
        "max_forwards": max_forwards,
        "regex": regex,
        "json_schema": _schema(json_schema),
    }
    if rows is not None:
        if prompt or show_steps or trace is not None:
            raise ValueError("--input goes with neither --prompt nor --show-steps nor --trace")
        if output is None:
            raise ValueError("--input needs --output, the directory of the answers")
        options |= {"strict_coverage": strict_coverage, "running": batch}
        answer_rows(
            path,
            rows,
            output,
            options,
            shard=shard,
            cluster=_cluster(ray, actors, gpus_per_actor),
            chat_template=chat_template,
            json_file=json_file,
        )
        return
    if not prompt:
        raise ValueError("give a text to continue (--prompt), or a file of rows (--input)")
    if any(given is not None for given in (output, shard, chat_template, ray, actors, gpus_per_actor)):
        raise ValueError("--output, --shard, --chat-template, --ray, --actors and --gpus-per-actor go with --input")
    model = load_writer(path)
    if isinstance(model, Model):
        covered_size = 1 if lossless else block_size  # a draft that training does not cover costs speed, not text
        _check_coverage(model, prompt, max_new_tokens, covered_size, chosen, strict_coverage)
    else:
        model.request(strict_coverage=strict_coverage)  # which refuses it
    single = len(prompt) == 1
    show = StepPrinter(model) if show_steps else None
    stream = _Stream(prompt[0]) if single and not show_steps else None
    recorder = None if trace is None else Recorder()
    outputs = model.generate(prompt, on_text=stream, on_step=_together(show, recorder), **options)
    for number, answer in enumerate(outputs):
        if stream is not None:
            stream(0, "\n")
        else:
            out.print(f"[{number}] " * (not single) + prompt[number] + answer.text)
        err.print(_summary(answer), style="dim", highlight=False)
    results = [answer.to_json() for answer in outputs]
    contents: dict[str, Any] = results[0] if single else {"outputs": results}
    write_result(json_file, record("generate", seed, prompts=prompt, **contents))
    if recorder is not None:
        settings = _settings(model, options)
        traces = [
            {**settings, "seed": seed + number, **recorder.trace(model, number, text, answer)}
            for number, (text, answer) in enumerate(zip(prompt, outputs, strict=True))
        ]
        write_result(trace, record("generate", seed, model=path, rows=traces))


def infill(
    path: ModelPath,
    prefix: Annotated[str, typer.Option(help="Text before the hole.")],
    suffix: Annotated[str, typer.Option(help="Text after the hole.")],
    tokens: Annotated[int, typer.Option(help="Tokens of the hole.", min=1)] = 8,
    policy: ChosenPolicy = None,
    threshold: Threshold = None,
    per_step: PerStep = None,
    left_bias: LeftBias = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    show_steps: Steps = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Fill a hole between two texts, seeing both."""
    from blockdiff.decode import Sampling
    from blockdiff.runtime import record

    chosen = chosen_policy(policy or "threshold", threshold, per_step, left_bias)
    model = load_model(path)
    found = model.infill(
        prefix,
        suffix,
        tokens,
        policy=chosen,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        on_step=StepPrinter(model) if show_steps else None,
    )
    out.print(found.text)
    err.print(_summary(found.output), style="dim", highlight=False)
    contents = {"hole": found.hole, **found.output.to_json(), "text": found.text}
    write_result(json_file, record("infill", seed, prefix=prefix, suffix=suffix, **contents))


def policies(
    parts: Annotated[
        bool, typer.Option("--parts", help="List the parts that a policy can be put together from.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/policies.md.")] = False,
) -> None:
    """The named decoding policies, or the parts of one's own (--policy 'entropy + entropy_budget(0.1)')."""
    from blockdiff.decode import described

    if markdown:
        sys.stdout.write(described.page())
    else:
        out.print(described.parts_table() if parts else described.policies_table())


def _settings(model: Model | DiffusionGemma, options: dict[str, Any]) -> dict[str, Any]:
    """How texts were decoded, as a page of traces says it."""
    from blockdiff.api import Model
    from blockdiff.decode import named

    size, policy, lossless = options["block_size"], options["policy"], options["lossless"]
    if isinstance(model, Model):
        sampling = options.get("sampling")
        temperature: float | str = 0.0 if sampling is None else sampling.temperature
        size = model.spec.default_block_size if size is None else size
        way = "the fastest drafts" if lossless and policy is None else str(policy or named("threshold"))
    else:
        asked = model.request(**options)
        size, way = asked.block_size, str(asked.policy)
        temperature = " to ".join(f"{value:g}" for value in dict.fromkeys(asked.temperatures))
    name = ("one token at a time" if size == 1 else f"blocks of {size}") + ", lossless" * lossless
    return {"name": name, "block_size": size, "policy": way, "temperature": temperature}


def _cluster(address: str | None, actors: int | None, gpus: float | None) -> Cluster | None:
    if address is None:
        if actors is not None or gpus is not None:
            raise ValueError("--actors and --gpus-per-actor go with --ray")
        return None
    from blockdiff.rays import Cluster

    return Cluster(address, actors, gpus)


def _schema(text: str | None) -> str | None:
    if text is None or text.lstrip().startswith("{"):
        return text
    file = Path(text)
    if not file.is_file():
        raise ValueError(f"--json-schema {text}: neither a JSON object nor a file; give one of the two")
    return file.read_text()


def _together(*watchers: OnStep | None) -> OnStep | None:
    """One function that tells every watcher of a step; None where there is no watcher."""
    told = [watcher for watcher in watchers if watcher is not None]
    if not told:
        return None

    def tell(step: Step) -> None:
        for watcher in told:
            watcher(step)

    return tell


def _summary(output: Output) -> str:
    kept = "" if output.tokens_per_verify is None else f", {output.tokens_per_verify:.2f} kept a verification"
    return (
        f"{len(output.tokens)} tokens, {output.forwards} forwards ({output.denoise_forwards} denoise, "
        f"{output.commit_forwards} commit, {output.verify_forwards} verify), "
        f"{output.tokens_per_forward:.2f} tokens per forward with commits{kept}, "
        f"{output.seconds:.2f} s, ended by {output.finish_reason}"
    )


class _Stream:
    """Writes the prompt, once the first text is there, and then the text piece by piece."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def __call__(self, number: int, piece: str) -> None:
        sys.stdout.write(self.prompt + piece)
        sys.stdout.flush()
        self.prompt = ""


def _check_coverage(
    model: Model, prompts: list[str], max_new_tokens: int, block_size: int | None, policy: Policy | None, strict: bool
) -> None:
    """Warn about a decode that training does not cover, or refuse it."""
    if not model.spec.is_diffusion:  # block size 1 is all it has, and generate refuses the rest
        return
    if not model.spec.trained_length and not strict:  # with nothing known there is nothing to compare
        return
    found = model.coverage(
        [len(model.encode(prompt)) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        policy=policy or "threshold",
    )
    if found.covered:
        if found.order_sentence:
            warn(f"covered by training, but {found.order_sentence}")
        return
    assert found.problem is not None
    if strict:
        raise ValueError(f"{found.problem}; see `blockdiff eval coverage`, or leave --strict-coverage out")
    warn(found.problem)


class StepPrinter:
    """Shows the open blocks: decided tokens as text, masks as shaded cells."""

    def __init__(self, model: Model | DiffusionGemma) -> None:
        self.model = model

    def __call__(self, step: Any) -> None:
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        shown = "".join("░" if token is None else tokenizer.decode([token]) for token in step.tokens)
        label = f"[{step.request}] at {step.start:>4}, step {step.step:>2}: "
        out.print(label + shown.replace("\n", "⏎"))
