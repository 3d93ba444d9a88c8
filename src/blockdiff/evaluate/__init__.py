"""Measures of a model, with standard errors."""

from blockdiff.evaluate.bounds import BoundRow, bound, unigram

__all__ = ["BoundRow", "bound", "unigram"]
