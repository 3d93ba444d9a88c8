"""The Python interface: load, generate, bound, train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blockdiff import evaluate, loading
from blockdiff.attention import Implementation
from blockdiff.building import encoder_of
from blockdiff.config import RunConfig, load_config, make_config
from blockdiff.coverage import Coverage
from blockdiff.data import Document, read_corpus
from blockdiff.datafiles import BadRows
from blockdiff.decode import Policy, Sampling, named
from blockdiff.decode.automaton import Automaton, compile_pattern, schema_pattern
from blockdiff.decode.pieces import token_pieces
from blockdiff.diffusion_gemma import DiffusionGemma
from blockdiff.engine import Output, Request, generate
from blockdiff.engine.entry import OnStep
from blockdiff.engine.runner import OnText
from blockdiff.engine.stream import pieces
from blockdiff.evaluate import BoundRow
from blockdiff.foreign import foreign_family
from blockdiff.model import BlockDiffusionModel
from blockdiff.prompting import Prompting


@dataclass(frozen=True)
class Infilled:
    """hole: the text that was filled in; text: the whole; output: how it was decoded, the fixed tokens included."""

    hole: str
    text: str
    output: Output


class Model(Prompting, BlockDiffusionModel):
    """A block diffusion model that generates text. `backbone` is the Hugging Face model, `spec` how it was trained."""

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        max_new_tokens: int = 128,
        block_size: int | None = None,
        policy: Policy | str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
        stop: Sequence[str] = (),
        lossless: bool = False,
        stepwise: int = 0,
        max_forwards: int = 0,
        regex: str | None = None,
        json_schema: str | dict[str, Any] | None = None,
        on_text: OnText | None = None,
        on_step: OnStep | None = None,
    ) -> list[Output]:
        """Continue each prompt; prompt number i uses seed + i, and its text does not depend on the others.

        block_size defaults to the checkpoint's own; policy: a name of `blockdiff policies`, an expression, or a
        `Policy` (default `threshold`). lossless keeps of every block what the AR model writes itself; without a policy
        of its own it drafts in the fastest way that the model allows. stepwise guesses so many one-token steps of the
        policy in one pass. max_forwards ends the text there (0: no limit). regex or json_schema: what the whole
        continuation must match. `on_text(number, piece)` receives final text only. Raises ValueError for what the model
        cannot do.
        """
        request = self.request(
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            policy=policy,
            sampling=sampling,
            stop=tuple(stop),
            lossless=lossless,
            stepwise=stepwise,
            max_forwards=max_forwards,
            constraint=self.constraint(regex, json_schema),
        )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        requests = [
            replace(request, prompt=tuple(self.encode(text)), seed=seed + number) for number, text in enumerate(texts)
        ]
        return generate(self, requests, on_text=on_text, on_step=on_step)

    def request(
        self,
        prompt: tuple[int, ...] = (0,),
        *,
        block_size: int | None = None,
        policy: Policy | str | None = None,
        lossless: bool = False,
        max_forwards: int = 0,
        **fields: Any,
    ) -> Request:
        """What `generate` asks the engine for: a request with this model's block size, policy and end unless told
        otherwise, and what a lossless one drafts with. fields: others of `Request`."""
        fastest = lossless and not max_forwards  # what is fastest follows the clock, and so would where the text ends
        return Request(
            prompt=prompt,
            block_size=self.spec.default_block_size if block_size is None else block_size,
            policy=_policy(policy, lossless),
            end_ids=self.end_ids,
            lossless=lossless,
            drafting="auto" if fastest and policy is None else "policy",
            adaptive=fastest,
            max_forwards=max_forwards,
            forbidden=self.control_ids,
            **fields,
        )

    def infill(
        self,
        prefix: str,
        suffix: str,
        tokens: int,
        *,
        policy: Policy | str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> Infilled:
        """Fill a hole of so many tokens between two texts, seeing both: one block holds the hole and what follows it.

        Raises ValueError where the model's context or its conventions do not allow it.
        """
        before = tuple(self.encode(prefix))
        after = self._suffix_ids(suffix)
        if not before:
            raise ValueError("infilling: the prefix has no tokens; give some text before the hole")
        if tokens < 1:
            raise ValueError(f"infilling: a hole of {tokens} tokens; give 1 or more")
        lead = before[-1:] if len(before) > 1 else ()
        given = (*lead, *([None] * tokens), *after)
        request = Request(
            prompt=before[: len(before) - len(lead)],
            max_new_tokens=len(given),
            block_size=len(given),
            policy=_policy(policy, False),
            sampling=sampling,
            seed=seed,
            forbidden=(*self.control_ids, *self.end_ids),
            given=given,
        )
        (output,) = generate(self, [request], on_step=on_step)
        hole = output.tokens[len(lead) : len(lead) + tokens]
        added = pieces(self._tokenizer, before, [*hole, *after])
        return Infilled("".join(added[:tokens]), prefix + "".join(added), output)

    def _suffix_ids(self, suffix: str) -> tuple[int, ...]:
        """The tokens of a text that follows another: without a beginning token, with its leading space.

        Read off behind a carrier with which it does not merge; ValueError where every carrier merges.
        """
        for carrier in ("a", ".", "x", "0", "\n", ")"):
            lead, whole = self.encode(carrier), self.encode(carrier + suffix)
            ids = tuple(whole[len(lead) :])
            if whole[: len(lead)] == lead and "".join(pieces(self._tokenizer, tuple(lead), list(ids))) == suffix:
                return ids
        raise ValueError(
            f"infilling: the suffix {suffix!r} merges with whatever stands before it; begin it with a space"
        )

    def constraint(self, regex: str | None = None, json_schema: str | dict[str, Any] | None = None) -> Automaton | None:
        """What a text must match, compiled for this tokenizer; None where nothing is asked. Raises ValueError."""
        if regex is None and json_schema is None:
            return None
        if regex is not None and json_schema is not None:
            raise ValueError("give a regex or a json_schema, not both")
        if regex == "":
            raise ValueError("regex: the empty pattern matches the empty text only; give one that matches some text")
        if not hasattr(self, "_pieces"):
            self._pieces = token_pieces(self._tokenizer, self.vocabulary)
        pattern = regex if regex is not None else schema_pattern(json_schema or "")
        return compile_pattern(pattern, self._pieces, self.end_ids)

    def coverage(
        self,
        prompt_tokens: int | Sequence[int] = 16,
        *,
        max_new_tokens: int = 128,
        block_size: int | None = None,
        policy: Policy | str = "threshold",
    ) -> Coverage:
        """Whether training covers decoding with these options after prompts of so many tokens; nothing is decoded."""
        return evaluate.decode_coverage(
            self,
            [prompt_tokens] if isinstance(prompt_tokens, int) else prompt_tokens,
            block_size=self.spec.default_block_size if block_size is None else block_size,
            max_new_tokens=max_new_tokens,
            policy=named(policy) if isinstance(policy, str) else policy,
        )

    def uncovered(self, request: Request) -> str | None:
        """What training does not cover of a request, in a sentence; None where it covers all, or nothing is known."""
        if not self.spec.is_diffusion or not self.spec.trained_length:
            return None
        size = 1 if request.lossless else request.block_size  # a draft that is not covered costs speed, not text
        tokens = min(request.max_new_tokens, self.context_length - len(request.prompt))
        prompt, policy = len(request.prompt), request.policy
        return evaluate.decode_problem(self, prompt, block_size=size, max_new_tokens=tokens, policy=policy)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    implementation: Implementation = "sdpa",
) -> Model:
    """Load a blockdiff checkpoint, or any Hugging Face AR decoder (block size 1 only). CUDA where there is one."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loading.load(path, dtype=dtype, device=where, implementation=implementation, model_class=Model)


