"""Generation: many ragged requests in one batch, block after block, over an exact cache.

prefill   the prompts, read once into the cache of clean keys and values
open      a block of masks (its first token already known where the model reads it from the prefix)
denoise   a pass over the open blocks only; the policies fill positions; the cache is left as it was
commit    a clean pass over the finished blocks writes their keys and values
verify    the same pass, for lossless requests, says first how much of the block stays (`engine.drafting`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockdiff.decode import MASK
from blockdiff.engine.batch import Batch
from blockdiff.engine.checks import check
from blockdiff.engine.request import Output, Request, Step
from blockdiff.engine.search import Search, refined, refinement
from blockdiff.engine.stepwise import denoise_stepwise
from blockdiff.engine.stream import TextStream
from blockdiff.model import BlockDiffusionModel

OnText = Callable[[int, str], None]
OnStep = Callable[[Step], None]


@torch.inference_mode()
def generate(
    model: BlockDiffusionModel,
    requests: Sequence[Request],
    *,
    on_text: OnText | None = None,
    on_step: OnStep | None = None,
) -> list[Output]:
    """Continue every request. `on_text(request, piece)` receives final text only, piece by piece: the pieces of a
    request joined are its output's text. `on_step` receives open blocks as they fill.

    Raises ValueError for a request the model cannot serve, before any work is done.
    """
    if not requests:
        return []
    for request in requests:
        check(model, request)
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: load it from a directory that holds one")
    was_training = model.training
    model.eval()
    if model.adapter is not None:
        model.adapter.prepare()
    began = time.perf_counter()
    outputs = _generate(model, requests, on_text, on_step)
    again = [at for at, request in enumerate(requests) if request.policy.refine is not None and outputs[at].tokens]
    if again:
        second = [refinement(requests[at], outputs[at]) for at in again]
        for at, output in zip(again, _generate(model, second, None, None), strict=True):
            outputs[at] = refined(model.tokenizer, requests[at], outputs[at], output)
            if on_text is not None:
                on_text(at, outputs[at].text)
    model.train(was_training)
    for output in outputs:
        output.seconds = time.perf_counter() - began
    return outputs


def _generate(
    model: BlockDiffusionModel, requests: Sequence[Request], on_text: OnText | None, on_step: OnStep | None
) -> list[Output]:
    """One stage. Requests that search run as several particles; stepwise ones in batches of their own."""
    outputs: dict[int, Output] = {}
    for steps in dict.fromkeys(request.stepwise for request in requests):
        numbers = [number for number, request in enumerate(requests) if request.stepwise == steps]
        search = Search.of([requests[number] for number in numbers])
        shown = [numbers[own] for own in search.owner]
        silent = {shown[at] for at, r in enumerate(search.requests) if r.policy.refine or r.policy.search}
        run = _Run(model, search, on_text and _renumbered(on_text, shown, silent), on_step, shown, steps)
        for number, output in zip(numbers, search.best(run.finish()), strict=True):
            outputs[number] = output
            if on_text is not None and requests[number].policy.search and not requests[number].policy.refine:
                on_text(number, output.text)
    return [outputs[number] for number in range(len(requests))]


def _renumbered(on_text: OnText, numbers: list[int], silent: set[int]) -> OnText:
    def told(at: int, piece: str) -> None:
        if numbers[at] not in silent:
            on_text(numbers[at], piece)

    return told


class _Run:
    """A batch from its prompts to its texts."""

    def __init__(
        self,
        model: BlockDiffusionModel,
        search: Search,
        on_text: OnText | None,
        on_step: OnStep | None,
        numbers: list[int],
        stepwise: int,
    ) -> None:
        assert model.tokenizer is not None
        self.model, self.search, self.requests = model, search, search.requests
        self.on_text, self.on_step, self.numbers, self.stepwise = on_text, on_step, numbers, stepwise
        self.outputs = [Output() for _ in self.requests]
        self.streams = [TextStream(model.tokenizer, r.prompt, r.stop) for r in self.requests]
        self.batch = Batch(model, self.requests, self.outputs)

    def finish(self) -> list[Output]:
        batch = self.batch
        batch.prefill()
        while len(batch.rows):
            began = time.perf_counter()
            batch.open()
            self._show()
            while denoise_stepwise(batch, self.stepwise) if self.stepwise else batch.denoise():
                self._show()
            batch.close()
            self._deliver_rows(~batch.lossless)
            if len(batch.rows):
                batch.commit()
                self._note(began)
                self._deliver_rows(batch.lossless)
            if self.search.active and len(batch.rows):
                self.search.resample(batch, self.outputs, self.streams)
        return self.outputs

    def _note(self, began: float) -> None:
        """Tell an adaptive batch what the round brought."""
        pace = self.batch.pace
        if pace is not None and bool((adapts := pace.rows(self.batch.rows)).any()):
            pace.note(float(self.batch.size[adapts].double().mean()), time.perf_counter() - began)

    def _deliver_rows(self, final: Tensor) -> None:
        """Deliver the blocks of the rows `final` bool [R], and go on without the requests that they finish."""
        if not bool(final.any()):
            return
        batch = self.batch
        blocks = batch.blocks
        columns = (blocks.ids, blocks.filled_at, blocks.log_probability, blocks.edits)
        rows = zip(batch.rows.tolist(), final.tolist(), batch.size.tolist(), batch.place[:, 0].tolist(), strict=True)
        going = []
        for at, (row, ready, size, start) in enumerate(rows):
            if ready:
                kept = [column[at, :size].tolist() for column in columns]
                going.append(self._deliver(row, start, *kept))
            else:
                going.append(True)
        if not all(going):
            batch.select(torch.tensor(going).nonzero()[:, 0])

    def _deliver(
        self, row: int, start: int, ids: list[int], steps: list[int], log_probability: list[float], edits: list[int]
    ) -> bool:
        """Hand the finished block of a row to its output; True if the request goes on."""
        request, output, stream = self.requests[row], self.outputs[row], self.streams[row]
        room = request.max_new_tokens - len(output.tokens)
        new = ids[:room]
        ends = [i for i, token in enumerate(new) if token in request.end_ids]
        if ends:
            new, output.finish_reason = new[: ends[0] + 1], "end"
        elif len(ids) >= room or start + len(ids) >= self.model.context_length:
            output.finish_reason = "length"
        before = len(output.tokens)
        output.tokens += new
        text_tokens = output.tokens[:-1] if ends else output.tokens
        if request.stop and (cut := self._stopped_at(stream, text_tokens, before)) is not None:
            output.tokens, output.finish_reason = output.tokens[:cut], "stop"
        else:
            stream.feed(text_tokens)
        delivered = len(output.tokens) - before
        output.steps += steps[:delivered]
        output.log_probabilities += log_probability[:delivered]
        output.edits += sum(edits[:delivered])
        output.blocks.append(delivered)
        output.steps_per_block.append(output.denoise_forwards - sum(output.steps_per_block))
        piece = stream.new_text(final=bool(output.finish_reason))
        output.text = stream.text
        if piece and self.on_text is not None:
            self.on_text(row, piece)
        return not output.finish_reason

    @staticmethod
    def _stopped_at(stream: TextStream, tokens: list[int], before: int) -> int | None:
        """Number of tokens after which a stop string is complete, or None."""
        if not stream.feed(tokens):
            return None
        for count in range(before + 1, len(tokens) + 1):
            if stream.feed(tokens[:count]):
                return count
        return len(tokens)

    def _show(self) -> None:
        if self.on_step is None:
            return
        blocks, step = self.batch.blocks, max(int(group.blocks.step.max()) for group in self.batch.groups)
        for at, row in enumerate(self.batch.rows.tolist()):
            size = int(self.batch.size[at])
            ids, masked = blocks.ids[at, :size].tolist(), (blocks.status[at, :size] == MASK).tolist()
            tokens = tuple(None if hidden else token for token, hidden in zip(ids, masked, strict=True))
            self.on_step(Step(self.numbers[row], int(self.batch.position[at]), step, tokens))
