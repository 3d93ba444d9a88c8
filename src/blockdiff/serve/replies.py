"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blockdiff.engine import Output
from blockdiff.serve.orders import Order
from blockdiff.serve.worker import Draft, Piece, Token

_FINISH = {"end": "stop", "stop": "stop", "length": "length"}
_COUNTS = ("forwards", "denoise_forwards", "commit_forwards", "verify_forwards", "positions", "edits")


@dataclass
class Choice:
    """One text of an answer as far as it is known. size: characters of it that were sent, for text offsets."""

    lead: str
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    output: Output | None = None
    size: int = 0

    @property
    def text(self) -> str:
        return self.lead + "".join(self.texts)

    @property
    def finish_reason(self) -> str | None:
        return None if self.output is None else _FINISH[self.output.finish_reason]


class Reply:
    """The answer to one order."""

    def __init__(self, order: Order, model: str) -> None:
        self.order = order
        self.choices = [Choice(lead, size=len(lead)) for lead in order.leads]
        self.warnings = list(order.warnings)
        kind = "chat.completion" if order.chat else "text_completion"
        self.id = ("chatcmpl-" if order.chat else "cmpl-") + secrets.token_hex(12)
        self._head = {"id": self.id, "object": kind, "created": int(time.time()), "model": model}

    # ---- in chunks

    def first(self, index: int) -> dict[str, Any]:
        """The chunk that is sent at once."""
        return self._chunk(index, {"role": "assistant", "content": ""} if self.order.chat else self.choices[index].lead)

    def piece(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The chunk of new text; None where there is nothing to send yet."""
        choice = self.choices[index]
        if not piece.text and not piece.tokens:
            return None
        chunk = self._chunk(index, {"content": piece.text} if self.order.chat else piece.text)
        if self.order.log_probabilities:
            chunk["choices"][0]["logprobs"] = self._log_probabilities(choice, piece.tokens)
        if self.order.drafts:
            tokens = [{"text": token.text, "step": token.step} for token in piece.tokens]
            chunk["diffusion"] = {"index": index, "start": piece.start, "tokens": tokens, "forwards": piece.forwards}
        return chunk

    def draft(self, index: int, draft: Draft) -> dict[str, Any]:
        """An open block: no chunk of text, and without choices, so that a client that does not know it passes it by."""
        return {
            **self._head,
            "object": "blockdiff.draft",
            "choices": [],
            "index": index,
            "start": draft.start,
            "step": draft.step,
            "tokens": list(draft.tokens),
            "forwards": draft.forwards,
        }

    def last(self, index: int) -> dict[str, Any]:
        """The chunk that says how a text ended."""
        chunk = self._chunk(index, {} if self.order.chat else "")
        chunk["choices"][0]["finish_reason"] = self.choices[index].finish_reason
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.order.chat else "text_completion"

    def _chunk(self, index: int, content: dict[str, str] | str) -> dict[str, Any]:
        key = "delta" if self.order.chat else "text"
        choice = {"index": index, key: content, "logprobs": None, "finish_reason": None}
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        if self.order.include_usage:
            chunk["usage"] = None
        return chunk

    # ---- whole

    def take(self, index: int, piece: Piece) -> None:
        """Keep new text for the whole answer."""
        self.choices[index].texts.append(piece.text)
        self.choices[index].tokens += piece.tokens

    def whole(self) -> dict[str, Any]:
        return {**self._head, "choices": [self._whole(i) for i in range(len(self.choices))], "usage": self.usage()}

    def _whole(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        content: dict[str, Any] = {"text": choice.text}
        if self.order.chat:
            content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        tokens = self._log_probabilities(choice, choice.tokens) if self.order.log_probabilities else None
        return {"index": index, **content, "logprobs": tokens, "finish_reason": choice.finish_reason}

    def _log_probabilities(self, choice: Choice, tokens: Sequence[Token]) -> dict[str, Any]:
        """Each token's log-probability under the raw softmax when it was filled. kind `ar`: their sum is the text's
        log-likelihood (block size 1); `reveal`: it is not."""
        kind = "ar" if self.order.requests[0].block_size == 1 else "reveal"
        if self.order.chat:
            content = [
                {
                    "token": token.text,
                    "logprob": token.log_probability,
                    "bytes": list(token.text.encode()),
                    "top_logprobs": [],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None, "kind": kind}
        offsets = []
        for token in tokens:
            offsets.append(choice.size)
            choice.size += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": None,
            "text_offset": offsets,
            "kind": kind,
        }

    def usage(self) -> dict[str, Any]:
        """What the answer cost, over all its texts; forwards are counted as `blockdiff generate` counts them."""
        outputs = [choice.output for choice in self.choices if choice.output is not None]
        first = self.order.requests[0]
        counts = {name: sum(getattr(output, name) for output in outputs) for name in _COUNTS}
        tokens = sum(len(output.tokens) for output in outputs)
        denoise = counts["denoise_forwards"]
        firsts = [choice.output for choice in self.choices[:: self.order.n] if choice.output is not None]
        return {
            "prompt_tokens": self.order.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.order.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in firsts)},
            "diffusion": {
                **counts,
                "blocks": sum(len(output.blocks) for output in outputs),
                "steps_per_block": [steps for output in outputs for steps in output.steps_per_block],
                "tokens_per_forward": tokens / max(counts["forwards"], 1),
                "tokens_per_denoise": tokens / denoise if denoise else None,
                "policy": self.order.named,
                "block_size": first.block_size,
                "lossless": first.lossless,
                "seed": first.seed,
                "warnings": self.warnings,
            },
        }
