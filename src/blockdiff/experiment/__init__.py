"""Experiments as data: settings x seeds, each a training run and its bounds, summed up from the saved files."""

from blockdiff.experiment.page import page, write_page
from blockdiff.experiment.plan import Experiment, Run, load_experiment
from blockdiff.experiment.render import markdown
from blockdiff.experiment.runner import run_experiment
from blockdiff.experiment.summary import summarise

__all__ = ["Experiment", "Run", "load_experiment", "markdown", "page", "run_experiment", "summarise", "write_page"]
