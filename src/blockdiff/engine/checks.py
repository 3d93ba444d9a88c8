"""What a model cannot serve: refused with a reason before any work is done."""

from __future__ import annotations

from blockdiff.engine.drafting import check_lossless
from blockdiff.engine.request import Request
from blockdiff.model import BlockDiffusionModel


def check(model: BlockDiffusionModel, request: Request) -> None:
    """Refuse a request that this model cannot serve: ValueError."""
    room = model.context_length - len(request.prompt)
    known = (*request.prompt, *request.forbidden, *(token for token in request.given if token is not None))
    if min(known) < 0 or max(known) >= model.vocabulary:
        odd = next(token for token in known if not 0 <= token < model.vocabulary)
        raise ValueError(f"token {odd} is none of the model's {model.vocabulary}; use its own tokenizer")
    if not -(2**63) <= request.seed < 2**63:
        raise ValueError(f"seed {request.seed} does not fit 64 bits; give a smaller one")
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
        check_lossless(model, request)
    _check_policy(model, request)
    if request.max_forwards and (request.policy.search is not None or request.policy.refine is not None):
        raise ValueError(
            f"max_forwards: policy {request.policy} runs several texts for one, so its forwards have no one count"
        )
    if request.max_forwards and request.lossless and (request.adaptive or request.drafting != "policy"):
        raise ValueError("max_forwards: drafts that are adaptive or ahead follow the clock; let a policy draft")
    if request.given:
        _check_given(model, request, room)
    if request.stepwise:
        _check_stepwise(request)
    if request.constraint is not None:
        _check_constraint(request, room)


def _check_constraint(request: Request, room: int) -> None:
    if not request.end_ids:
        raise ValueError("constraint: the model has no end token, so a text that matches could not end")
    if request.policy.reviser is not None and request.policy.reviser.edits:
        raise ValueError(
            f"constraint: policy {request.policy} changes tokens one by one, which would break the match; take another"
        )
    assert request.constraint is not None
    least = int(request.constraint.distance[request.constraint.start])
    if least > min(request.max_new_tokens, room):
        raise ValueError(
            f"constraint: a match takes {least} tokens or more, and {min(request.max_new_tokens, room)} are allowed; "
            "allow more new tokens, or shorten the prompt"
        )


def _check_policy(model: BlockDiffusionModel, request: Request) -> None:
    policy = request.policy
    if "uniform_state" in policy.needs and not model.spec.uniform_state:
        raise ValueError(
            f"policy {policy}: renoise decodes from random tokens, and this model was trained on masks "
            "(uniform_state is not set in block_diffusion.json); take another policy"
        )
    if policy.search is not None and request.sampling.temperature == 0:
        raise ValueError("policy: particles need a temperature above 0, or all of them write the same text")
    for part, name in ((policy.search, "particles"), (policy.refine, "refine")):
        if part is not None and (request.lossless or request.given or request.constraint is not None):
            raise ValueError(f"policy: {name} goes with neither lossless decoding nor infilling nor a constraint")
    if policy.refine is not None and not model.spec.is_diffusion:
        raise ValueError("policy: refine fills masks anew, and this is an autoregressive checkpoint without a [MASK]")
    if "unconditional" in policy.needs:
        if model.spec.mask_id is None:
            raise ValueError("policy: guidance hides the prompt behind [MASK], and this model has none")
        if request.lossless:
            raise ValueError("policy: guidance changes the AR text that lossless decoding keeps; take one of the two")


def _check_given(model: BlockDiffusionModel, request: Request, room: int) -> None:
    """A hole must see what is given behind it, so both must lie in one block."""
    if len(request.given) > room:
        raise ValueError(
            f"infilling: prompt and text have {len(request.prompt) + len(request.given)} tokens and the model's "
            f"context holds {model.context_length}"
        )
    if request.policy.planner is not None:
        raise ValueError(
            f"infilling: {request.policy.planner.name} may end a block between a hole and what is fixed behind it; "
            "take a policy that does not plan blocks"
        )
    holes = [at for at, token in enumerate(request.given) if token is None]
    known = [at for at, token in enumerate(request.given) if token is not None]
    first_hole, last_known = min(holes, default=0), max(known, default=-1)
    if last_known > first_hole and first_hole // request.block_size != last_known // request.block_size:
        raise ValueError(
            f"infilling: tokens fixed behind a hole lie in a later block than the hole, which cannot see them; the two "
            f"must share one block: give a block size of {last_known + 1} or more"
        )
    if first_hole == 0 and holes and last_known > 0 and model.spec.alignment.scoring().first_is_clean:
        raise ValueError(
            "infilling: this model draws a block's first token from what precedes it, so a hole there cannot see what "
            "is fixed behind it; begin the text with a fixed token (`Model.infill` does)"
        )


def _check_stepwise(request: Request) -> None:
    policy = request.policy
    fits = policy.final_once_filled and policy.planner is None and policy.soft is None
    fits = fits and not policy.logits and not {"attention", "unconditional"} & policy.needs
    if not fits or any(part.name in ("stability", "stable") for part in policy.parts):
        raise ValueError(
            f"stepwise: policy {policy} remembers earlier steps or changes filled tokens; it works for policies whose "
            "step depends on the open block alone"
        )
    if request.lossless or request.constraint is not None:
        raise ValueError("stepwise: not together with lossless decoding or a constraint")
