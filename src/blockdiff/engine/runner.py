"""Generation: many ragged requests in one batch, block after block, over an exact cache.

    prefill   the prompts, read once into the cache of clean keys and values
    open      a block of masks (its first token already known where the model reads it from the prefix)
    denoise   a pass over the open blocks only; the policy fills positions; the cache is left as it was
    commit    a clean pass over the finished blocks writes their keys and values
    verify    the same pass, for lossless requests, says first how much of the block stays (`engine.verify`)

Rows move in step, each with its own block size, policy, sampling and seed. A slot that a row does not use belongs to
no document, so nobody sees it.

Shapes: R rows, W slots of the widest open block, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockdiff.decode import SamplingBatch, fill, propose, random_order
from blockdiff.engine.request import Output, Request, Step, TextStream
from blockdiff.engine.verify import agreed, check_lossless
from blockdiff.layout import TokenMap
from blockdiff.model import BlockDiffusionModel, Past
from blockdiff.rng import uniform

_TOKEN, _ORDER = 1, 2  # purposes of random numbers

OnText = Callable[[int, str], None]
OnStep = Callable[[Step], None]


def check(model: BlockDiffusionModel, request: Request) -> None:
    """Refuse a request that this model cannot serve: ValueError."""
    room = model.context_length - len(request.prompt)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(request.prompt)} tokens and the model's context holds {model.context_length}: "
            "shorten the prompt"
        )
    if request.block_size > model.context_length:
        raise ValueError(
            f"block size {request.block_size} does not fit the model's context of {model.context_length} tokens"
        )
    if request.block_size > 1 and not model.spec.is_diffusion:
        raise ValueError(
            f"block size {request.block_size}: this is an autoregressive checkpoint without a [MASK], which decodes at "
            "block size 1 only; adapt it with `blockdiff train --init` first"
        )
    if request.lossless:
        check_lossless(model)


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
    began = time.perf_counter()
    batch = _Batch(model, requests, on_text, on_step)
    batch.prefill()
    while len(batch.rows):
        batch.open()
        while batch.denoise():
            pass
        batch.finish()
    model.train(was_training)
    for output in batch.outputs:
        output.seconds = time.perf_counter() - began
    return batch.outputs


class _Batch:
    """The unfinished requests of one call. `rows` [R] are their numbers; every tensor below has R rows."""

    def __init__(
        self,
        model: BlockDiffusionModel,
        requests: Sequence[Request],
        on_text: OnText | None,
        on_step: OnStep | None,
    ) -> None:
        self.model, self.requests = model, requests
        self.on_text, self.on_step = on_text, on_step
        self.outputs = [Output() for _ in requests]
        assert model.tokenizer is not None
        self.streams = [TextStream(model.tokenizer, r.prompt, r.stop) for r in requests]
        self.alignment = model.spec.alignment.scoring()
        self.past = Past()
        self.rows = torch.arange(len(requests))
        self.position = self._column([len(r.prompt) for r in requests])
        self.seed = self._column([r.seed for r in requests])
        self.sampling = SamplingBatch.of([r.sampling for r in requests], model.device)
        self.random = self._column([r.policy.score == "random" for r in requests])
        self.per_step = self._column([r.policy.per_step for r in requests])
        self.threshold = torch.tensor(
            [torch.inf if r.policy.threshold is None else r.policy.threshold for r in requests], device=model.device
        )
        self.left_bias = torch.tensor([r.policy.left_bias for r in requests], dtype=torch.float64, device=model.device)
        self.last = self._column([r.prompt[-1] for r in requests])
        self.lossless = self._column([r.lossless for r in requests])

    def _column(self, values: list[int] | list[bool]) -> Tensor:
        return torch.tensor(values, device=self.model.device)

    def prefill(self) -> None:
        width = max(len(r.prompt) for r in self.requests)
        ids = torch.zeros(len(self.requests), width, dtype=torch.int64)
        for row, request in enumerate(self.requests):
            ids[row, : len(request.prompt)] = torch.tensor(request.prompt)
        place = torch.arange(width, device=self.model.device).expand(len(ids), -1)
        used = place < self.position[:, None]
        tokens = TokenMap(
            doc=torch.where(used, 0, -1),
            position=place,
            block=place,
            start=place,
            prompt=torch.ones_like(used),
            noisy=torch.zeros_like(used),
        )
        self.next_logits = self._clean_pass(ids.to(self.model.device), tokens, self.position[:, None] - 1)[:, 0]

    def open(self) -> None:
        """Open every row's next block: all masks, but a first token that the prefix already decides."""
        sizes = self._column([self.requests[r].block_size for r in self.rows.tolist()])
        self.size = torch.minimum(sizes, self.model.context_length - self.position)
        self.step = 0
        width = int(self.size.max())
        self.slot = torch.arange(width, device=self.model.device)[None]
        self.used = self.slot < self.size[:, None]
        self.place = self.position[:, None] + self.slot
        self.u = uniform(self.seed[:, None], self.place, _TOKEN)
        self.ids = torch.zeros_like(self.place)
        self.filled_at = torch.zeros_like(self.place)
        self.masked = self.used.clone()
        if self.alignment.first_is_clean:
            tokens, _ = propose(self.next_logits[:, None], self.u[:, :1], self.sampling)
            self.ids[:, 0] = tokens[:, 0]
            self.masked[:, 0] = False
        self._show()

    def denoise(self) -> bool:
        """One pass over the open blocks; False (and no pass) when no row has a mask left."""
        open_rows = self.masked.any(1)
        if not bool(open_rows.any()):
            return False
        self.step += 1
        logits = self._block_logits()
        tokens, probability = propose(logits, self.u, self.sampling)
        order = random_order(uniform(self.seed[:, None], self.place, self.step, _ORDER), self.slot, self.left_bias)
        score = torch.where(self.random[:, None], order, probability.double())
        now = fill(score, self.masked, self.threshold, self.per_step)
        self.ids = torch.where(now, tokens, self.ids)
        self.filled_at = torch.where(now, self.step, self.filled_at)
        self.masked &= ~now
        for row in self.rows[open_rows.cpu()].tolist():
            self.outputs[row].denoise_forwards += 1
        self._show()
        return True

    def finish(self) -> None:
        """Deliver the finished blocks, drop finished rows, and commit the others' blocks to the cache.

        The drafts of lossless rows are delivered after that pass, as far as it proves them.
        """
        self._deliver_rows(~self.lossless)
        if not len(self.rows):
            return
        for row, drafted in zip(self.rows.tolist(), self.lossless.tolist(), strict=True):
            self.outputs[row].verify_forwards += drafted
            self.outputs[row].commit_forwards += not drafted
        if bool(self.lossless.any()):
            self._verify()
            self._deliver_rows(self.lossless)
        else:
            self.next_logits = self._clean_pass(self.ids, self._clean_map(), self.size[:, None] - 1)[:, 0]
        self.last = self.ids.gather(1, self.size[:, None] - 1)[:, 0]
        self.position = self.position + self.size

    def _verify(self) -> None:
        """The clean pass where some blocks are drafts: these shrink to what it proves, in `size` and in the cache."""
        logits = self._clean_pass(self.ids, self._clean_map(), self.slot.expand_as(self.ids))
        own = agreed(logits, self.ids, self.u, self.used, self.sampling)
        self.size = torch.where(self.lossless, own, self.size)
        self.past.forget(self.slot >= self.size[:, None])
        self.next_logits = logits[torch.arange(len(logits), device=logits.device), self.size - 1]

    def _deliver_rows(self, final: Tensor) -> None:
        """Deliver the blocks of the rows `final` bool [R], and go on without the requests that they finish."""
        rows = enumerate(zip(self.rows.tolist(), final.tolist(), strict=True))
        going = [not ready or self._deliver(at, row) for at, (row, ready) in rows]
        if not all(going):
            self._keep(torch.tensor(going).nonzero()[:, 0])

    def _clean_map(self) -> TokenMap:
        """The open blocks as clean tokens."""
        start = self.position[:, None].expand_as(self.place)
        return TokenMap(
            doc=torch.where(self.used, 0, -1),
            position=self.place,
            block=start,
            start=start,
            prompt=torch.zeros_like(self.used),
            noisy=torch.zeros_like(self.used),
        )

    def _block_logits(self) -> Tensor:
        """Logits [R, W, V] of the open blocks, slot j predicting the block's token j (slot 0 unused under `clean`)."""
        assert self.model.spec.mask_id is not None
        shown = self.ids.masked_fill(self.masked, self.model.spec.mask_id)
        start = self.position[:, None].expand_as(self.place)
        if self.alignment.seeded:
            shown = torch.cat([self.last[:, None], shown[:, :-1]], 1)
            start = start - 1
        tokens = TokenMap(
            doc=torch.where(self.used, 0, -1),
            position=start + self.slot,
            block=start,
            start=start,
            prompt=torch.zeros_like(self.used),
            noisy=torch.ones_like(self.used),
        )
        logits = self.model(shown, tokens, past=self.past).view(*shown.shape, -1)
        if self.alignment.first_is_clean:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        return logits

    def _clean_pass(self, ids: Tensor, tokens: TokenMap, slots: Tensor) -> Tensor:
        """Write clean tokens to the cache; returns the logits [R, S, V] at the `slots` [R, S] of each row."""
        rows = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
        logits: Tensor = self.model(ids, tokens, read=(rows + slots).flatten(), past=self.past, keep=True)
        return logits.view(*slots.shape, -1)

    def _deliver(self, at: int, row: int) -> bool:
        """Hand the finished block of a row to its output; True if the request goes on."""
        request, output, stream = self.requests[row], self.outputs[row], self.streams[row]
        size = int(self.size[at])
        room = request.max_new_tokens - len(output.tokens)
        new = self.ids[at, : min(size, room)].tolist()
        ends = [i for i, token in enumerate(new) if token in request.end_ids]
        if ends:
            new, output.finish_reason = new[: ends[0] + 1], "end"
        elif size >= room or int(self.position[at]) + size >= self.model.context_length:
            output.finish_reason = "length"
        before = len(output.tokens)
        output.tokens += new
        text_tokens = output.tokens[:-1] if ends else output.tokens
        if request.stop and (cut := self._stopped_at(stream, text_tokens, before)) is not None:
            output.tokens, output.finish_reason = output.tokens[:cut], "stop"
        else:
            stream.feed(text_tokens)
        output.steps += self.filled_at[at, : len(output.tokens) - before].tolist()
        output.blocks.append(len(output.tokens) - before)
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

    def _keep(self, kept: Tensor) -> None:
        """Go on with these rows only."""
        self.rows = self.rows[kept]
        kept = kept.to(self.model.device)
        if len(kept):
            self.past.select(kept)
        columns = ("position", "seed", "random", "per_step", "threshold", "left_bias", "last", "lossless", "size")
        for name in (*columns, "used", "place", "ids", "u", "next_logits"):
            setattr(self, name, getattr(self, name)[kept])
        self.sampling = self.sampling.select(kept)

    def _show(self) -> None:
        if self.on_step is None:
            return
        for at, row in enumerate(self.rows.tolist()):
            size = int(self.size[at])
            ids, masked = self.ids[at, :size].tolist(), self.masked[at, :size].tolist()
            tokens = tuple(None if hidden else token for token, hidden in zip(ids, masked, strict=True))
            self.on_step(Step(row, int(self.position[at]), self.step, tokens))
