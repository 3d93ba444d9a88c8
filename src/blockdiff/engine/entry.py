"""A request on its way through the engine: its final tokens, its pages, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from blockdiff.engine.pages import Mark, Table
from blockdiff.engine.request import Output, Request, Step
from blockdiff.engine.stream import TextStream

OnText = Callable[[str], None]
OnStep = Callable[[Step], None]


class Phase(Enum):
    """What a request waits for: clean tokens to be fed, a block to be opened, denoised or verified, its siblings."""

    FEED = "feed"
    OPEN = "open"
    DENOISE = "denoise"
    VERIFY = "verify"
    MEET = "meet"
    DONE = "done"


@dataclass
class Entry:
    """tokens: prompt and final tokens; size: of the open block; order: the number of its request, and its place in the
    queue; counted: log-probability of what a particle filled until it was last resampled."""

    request: Request
    order: int
    context: int
    stream: TextStream
    on_text: OnText | None = None
    on_step: OnStep | None = None
    output: Output = field(default_factory=Output)
    tokens: list[int] = field(default_factory=list)
    table: Table = field(default_factory=Table)
    shadow: Table | None = None
    phase: Phase = Phase.FEED
    size: int = 0
    counted: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.request.prompt)

    @property
    def pending(self) -> int:
        """Final tokens whose keys and values are not written yet."""
        return len(self.tokens) - self.table.written

    @property
    def room(self) -> int:
        """Tokens that it may still write."""
        return self.request.max_new_tokens - len(self.output.tokens)

    @property
    def guided(self) -> bool:
        """Whether a second text, with the prompt hidden, is read beside it."""
        return "unconditional" in self.request.policy.needs

    @property
    def spent(self) -> bool:
        """Whether its forwards are used up."""
        return 0 < self.request.max_forwards <= self.output.forwards

    def starts(self) -> list[int]:
        """The start of each token's block; a prompt token is a block of its own."""
        starts = list(range(len(self.request.prompt)))
        for size in self.output.blocks:
            starts += [len(starts)] * size
        return starts

    def marks(self, block_causal: bool) -> list[Mark]:
        """What its tokens are filed under. Keys of a block-causal block depend on the whole block."""
        if not block_causal:
            return list(self.tokens)
        marks: list[Mark] = list(self.request.prompt)
        for size in self.output.blocks:
            block = tuple(self.tokens[len(marks) : len(marks) + size])
            marks += [(at, block) for at in range(size)]
        return marks

    def deliver(self, ids: list[int], steps: list[int], log_probability: list[float], edits: list[int]) -> bool:
        """Hand a finished block to the output; True if the request goes on."""
        request, output, stream = self.request, self.output, self.stream
        room, new = self.room, ids[: self.room]
        ends = [i for i, token in enumerate(new) if token in request.end_ids]
        if ends:
            new, output.finish_reason = new[: ends[0] + 1], "end"
        elif len(ids) >= room or len(self.tokens) + len(ids) >= self.context:
            output.finish_reason = "length"
        before = len(output.tokens)
        output.tokens += new
        text_tokens = output.tokens[:-1] if ends else output.tokens
        if request.stop and (cut := self._stopped_at(text_tokens, before)) is not None:
            output.tokens, output.finish_reason = output.tokens[:cut], "stop"
        else:
            stream.feed(text_tokens)
        delivered = len(output.tokens) - before
        output.steps += steps[:delivered]
        output.log_probabilities += log_probability[:delivered]
        output.edits += sum(edits[:delivered])
        output.blocks.append(delivered)
        output.steps_per_block.append(output.denoise_forwards - sum(output.steps_per_block))
        self.tokens += output.tokens[before:]
        piece = stream.new_text(final=bool(output.finish_reason))
        output.text = stream.text
        if piece and self.on_text is not None:
            self.on_text(piece)
        return not output.finish_reason

    def cut_short(self) -> None:
        """End between two blocks: what was open is thrown away."""
        self.output.finish_reason = "length"
        piece = self.stream.new_text(final=True)
        if piece and self.on_text is not None:
            self.on_text(piece)

    def _stopped_at(self, tokens: list[int], before: int) -> int | None:
        """Number of tokens after which a stop string is complete, or None."""
        if not self.stream.feed(tokens):
            return None
        for count in range(before + 1, len(tokens) + 1):
            if self.stream.feed(tokens[:count]):
                return count
        return len(tokens)
