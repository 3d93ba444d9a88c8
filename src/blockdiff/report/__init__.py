"""The report: one self-contained HTML page of a run, or of several runs and experiments side by side.

`sources` reads the saved files and nothing else is read; a module for each part of the page turns them into exhibits
(a figure or a table with its caption); `page` puts them together. `terminal` prints the same numbers.
"""

from blockdiff.report.coverage import coverage_figure
from blockdiff.report.page import compare, draw, write
from blockdiff.report.terminal import bound_table, comparison_table, coverage_map, coverage_summary

__all__ = [
    "bound_table",
    "compare",
    "comparison_table",
    "coverage_figure",
    "coverage_map",
    "coverage_summary",
    "draw",
    "write",
]
