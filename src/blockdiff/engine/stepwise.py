"""Stepwise decoding: several steps of a policy at one token each, guessed and checked in one pass.

The guarantee is another one than lossless decoding's: the text is that of the *same policy filling one token at a
time*, not that of the AR model. From the logits of a state the next states are guessed by filling on; one pass reads
all guessed states, each as a noisy block of its own over the same cache; a guess counts while it is what the policy
does with the logits of the state before it. (FreeDave, arXiv 2510.00294.) Its cost is `steps` times the tokens a pass.

Shapes: R rows, W slots, D guessed states.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from blockdiff.decode import OpenBlocks, Policy
from blockdiff.decode.counts import Fixed
from blockdiff.engine.batch import Batch
from blockdiff.engine.group import Group
from blockdiff.layout import TokenMap


def denoise_stepwise(batch: Batch, steps: int) -> bool:
    """One pass over the open blocks and up to `steps` guessed states after them; False when every block is final."""
    final = batch.gather(lambda group: group.final)
    if bool(final.all()):
        return False
    states = [
        [group.blocks] + [group.blocks.recall(f"guess{n}") for n in range(_known(group))] for group in batch.groups
    ]
    depth = max(len(own) for own in states)
    logits = _logits(batch, [own + [own[-1]] * (depth - len(own)) for own in states])
    for group, own in zip(batch.groups, states, strict=True):
        _advance(batch, group, own, group.of(logits), steps)
    for at, (row, done) in enumerate(zip(batch.rows.tolist(), final.tolist(), strict=True)):
        batch.outputs[row].denoise_forwards += not done
        batch.outputs[row].positions += 0 if done else int(batch.size[at]) * depth
    return True


def one_at_a_time(policy: Policy) -> Policy:
    """The policy that stepwise decoding is equal to."""
    return replace(policy, counts=(Fixed(1),), max_steps=None)


def _known(group: Group) -> int:
    return sum(name.startswith("guess") and name.endswith(".ids") for name in group.blocks.memory)


def _advance(batch: Batch, group: Group, states: list[OpenBlocks], logits: Tensor, steps: int) -> None:
    """Take the policy's steps as far as the guessed states were the right ones, and guess anew from where they end.

    logits [R, D, W, V] of the states.
    """
    policy = one_at_a_time(group.policy)
    start = group.blocks
    here = replace(start, memory={})
    going = ~group.final
    base = logits[:, 0]
    for number, state in enumerate(states):
        if number:  # this state was a guess: it counts where it is where the policy arrived
            going = going & (state.ids == here.ids).all(1) & (state.status == here.status).all(1)
            base = torch.where(going[:, None, None], logits[:, number], base)
        going = going & here.masked.any(1)
        after, _ = policy.step(here, logits[:, number], batch._propose(group, here))
        here = after.unless(~going, here) if len(going) > 1 else (after if bool(going.all()) else here)
    guesses, guess = [], here
    for _ in range(steps - 1):
        guess, _ = policy.step(guess, base, batch._propose(group, guess))
        guesses.append(guess)
    blocks = here
    for number, guess in enumerate(guesses):
        blocks = blocks.keep(f"guess{number}", guess)
    group.blocks = blocks
    group.final = ~here.masked.any(1)


def _logits(batch: Batch, states: list[list[OpenBlocks]]) -> Tensor:
    """Logits [R, D, W, V] of D states of every open block, each a noisy block of its own."""
    own = [group.blocks for group in batch.groups]
    ids, maps = [], []
    for number in range(len(states[0])):
        for group, state in zip(batch.groups, states, strict=True):
            group.blocks = state[number]
        shown, _ = batch.shown()
        if batch.alignment.seeded:
            shown = torch.cat([batch.last[:, None], shown[:, :-1]], 1)
        tokens = batch.noisy_map()
        ids.append(shown)
        maps.append(replace(tokens, block=tokens.block + number * batch.model.context_length))
    for group, blocks in zip(batch.groups, own, strict=True):
        group.blocks = blocks
    logits = batch.model(torch.cat(ids, 1), TokenMap.cat(*maps), past=batch.past)
    rows, width = ids[0].shape
    parts = logits.view(rows, len(ids), width, -1).unbind(1)
    return torch.stack([batch._allowed(batch._aligned(part)) for part in parts], 1)
