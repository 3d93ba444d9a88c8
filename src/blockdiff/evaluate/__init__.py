"""Measures of a model, with standard errors."""

from blockdiff.evaluate.bounds import BoundRow, bound, check_bound, document_nll, unigram
from blockdiff.evaluate.generation import GenerationRow, Question, answer_questions, read_questions

__all__ = [
    "BoundRow",
    "GenerationRow",
    "Question",
    "answer_questions",
    "bound",
    "check_bound",
    "document_nll",
    "read_questions",
    "unigram",
]
