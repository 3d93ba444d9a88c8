"""From a request's body to what the engine is asked for, or to a refusal that names the field."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockdiff.api import Model
from blockdiff.decode import Policy, Sampling, changed, named
from blockdiff.engine import Request
from blockdiff.serve.capabilities import block_sizes
from blockdiff.serve.fields import ChatBody, CompletionBody
from blockdiff.serve.settings import Settings

_SEEDS = 2**63
_COMPLETION_TOKENS = 16  # of OpenAI's completions, where none are asked for
_STOPS = 16
_LONGEST = 400  # characters of an error's message
# how the messages of the engine's refusals begin, and the field that they are about
_ABOUT = {
    "policy": "diffusion.policy",
    "block size": "diffusion.block_size",
    "lossless": "diffusion.lossless",
    "max_forwards": "diffusion.max_forwards",
    "seed": "seed",
    "temperature": "temperature",
    "top_p": "top_p",
    "the prompt": "prompt",
    "token ": "prompt",
    "the request needs room": "max_tokens",
    "not covered": "diffusion",
}


class Refused(Exception):
    """A request that is answered with an error: the HTTP status, what is wrong, and in which field."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None, wait: int = 0
    ) -> None:
        super().__init__(message)
        self.message = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
        self.param, self.status, self.code, self.wait = param, status, code, wait


