"""Measures of a model: bounds with standard errors, and whether its training covers what is asked of it."""

from blockdiff.evaluate.bounds import BoundRow, bound, unigram
from blockdiff.evaluate.coverage import decode_coverage, evaluation_coverage, output_coverage, trained_calls

__all__ = [
    "BoundRow",
    "bound",
    "decode_coverage",
    "evaluation_coverage",
    "output_coverage",
    "trained_calls",
    "unigram",
]
