"""What one group of rows adds to a pass, and what it makes of the logits.

Clean tokens: parts of prompts, finished blocks to be committed, drafts to be verified. Noisy tokens: open blocks,
states guessed ahead, blocks drafted ahead. A finished block whose successor opens without its logits is committed in
that block's first pass (a *fused* commit).

Shapes: r fed or verified rows, d denoised rows, W slots of the widest open block, V vocabulary, n noisy tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blockdiff.decode import OpenBlocks
from blockdiff.decode.inputs import Soft
from blockdiff.engine.entry import Entry, Phase
from blockdiff.engine.maps import branch_map, clean_blocks, state_map
from blockdiff.engine.pages import Table
from blockdiff.engine.ragged import Sees, Segment
from blockdiff.engine.rows import Rows
from blockdiff.engine.stepwise import advance, guessed
from blockdiff.masks import AttentionSums


@dataclass
class Share:
    """segments and tokens of both streams; read: slots of them whose logits are wanted, counted within the stream."""

    rows: Rows
    block_causal: bool
    clean: list[Segment] = field(default_factory=list)
    noisy: list[Segment] = field(default_factory=list)
    clean_ids: list[int] = field(default_factory=list)
    clean_at: list[int] = field(default_factory=list)
    noisy_ids: list[Tensor] = field(default_factory=list)
    noisy_at: list[int] = field(default_factory=list)
    read_clean: list[int] = field(default_factory=list)
    read_noisy: list[int] = field(default_factory=list)
    masked: int | None = None  # how many slots of the open blocks are read, where only masked ones are
    blends: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # from which noisy token on
    fed: list[tuple[int, int]] = field(default_factory=list)  # rows, and how many tokens each
    asked: list[int] = field(default_factory=list)  # rows whose logits after what is fed are wanted
    verified: list[int] = field(default_factory=list)
    denoised: list[int] = field(default_factory=list)
    ahead: int = 1  # tokens of a block drafted ahead
    depth: int = 1  # states of a block in the pass
    kept: list[int] = field(default_factory=list)  # what verification let through
    _mask_id: int = 0

    @staticmethod
    def of(rows: Rows, budget: int) -> Share:
        """At most `budget` clean tokens, but at least one segment; open blocks always take part."""
        spec = rows.model.spec
        share = Share(rows, spec.clean_context == "block_causal", _mask_id=spec.mask_id or 0)
        for row, entry in enumerate(rows.entries):
            if entry.phase is Phase.FEED and (budget > 0 or not share.fed):
                count = share._chunk(entry, budget)
                share.fed.append((row, count))
                budget -= count
                if count == entry.pending and rows.kind.first_known:
                    share.asked.append(row)
            elif entry.phase is Phase.DENOISE:
                share.denoised.append(row)
                if entry.pending > rows.kind.lag:
                    share.fed.append((row, entry.pending - rows.kind.lag))
            elif entry.phase is Phase.VERIFY:
                share.verified.append(row)
        share._add(real=True)
        if rows.kind.guided:
            share._add(real=False)
        return share

    @property
    def count(self) -> int:
        return len(self.clean_at) + len(self.noisy_at)

    def _chunk(self, entry: Entry, budget: int) -> int:
        """How many pending tokens are fed now; a block-causal block is never torn apart."""
        last = len(entry.tokens) - self.rows.kind.lag
        end = min(last, entry.table.written + max(1, budget))
        if self.block_causal and end < last:
            starts = entry.starts()
            while end < last and starts[end] != end:
                end += 1
        return end - entry.table.written

    # ---- building

    def _add(self, *, real: bool) -> None:
        entries = self.rows.entries
        for row, count in self.fed:
            self._feed(entries[row], self._table(entries[row], real), count, real)
            if row in self.asked:
                self.read_clean.append(len(self.clean_at) - 1)
        if self.verified and real:
            self._verify()
        if self.denoised:
            self._denoise(real)

    @staticmethod
    def _table(entry: Entry, real: bool) -> Table:
        if real:
            return entry.table
        assert entry.shadow is not None
        return entry.shadow

    def _feed(self, entry: Entry, table: Table, count: int, real: bool) -> None:
        start, prompt = table.written, len(entry.request.prompt)
        ids = entry.tokens[start : start + count]
        if not real:  # the unconditional branch reads a prompt of masks
            hidden = max(0, min(prompt - start, count))
            ids = [self._mask_id] * hidden + ids[hidden:]
        sees: Sees = "causal"
        tokens = None
        if self.block_causal and start + count > prompt:
            starts = entry.starts()[start : start + count]
            sees = "all" if len(set(starts)) == 1 else "map"
            tokens = clean_blocks(start, starts, self.rows.device)
        self.clean.append(Segment(table, start, count, False, sees, tokens))
        self.clean_ids += ids
        self.clean_at += range(start, start + count)

    def _verify(self) -> None:
        """Drafts as clean tokens; drafting ahead, a noisy block behind each of their tokens."""
        rows, device = self.rows, self.rows.device
        width = max(rows.entries[row].size for row in self.verified)
        ids = rows.blocks.ids[rows.index(self.verified), :width].tolist()
        ends = [rows.entries[row].table.written + rows.entries[row].size for row in self.verified]
        self.ahead = max(1, min(rows.width_ahead(), rows.model.context_length - max(ends)))
        for own, row in zip(ids, self.verified, strict=True):
            entry = rows.entries[row]
            start, size = entry.table.written, entry.size
            self.clean.append(Segment(entry.table, start, size, False, "causal"))
            self.read_clean += range(len(self.clean_at), len(self.clean_at) + size)
            self.clean_ids += own[:size]
            self.clean_at += range(start, start + size)
            if self.ahead > 1:
                tokens = branch_map(start, size, self.ahead, device)
                self.noisy.append(Segment(entry.table, start + size, size * self.ahead, True, "map", tokens))
                first = len(self.noisy_at)
                for slot in range(size):
                    at = first + slot * self.ahead
                    self.read_noisy += range(at + 1, at + self.ahead)
                    self.noisy_at += range(start + slot, start + slot + self.ahead)
                inputs = torch.full((size, self.ahead), self._mask_id, device=device)
                inputs[:, 0] = rows.column(own[:size])
                self.noisy_ids.append(inputs.flatten())

    def _denoise(self, real: bool) -> None:
        """Open blocks; with stepwise decoding the states guessed after them as well."""
        rows = self.rows
        index = rows.index(self.denoised)
        blocks = rows.blocks if isinstance(index, slice) else rows.blocks.select(index)
        states = guessed(blocks) if rows.kind.stepwise else [blocks]
        self.depth = len(states)
        sizes = [rows.entries[row].size for row in self.denoised]
        shown = torch.stack([self._shown(state, rows.last[index]) for state in states], 1)
        used = self._used(sizes, shown.shape[2])
        self.noisy_ids.append(shown.flatten() if used is None else shown[used[:, None].expand_as(shown)])
        sums = "attention" in rows.kind.policy.needs
        read = blocks.masked.tolist() if rows.reads_masked else [[True] * shown.shape[2]] * len(sizes)
        before = len(self.read_noisy)
        for row, size, slots in zip(self.denoised, sizes, read, strict=True):
            self._open_segment(rows.entries[row], self._table(rows.entries[row], real), size, slots, real and sums)
        if rows.reads_masked:
            self.masked = len(self.read_noisy) - before
        if rows.kind.policy.soft and (found := Soft.blend(blocks)) is not None:
            self.blends.append((len(self.noisy_at) - sum(sizes), *self._blend(found, used)))

    def _open_segment(self, entry: Entry, table: Table, size: int, wanted: Sequence[bool], sums: bool) -> None:
        start, seeded, lag = len(entry.tokens), self.rows.alignment.seeded, self.rows.kind.lag
        sees: Sees = "all but the seed" if seeded and not lag else "all"
        tokens = None
        if self.depth > 1:
            sees, tokens = "map", state_map(start - seeded, size, self.depth, self.rows.device)
        collected = AttentionSums() if sums else None
        self.noisy.append(Segment(table, start - lag, size * self.depth, True, sees, tokens, collected))
        for _ in range(self.depth):
            first = len(self.noisy_at)
            # under the clean boundary the logits of a slot predict the next one's token
            behind = int(self.rows.alignment.first_is_clean)
            self.read_noisy += [first + max(slot - behind, 0) for slot in range(size) if wanted[slot]]
            self.noisy_at += range(start - seeded, start - seeded + size)

    def _shown(self, blocks: OpenBlocks, last: Tensor) -> Tensor:
        """What the network is fed at the open blocks: tokens [d, W]."""
        shown = blocks.ids
        if "uniform_state" not in self.rows.kind.policy.needs:
            shown = shown.masked_fill(blocks.masked, self._mask_id)
        return torch.cat([last[:, None], shown[:, :-1]], 1) if self.rows.alignment.seeded else shown

    def _used(self, sizes: Sequence[int], width: int) -> Tensor | None:
        """Slots of the rows' own blocks, bool [d, W]; None where all are."""
        if min(sizes) == width:
            return None
        slot = torch.arange(width, device=self.rows.device)
        return slot < self.rows.column(sizes)[:, None]

    def _blend(self, found: tuple[Tensor, Tensor], used: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and weights [n, K] of what is blended into the open blocks."""
        parts = []
        for part in found:
            if self.rows.alignment.seeded:
                part = torch.cat([torch.zeros_like(part[:, :1]), part[:, :-1]], 1)
            parts.append(part.flatten(0, 1) if used is None else part[used])
        return parts[0], parts[1]

    # ---- using

    def take(self, clean: Tensor, noisy: Tensor) -> tuple[list[int], list[int]]:
        """Use the logits at what is read; returns the rows whose blocks are done, and those that ended."""
        rows = self.rows
        for row, count in self.fed:
            entry = rows.entries[row]
            for table in (entry.table, entry.shadow):
                if table is not None:
                    table.written += count
            if entry.phase is Phase.FEED and entry.pending <= rows.kind.lag:
                entry.phase = Phase.OPEN
        clean, noisy = rows.allowed(clean), rows.allowed(noisy)
        if rows.kind.guided:
            clean, other = clean.chunk(2)
            guided = other + (1 + rows.guidance[rows.index(self.asked)])[:, None] * (clean - other)
            clean = torch.where(torch.isfinite(clean), guided, clean)
        if self.asked:
            rows.put_next(self.asked, clean[: len(self.asked)])
        ended = self._take_verified(clean[len(self.asked) :], noisy) if self.verified else []
        return self._take_denoised(noisy) if self.denoised else [], ended

    def _take_verified(self, clean: Tensor, noisy: Tensor) -> list[int]:
        rows = self.rows
        sizes = [rows.entries[row].size for row in self.verified]
        width = rows.blocks.ids.shape[1]
        logits = self._padded(clean, sizes, width)
        ahead = None
        if self.ahead > 1:
            count = sum(sizes) * (self.ahead - 1)
            ahead = self._padded(noisy[:count].view(sum(sizes), self.ahead - 1, -1), sizes, width)
        kept = rows.verify(self.verified, logits, ahead)
        for row, size, count in zip(self.verified, sizes, kept, strict=True):
            entry = rows.entries[row]
            entry.table.written += count
            entry.output.verify_forwards += 1
            entry.output.positions += size * (1 + (self.ahead if self.ahead > 1 else 0))
            entry.phase = Phase.OPEN
        self.kept = kept
        going = rows.delivered(self.verified, kept)
        return [row for row in self.verified if row not in going]

    def _take_denoised(self, noisy: Tensor) -> list[int]:
        rows = self.rows
        sizes = [rows.entries[row].size for row in self.denoised]
        width = rows.blocks.ids.shape[1]
        count = sum(sizes) * self.depth if self.masked is None else self.masked
        own = noisy[len(noisy) - count * (2 if rows.kind.guided else 1) :]
        unconditional = None
        if rows.kind.guided:
            own, other = own.chunk(2)
            unconditional = self._padded(other, sizes, width)
        for row, size in zip(self.denoised, sizes, strict=True):
            output = rows.entries[row].output
            output.denoise_forwards += 1
            output.positions += size * self.depth
        if rows.kind.stepwise:
            sizes_of_states = [size for size in sizes for _ in range(self.depth)]
            states = self._padded(own, sizes_of_states, width).unflatten(0, (len(sizes), self.depth))
            return advance(rows, self.denoised, states)
        attention = self._looked_at(sizes, width) if "attention" in rows.kind.policy.needs else None
        logits = self._padded(own, sizes, width) if self.masked is None else own
        return rows.step(self.denoised, logits, unconditional, attention)

    def _padded(self, flat: Tensor, sizes: Sequence[int], width: int) -> Tensor:
        """Rows [r, W, ...] of what lies one behind the other."""
        if min(sizes) == width:
            return flat.view(len(sizes), width, *flat.shape[1:])
        used = self._used(sizes, width)
        assert used is not None
        whole = flat.new_zeros((len(sizes), width, *flat.shape[1:]))
        whole[used] = flat
        return whole

    def _looked_at(self, sizes: Sequence[int], width: int) -> Tensor:
        """How much the blocks look at each of their tokens [d, W]: at the slot that holds it, one further if seeded."""
        sums = [segment.attention.total[0] for segment in self.noisy if segment.attention is not None]  # type: ignore[index]
        found = self._padded(torch.cat(sums), sizes, width)
        return found.roll(-1, 1) if self.rows.alignment.seeded else found
