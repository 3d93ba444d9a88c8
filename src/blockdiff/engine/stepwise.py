"""Stepwise decoding: several steps of a policy at one token each, guessed and checked in one pass.

The guarantee is another one than lossless decoding's: the text is that of the *same policy filling one token at a
time*, not that of the AR model. From the logits of a state the next states are guessed by filling on; one pass reads
all guessed states, each as a noisy block of its own over the same cache; a guess counts while it is what the policy
does with the logits of the state before it. (FreeDave, arXiv 2510.00294.) Its cost is `steps` times the tokens a pass.

Shapes: d rows, W slots, D guessed states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blockdiff.decode import OpenBlocks, Policy
from blockdiff.decode.counts import Fixed
from blockdiff.engine.rows import Rows


def one_at_a_time(policy: Policy) -> Policy:
    """The policy that stepwise decoding is equal to."""
    return replace(policy, counts=(Fixed(1),), max_steps=None)


def guessed(blocks: OpenBlocks) -> list[OpenBlocks]:
    """The open blocks, and the states that were guessed after them (of a block just opened: those of the one before,
    which never agree with where it stands, or are right)."""
    count = sum(name.startswith("guess") and name.endswith(".ids") for name in blocks.memory)
    return [blocks] + [blocks.recall(f"guess{number}") for number in range(count)]


def advance(rows: Rows, denoised: Sequence[int], logits: Tensor) -> list[int]:
    """Take the policy's steps as far as the guessed states were the right ones, and guess anew from where they end.

    logits [d, D, W, V] of the states. Returns the rows whose blocks are final.
    """
    policy, steps = one_at_a_time(rows.kind.policy), rows.kind.stepwise
    index = rows.index(denoised)
    whole = rows.blocks if isinstance(index, slice) else rows.blocks.select(index)
    noise = None if rows.noise is None else rows.noise[index]
    states = guessed(whole)
    here = replace(whole, memory={})
    going = here.masked.any(1)
    base = logits[:, 0]
    for number, state in enumerate(states):
        if number:  # this state was a guess: it counts where it is where the policy arrived
            going = going & (state.ids == here.ids).all(1) & (state.status == here.status).all(1)
            base = torch.where(going[:, None, None], logits[:, number], base)
        going = going & here.masked.any(1)
        after, _ = policy.step(here, logits[:, number], rows.proposer(here, noise, index))
        here = after.unless(~going, here)
    guesses, guess = [], here
    for _ in range(steps - 1):
        guess, _ = policy.step(guess, base, rows.proposer(guess, noise, index))
        guesses.append(guess)
    blocks = replace(here, memory={})
    for number, guess in enumerate(guesses):
        blocks = blocks.keep(f"guess{number}", guess)
    rows.blocks = blocks if isinstance(index, slice) else rows.blocks.put_rows(index, blocks)
    final = (~here.masked.any(1)).tolist()
    return [row for row, done in zip(denoised, final, strict=True) if done]
