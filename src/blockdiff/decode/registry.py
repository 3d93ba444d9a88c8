"""The named policies: published decoders as compositions, with their defaults and sources.

`blockdiff policies` prints this table, and docs/policies.md is generated from it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from blockdiff.decode.expression import PARTS, parse
from blockdiff.decode.policy import Policy


@dataclass(frozen=True)
class Entry:
    """A published decoder: its composition, where it is from, and what to know about it.

    block_size: the published one; model: what kind of model it asks for, where not any.
    """

    composition: str
    source: str
    note: str = ""

    @property
    def policy(self) -> Policy:
        return parse(self.composition)


TABLE: dict[str, Entry] = {
    "threshold": Entry(
        "confidence + threshold(0.9)",
        "Fast-dLLM, arXiv 2505.22618",
        "the default: all positions above a confidence, at least one; meant for temperature 0",
    ),
    "factor": Entry("confidence + factor(1.0)", "Fast-dLLM, arXiv 2505.22618, section 3.3"),
    "ancestral": Entry(
        "random + reverse(steps=32)", "MDLM, arXiv 2406.07524", "steps that reveal nothing still cost a forward here"
    ),
    "first_hitting": Entry(
        "random + fixed(1)",
        "Zheng et al., arXiv 2409.02908; BD3-LM, arXiv 2503.09573",
        "ancestral sampling in continuous time; the sampler whose likelihood the bound bounds",
    ),
    "low_confidence": Entry(
        "confidence + even(steps=4)", "LLaDA, arXiv 2502.09992", "published with as many steps as tokens"
    ),
    "fixed_count": Entry(
        "confidence + fixed(2)", "LLaDA, arXiv 2502.09992", "the same order, with the same number at every step"
    ),
    "dream_entropy": Entry(
        "entropy + linear(steps=8)",
        "Dream, HKUNLP/Dream",
        "at least one position a step, which Dream's own rounding may miss",
    ),
    "dream_margin": Entry("margin + linear(steps=8)", "Dream, HKUNLP/Dream"),
    "dream_maskgit": Entry("top_probability + linear(steps=8)", "Dream, HKUNLP/Dream (`maskgit_plus`)"),
    "dream_stochastic": Entry("entropy + jitter(0.1) + linear(steps=8)", "Dream, HKUNLP/Dream (`alg_temp`)"),
    "entropy_bounded": Entry("entropy + entropy_budget(0.1)", "EB-sampler, arXiv 2505.24857"),
    "diffusion_gemma": Entry(
        "entropy + entropy_budget(0.1, own=True) + renoise(steps=48)",
        "DiffusionGemma, transformers 5.23",
        "for models trained on uniform noise; its falling temperature (0.8 to 0.4) is the request's own here",
    ),
    "sdar_static": Entry("confidence + even(steps=4)", "SDAR, arXiv 2510.06303", "blocks of 4"),
    "sdar_dynamic": Entry(
        "confidence + threshold(0.85) + even(steps=4)",
        "SDAR, arXiv 2510.06303",
        "blocks of 4; threshold or the even split, whichever fills more",
    ),
    "longest_prefix": Entry(
        "confidence + prefix(0.9)", "SDLM, arXiv 2509.24007", "here a block keeps its size; SDLM slides it"
    ),
    "dilated": Entry(
        "leftmost + spaced(base=2)", "DUS, arXiv 2506.19037", "index rule from the abstract; later versions skip"
    ),
    "stability_weighted": Entry(
        "confidence + stability(1.0) + threshold(0.9)",
        "SWD, arXiv 2604.17068",
        "the paper's exact weighting is not public; exp(-KL) is ours",
    ),
    "klass": Entry("top_probability + stable(0.9, kl=0.01, steps=2)", "KLASS, arXiv 2511.05664"),
    "attention": Entry(
        "attention + above_mean(1.0)",
        "Attn-Sampler, arXiv 2604.08564",
        "aggregation and threshold are not public; ours are in the parts",
    ),
    "credit": Entry("confidence + credit(0.7) + threshold(0.9)", "dInfer, arXiv 2510.08666"),
    "hierarchical": Entry("confidence + threshold(0.9) + run_best(0.4)", "dInfer, arXiv 2510.08666"),
    "remdm": Entry(
        "random + reverse(steps=32, eta=0.05) + remask(steps=32, eta=0.05)", "ReMDM, arXiv 2503.00307 (cap)"
    ),
    "remdm_confident": Entry(
        "random + reverse(steps=32) + remask(steps=32, confident=True)",
        "ReMDM, arXiv 2503.00307 (conf)",
    ),
    "topk_remasking": Entry(
        "confidence + everything + keep_top(steps=8)",
        "RemeDi, arXiv 2509.23653",
        "the model's own probability in place of RemeDi's trained head",
    ),
    "token_editing": Entry(
        "top_probability + threshold(0.95) + edit(0.9)",
        "LLaDA2.1, arXiv 2602.08676",
        "asks for a model trained to edit",
    ),
    "adablock": Entry(
        "confidence + threshold(0.9) + delimiter(0.3)",
        "AdaBlock-dLLM, arXiv 2509.26432",
        "the block size is the largest; a delimiter may end it earlier",
    ),
    "swordsman": Entry(
        "confidence + threshold(0.9) + entropy_shift(1.0)",
        "Swordsman, 2026",
        "the paper's formula is not public; the cut before the largest rise is ours",
    ),
    "nbdiff": Entry(
        "entropy + even(steps=8) + subblocks(4)", "NBDiff, arXiv 2512.06776", "blocks of 32 with sub-blocks of 4"
    ),
    "fast_dllm_v2": Entry(
        "confidence + threshold(0.9) + subblocks(8)",
        "Fast-dLLM v2, arXiv 2509.26328",
        "blocks of 32; without its approximate cache inside the block",
    ),
    "self_rewarding_smc": Entry(
        "confidence + threshold(0.9) + particles(4)", "arXiv 2602.01849", "temperature above 0"
    ),
    "draft_then_refine": Entry(
        "confidence + threshold(0.9) + refine(0.25)",
        "Diffusion in Diffusion, arXiv 2601.13599",
        "the second stage is one block over the whole text",
    ),
    "guided": Entry(
        "confidence + threshold(0.9) + guidance(1.0)",
        "LLaDA, arXiv 2502.09992",
        "classifier-free guidance; two forwards for one",
    ),
    "soft_masked": Entry(
        "confidence + threshold(0.9) + soft(0.3)",
        "Soft-masked diffusion, arXiv 2510.17206",
        "asks for a model trained so",
    ),
    "one_step": Entry("confidence + everything", "ours", "a whole block at once: what lossless decoding drafts with"),
}

POLICIES: dict[str, Policy] = {name: entry.policy for name, entry in TABLE.items()}


def named(text: str) -> Policy:
    """A policy by its name in the table, or written as parts (`decode.expression`). Raises ValueError."""
    text = text.strip()
    if text in POLICIES:
        return POLICIES[text]
    try:
        return parse(text)
    except ValueError as error:
        near = difflib.get_close_matches(text, POLICIES, 1)
        if text.isidentifier() and near and text not in PARTS:
            raise ValueError(f"policy {text!r} is unknown; did you mean {near[0]}?") from None
        if text.isidentifier() and "no part is called" in str(error):
            raise ValueError(f"policy {text!r} is unknown; `blockdiff policies` lists the known ones") from None
        raise
