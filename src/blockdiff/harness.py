"""lm-eval's tasks on block diffusion models: the three methods of its contract, and nothing more.

`blockdiff eval tasks MODEL --harness TASKS` measures them, or lm-eval's own command line, told of this model:

    python -m blockdiff.harness run --model blockdiff --model_args path=MODEL,block_size=4 --tasks TASKS

A log-likelihood is minus the bound of `evaluate.bounds`, in nats, of the same documents in the same windows: exact at
block size 1, a bound above (so a score of its own: compare it across models at one block size). lm-eval's batch_size is
not used; `batch` texts are decoded at once, and scoring fills its passes by tokens.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars

from blockdiff.api import Model, load
from blockdiff.data import Document, Encoder
from blockdiff.decode import Sampling, named
from blockdiff.engine import Output, Request, generate_batches
from blockdiff.evaluate.bounds import check_bound, document_nats, estimator_of
from blockdiff.evaluate.scoring import Estimator

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ValueError(f"tasks of lm-eval need it ({error}); pip install 'blockdiff[evaluation]'") from None

_FEWSHOT_SEED = 1234  # lm-eval's own
_YAML = (".yaml", ".yml")
_OPTIONS: dict[str, Any] = {  # of --model_args, with their defaults
    "path": "",
    "block_size": None,
    "draws": 8,
    "exact": False,
    "policy": "threshold",
    "temperature": 0.0,
    "max_new_tokens": 256,
    "batch": 32,
    "seed": 0,
}
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


@register_model("blockdiff")
class BlockDiffusionLM(LM):
    """A model as lm-eval sees it.

    form: how texts are decoded (block size, policy, sampling, token limit, seed), its prompt not used; estimator: how
    bounds are, at the same block size. Text number i of a call is decoded with the form's seed + i, and its noise is
    that of document i of `evaluate.bound`.
    """

    def __init__(self, model: Model, form: Request, estimator: Estimator, batch: int = 32) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: load it from a directory that holds one")
        self.model, self.form, self.estimator, self.batch = model, form, estimator, batch
        self.encoder = Encoder(model.tokenizer, None)  # an end is no part of what lm-eval asks about
        block = self.encoder.document([0] * (form.block_size + 1), 1, "a block")
        check_bound(model, [block], [form.block_size], draws=estimator.draws, exact=estimator.kind == "exact")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """The model that `--model_args` describe (`_OPTIONS`); ValueError for an option that there is not."""
        for key in arg_dict:
            if key not in _OPTIONS:
                close = difflib.get_close_matches(key, _OPTIONS, n=1)
                raise ValueError(
                    f"model_args {key}: unknown; {f'did you mean {close[0]}?' if close else ''} "
                    f"known are {', '.join(_OPTIONS)}"
                )
        chosen = _OPTIONS | arg_dict
        if not chosen["path"]:
            raise ValueError("model_args: give path=DIRECTORY, a checkpoint")
        device = str((additional_config or {}).get("device") or "cuda")  # lm-eval says cuda where nothing is said
        model = load(str(chosen["path"]), device=None if device.startswith("cuda") else device)
        form = Request(
            prompt=(0,),
            max_new_tokens=chosen["max_new_tokens"],
            block_size=chosen["block_size"] or model.spec.default_block_size,
            policy=named(chosen["policy"]),
            sampling=Sampling(chosen["temperature"]),
            seed=chosen["seed"],
        )
        estimator = estimator_of(chosen["draws"], chosen["exact"], 0, 0.0, chosen["seed"])
        return cls(model, form, estimator, chosen["batch"])

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.backbone.config._name_or_path)

    @property
    def likelihood(self) -> str:
        """What a log-likelihood of this model is, in words."""
        size = self.form.block_size
        if size - int(self.model.spec.alignment_of(size).first_is_clean) <= 1:
            return f"exact likelihood at block size {size}"
        how = "every mask set" if self.estimator.kind == "exact" else f"{self.estimator.draws} draws"
        return f"bound at block size {size}, {how}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the `config` of its results."""
        return {"likelihood": self.likelihood, "block_size": self.form.block_size}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Minus the bound of each continuation after its context, in nats, its end not among them; and whether greedy
        decoding at the block size, with the policy, writes just this continuation.

        An empty context is the tokenizer's beginning token; where it adds none, the first token is given, as it is in
        every text (`data`). Raises DataError where then nothing is left to score.
        """
        pairs = [one.args for one in requests]
        documents = [self.encoder.completion(asked, told, f"request {i}") for i, (asked, told) in enumerate(pairs)]
        found = list(zip(self._log_likelihoods(documents), self._greedy(documents), strict=True))
        self._cache("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Minus the bound of each whole text, in nats, as `eval bound` scores texts, but for their ends."""
        ids = self.encoder.tokenize([one.args[0] for one in requests])
        documents = [self.encoder.document(one, 1, f"request {i}") for i, one in enumerate(ids)]
        found = self._log_likelihoods(documents)
        self._cache("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The texts that continue the contexts, up to a stop string, an end token, or max_gen_toks.

        Contexts that do not fit are cut at their beginning. Raises ValueError for an option that is not known.
        """
        forms = []
        for number, one in enumerate(requests):
            context, options = one.args
            form = self._form(options, number)
            forms.append(replace(form, prompt=self._fitting(self.model.encode(context), form.max_new_tokens)))
        found = [output.text for output in self._decode(forms)]
        self._cache("generate_until", requests, found)
        return found

    def _log_likelihoods(self, documents: Sequence[Document]) -> list[float]:
        if not documents:
            return []
        drawn = document_nats(self.model, documents, self.form.block_size, self.estimator)
        return [-float(nats) for nats in drawn.mean(0)]

    def _greedy(self, documents: Sequence[Document]) -> list[bool]:
        forms = []
        for document in documents:
            wanted = document.scored
            prompt = self._fitting(document.ids[document.prompt].tolist(), wanted)
            forms.append(replace(self.form, prompt=prompt, max_new_tokens=wanted, sampling=Sampling(), end_ids=()))
        outputs = self._decode(forms)
        return [
            bool(np.array_equal(output.tokens, document.ids[~document.prompt]))
            for output, document in zip(outputs, documents, strict=True)
        ]

    def _decode(self, forms: Sequence[Request]) -> list[Output]:
        return generate_batches(self.model, forms, self.batch)

    def _form(self, options: dict[str, Any], number: int) -> Request:
        unknown = [key for key in options if key not in _GENERATION]
        if unknown:
            raise ValueError(f"generation_kwargs {unknown[0]}: not one of {', '.join(_GENERATION)}; remove it")
        until = options.get("until") or ()
        own = self.form.sampling
        sampled = options.get("do_sample", True)
        return replace(
            self.form,
            max_new_tokens=options.get("max_gen_toks", self.form.max_new_tokens),
            stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
            sampling=Sampling(
                options.get("temperature", own.temperature) if sampled else 0.0,
                options.get("top_k", own.top_k),
                options.get("top_p", own.top_p),
            ),
            seed=self.form.seed + number,
            end_ids=self.model.end_ids,
            forbidden=self.model.control_ids,
        )

    def _fitting(self, ids: Sequence[int], wanted: int) -> tuple[int, ...]:
        """The end of a prompt, as much as leaves room for so many tokens."""
        room = self.model.context_length - wanted
        if room < 1:
            raise ValueError(
                f"{wanted} tokens do not fit the model's context of {self.model.context_length}; ask for fewer"
            )
        return tuple(ids[-room:])

    def _cache(self, method: str, requests: Sequence[Instance], found: Sequence[Any]) -> None:
        for one, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial(method, one.args, result)


def measure(
    lm: BlockDiffusionLM, tasks: Sequence[str], include_path: Path | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Rows {task, metric, filter, value, se, n, block_size, likelihood} of lm-eval's tasks, by name or YAML file.

    likelihood says what the numbers are made of, None where they are made of texts that were written.
    include_path: a folder of YAML files; with it lm-eval's own tasks are left out. The data files that a YAML names are
    looked for in its folder. Raises ValueError for a task that there is not.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    loaded = _load(tasks, include_path)
    results = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
    writing = {name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until"}
    rows = []
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            se = numbers.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "kind": "lm-eval",
                    "metric": metric,
                    "filter": filtered,
                    "value": float(value),
                    "se": float(se) if isinstance(se, int | float) else None,
                    "n": results["n-samples"].get(task, {}).get("effective"),
                    "block_size": lm.form.block_size,
                    "likelihood": None if task in writing else lm.likelihood,
                }
            )
    return rows


def _load(tasks: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's tasks of these names and files, ready to be evaluated."""
    by_name = any(not task.endswith(_YAML) for task in tasks)
    folder = None if include_path is None else include_path.absolute()
    manager = TaskManager(include_path=folder, include_defaults=by_name and folder is None)
    found = []
    for task in tasks:
        file = Path(task).absolute() if task.endswith(_YAML) else None
        if file is None and task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"--harness {task}: no such task in {folder or 'lm-eval'}{hint}")
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"--harness {task}: no such file")
        with chdir(folder or (Path.cwd() if file is None else file.parent)):  # data files are named from there
            found += list(manager.load([task if file is None else str(file)])["tasks"].values())
    for one in found:
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return manager.load(found)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
