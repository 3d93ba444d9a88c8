"""DiffusionGemma, transformers' own block diffusion model, written with by transformers' own `generate`.

Its encoder reads the prompt and every finished canvas causally and keeps their keys and values; its decoder denoises a
canvas of `canvas_length` random tokens (there is no [MASK]), seeing them, itself, and its own last prediction. That is
no `BlockDiffusionModel`, and nothing here computes it: requests become arguments of `generate`, and what that reports
of each step becomes an `Output`. Texts are written one by one, so that none depends on the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff.attention import UnsupportedModel
from blockdiff.decode import Policy, Sampling, named
from blockdiff.decode.counts import EntropyBudget
from blockdiff.decode.remasking import Renoise
from blockdiff.decode.scores import Entropy
from blockdiff.engine import Job, Output, Request, Step
from blockdiff.engine.entry import Entry, OnStep
from blockdiff.engine.runner import OnText
from blockdiff.engine.stream import TextStream
from blockdiff.loading import check_whole, generation_settings, load_tokenizer, reading
from blockdiff.prompting import Prompting

if TYPE_CHECKING:
    from transformers import DiffusionGemmaForBlockDiffusion

_REFUSED = {  # options of `Model.generate` that mean nothing here, and why
    "block_size": "its canvas has one size, the checkpoint's",
    "lossless": "no AR model is in it whose text could be kept",
    "stepwise": "every step draws new noise, so none can be guessed ahead",
    "max_forwards": "a canvas is a draft until its last step (the policy's renoise(steps=16) allows fewer)",
    "constraint": "its sampler knows none",
    "regex": "its sampler knows no constraints",
    "json_schema": "its sampler knows no constraints",
    "strict_coverage": "what it was trained on is not known",
}


@dataclass(frozen=True)
class CanvasRequest(Request):
    """A request to DiffusionGemma: block_size is its canvas, policy its sampler's settings (`denoising`).

    temperatures: of a canvas' first and last step, linear between them (sampling has the first); stability: steps for
    which a canvas must stand still to be done.
    """

    temperatures: tuple[float, float] = (0.8, 0.4)
    stability: int = 1


def denoising(bound: float, steps: int, settled: float) -> Policy:
    """DiffusionGemma's sampler as a policy: at every step the surest positions, within so many nats of entropy, are
    kept and the rest drawn anew, for so many steps at most, or until the mean entropy is below `settled` nats."""
    count, reviser = EntropyBudget(float(bound), own=True), Renoise(float(settled), int(steps))
    return Policy(score=Entropy(), counts=(count,), reviser=reviser)


def with_steps(policy: Policy, steps: int) -> Policy:
    """The policy, DiffusionGemma's sampler, with so many steps for a canvas at most; ValueError for another policy."""
    budget, reviser = _parts(policy)
    return denoising(budget.gamma, steps, reviser.settled)


