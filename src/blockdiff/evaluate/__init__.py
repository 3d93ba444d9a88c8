"""Measures of a model: bounds with standard errors, and whether its training covers what is asked of it."""

from blockdiff.evaluate.answers import Answer, AnswerRow, Asking, answer_task, check_asking
from blockdiff.evaluate.bounds import BoundRow, bound, check_bound, document_nll, grids, unigram
from blockdiff.evaluate.compare import Comparison, compare
from blockdiff.evaluate.coverage import (
    decode_coverage,
    decode_problem,
    evaluation_coverage,
    evaluation_problem,
    output_coverage,
    trained_calls,
)
from blockdiff.evaluate.frontier import FrontierRow, check_frontier, data_point, measure_frontier
from blockdiff.evaluate.judge import Judged, judge_texts, tokenizer_of
from blockdiff.evaluate.length import check_length, measure_way
from blockdiff.evaluate.plan import FrontierPlan, LengthPlan, read_plan
from blockdiff.evaluate.questions import KINDS, Question, Task, read_questions, read_task
from blockdiff.evaluate.variance import VarianceRow, gradient_variance

__all__ = [
    "KINDS",
    "Answer",
    "AnswerRow",
    "Asking",
    "BoundRow",
    "Comparison",
    "FrontierPlan",
    "FrontierRow",
    "Judged",
    "LengthPlan",
    "Question",
    "Task",
    "VarianceRow",
    "answer_task",
    "bound",
    "check_asking",
    "check_bound",
    "check_frontier",
    "check_length",
    "compare",
    "data_point",
    "decode_coverage",
    "decode_problem",
    "document_nll",
    "evaluation_coverage",
    "evaluation_problem",
    "gradient_variance",
    "grids",
    "judge_texts",
    "measure_frontier",
    "measure_way",
    "output_coverage",
    "read_plan",
    "read_questions",
    "read_task",
    "tokenizer_of",
    "trained_calls",
    "unigram",
]
