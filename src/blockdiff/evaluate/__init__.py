"""Measures of a model: bounds with standard errors, and whether its training covers what is asked of it."""

from blockdiff.evaluate.bounds import BoundRow, bound, check_bound, document_nll, unigram
from blockdiff.evaluate.coverage import decode_coverage, evaluation_coverage, output_coverage, trained_calls
from blockdiff.evaluate.generation import GenerationRow, Question, answer_questions, read_questions
from blockdiff.evaluate.judge import Judged, judge_texts
from blockdiff.evaluate.variance import VarianceRow, gradient_variance

__all__ = [
    "BoundRow",
    "GenerationRow",
    "Judged",
    "Question",
    "VarianceRow",
    "answer_questions",
    "bound",
    "check_bound",
    "decode_coverage",
    "document_nll",
    "evaluation_coverage",
    "gradient_variance",
    "judge_texts",
    "output_coverage",
    "read_questions",
    "trained_calls",
    "unigram",
]