def load_writer(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Model | DiffusionGemma:
    """Load whatever writes texts: what `load` does, or DiffusionGemma, which transformers' own `generate` runs."""
    with loading.reading(path):
        family = foreign_family(path)
    if family is None or not family.commands:
        return load(path, dtype=dtype, device=device)
    return DiffusionGemma.load(path, dtype=dtype, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def documents_of(
    bridge: BlockDiffusionModel | DiffusionGemma, texts: Sequence[str] | str | Path, bad_rows: BadRows = "error"
) -> list[Document]:
    """Documents as training makes them, from a list of texts or from a data file."""
    encoder = encoder_of(bridge)
    if isinstance(texts, str | Path):
        return read_corpus(texts, encoder, bad_rows).documents
    names = [f"text {number}" for number in range(1, len(texts) + 1)]
    tokenized = zip(texts, encoder.tokenize(texts), names, strict=True)
    return [encoder.text(text, ids, name) for text, ids, name in tokenized]


def bound(
    bridge: BlockDiffusionModel,
    texts: Sequence[str] | str | Path,
    block_sizes: Sequence[int],
    *,
    offsets: Sequence[int] | None = None,
    draws: int = 8,
    exact: bool = False,
    orders: int = 0,
    left_bias: float = 0.0,
    seed: int = 0,
) -> list[BoundRow]:
    """Bounds on the NLL of texts (or of a data file) at each block size, with standard errors (`evaluate.bound`).

    offsets: none: blocks lie on the grid that they were trained on, where there is one.
    """
    return evaluate.bound(
        bridge,
        documents_of(bridge, texts),
        block_sizes,
        offsets=offsets,
        draws=draws,
        exact=exact,
        orders=orders,
        left_bias=left_bias,
        seed=seed,
    )


def train(config: RunConfig | str | Path | dict[str, Any], **options: Any) -> Path:
    """Train as a config (an object, a YAML file or a dict) says; returns the run directory."""
    from blockdiff import training  # brings the Trainer's libraries, a second that nothing else needs

    if isinstance(config, dict):
        config = make_config(config)
    elif not isinstance(config, RunConfig):
        config = load_config(config)
    return training.train(config, **options).path


def _policy(policy: Policy | str | None, lossless: bool) -> Policy:
    if policy is None:
        policy = "one_step" if lossless else "threshold"
    return named(policy) if isinstance(policy, str) else policy