@dataclass(frozen=True)
class Order:
    """What one HTTP request asks for: the engine's requests of all its texts, and how to answer.

    leads: what is put before each text (echo); named: the policy as it was asked for; log_probabilities, drafts:
    whether they are wanted; warnings: what the client should know; n: texts of each prompt.
    """

    requests: tuple[Request, ...]
    chat: bool
    leads: tuple[str, ...]
    named: str
    log_probabilities: bool = False
    drafts: bool = False
    stream: bool = False
    include_usage: bool = False
    warnings: tuple[str, ...] = ()
    n: int = 1

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once, however many texts continue it."""
        return sum(len(request.prompt) for request in self.requests[:: self.n])

    @property
    def detailed(self) -> bool:
        """Whether an answer tells about single tokens."""
        return self.log_probabilities or self.drafts


class Clerk:
    """Reads bodies for one model. check: raises ValueError for what the engine cannot serve. Tokenizing is done by one
    thread at a time."""

    def __init__(self, model: Model, check: Callable[[Request], None], settings: Settings) -> None:
        self.model, self.check, self.settings = model, check, settings
        self.block_sizes = block_sizes(model, settings)
        self._lock = threading.Lock()

    # ---- the two kinds of bodies

    def completion(self, body: CompletionBody) -> Order:
        self._check_common(body)
        prompts = self._prompts(body.prompt)
        if body.echo and body.logprobs is not None:
            raise Refused("echo: not together with logprobs, since a prompt's tokens were not filled", "echo")
        limit = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        leads = [text or "" if body.echo else "" for text, _ in prompts]
        if body.echo and any(text is None for text, _ in prompts):
            raise Refused("echo: give the prompt as text, not as token ids", "echo")
        return self._order(body, [ids for _, ids in prompts], leads, limit, False, body.logprobs is not None)

    def chat(self, body: ChatBody) -> Order:
        if body.generation_config is not None:
            body = _with_generation_config(body)
        self._check_common(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused("top_logprobs: only together with logprobs", "top_logprobs")
        newer, older = body.max_completion_tokens, body.max_tokens
        if newer is not None and older is not None and newer != older:
            raise Refused("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
        messages = [{"role": _role(one.role), "content": one.text} for one in body.messages]
        with self._lock:
            ids = self._about("messages", self.model.encode_chat, messages)
        limit = older if newer is None else newer
        return self._order(body, [ids], [""], limit, True, bool(body.logprobs))

    # ---- what they share

    def _check_common(self, body: CompletionBody | ChatBody) -> None:
        if body.model is not None and body.model != self.settings.name:
            raise Refused(
                f"model {_shown(body.model)} is not served here; this server has {self.settings.name}",
                "model",
                status=404,
                code="model_not_found",
            )
        if body.stream_options is not None and not body.stream:
            raise Refused("stream_options: only together with stream: true", "stream_options")
        if body.options.stream_drafts and not body.stream:
            raise Refused("diffusion.stream_drafts: only together with stream: true", "diffusion.stream_drafts")
        if isinstance(body.stop, list) and len(body.stop) > _STOPS:
            raise Refused(f"stop: {len(body.stop)} texts; give at most {_STOPS}", "stop")

    def _prompts(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[tuple[str | None, list[int]]]:
        """Each prompt's text (None where it came as tokens) and tokens."""
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        given: Sequence[Any] = [prompt] if single else prompt
        if not given:
            raise Refused("prompt: the list is empty; give at least one prompt", "prompt")
        if len(given) > self.settings.choices:
            raise Refused(f"prompt: {len(given)} prompts; give at most {self.settings.choices}", "prompt")
        found: list[tuple[str | None, list[int]]] = []
        for one in given:
            if isinstance(one, str):
                with self._lock:
                    found.append((one, self._about("prompt", self.model.encode, one)))
            else:
                found.append((None, list(one)))
            if not found[-1][1]:
                raise Refused("prompt: it has no tokens; give some text", "prompt")
        return found

    def _order(
        self,
        body: CompletionBody | ChatBody,
        prompts: Sequence[Sequence[int]],
        leads: Sequence[str],
        limit: int | None,
        chat: bool,
        log_probabilities: bool,
    ) -> Order:
        n = body.n or 1
        if n * len(prompts) > self.settings.choices:
            raise Refused(f"n: {n} texts of {len(prompts)} prompts; at most {self.settings.choices} at once", "n")
        options = body.options
        policy = self._policy(body)
        if options.lossless and log_probabilities:
            raise Refused("logprobs: not with lossless decoding, whose drafts have other probabilities", "logprobs")
        largest = self.settings.largest_block or self.block_sizes[-1]
        size = min(self.model.spec.default_block_size, largest) if options.block_size is None else options.block_size
        if size > largest:
            why = "" if self.settings.largest_block else ", the largest that training had"
            text = f"diffusion.block_size: {size}; this server allows {largest}{why}"
            raise Refused(text, "diffusion.block_size")
        seed = secrets.randbits(48) if body.seed is None else body.seed
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        template = self.model.request(
            block_size=size,
            policy=policy,
            lossless=options.lossless,
            sampling=self._sampling(body),
            stop=stop,
            max_forwards=options.max_forwards or 0,
        )
        requests, warnings = [], []
        field = "messages" if chat else "prompt"
        for at, ids in enumerate(prompts):
            if (mask := self.model.spec.mask_id) is not None and mask in ids:
                text = f"{field}: it holds the [MASK] token ({mask}), and a prompt is decided text; leave it out"
                raise Refused(text, field)
            own = replace(template, prompt=tuple(ids), max_new_tokens=self._limit(len(ids), limit, field))
            self._about(field, self.check, own)
            if (problem := self._covered(own)) is not None:
                warnings.append(problem)
            requests += [replace(own, seed=_seed(seed, at * n + i)) for i in range(n)]
        return Order(
            requests=tuple(requests),
            chat=chat,
            leads=tuple(lead for lead in leads for _ in range(n)),
            named=str(policy or ("the fastest" if options.lossless else "threshold")),
            log_probabilities=log_probabilities,
            drafts=options.stream_drafts,
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            warnings=tuple(dict.fromkeys(warnings)),
            n=n,
        )

    @staticmethod
    def _policy(body: CompletionBody | ChatBody) -> Policy | None:
        """The policy that is asked for; None where none is, and the model takes its own."""
        options = body.options
        if options.policy is None and options.threshold is None:
            return None
        try:
            policy = named(options.policy or "threshold")
        except (ValueError, RecursionError, MemoryError) as error:
            raise Refused(str(error) or "policy: too deep", "diffusion.policy") from error
        try:
            return changed(policy, options.threshold)
        except ValueError as error:
            raise Refused(str(error), "diffusion.threshold") from error

    def _sampling(self, body: CompletionBody | ChatBody) -> Sampling:
        temperature = 1.0 if body.temperature is None else body.temperature
        return Sampling(temperature, body.options.top_k, 1.0 if body.top_p is None else body.top_p)

    def _limit(self, prompt: int, asked: int | None, source: str) -> int:
        """How many tokens a text may have."""
        context = self.model.context_length
        room = context - prompt
        most = self.settings.max_tokens or context
        if asked is not None and asked > most:
            raise Refused(f"max_tokens: {asked}; this server allows {most}", "max_tokens")
        if room < 1 or (asked is not None and asked > room):
            field = source if asked is None or room < 1 else "max_tokens"
            wanted = "" if asked is None else f" and {asked} new ones"
            raise Refused(
                f"{field}: the context holds {context} tokens, and the prompt has {prompt}{wanted}: shorten them",
                field,
                code="context_length_exceeded",
            )
        return min(room, most) if asked is None else asked

    def _covered(self, request: Request) -> str | None:
        """What training does not cover of it: a warning, or a refusal where that is strict."""
        problem = self.model.uncovered(request)
        if problem is not None and self.settings.strict_coverage:
            raise Refused(problem, "diffusion.block_size", code="not_covered")
        return problem

    @staticmethod
    def _about(param: str, call: Any, *args: Any) -> Any:
        """The call's result; its ValueError as a refusal that names the field."""
        try:
            return call(*args)
        except ValueError as error:
            text = str(error)
            own = next((field for start, field in _ABOUT.items() if text.startswith(start)), param)
            raise Refused(text, param if own == "prompt" else own) from error


