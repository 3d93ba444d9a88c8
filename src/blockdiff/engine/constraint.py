"""Constrained decoding: what the open blocks may still become, so that the whole text matches an automaton.

At every step the proposal is one string for the whole block that agrees with what is filled already and can still be
finished in the tokens left (`decode.automaton`): the likeliest at temperature 0, else a draw. Its tokens belong
together, so whichever of them the policy fills, the rest can follow. (DINGO, arXiv 2505.23061.)

Shapes: R rows of one constraint, n slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.decode.automaton import Automaton, advance, best_fill, sampled_fill
from blockdiff.decode.blocks import TOKEN, OpenBlocks
from blockdiff.decode.sampling import SamplingBatch, log_law
from blockdiff.engine.request import Output, Request
from blockdiff.rng import uniform

_FILTERED = (
    200.0  # nats by which a token that top-k or top-p drop is less likely: taken only where nothing else matches
)


@dataclass(frozen=True)
class Constrained:
    """Rows with the automaton, the states [R] that their texts have reached, and the tokens [R] they have left."""

    automaton: Automaton
    state: Tensor
    left: Tensor

    @staticmethod
    def of(
        automaton: Automaton, requests: Sequence[Request], outputs: Sequence[Output], context: int, device: torch.device
    ) -> Constrained:
        """The state of the texts so far, in a model whose context holds so many tokens."""
        width = max(len(output.tokens) for output in outputs)
        ids = torch.zeros(len(outputs), max(width, 1), dtype=torch.int64)
        used = torch.zeros_like(ids, dtype=torch.bool)
        for row, output in enumerate(outputs):
            ids[row, : len(output.tokens)] = torch.tensor(output.tokens, dtype=torch.int64)
            used[row, : len(output.tokens)] = True
        state = advance(automaton, torch.full((len(outputs),), automaton.start), ids, used)
        whole = [min(request.max_new_tokens, context - len(request.prompt)) for request in requests]
        left = [most - len(output.tokens) for most, output in zip(whole, outputs, strict=True)]
        return Constrained(automaton, state.to(device), torch.tensor(left, device=device))

    def propose(self, logits: Tensor, blocks: OpenBlocks, settings: SamplingBatch) -> Tensor:
        """Tokens int64 [R, n] that belong together."""
        used = blocks.inside
        given = torch.where(blocks.masked, -1, blocks.ids)
        room = self.left - used.sum(1)
        log_p = logits.double().log_softmax(-1)
        tokens = best_fill(log_p, given, used, self.state, room, self.automaton)
        if not settings.sampled:
            return tokens
        law = torch.maximum(log_law(logits, settings), log_p - _FILTERED)
        u = uniform(blocks.seed[:, None], TOKEN, blocks.draws)
        drawn = sampled_fill(law, given, used, self.state, room, self.automaton, u)
        return torch.where(settings.temperature[..., 0] > 0, drawn, tokens)
