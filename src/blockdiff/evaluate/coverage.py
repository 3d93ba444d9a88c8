"""Coverage of a model: its checkpoint's description against a decode, an evaluation, or what was really generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from blockdiff.coverage import (
    Calls,
    Coverage,
    SpanShare,
    Trained,
    compare,
    decode_calls,
    grid_calls,
    not_covered,
    problem_of,
    traced_calls,
    trained,
    violations_of,
)
from blockdiff.data import Document
from blockdiff.decode import Policy
from blockdiff.engine import Output
from blockdiff.evaluate.bounds import check_bound, grids
from blockdiff.evaluate.windows import window_length, windows
from blockdiff.model import BlockDiffusionModel, Spec

_TRAINED: WeakKeyDictionary[BlockDiffusionModel, tuple[Spec, Trained]] = WeakKeyDictionary()


def trained_calls(model: BlockDiffusionModel) -> Trained:
    """What the checkpoint says it was trained on.

    One that does not name its documents is taken to have seen texts of the trained length. Raises ValueError for one
    that says nothing about its training.
    """
    spec = model.spec
    known = _TRAINED.get(model)
    if known is not None and known[0] is spec:
        return known[1]
    if not spec.documents and spec.trained_length < 2:
        raise ValueError("the checkpoint says nothing about its training (trained_length is 0): train it first")
    spans = spec.documents or (SpanShare(1, spec.trained_length - 1, 1.0),)
    found = trained(
        spec.layout, spec.noise, spec.alignment, spans, ar_trained=spec.ar_trained, tokens=spec.trained_tokens
    )
    _TRAINED[model] = (spec, found)
    return found


def decode_coverage(
    model: BlockDiffusionModel,
    prompts: Sequence[int],
    *,
    block_size: int,
    max_new_tokens: int,
    policy: Policy,
) -> Coverage:
    """Decoding after prompts of so many tokens, none of which ends before `max_new_tokens`."""
    dry = [_decode_calls(model, prompt, block_size, max_new_tokens, policy) for prompt in prompts]
    return _compared(model, Calls.cat(dry), max(prompts))


def decode_problem(
    model: BlockDiffusionModel, prompt: int, *, block_size: int, max_new_tokens: int, policy: Policy
) -> str | None:
    """What `decode_coverage` finds uncovered after a prompt of so many tokens, in a sentence, in a tenth of its time:
    how often the rest was trained is not looked at. None where all is covered."""
    calls = _decode_calls(model, prompt, block_size, max_new_tokens, policy)
    return problem_of(violations_of(trained_calls(model), calls)) or not_covered(_prompt_sentence(model, prompt))


def _compared(model: BlockDiffusionModel, calls: Calls, prompt: int) -> Coverage:
    """Training against these calls, the longest of whose prompts has so many tokens."""
    return replace(compare(trained_calls(model), calls), prompt_sentence=_prompt_sentence(model, prompt))


def _decode_calls(model: BlockDiffusionModel, prompt: int, block_size: int, new_tokens: int, policy: Policy) -> Calls:
    return decode_calls(
        model.spec.alignment,
        policy,
        prompt=prompt,
        block_size=block_size,
        new_tokens=new_tokens,
        context=model.context_length,
    )


def _prompt_sentence(model: BlockDiffusionModel, prompt: int) -> str | None:
    """What is wrong with reading a prompt token by token, where that makes a difference."""
    spec = model.spec
    longest = max((share.given for share in spec.documents), default=1)
    if spec.clean_context != "block_causal" or prompt <= longest:
        return None
    known = f"was trained on given texts of {longest} at most" if spec.documents else "says nothing of given texts"
    return (
        f"a prompt of {prompt} tokens is read token by token, and this block-causal model {known}: what else "
        "it read in training came in blocks that see themselves whole"
    )


def output_coverage(
    model: BlockDiffusionModel, prompts: Sequence[int], outputs: Sequence[Output], *, block_size: int
) -> Coverage:
    """What was really asked for these outputs of prompts of so many tokens."""
    traces = [
        traced_calls(
            model.spec.alignment,
            prompt=prompt,
            block_size=block_size,
            context=model.context_length,
            blocks=output.blocks,
            steps=output.steps,
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return _compared(model, Calls.cat(traces), max(prompts))


def evaluation_coverage(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    offsets: Sequence[int] | None = None,
    left_bias: float = 0.0,
) -> Coverage:
    """The configurations that `bound` scores with the same arguments; raises ValueError as it does."""
    calls = _bound_calls(model, documents, block_sizes, offsets, left_bias)
    return _compared(model, calls, _longest_given(model, documents, block_sizes))


def evaluation_problem(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    offsets: Sequence[int] | None = None,
) -> str | None:
    """What `evaluation_coverage` finds uncovered, in a sentence; None where all is covered, or nothing is known."""
    if not model.spec.is_diffusion or not model.spec.trained_length:
        return None
    problem = problem_of(violations_of(trained_calls(model), _bound_calls(model, documents, block_sizes, offsets)))
    return problem or not_covered(_prompt_sentence(model, _longest_given(model, documents, block_sizes)))


def _longest_given(model: BlockDiffusionModel, documents: Sequence[Document], block_sizes: Sequence[int]) -> int:
    """Tokens of the longest given text that a bound reads, windows of long documents among them."""
    pieces = windows(documents, max(block_sizes), 0, window_length(model))
    return max(given for piece in pieces for given, _ in piece.document.spans())


def _bound_calls(
    model: BlockDiffusionModel,
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    offsets: Sequence[int] | None,
    left_bias: float = 0.0,
) -> Calls:
    check_bound(model, documents, block_sizes, offsets)
    found = []
    for size, offset in grids(model, block_sizes, offsets):
        spans = Counter(
            (given, scored, window.head)
            for window in windows(documents, size, offset, window_length(model))
            for given, scored in window.document.spans()
        )
        found.append(grid_calls(model.spec.alignment, spans, size, left_bias))
    return Calls.cat(found)
