"""The Python interface: load, generate, bound, train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from blockdiff import evaluate, loading, training
from blockdiff.attention import Implementation
from blockdiff.building import encoder_of
from blockdiff.config import RunConfig, load_config, make_config
from blockdiff.coverage import Coverage
from blockdiff.data import Document, read_corpus
from blockdiff.datafiles import BadRows
from blockdiff.decode import POLICIES, Policy, Sampling
from blockdiff.engine import Output, Request, generate
from blockdiff.engine.runner import OnStep, OnText
from blockdiff.evaluate import BoundRow
from blockdiff.model import BlockDiffusionModel


class Model(BlockDiffusionModel):
    """A block diffusion model that generates text. `backbone` is the Hugging Face model, `spec` how it was trained."""

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        max_new_tokens: int = 128,
        block_size: int | None = None,
        policy: Policy | str = "threshold",
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
        stop: Sequence[str] = (),
        lossless: bool = False,
        on_text: OnText | None = None,
        on_step: OnStep | None = None,
    ) -> list[Output]:
        """Continue each prompt; prompt number i uses seed + i, and its text does not depend on the others.

        block_size defaults to the checkpoint's own; lossless keeps of every block what the AR model writes itself
        (`Request`). `on_text(number, piece)` receives final text only. Raises
        ValueError for what the model cannot do.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return generate(
            self,
            [
                Request(
                    prompt=tuple(self.encode(text)),
                    max_new_tokens=max_new_tokens,
                    block_size=self.spec.default_block_size if block_size is None else block_size,
                    policy=named_policy(policy) if isinstance(policy, str) else policy,
                    sampling=sampling,
                    seed=seed + number,
                    stop=tuple(stop),
                    end_ids=self.end_ids,
                    lossless=lossless,
                )
                for number, text in enumerate(texts)
            ],
            on_text=on_text,
            on_step=on_step,
        )

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
            policy=named_policy(policy) if isinstance(policy, str) else policy,
        )

    def encode(self, text: str) -> list[int]:
        """The prompt's tokens, as training made them: with the beginning token where the tokenizer adds one."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: load it from a directory that holds one")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not text: character {error.start} is no Unicode; give UTF-8") from error
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids


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


def documents_of(
    bridge: BlockDiffusionModel, texts: Sequence[str] | str | Path, bad_rows: BadRows = "error"
) -> list[Document]:
    """Documents as training makes them, from a list of texts or from a data file."""
    encoder = encoder_of(bridge)
    if isinstance(texts, str | Path):
        return read_corpus(texts, encoder, bad_rows).documents
    names = [f"text {number}" for number in range(1, len(texts) + 1)]
    return [encoder.document(ids, 1, name) for ids, name in zip(encoder.tokenize(texts), names, strict=True)]


def bound(
    bridge: BlockDiffusionModel,
    texts: Sequence[str] | str | Path,
    block_sizes: Sequence[int],
    *,
    offsets: Sequence[int] = (0,),
    draws: int = 8,
    exact: bool = False,
    left_bias: float = 0.0,
    seed: int = 0,
) -> list[BoundRow]:
    """Bounds on the NLL of texts (or of a data file) at each block size, with standard errors (`evaluate.bound`)."""
    return evaluate.bound(
        bridge,
        documents_of(bridge, texts),
        block_sizes,
        offsets=offsets,
        draws=draws,
        exact=exact,
        left_bias=left_bias,
        seed=seed,
    )


def train(config: RunConfig | str | Path | dict[str, Any], **options: Any) -> Path:
    """Train as a config (an object, a YAML file or a dict) says; returns the run directory."""
    if isinstance(config, dict):
        config = make_config(config)
    elif not isinstance(config, RunConfig):
        config = load_config(config)
    return training.train(config, **options).path


def named_policy(name: str) -> Policy:
    """The policy registered under a name; raises ValueError naming the known ones."""
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown; known: {', '.join(POLICIES)}")
    return POLICIES[name]
