"""Coverage: does what a model was trained on cover what a decoder or an evaluation asks of it?

A *call* reads the model in one configuration (p, w, k, M): p clean tokens before the block in its document, w tokens in
the block, k of them masked, namely the set M. k = 0 (with w = 1) is the AR configuration: the clean stream predicts the
next token, as decoding does for blocks of one token and, under `shift` + `clean`, for the first token of every block.
(p, w, k) is a cell of a table; which M comes with it depends on n (the tokens of the block that decoding may find
masked), k and the reveal order alone (`order`), so pi / mu is a product of two factors.

mu is the distribution of training's calls (`trained`), pi that of the calls asked for (`requested`). Where pi > 0 and
mu = 0 the model answers a question it never met. Elsewhere, for any loss r >= 0 of a configuration (its excess risk,
say, over that of the best possible model),

    sum pi r  <=  max(pi / mu) * sum mu r          (Adaptive Block Diffusion, arXiv 2606.29275)

What a confidence policy leaves masked is known only afterwards, from traces (`Coverage.order_gain`).
The clean context is no part of a configuration: under `block_causal` the cache also depends on how the prefix was cut,
of which only this is looked at: whether training had given texts as long as the prompts (`Coverage.prompt_sentence`).
"""

from blockdiff.coverage.comparison import (
    RARE_VISITS,
    Coverage,
    Violation,
    compare,
    not_covered,
    problem_of,
    violations_of,
)
from blockdiff.coverage.order import Order
from blockdiff.coverage.requested import Calls, decode_calls, grid_calls, traced_calls
from blockdiff.coverage.trained import Cell, SpanShare, Trained, histogram, trained

__all__ = [
    "RARE_VISITS",
    "Calls",
    "Cell",
    "Coverage",
    "Order",
    "SpanShare",
    "Trained",
    "Violation",
    "compare",
    "decode_calls",
    "grid_calls",
    "histogram",
    "not_covered",
    "problem_of",
    "traced_calls",
    "trained",
    "violations_of",
]
