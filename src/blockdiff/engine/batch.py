"""The unfinished requests of one call: their columns, their open blocks, and the passes over both.

Rows move in step, each with its own block size, policy, sampling and seed. A slot that a row does not use belongs to no
document, so nobody sees it. Rows of one policy (and one constraint) are a group, and a group takes its step as a whole.

Shapes: R rows, W slots of the widest open block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blockdiff.decode import FILLED, FIXED, MASK, OUTSIDE, OpenBlocks, SamplingBatch, gumbel, propose
from blockdiff.decode.blocks import NOISE
from blockdiff.decode.inputs import Guidance, Soft
from blockdiff.decode.pieces import tokens_with
from blockdiff.engine.constraint import Constrained
from blockdiff.engine.drafting import Pace, agreed
from blockdiff.engine.group import Group
from blockdiff.engine.maps import branches, clean_map
from blockdiff.engine.request import Output, Request
from blockdiff.layout import TokenMap
from blockdiff.masks import AttentionSums
from blockdiff.model import BlockDiffusionModel, Past


class Batch:
    """`rows` [R] are the numbers of the unfinished requests; every tensor of the batch has R rows."""

    def __init__(self, model: BlockDiffusionModel, requests: Sequence[Request], outputs: Sequence[Output]) -> None:
        self.model, self.requests, self.outputs = model, requests, outputs
        self.alignment = model.spec.alignment.scoring()
        self.past = Past()
        self.shadow = Past() if any("unconditional" in r.policy.needs for r in requests) else None
        self.rows = torch.arange(len(requests))
        column = self._column
        self.position = column([len(r.prompt) for r in requests])
        self.origin = self.position
        self.seed = column([r.seed for r in requests])
        self.block_size = column([r.block_size for r in requests])
        self.lossless = column([r.lossless for r in requests])
        self.ahead = column([r.lossless and r.drafting == "ahead" for r in requests])
        self.auto = column([r.lossless and r.drafting == "auto" for r in requests])
        self.last = column([r.prompt[-1] for r in requests])
        scales = [[part.scale for part in r.policy.logits if isinstance(part, Guidance)] for r in requests]
        self.guidance = torch.tensor([sum(own) for own in scales], device=model.device)
        self.sampling = SamplingBatch.of([r.sampling for r in requests], model.device)
        self.given = self._given()
        self.pace = Pace.of(model, requests)
        self.drafted: Tensor | None = None  # logits [R, w, V] of what was drafted ahead, after the next first token
        self._forbidden = [torch.tensor(r.forbidden, dtype=torch.int64, device=model.device) for r in requests]
        self._one_forbidden = len({r.forbidden for r in requests}) == 1
        self._token_ids: dict[tuple[str, ...], Tensor] = {}

    def _column(self, values: Sequence[int] | Sequence[bool]) -> Tensor:
        return torch.tensor(values, device=self.model.device)

    def _given(self) -> Tensor | None:
        """Fixed tokens [R, L] of the texts, -1 elsewhere; None where there are none."""
        rows = [torch.tensor([-1 if token is None else token for token in r.given]) for r in self.requests]
        given = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).long()
        return given.to(self.model.device) if given.shape[1] else None

    # ---- passes

    def prefill(self) -> None:
        width = max(len(r.prompt) for r in self.requests)
        ids = torch.zeros(len(self.requests), width, dtype=torch.int64)
        for row, request in enumerate(self.requests):
            ids[row, : len(request.prompt)] = torch.tensor(request.prompt)
        place = torch.arange(width, device=self.model.device).expand(len(ids), -1)
        used = place < self.position[:, None]
        tokens = clean_map(place, place, used, prompt=True)
        self.next_logits = self._clean_pass(ids.to(self.model.device), tokens, self.position[:, None] - 1)[:, 0]

    def open(self) -> None:
        """Open every row's next block: masks, what is given, and a first token that the prefix already decides."""
        self.size = self._sizes()
        width = int(self.size.max())
        self.slot = torch.arange(width, device=self.model.device)[None]
        self.place = self.position[:, None] + self.slot
        used = self.slot < self.size[:, None]
        sampled = self.sampling.sampled
        self.noise = gumbel(self.seed, self.place, self.next_logits.shape[-1]) if sampled else None
        status = torch.where(used, MASK, OUTSIDE)
        ids = torch.zeros_like(self.place)
        if self.given is not None:
            at = self.place - self.origin[:, None]
            known = self.given.gather(1, at.clamp(max=self.given.shape[1] - 1))
            known = torch.where(used & (at < self.given.shape[1]), known, -1)
            ids, status = torch.where(known >= 0, known, ids), torch.where(known >= 0, FIXED, status)
        self.groups = self._grouped(OpenBlocks.open(ids, status, self.place, self.seed))
        self._fill_first(self._first_known())
        if self.drafted is not None:
            self._fill_drafted(self.drafted)
        for group in self.groups:
            self._start(group)

    def _ahead(self) -> Tensor:
        """Rows whose drafts ride in the verifying pass, bool [R]."""
        if self.pace is not None and self.pace.mode == "ahead":
            return self.ahead | self.auto
        return self.ahead

    def _first_known(self) -> Tensor:
        """Rows whose block's first token comes from the AR logits, bool [R]: all under the clean boundary; under the
        seeded one drafts, and blocks of one token where the clean stream is an AR model."""
        if self.alignment.first_is_clean:
            return torch.ones_like(self.lossless)
        alone = self.model.spec.alignment_of(1).first_is_clean
        return self.lossless | ((self.block_size == 1) & alone)

    def _sizes(self) -> Tensor:
        """Tokens of every row's next block: int64 [R]."""
        size = torch.minimum(self.block_size, self.model.context_length - self.position)
        if self.pace is not None:
            size = torch.where(self.lossless & self.pace.rows(self.rows), size.clamp(max=self.pace.length), size)
        ahead = self._ahead()
        if bool(ahead.any()) or self.drafted is not None:
            ready = 1 + (0 if self.drafted is None else self.drafted.shape[1])
            size = torch.where(ahead | (self.auto & (self.drafted is not None)), size.clamp(max=ready), size)
        for at, row in enumerate(self.rows.tolist()):
            request = self.requests[row]
            if request.constraint is not None or request.lossless:  # neither changes its text by a shorter block
                size[at] = size[at].clamp(max=request.max_new_tokens - len(self.outputs[row].tokens))
        return size

    def _grouped(self, blocks: OpenBlocks) -> list[Group]:
        keys: dict[Any, list[int]] = {}
        for at, row in enumerate(self.rows.tolist()):
            request = self.requests[row]
            keys.setdefault((request.policy, id(request.constraint)), []).append(at)
        groups = []
        for members in keys.values():
            request = self.requests[int(self.rows[members[0]])]
            rows = None if len(keys) == 1 else self._column(members)
            own = blocks if rows is None else blocks.select(rows)
            group = Group(request.policy, rows, own, torch.zeros_like(own.step, dtype=torch.bool))
            if request.constraint is not None:
                requests = [self.requests[int(self.rows[at])] for at in members]
                outputs = [self.outputs[int(self.rows[at])] for at in members]
                group.constrained = Constrained.of(
                    request.constraint, requests, outputs, self.model.context_length, self.model.device
                )
            groups.append(group)
        return groups

    def _fill_first(self, rows: Tensor) -> None:
        """The first token of the blocks of `rows` bool [R], from the AR logits before them, unless it is given."""
        if not bool(rows.any()):
            return
        logits = self._allowed(self.next_logits)
        for group in self.groups:
            blocks, ours = group.blocks, group.of(logits)[:, None]
            fill = group.of(rows) & (blocks.status[:, 0] == MASK)
            one = replace(blocks.cut(1), status=torch.where(fill[:, None], MASK, OUTSIDE))
            token = self._propose(group, one)(ours)
            probability = (ours.gather(-1, token[..., None])[..., 0] - ours.logsumexp(-1)).double()
            group.blocks = blocks.put(0, fill, token[:, 0], FIXED, probability[:, 0])

    def _fill_drafted(self, drafted: Tensor) -> None:
        """What was drafted ahead, as tokens of the open blocks."""
        for group in self.groups:
            logits = group.of(drafted)[:, : self.slot.shape[1] - 1]
            ahead, blocks = group.of(self.ahead | self.auto), group.blocks
            if not logits.shape[1]:
                continue
            noise = None if self.noise is None else group.of(self.noise)[:, 1 : 1 + logits.shape[1]]
            tokens = propose(logits, noise, self._sampling(group))
            value = (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).double()
            for j in range(logits.shape[1]):
                fill = ahead & (blocks.status[:, j + 1] == MASK)
                blocks = blocks.put(j + 1, fill, tokens[:, j], FILLED, value[:, j])
            group.blocks = blocks

    def _start(self, group: Group) -> None:
        """What a policy wants before its first step."""
        blocks = group.blocks
        if "uniform_state" in group.policy.needs:
            vocabulary = self.next_logits.shape[-1]
            random = (blocks.uniform(NOISE) * vocabulary).long()
            blocks = replace(blocks, ids=torch.where(blocks.masked, random, blocks.ids))
        group.blocks = replace(blocks, opened=blocks.masked.sum(1))
        group.final = ~group.blocks.masked.any(1)

    # ---- denoising

    def denoise(self) -> bool:
        """One pass over the open blocks; False (and no pass) when every block is final."""
        final = self.gather(lambda group: group.final)
        if bool(final.all()):
            return False
        needs: frozenset[str] = frozenset().union(*(group.policy.needs for group in self.groups))
        sums = AttentionSums() if "attention" in needs else None
        logits = self._block_logits(self.past, sums)
        unconditional = self._block_logits(self.shadow, None) if self.shadow is not None else None
        attention = None if sums is None else self._looked_at(sums)
        for group in self.groups:
            after, done = group.policy.step(
                group.blocks,
                group.of(logits),
                self._propose(group, group.blocks),
                unconditional=None if unconditional is None else group.of(unconditional),
                attention=None if attention is None else group.of(attention),
                token_ids=self._ids_of,
            )
            group.blocks = after.unless(group.final, group.blocks)
            group.final = group.final | done
        for at, (row, done) in enumerate(zip(self.rows.tolist(), final.tolist(), strict=True)):
            self.outputs[row].denoise_forwards += not done
            self.outputs[row].positions += 0 if done else int(self.size[at])
        return True

    def gather(self, of: Callable[[Group], Tensor]) -> Tensor:
        """A tensor of every group's rows, as one of the whole batch."""
        if len(self.groups) == 1:
            return of(self.groups[0])
        parts = [of(group) for group in self.groups]
        whole = parts[0].new_zeros((len(self.rows), *parts[0].shape[1:]))
        for group, part in zip(self.groups, parts, strict=True):
            whole[group.rows] = part
        return whole

    @property
    def blocks(self) -> OpenBlocks:
        """The open blocks of all rows (without what parts remember)."""
        if len(self.groups) == 1:
            return self.groups[0].blocks
        parts = [group.blocks for group in self.groups]
        order = torch.cat([group.rows for group in self.groups if group.rows is not None]).argsort()
        return OpenBlocks.cat(parts).select(order)

    def _propose(self, group: Group, blocks: OpenBlocks) -> Callable[[Tensor], Tensor]:
        noise = None if self.noise is None else group.of(self.noise)[:, : blocks.ids.shape[1]]
        if noise is not None and group.policy.reviser is not None:
            noise = gumbel(blocks.seed, blocks.draws, noise.shape[-1])
        settings = self._sampling(group)

        def proposed(logits: Tensor) -> Tensor:
            if group.constrained is not None:
                return group.constrained.propose(logits, blocks, settings)
            return propose(logits, noise, settings)

        return proposed

    def _sampling(self, group: Group) -> SamplingBatch:
        return self.sampling if group.rows is None else self.sampling.select(group.rows)

    def shown(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What the network is fed at the open blocks: tokens [R, W], and what is blended into them."""
        mask_id = self.model.spec.mask_id
        assert mask_id is not None

        def fed(group: Group) -> Tensor:
            hidden = group.blocks.masked
            if "uniform_state" in group.policy.needs:
                return group.blocks.ids
            return group.blocks.ids.masked_fill(hidden, mask_id)

        blends = [Soft.blend(group.blocks) if group.policy.soft else None for group in self.groups]
        if all(blend is None for blend in blends):
            return self.gather(fed), None
        width = max(blend[0].shape[-1] for blend in blends if blend is not None)
        ids = self.place.new_zeros((*self.place.shape, width))
        weight = torch.zeros(ids.shape, device=ids.device)
        for group, blend in zip(self.groups, blends, strict=True):
            if blend is not None:
                rows = slice(None) if group.rows is None else group.rows
                ids[rows, :, : blend[0].shape[-1]] = blend[0]
                weight[rows, :, : blend[0].shape[-1]] = blend[1].to(weight.dtype)
        return self.gather(fed), (ids, weight)

    def noisy_map(self) -> TokenMap:
        """The open blocks in the noisy stream, beginning one token earlier where the blocks are seeded."""
        start = self.position[:, None].expand_as(self.place) - int(self.alignment.seeded)
        used = self.slot < self.size[:, None]
        return replace(clean_map(start + self.slot, start, used), noisy=torch.ones_like(used))

    def _block_logits(self, past: Past | None, sums: AttentionSums | None) -> Tensor:
        """Logits [R, W, V] of the open blocks, slot j predicting the block's token j (slot 0 unused under `clean`)."""
        shown, blend = self.shown()
        if self.alignment.seeded:
            shown = torch.cat([self.last[:, None], shown[:, :-1]], 1)
            if blend is not None:
                blend = tuple(torch.cat([torch.zeros_like(t[:, :1]), t[:, :-1]], 1) for t in blend)  # type: ignore[assignment]
        logits = self.model(shown, self.noisy_map(), past=past, blend=blend, attention=sums)
        return self._allowed(self._aligned(logits.view(*shown.shape, -1)))

    def _aligned(self, read: Tensor) -> Tensor:
        """Logits of the network's slots [R, W, V] as those of the tokens that they predict."""
        return torch.cat([read[:, :1], read[:, :-1]], 1) if self.alignment.first_is_clean else read

    def _looked_at(self, sums: AttentionSums) -> Tensor:
        """How much the block looks at each of its tokens [R, W]: at the slot that holds it, one further if seeded."""
        assert sums.total is not None
        return sums.total.roll(-1, 1) if self.alignment.seeded else sums.total

    def _allowed(self, logits: Tensor) -> Tensor:
        """Logits [R, ..., V] without the tokens that may not be written (changed in place)."""
        if self._one_forbidden:
            return logits.index_fill_(-1, self._forbidden[0], -torch.inf)
        for at, row in enumerate(self.rows.tolist()):
            logits[at].index_fill_(-1, self._forbidden[row], -torch.inf)
        return logits

    def _ids_of(self, strings: tuple[str, ...]) -> Tensor:
        """Tokens whose text holds one of the strings."""
        if strings not in self._token_ids:
            self._token_ids[strings] = self._column(tokens_with(self.model.tokenizer, strings))
        return self._token_ids[strings]

    # ---- committing

    def close(self) -> None:
        """After the last step: blocks are as long as their planners made them."""
        if any(group.policy.planner is not None for group in self.groups):
            self.size = self.blocks.inside.sum(1)

    def commit(self) -> None:
        """The clean pass over the finished blocks; the drafts of lossless rows shrink to what it proves."""
        ids = self.blocks.ids
        for at, (row, drafted) in enumerate(zip(self.rows.tolist(), self.lossless.tolist(), strict=True)):
            self.outputs[row].verify_forwards += drafted
            self.outputs[row].commit_forwards += not drafted
            self.outputs[row].positions += int(self.size[at])
        used = self.slot < self.size[:, None]
        start = self.position[:, None].expand_as(self.place)
        tokens = clean_map(self.place, start, used)
        if not bool(self.lossless.any()) or (ids.shape[1] == 1 and self._length_ahead() == 1):
            self.drafted = None
            self.next_logits = self._clean_pass(ids, tokens, self.size[:, None] - 1)[:, 0]
        else:
            self._verify(ids, tokens)
        self.last = ids.gather(1, self.size[:, None] - 1)[:, 0]
        self.position = self.position + self.size

    def _verify(self, ids: Tensor, tokens: TokenMap) -> None:
        """The clean pass where some blocks are drafts: `size` and the cache shrink to what it proves."""
        width, length = ids.shape[1], self._length_ahead()
        every = self.slot.expand_as(ids)
        if length > 1:
            assert self.model.spec.mask_id is not None
            going = self._ahead()
            more_ids, more = branches(ids, tokens, going, length, self.model.spec.mask_id)
            for at, row in enumerate(self.rows.tolist()):
                self.outputs[row].positions += int(self.size[at]) * length if bool(going[at]) else 0
            # of each branch all but its first prediction, which the AR logits replace
            read = torch.arange(width * length, device=ids.device).view(width, length)[:, 1:].flatten() + width
            slots = torch.cat([every, read.expand(len(ids), -1)], 1)
            ids, tokens = torch.cat([ids, more_ids], 1), TokenMap.cat(tokens, more)
        else:
            slots = every
        logits = self._clean_pass(ids, tokens, slots, keep=width)
        ids, clean = ids[:, :width], self._allowed(logits[:, :width])
        noise = None if self.noise is None else self.noise[:, 1:]
        used = self.slot < self.size[:, None]
        own = agreed(clean, ids, noise, used, self.sampling)
        self.size = torch.where(self.lossless, own, self.size)
        self.past.forget(self.slot >= self.size[:, None])
        rows = torch.arange(len(ids), device=ids.device)
        self.next_logits = clean[rows, self.size - 1]
        self.drafted = None
        if length > 1:
            ahead = logits[:, width:].view(len(ids), width, length - 1, -1)
            self.drafted = self._allowed(ahead[rows, self.size - 1])

    def _length_ahead(self) -> int:
        """Tokens of a block drafted in the verifying pass (its first one included); 1: none is."""
        going = self._ahead()
        if not bool(going.any()):
            return 1
        longest = int(self.block_size[going].max())
        room = self.model.context_length - int((self.position + self.size).max())
        return max(1, min(longest if self.pace is None else min(longest, self.pace.length), room))

    def _clean_pass(self, ids: Tensor, tokens: TokenMap, slots: Tensor, keep: int | None = None) -> Tensor:
        """Write clean tokens to the cache; returns the logits [R, S, V] at the `slots` [R, S] of each row."""
        rows = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
        kept: bool | int = True if keep is None else keep
        logits: Tensor = self.model(ids, tokens, read=(rows + slots).flatten(), past=self.past, keep=kept)
        logits = logits.view(*slots.shape, -1)
        if self.shadow is None:
            return logits
        assert self.model.spec.mask_id is not None
        hidden = ids.masked_fill(tokens.prompt, self.model.spec.mask_id)
        other = self.model(hidden, tokens, read=(rows + slots).flatten(), past=self.shadow, keep=kept).view_as(logits)
        guided = other + (1 + self.guidance)[:, None, None] * (logits - other)
        return torch.where(torch.isfinite(logits), guided, logits)

    def select(self, kept: Tensor) -> None:
        """Go on with these rows only, in this order."""
        whole = self.blocks.select(kept.to(self.model.device))
        self.rows = self.rows[kept]
        kept = kept.to(self.model.device)
        if len(kept):
            self.past.select(kept)
            if self.shadow is not None:
                self.shadow.select(kept)
        columns = (
            "position",
            "origin",
            "seed",
            "block_size",
            "lossless",
            "ahead",
            "auto",
            "last",
            "guidance",
            "size",
            "place",
        )
        for name in (*columns, "next_logits", "given", "drafted", "noise"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[kept])
        self.sampling = self.sampling.select(kept)
        self.groups = [Group(self.groups[0].policy, None, whole, torch.ones_like(kept, dtype=torch.bool))]
