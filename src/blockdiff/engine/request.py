"""Requests and their outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from blockdiff.decode import POLICIES, Policy, Sampling
from blockdiff.decode.automaton import Automaton


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    prompt token ids (at least one); block_size tokens denoised together; stop strings end the text before their first
    occurrence; end_ids are tokens that end it; forbidden ones are never written.

    lossless: what is filled is a draft, of which only the part that the AR model would have written itself is kept
    (`engine.drafting`). drafting: by the policy in passes of its own; `ahead`, in the pass that verifies the draft
    before; or `auto`, whichever is faster. adaptive: drafts get shorter where they fail, and
    stop where they do not pay.
    given: tokens of the text that are fixed, None where it is to be filled (infilling). stepwise: several steps of the
    policy guessed and checked in one pass (`engine.stepwise`). constraint: what the text must match.

    max_forwards: passes after which the text ends with what is final by then (finish reason length); 0: no limit.

    The text is a function of the request and the model alone, never of the batch. How it was cut into blocks and how
    many forwards it took is, too, but where drafts are ahead or adaptive (the latter follow the clock) and where
    particles were preempted; `positions` also follow the batch in stepwise decoding.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    block_size: int = 1
    policy: Policy = POLICIES["threshold"]
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    seed: int = 0
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    lossless: bool = False
    drafting: Literal["policy", "ahead", "auto"] = "policy"
    adaptive: bool = False
    forbidden: tuple[int, ...] = ()
    given: tuple[int | None, ...] = ()
    stepwise: int = 0
    max_forwards: int = 0
    constraint: Automaton | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens; give some text (this tokenizer adds no beginning token)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more")
        if self.block_size < 1:
            raise ValueError(f"block size {self.block_size} is not possible; give 1 or more")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty; give at least one character")
        if self.max_forwards < 0:
            raise ValueError(f"max_forwards {self.max_forwards} is negative; give the most passes, 0 for no limit")
        if self.stepwise < 0:
            raise ValueError(f"stepwise {self.stepwise} is negative; give the steps to guess, 0 for none")


@dataclass(frozen=True)
class Step:
    """A block while it fills: what `--show-steps` draws. tokens are None where still masked; never final text."""

    request: int
    start: int
    step: int
    tokens: tuple[int | None, ...]


@dataclass
class Output:
    """What a request produced.

    tokens: generated ids, the end token included; steps: for each token the denoising step of its block that filled
    it (0: the prefix decided it, or it was given); log_probabilities: of each under the raw softmax when it was filled,
    in nats (their sum is *not* the text's likelihood); blocks: how many tokens each block delivered; steps_per_block:
    denoise forwards of each; finish_reason: end (an end token), stop (a stop string) or length. denoise, commit and
    verify forwards: passes over this request's blocks while it was unfinished; the prefill of the prompt is not among
    them. positions: tokens of the passes, prefill not counted. edits: filled tokens that were changed. cached_tokens:
    of the prompt, found in pages that another request had written.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    steps_per_block: list[int] = field(default_factory=list)
    finish_reason: str = ""
    denoise_forwards: int = 0
    commit_forwards: int = 0
    verify_forwards: int = 0
    positions: int = 0
    edits: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    @property
    def forwards(self) -> int:
        return self.denoise_forwards + self.commit_forwards + self.verify_forwards

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward, commit forwards counted."""
        return len(self.tokens) / max(self.forwards, 1)

    @property
    def tokens_per_denoise(self) -> float | None:
        """Tokens per denoise forward, commit forwards not counted; None where none was made."""
        return len(self.tokens) / self.denoise_forwards if self.denoise_forwards else None

    @property
    def tokens_per_verify(self) -> float | None:
        """Tokens that a verification lets through, the block's certain first one counted; None where none was made."""
        return len(self.tokens) / self.verify_forwards if self.verify_forwards else None

    @property
    def accepted(self) -> dict[int, int]:
        """How often a verification let through so many tokens; empty where none was made."""
        if not self.verify_forwards:
            return {}
        return {size: self.blocks.count(size) for size in sorted(set(self.blocks))}

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "steps": self.steps,
            "log_probabilities": [round(value, 6) for value in self.log_probabilities],
            "blocks": self.blocks,
            "steps_per_block": self.steps_per_block,
            "finish_reason": self.finish_reason,
            "forwards": self.forwards,
            "denoise_forwards": self.denoise_forwards,
            "commit_forwards": self.commit_forwards,
            "verify_forwards": self.verify_forwards,
            "positions": self.positions,
            "edits": self.edits,
            "cached_tokens": self.cached_tokens,
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_denoise": self.tokens_per_denoise,
            "tokens_per_verify": self.tokens_per_verify,
            "accepted": {str(size): often for size, often in self.accepted.items()},
            "seconds": self.seconds,
        }