_THEIRS = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p"}


def _with_generation_config(body: ChatBody) -> ChatBody:
    """What `transformers chat` asks for in its own words, in OpenAI's."""
    name = "generation_config"
    try:
        asked = json.loads(body.generation_config or "")
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: this is no JSON", name) from error
    if not isinstance(asked, dict):
        raise Refused(f"{name}: give a JSON object", name)
    asked = {key: value for key, value in asked.items() if value is not None and key != "transformers_version"}
    tree = {key: value for key, value in body.model_dump(exclude={name}).items() if value is not None}
    wanted = {ours: asked.pop(theirs) for theirs, ours in _THEIRS.items() if theirs in asked}
    sampled = asked.pop("do_sample", True)
    if not isinstance(sampled, bool):
        raise Refused(f"{name}: do_sample is true or false", name)
    if not sampled:  # then transformers passes a temperature by
        wanted["temperature"] = 0.0
    for ours, value in wanted.items():
        if tree.get(ours, value) != value:
            raise Refused(f"{name}: it asks for another {ours} than the request itself; give one of them", name)
    if body.options.top_k and asked.get("top_k", body.options.top_k) != body.options.top_k:
        raise Refused(f"{name}: it asks for another top_k than the request itself; give one of them", name)
    tree |= wanted
    if "top_k" in asked:
        tree["diffusion"] = {**tree.get("diffusion", {}), "top_k": asked.pop("top_k")}
    if asked:
        first = _shown(next(iter(asked)))
        raise Refused(f"{name}: {first} is not supported; leave it out", name)
    try:
        return ChatBody.model_validate(tree)
    except ValueError as error:
        raise Refused(f"{name}: a value in it is out of range", name) from error


def _role(name: str) -> str:
    return "system" if name == "developer" else name


def _seed(first: int, number: int) -> int:
    """first + number, in the 64 bits that a seed has."""
    return (first + number + _SEEDS) % (2 * _SEEDS) - _SEEDS


def _shown(text: str) -> str:
    """A client's text as it may stand in an answer: short, and in one line."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
