"""Requests, their outputs, and the text that a stream may already show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff.decode import POLICIES, Policy, Sampling


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    prompt token ids (at least one); block_size tokens denoised together; stop strings end the text before their first
    occurrence; end_ids are tokens that end it. lossless: what the policy fills is a draft, of which only the part that
    the AR model would have written itself is kept (`engine.verify`). The output is a function of the request and the
    model alone, never of the batch.
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

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens; give some text (this tokenizer adds no beginning token)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more")
        if self.block_size < 1:
            raise ValueError(f"block size {self.block_size} is not possible; give 1 or more")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty; give at least one character")


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
    it (0: known before denoising began, from the prefix alone); blocks: tokens delivered of each block. forwards counts
    denoise, commit and verify passes over this request's blocks while it was unfinished; the prefill of the prompt is
    not among them.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    finish_reason: str = ""
    denoise_forwards: int = 0
    commit_forwards: int = 0
    verify_forwards: int = 0
    seconds: float = 0.0

    @property
    def forwards(self) -> int:
        return self.denoise_forwards + self.commit_forwards + self.verify_forwards

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward, commit forwards counted."""
        return len(self.tokens) / max(self.forwards, 1)

    @property
    def tokens_per_verify(self) -> float | None:
        """Tokens that a verification lets through, the block's certain first one counted; None where none was made."""
        return len(self.tokens) / self.verify_forwards if self.verify_forwards else None

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "steps": self.steps,
            "blocks": self.blocks,
            "finish_reason": self.finish_reason,
            "forwards": self.forwards,
            "denoise_forwards": self.denoise_forwards,
            "commit_forwards": self.commit_forwards,
            "verify_forwards": self.verify_forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_verify": self.tokens_per_verify,
            "seconds": self.seconds,
        }


class TextStream:
    """Turns committed tokens into text that never changes once shown.

    Held back until certain: bytes of an unfinished character, and an end that could be the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._lead = self._decode(self._prompt)
        self._stop = stop
        self._shown = 0
        self.text = ""

    def feed(self, tokens: list[int]) -> bool:
        """Give all tokens so far; returns True when a stop string ends the text (which is then cut before it)."""
        whole = self._decode(self._prompt + tokens)
        # the first token of a continuation may carry a space that decoding it alone would drop
        self.text = whole[len(self._lead) :] if whole.startswith(self._lead) else self._decode(tokens)
        found = [at for at in (self.text.find(text) for text in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def new_text(self, *, final: bool) -> str:
        """Text that became certain since the last call."""
        ready = len(self.text)
        if not final:
            ready = len(self.text.rstrip("�"))
            ready -= max((_overlap(self.text[:ready], text) for text in self._stop), default=0)
        piece = self.text[self._shown : ready]
        self._shown = max(self._shown, ready)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], tokens: list[int]) -> list[str]:
    """The text that each token adds; joined, they are the text (a character of several tokens belongs to the last)."""
    stream = TextStream(tokenizer, prompt, ())
    out = []
    for count in range(1, len(tokens) + 1):
        stream.feed(tokens[:count])
        out.append(stream.new_text(final=count == len(tokens)))
    return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    return max((n for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)
