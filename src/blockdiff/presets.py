"""The papers as settings of one trainer: each preset is a configuration tree beneath the user's own.

`blockdiff explain` prints what a preset says of itself. Where a paper leaves something open, or where we chose
otherwise, the preset says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """tree: the settings; about: the paper, what it prescribes, what we chose, and the number we got."""

    about: str
    tree: dict[str, Any]


PRESETS: dict[str, Preset] = {
    "ar": Preset(
        "An ordinary autoregressive model: blocks of one token. The other end of every number in docs/results.md.",
        {"layout": {"kind": "ar"}},
    ),
    "mdlm": Preset(
        "MDLM (arXiv 2406.07524): one block over the whole text, logits at the token's own place, log-linear schedule. "
        "Ours: documents end with a trained end token. No number yet.",
        {
            "layout": {"kind": "full"},
            "model": {"prediction": "same"},
            "noise": {"kind": "bernoulli", "schedule": "log_linear"},
        },
    ),
    "bd3lm": Preset(
        "BD3-LM (arXiv 2503.09573): one block size, block-causal clean context, clipped mask rates whose range is "
        "searched on validation data. Ours: no redrawing of masks (the authors' scripts redraw, which never trains the "
        "fully masked block that decoding begins with; set noise.redraw: true for it). Numbers, noise alone: E1 in "
        "docs/results.md (b = 16: searched 3.467, the paper's fixed interval 3.389, exact counts 3.443 nats a token).",
        {
            "layout": {"kind": "fixed", "size": 16},
            "model": {"clean_context": "block_causal", "prediction": "same"},
            "noise": {"kind": "searched_clip", "every": 5000},
        },
    ),
    "abd": Preset(
        "Adaptive Block Diffusion (arXiv 2606.29275): a distribution over (prefix, window), the context read causally "
        "so that the two are the whole configuration. Ours: the scale mixture and exact counts. Numbers: README's "
        "demo, docs/results.md.",
        {"layout": {"kind": "scale_mixture", "max_size": 32, "atoms": {4: 0.1, 8: 0.1, 16: 0.1}}},
    ),
    "nbdiff": Preset(
        "NBDiff (arXiv 2512.06776): an AR checkpoint adapted with a causal clean context, shifted logits, an AR loss "
        "of weight 0.5 and blocks growing 1 -> 32 in the first 5/8 of the steps; unweighted cross-entropy. Ours: exact "
        "counts, and a block's first token read from the clean stream, as decoding does. Numbers: E3, docs/results.md "
        "(at 300K tokens growth ends at 3.672 nats a token at b = 16, without it at 3.464).",
        {
            "layout": {"kind": "fixed", "size": 32},
            "growth": {"shape": "geometric", "until": 0.625},
            "objective": {"weighting": "ce", "ar_weight": 0.5},
        },
    ),
    "blockwise_sft": Preset(
        "Blockwise SFT (arXiv 2508.19529): one random block of the answer denoised, prompt and earlier blocks clean, "
        "blocks counted from the answer's start. Ours: the future is absent instead of hidden behind masks, weights "
        "n/k (the authors' sum over k up to a constant), and the last block filled with the end token. "
        "objective.active: all gives the same expected gradient from every pass. Numbers for blocks of 8: E4 in "
        "docs/results.md (exact match 0.57 after 120 steps, 0.24 for classical SFT).",
        {
            "layout": {"kind": "fixed", "size": 32},
            "objective": {"active": "one"},
            "data": {"eos_fill": "block"},
        },
    ),
    "classical_sft": Preset(
        "Classical SFT of masked diffusion models (LLaDA, arXiv 2502.09992): the whole answer is one block. Number: "
        "E4 in docs/results.md (exact match 0.24 after 120 steps, decoded in blocks of 8).",
        {"layout": {"kind": "full"}},
    ),
    "sdar": Preset(
        "SDAR (arXiv 2510.06303): blocks of 4, block-causal clean context, logits at the token's own place, mask rate "
        "t with weight 1/t. Ours: one t for every block (SDAR: one for a sequence). No number yet.",
        {
            "layout": {"kind": "fixed", "size": 4},
            "model": {"clean_context": "block_causal", "prediction": "same"},
            "noise": {"kind": "bernoulli"},
        },
    ),
    "llada2": Preset(
        "LLaDA 2.0 (arXiv 2512.15745): block size up to a peak, stable, and down to 32, block-causal. Ours: the "
        "peak is 256 (theirs 4,096) so that it fits short rows. No number yet.",
        {
            "layout": {"kind": "fixed", "size": 32},
            "growth": {"shape": "wsd", "ratio": 4, "until": 0.3, "peak": 256, "decay": 0.3},
            "model": {"clean_context": "block_causal", "prediction": "same"},
        },
    ),
    "fast_dllm_v2": Preset(
        "Fast-dLLM v2 (arXiv 2509.26328): blocks of 32, block-causal, shifted logits with a block's first token read "
        "from the noisy stream, two complementary masks a text, unweighted cross-entropy. Scored and decoded with the "
        "first token from the clean stream. No number yet.",
        {
            "layout": {"kind": "fixed", "size": 32},
            "model": {"clean_context": "block_causal", "prediction": "shift", "boundary": "noisy"},
            "objective": {"weighting": "ce", "complementary": True},
        },
    ),
    "sdlm": Preset(
        "SDLM (arXiv 2509.24007): blocks of 4 that begin anywhere, always fully masked, each opening with the clean "
        "token before it. Ours: a random grid for each text instead of overlapping blocks. No number yet.",
        {
            "layout": {"kind": "random_offset", "size": 4},
            "model": {"boundary": "seed"},
            "noise": {"kind": "clipped", "low": 1.0, "high": 1.0},
            "objective": {"weighting": "ce"},
        },
    ),
}
