"""The visibility rule against an independent statement of it, and its renderings against one another."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from blockdiff import masks
from blockdiff.attention import NAMES, _flex, _sdpa, eager_attention
from blockdiff.layout import Layout, TokenMap
from blockdiff.masks import Visibility
from blockdiff.noise import ExactCount
from blockdiff.objectives import Alignment, block_numbers, maskable, two_streams

CONTEXTS = ["context_causal", "block_causal"]


def stream_map(seed: int, alignment: Alignment, rows: int = 2) -> TokenMap:
    ids, tokens, _ = tiny.random_batch(seed, rows)
    block = block_numbers(tokens, maskable(tokens, alignment))
    corruption = ExactCount().draw(block, torch.Generator().manual_seed(seed))
    return two_streams(ids, tokens, corruption, alignment, 99).tokens


def sees(tokens: TokenMap, row: int, q: int, k: int, clean_context: str, window: int | None) -> bool:
    """The rule in plain words, token by token."""

    def value(name: str, i: int) -> int:
        return int(getattr(tokens, name)[row, i])

    if value("doc", q) != value("doc", k):
        return False
    if window is not None and value("position", q) - value("position", k) >= window:
        return False
    if value("noisy", q) and value("noisy", k):
        return value("block", q) == value("block", k)
    if value("noisy", q):
        return value("position", k) < value("start", q)
    if value("noisy", k):
        return False
    if clean_context == "context_causal":
        return value("position", k) <= value("position", q)
    return value("block", k) <= value("block", q)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("clean_context", CONTEXTS)
@pytest.mark.parametrize("alignment", [Alignment(), Alignment("shift", "seed"), Alignment("same")], ids=str)
def test_the_rule(alignment, clean_context, window):
    for seed in range(3):
        tokens = stream_map(seed, alignment)
        allowed = Visibility(tokens, tokens, clean_context).dense(window)[:, 0]
        for row in range(tokens.shape[0]):
            for q in range(tokens.shape[1]):
                for k in range(tokens.shape[1]):
                    assert allowed[row, q, k] == sees(tokens, row, q, k, clean_context, window)
        assert allowed.any(-1).all()  # nobody attends to nothing


@pytest.mark.parametrize("window", [None, 5])
def test_tiles_are_the_dense_mask_without_what_nobody_sees(window, monkeypatch):
    monkeypatch.setattr(masks, "TILE", 8)
    tokens = stream_map(3, Alignment(), rows=3)
    assert touched_by_tiles(tokens, "context_causal", window) < 0.7


@pytest.mark.parametrize("clean_context", ["context_causal", "block_causal"])
@pytest.mark.parametrize("alignment", [Alignment(), Alignment("same"), Alignment("shift", "seed")])
def test_rows_that_see_alike_share_a_mask_and_a_lone_document_is_plainly_causal(clean_context, alignment, monkeypatch):
    monkeypatch.setattr(masks, "TILE", 8)
    row = [Layout(1, (3, 5, 2, 7, 4, 4, 6))]
    clean = TokenMap.from_layouts([row, row])
    tokens = TokenMap.cat(clean.as_noisy()[:, 1:], clean)
    tiles = Visibility(tokens, tokens, clean_context).tiles()
    assert all(tile.mask is None or tile.mask.shape[0] == 1 for tile in tiles)
    assert [tile.causal for tile in tiles].count(True) == (clean_context == "context_causal")
    assert touched_by_tiles(tokens, clean_context, None) < 0.7
    # twins: rows that differ have masks of their own, and two documents or a cached token are not plainly causal
    for rows in ([row, [Layout(2, (3, 5, 2, 7, 4, 4, 5))]], [[*row, *row]], [[Layout(1, (3,))], row]):
        other = TokenMap.from_layouts(rows)
        tiles = Visibility(TokenMap.cat(other.as_noisy(), other), TokenMap.cat(other.as_noisy(), other), clean_context)
        assert not any(tile.causal for tile in tiles.tiles()) or len(rows) == 2
        assert len(rows) == 1 or any(t.mask is not None and t.mask.shape[0] == 2 for t in tiles.tiles())
    assert not any(tile.causal for tile in Visibility(clean, TokenMap.cat(clean, clean), clean_context).tiles())


def touched_by_tiles(tokens, clean_context, window):
    """Checks that the tiles are the dense mask; returns the share of all pairs that they touch."""
    seen = Visibility(tokens, tokens, clean_context)
    dense = seen.dense(window)
    rebuilt = torch.zeros_like(dense)
    touched = 0
    for tile in seen.tiles(window):
        keys = torch.cat([torch.arange(dense.shape[-1])[ks] for ks in tile.keys])
        queries = tile.queries.stop - tile.queries.start
        mask = torch.ones(queries, len(keys), dtype=torch.bool) if tile.mask is None else tile.mask
        rebuilt[:, :, tile.queries, keys] = (mask.tril() if tile.causal else mask).expand(len(dense), 1, -1, -1)
        touched += queries * len(keys) // (2 if tile.causal else 1)
    assert torch.equal(rebuilt, dense)
    return touched / dense[0, 0].numel()


def test_additive_and_flex_are_the_same_rule():
    tokens = stream_map(5, Alignment("same"))
    for window in (None, 4):
        seen = Visibility(tokens, tokens, "block_causal")
        dense = seen.dense(window)
        additive = seen.additive(torch.float64, window)
        assert torch.equal(additive == 0, dense)
        assert torch.isneginf(additive[~dense]).all()
        length = tokens.shape[1]
        flexible = create_mask(seen.mask_mod(window), tokens.shape[0], 1, length, length, device="cpu")
        assert torch.equal(flexible, dense)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_implementations_agree(window):
    assert set(NAMES) == {"sdpa", "eager", "flex"}
    tokens = stream_map(2, Alignment())
    rows, length = tokens.shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, length, 16, generator=generator)
    key, value = torch.randn(2, rows, 2, length, 16, generator=generator)
    seen = Visibility(tokens, tokens, "context_causal")
    results = [kernel(query, key, value, seen, window, 0.25, 0.0) for kernel in (_sdpa, eager_attention, _flex)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=2e-6, rtol=1e-5)
    other = _sdpa(query, key, value, Visibility(tokens, tokens, "block_causal"), window, 0.25, 0.0)
    assert (other - results[0]).abs().max() > 1e-2  # twin: another rule, another result


def test_a_boolean_mask_added_to_scores_is_wrong():
    """The trap that rendering by implementation avoids: eager attention adds its mask, so True would become +1."""
    tokens = stream_map(2, Alignment())
    seen = Visibility(tokens, tokens, "context_causal")
    scores = torch.randn(seen.dense().shape, generator=torch.Generator().manual_seed(0))
    right = F.softmax(scores + seen.additive(torch.float32), -1)
    wrong = F.softmax(scores + seen.dense(), -1)
    assert (right - wrong).abs().max() > 0.1
    assert right[~seen.dense()].abs().max() == 0


def test_drawing():
    tokens = TokenMap.from_layouts([[Layout(1, (2, 2))]])
    ids = torch.zeros(tokens.shape, dtype=torch.int64)
    alignment = Alignment("same")
    corruption = ExactCount().draw(block_numbers(tokens, maskable(tokens, alignment)), torch.Generator().manual_seed(0))
    stream = two_streams(ids, tokens, corruption, alignment, 1)
    drawn = Visibility(stream.tokens, stream.tokens, "context_causal").draw()
    assert drawn.splitlines() == [
        "         noisy     clean",
        "          1 2 3 4   0 1 2 3 4",
        "noisy  1  ■ ■ · ·   ■ · · · ·",
        "noisy  2  ■ ■ · ·   ■ · · · ·",
        "",
        "noisy  3  · · ■ ■   ■ ■ ■ · ·",
        "noisy  4  · · ■ ■   ■ ■ ■ · ·",
        "",
        "clean  0  · · · ·   ■ · · · ·",
        "clean  1  · · · ·   ■ ■ · · ·",
        "clean  2  · · · ·   ■ ■ ■ · ·",
        "clean  3  · · · ·   ■ ■ ■ ■ ·",
        "clean  4  · · · ·   ■ ■ ■ ■ ■",
    ]
    assert drawn != Visibility(stream.tokens, stream.tokens, "block_causal").draw()
