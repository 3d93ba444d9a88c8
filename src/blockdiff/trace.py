"""Traces of decoding: every state of every block, as a report steps through them (results/traces.json).

Positions are counted from the first generated token. A frame is the open block at one of its steps, None where still
masked; what it shows beyond the text's own tokens is a draft that was not kept.
"""

from __future__ import annotations

from typing import Any

from blockdiff.api import Model
from blockdiff.diffusion_gemma import DiffusionGemma
from blockdiff.engine import Output
from blockdiff.engine.request import Step
from blockdiff.engine.stream import pieces

_COUNTS = ("forwards", "denoise_forwards", "commit_forwards", "verify_forwards")


class Recorder:
    """Keeps the steps of all requests: give it as `on_step`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, step: Step) -> None:
        self.steps.append(step)

    def trace(self, model: Model | DiffusionGemma, number: int, prompt: str, output: Output) -> dict[str, Any]:
        """Request `number` as JSON: its tokens with block and step, its frames, and how many forwards it took."""
        assert model.tokenizer is not None
        ids = tuple(model.encode(prompt))
        texts = pieces(model.tokenizer, ids, output.tokens)
        blocks = [block for block, delivered in enumerate(output.blocks) for _ in range(delivered)]
        tokens = [
            {"text": text, "block": block, "step": step}
            for text, block, step in zip(texts, blocks, output.steps, strict=True)
        ]
        frames = []
        for step in self.steps:
            if step.request == number:
                start = step.start - len(ids)
                shown = [_text(model, output, texts, start + at, token) for at, token in enumerate(step.tokens)]
                frames.append({"start": start, "step": step.step, "tokens": shown})
        counts = {name: getattr(output, name) for name in _COUNTS}
        return {"prompt": prompt, "tokens": tokens, "frames": frames, **counts}


def _text(model: Model | DiffusionGemma, output: Output, texts: list[str], place: int, token: int | None) -> str | None:
    """A token's text: the final text's where it stayed, so that pieces of characters and spaces are right."""
    if token is None:
        return None
    if place < len(texts) and output.tokens[place] == token:
        return texts[place]
    assert model.tokenizer is not None
    return str(model.tokenizer.decode([token]))