class DiffusionGemma(Prompting):
    """A DiffusionGemma checkpoint that generates text; `network` is transformers' model."""

    def __init__(self, network: DiffusionGemmaForBlockDiffusion, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.notes: list[str] = []

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> DiffusionGemma:
        """Load a checkpoint directory or hub name. Raises FileNotFoundError, and UnsupportedModel for anything that is
        no whole DiffusionGemma."""
        from transformers import DiffusionGemmaForBlockDiffusion  # slow to import, and few need it

        with reading(path):
            generation_settings(path, DiffusionGemmaForBlockDiffusion.generation_config_class)
            network, found = DiffusionGemmaForBlockDiffusion.from_pretrained(
                path, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, trust_remote_code=False
            )
        check_whole(path, found)
        if found["unexpected_keys"]:
            odd = min(found["unexpected_keys"])
            raise UnsupportedModel(f"{path}: weights that DiffusionGemma has no place for, among them {odd}")
        model = cls(network.to(device).eval(), load_tokenizer(path))
        try:
            model.request()
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"{path}: generation_config.json: its sampler cannot run so ({error}); correct it or take it out"
            ) from error
        return model

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def canvas_length(self) -> int:
        """Tokens denoised together."""
        return int(self.network.config.canvas_length)

    @property
    def vocabulary(self) -> int:
        return int(self.network.config.text_config.vocab_size)

    @property
    def context_length(self) -> int:
        """Positions that the model can address."""
        return int(self.network.config.text_config.max_position_embeddings)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the generation config's, else the text config's, else the tokenizer's."""
        for source in (self.network.generation_config, self.network.config.text_config, self.tokenizer):
            found = getattr(source, "eos_token_id", None)
            if found is not None:
                return tuple(found) if isinstance(found, list | tuple) else (int(found),)
        return ()

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        on_text: OnText | None = None,
        on_step: OnStep | None = None,
        seed: int = 0,
        **options: Any,
    ) -> list[Output]:
        """Continue each prompt; prompt number i uses seed + i, and its text does not depend on the others.

        options: as `request`. `on_text(number, piece)` receives canvases that are done, `on_step` each step's draft.
        """
        request = self.request(**options)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        requests = [
            replace(request, prompt=tuple(self.encode(text)), seed=seed + number) for number, text in enumerate(texts)
        ]
        return self.write(requests, on_text=on_text, on_step=on_step)

    def request(
        self,
        prompt: tuple[int, ...] = (0,),
        *,
        max_new_tokens: int = 128,
        policy: Policy | str | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        **others: Any,
    ) -> CanvasRequest:
        """A request with the checkpoint's own settings unless told otherwise.

        policy: `diffusion_gemma`, or its parts with other settings (a canvas is then done when it stood still for one
        step); sampling: a constant temperature above 0 in place of the falling one. others: options of `Model.generate`
        that mean nothing here. Raises ValueError for those that are set, and for a policy or a sampling that
        transformers' sampler does not have.
        """
        for name, value in others.items():
            if name not in _REFUSED:
                raise TypeError(f"request() has no option {name!r}")
            if value and not (name == "block_size" and value == self.canvas_length):
                raise ValueError(f"{name} does not go with DiffusionGemma: {_REFUSED[name]}; leave it out")
        own, _ = self.network._prepare_generation_config(None)
        temperatures, stability = (float(own.t_max), float(own.t_min)), int(own.stability_threshold)
        if sampling is not None:
            temperatures = (_constant(sampling),) * 2
        if policy is None:
            policy = denoising(own.sampler_config.entropy_bound, own.max_denoising_steps, own.confidence_threshold)
        else:
            budget, reviser = _parts(policy)
            policy, stability = denoising(budget.gamma, reviser.steps, reviser.settled), 1
        return CanvasRequest(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            block_size=self.canvas_length,
            policy=policy,
            sampling=Sampling(temperatures[0]),
            seed=seed,
            stop=tuple(stop),
            end_ids=self.end_ids,
            temperatures=temperatures,
            stability=stability,
        )

    def write(
        self, requests: Sequence[Request], *, on_text: OnText | None = None, on_step: OnStep | None = None
    ) -> list[Output]:
        """Continue every request (of `self.request`), one after another; raises ValueError for one that the model
        cannot serve, before any work is done."""
        checked = [self.check(request) for request in requests]
        began = time.perf_counter()
        outputs = [
            self._write(request, number, None if on_text is None else partial(on_text, number), on_step)
            for number, request in enumerate(checked)
        ]
        seconds = time.perf_counter() - began
        for output in outputs:  # all of the call's time, as the engine has it
            output.seconds = seconds
        return outputs

    def check(self, request: Request) -> CanvasRequest:
        """The request; ValueError for one that this model cannot serve."""
        if not isinstance(request, CanvasRequest):
            raise ValueError("DiffusionGemma needs requests of its own: make them with its `request`")
        odd = [token for token in request.prompt if not 0 <= token < self.vocabulary]
        if odd:
            raise ValueError(f"token {odd[0]} is none of the model's {self.vocabulary}; use its own tokenizer")
        if self.network.config.image_token_id in request.prompt:
            raise ValueError("the prompt has the token of an image, and images are not read here: give text alone")
        if not -(2**63) <= request.seed < 2**63:
            raise ValueError(f"seed {request.seed} does not fit 64 bits; give a smaller one")
        if not self._canvases(request):
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, and the model's context of {self.context_length} has no "
                f"room for a canvas of {self.canvas_length} behind it: shorten the prompt"
            )
        return request

    def constraint(self, regex: str | None = None, json_schema: object = None) -> None:
        """As `Model.constraint`; ValueError where there is one."""
        self.request(regex=regex, json_schema=json_schema)

    def uncovered(self, request: Request) -> str | None:
        """As `Model.uncovered`; None: what it was trained on is not known."""
        return None

    def _canvases(self, request: CanvasRequest) -> int:
        """Canvases at most: as many as the tokens take and the context has room for."""
        wanted = math.ceil(request.max_new_tokens / self.canvas_length)
        return max(0, min(wanted, (self.context_length - len(request.prompt)) // self.canvas_length))

    def _write(
        self, request: CanvasRequest, number: int, on_text: Callable[[str], None] | None, on_step: OnStep | None
    ) -> Output:
        room = len(request.prompt) + self._canvases(request) * self.canvas_length
        stream = TextStream(self._tokenizer, request.prompt, request.stop)
        entry = Entry(request, number, room, stream, on_text, on_step)
        drafts = _Drafts(entry)
        ids = torch.tensor([request.prompt], device=self.device)
        with _seeded(request.seed, self.device), self._counted(entry.output):
            self.network.generate(
                ids,
                streamer=drafts,
                stopping_criteria=StoppingCriteriaList([drafts.deliver]),
                max_new_tokens=room - len(request.prompt),
                eos_token_id=list(request.end_ids) or None,
                **_settings(request),
            )
        return entry.output

    @contextmanager
    def _counted(self, output: Output) -> Iterator[None]:
        """Count passes of the network: the decoder's denoise, the encoder's after the prompt commit a canvas."""

        def denoised(*_: object) -> None:
            output.denoise_forwards += 1
            output.positions += self.canvas_length

        def encoded(*_: object) -> None:
            if output.denoise_forwards:
                output.commit_forwards += 1
                output.positions += self.canvas_length

        hooks = [
            self.network.model.decoder.register_forward_hook(denoised),
            self.network.model.encoder.register_forward_hook(encoded),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class OneByOne:
    """What batch generation asks of an engine, for DiffusionGemma: `step` writes the text that waits longest."""

    def __init__(self, model: DiffusionGemma) -> None:
        self.model = model
        self._added = 0
        self._waiting: list[Job] = []

    def check(self, request: Request) -> None:
        self.model.check(request)

    def add(self, request: Request) -> Job:
        self.check(request)
        job = Job(self._added, request, None, None)
        self._added += 1
        self._waiting.append(job)
        return job

    def step(self) -> list[Job]:
        job = self._waiting.pop(0)
        (job.output,) = self.model.write([job.request])
        return [job]


class _Drafts(BaseStreamer):
    """Told of every step by `generate`; hands finished canvases to the output."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.drafts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        """The prompt, and canvases that `deliver` has had already."""

    def put_draft(self, value: Tensor) -> None:
        """What the canvas would be, by its likeliest tokens, after another step."""
        self.drafts.append(value[0])
        if self.entry.on_step is not None:
            ids = tuple(value[0].tolist())
            self.entry.on_step(Step(self.entry.order, len(self.entry.tokens), len(self.drafts), ids))

    def end(self) -> None:
        """Nothing is held back."""

    def deliver(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        """Take the canvas that is done; a stopping criterion, asked after every canvas.

        A token's step is the first from which its draft stayed.
        """
        stays = (torch.stack(self.drafts) == self.drafts[-1]).flip(0).cumprod(0).sum(0)
        steps = (len(self.drafts) + 1 - stays).tolist()
        canvas = self.drafts[-1].tolist()
        self.drafts.clear()
        goes_on = self.entry.deliver(canvas, steps, [], [0] * len(canvas))
        return torch.tensor([not goes_on], device=ids.device)


def _parts(policy: Policy | str) -> tuple[EntropyBudget, Renoise]:
    """The two parts of DiffusionGemma's sampler that have settings; ValueError for a policy that is another."""
    policy = named(policy) if isinstance(policy, str) else policy
    count, reviser = policy.counts[0], policy.reviser
    if isinstance(count, EntropyBudget) and isinstance(reviser, Renoise):
        same = denoising(count.gamma, reviser.steps, reviser.settled)
        if policy == same and count.gamma > 0:
            return count, reviser
    raise ValueError(
        f"policy {policy}: DiffusionGemma has one sampler, diffusion_gemma; give that, its parts with other settings "
        "('entropy + entropy_budget(0.1, own=True) + renoise(steps=16)'), or none"
    )


def _constant(sampling: Sampling) -> float:
    """The temperature; ValueError for a sampling that the sampler does not have."""
    if sampling.top_k or sampling.top_p < 1:
        raise ValueError(
            "top_k and top_p do not go with DiffusionGemma, leave them out: its sampler draws from all tokens"
        )
    if not sampling.temperature:
        raise ValueError(
            "temperature 0 is not possible: DiffusionGemma divides its logits by it at every step; give one above 0, "
            "or none for the checkpoint's own"
        )
    return sampling.temperature


def _settings(request: CanvasRequest) -> dict[str, Any]:
    """The sampler's settings as arguments of `generate`."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    budget, reviser = _parts(request.policy)
    first, last = request.temperatures
    return {
        "max_length": None,  # would stand before max_new_tokens where that is 256
        "max_denoising_steps": reviser.steps,
        "sampler_config": EntropyBoundSamplerConfig(budget.gamma),
        "t_max": first if first > last else math.nextafter(last, math.inf),  # it insists on a difference
        "t_min": last,
        "stability_threshold": request.stability,
        "confidence_threshold": reviser.settled,
        "disable_compile": True,  # compiled, it keeps the first call's entropy bound, and hooks do not count
    }


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own generators, which `generate` draws from, started from a seed; as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
