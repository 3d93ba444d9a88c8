"""Texts of one length under a judge, at forward budgets and temperatures: NLL together with entropy.

A judge alone is pleased by texts that say little: the NLL of texts under it is the divergence from it plus their own
entropy. So every temperature is a point of (entropy, NLL), beside the data's own, and ways compare at the entropy that
is nearest to the data's. Entropies depend on how many tokens they are taken over: the data's is taken over groups of as
many texts. Sampling is in float64 and no text is left out: those that are blank, and cannot be judged, are counted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch

from blockdiff.data import Document
from blockdiff.decode import Policy, Sampling, named
from blockdiff.decode.counts import Fixed
from blockdiff.diffusion_gemma import DiffusionGemma, with_steps
from blockdiff.engine import Output, Request
from blockdiff.evaluate.diversity import distinct, repeated, self_bleu
from blockdiff.evaluate.judge import Judged, judge_texts, tokenizer_of
from blockdiff.evaluate.length import stretches
from blockdiff.evaluate.plan import FrontierPlan
from blockdiff.evaluate.writing import write
from blockdiff.layout import TokenMap
from blockdiff.masks import Visibility
from blockdiff.model import BlockDiffusionModel
from blockdiff.statistics import spread

MOST_SELF_BLEU = 64  # texts that are compared with one another


@dataclass(frozen=True)
class FrontierRow:
    """Texts of one way at one budget and temperature.

    budget: forwards that denoise a text, at most; forwards_per_text: all that were counted, commits and verifications
    too.
    judge_nll in nats per token of the judge, entropy of its tokens in nats: means over groups, with the standard
    deviation over groups (sd), and the NLL's standard error over texts (se). distinct_n, self_bleu, repeated_4grams: in
    words (`diversity`). mauve: None where it is not installed. nearest_to_data: the temperature of this way and budget
    whose entropy is nearest to the data's.
    """

    way: str
    model: str
    block_size: int
    policy: str
    temperature: float
    budget: int
    forwards_per_text: float
    tokens_per_forward: float
    judge_nll: float
    judge_nll_sd: float
    judge_nll_se: float
    entropy: float
    entropy_sd: float
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    self_bleu: float | None
    repeated_4grams: float | None
    mauve: float | None
    texts: int
    blank: int
    groups: int
    nearest_to_data: bool = False


@dataclass(frozen=True)
class Reference:
    """The data's own continuations: prompts and texts by group, and their point."""

    prompts: list[str]
    texts: list[str]
    judge_nll: float
    judge_nll_se: float
    entropy: float

    def to_json(self) -> dict[str, Any]:
        """The point alone."""
        point = asdict(self)
        del point["prompts"]
        return point | {"texts": len(self.texts)}


def check_frontier(plan: FrontierPlan, label: str, model: BlockDiffusionModel | DiffusionGemma) -> int:
    """The block size of a way; ValueError where the model cannot decode so."""
    way = plan.ways[label]
    size = way.size_over(plan.new_tokens)
    if isinstance(model, DiffusionGemma):
        _check_canvases(plan, label, model)
        return size
    if size > 1 and not model.spec.is_diffusion:
        raise ValueError(f"ways.{label}: {way.model} is autoregressive; give block_size 1")
    if _length(plan) + size > model.context_length + 1:
        raise ValueError(
            f"ways.{label}: {_length(plan)} tokens and a block of {size} do not fit the model's context of "
            f"{model.context_length}: lower new_tokens"
        )
    return size


def _check_canvases(plan: FrontierPlan, label: str, model: DiffusionGemma) -> None:
    way = plan.ways[label]
    if way.block_size != model.canvas_length:
        raise ValueError(f"ways.{label}: DiffusionGemma's canvas is its block; give block_size {model.canvas_length}")
    try:
        for temperature in plan.temperatures:
            model.check(_form(plan, model, named(way.policy), temperature))
    except ValueError as error:
        raise ValueError(f"ways.{label}: {error}") from None
    if plan.prompt_tokens + _canvases(plan, model) * model.canvas_length > model.context_length:
        raise ValueError(
            f"ways.{label}: {plan.prompt_tokens} tokens and {_canvases(plan, model)} canvases of {model.canvas_length} "
            f"do not fit the model's context of {model.context_length}: lower new_tokens"
        )


def _canvases(plan: FrontierPlan, model: DiffusionGemma) -> int:
    return -(-plan.new_tokens // model.canvas_length)


def data_point(
    plan: FrontierPlan, tokenizer: Any, documents: Sequence[Document], judge: BlockDiffusionModel
) -> Reference:
    """What the texts should be like: the data's continuations of as many prompts, in groups of as many texts, cut into
    prompt and text by this tokenizer."""
    prompts, texts = _continued(plan, tokenizer, _pieces(plan, documents))
    groups = _judged(plan, judge, prompts, texts)
    whole = judge_texts(judge, prompts, texts)
    if whole is None:
        raise ValueError("the data's own continuations are blank: give other texts")
    return Reference(prompts, texts, fmean(g.nll for g in groups), whole.se, fmean(g.entropy for g in groups))


def measure_frontier(
    plan: FrontierPlan,
    label: str,
    model: BlockDiffusionModel | DiffusionGemma,
    documents: Sequence[Document],
    judge: BlockDiffusionModel,
    reference: Reference,
    on_progress: Callable[[float], None] = lambda done: None,
) -> tuple[list[FrontierRow], list[str]]:
    """Rows of one way at every budget that its blocks allow, and a sentence for each that they do not.

    The policy fills as few positions a step as the budget allows, in place of its own count; DiffusionGemma's takes as
    many steps at most for a canvas.
    """
    size = check_frontier(plan, label, model)
    pieces, rows, skipped = _pieces(plan, documents), [], []
    if _continued(plan, model.tokenizer, pieces) != (reference.prompts, reference.texts):
        raise ValueError(
            f"ways.{label}: its tokenizer cuts the data otherwise than the first way's, and as many tokens are "
            "texts of another length: measure it in a file of its own"
        )
    done, total = 0, len(plan.budgets) * len(plan.temperatures)
    for budget in plan.budgets:
        policy = _within(plan, label, model, budget)
        if policy is None:
            blocks = -(-plan.new_tokens // size)
            skipped.append(f"{label}: {blocks} blocks of {size} cannot take {budget} forwards")
            continue
        found = []
        for temperature in plan.temperatures:
            outputs = _write(plan, model, pieces, size, policy, temperature)
            found.append(_row(plan, label, model, outputs, judge, reference, (size, policy, temperature, budget)))
            done += 1
            on_progress(done / total)
        nearest = min(found, key=lambda row: abs(row.entropy - reference.entropy))
        rows += [replace(row, nearest_to_data=row is nearest) for row in found]
    return rows, skipped


def _within(plan: FrontierPlan, label: str, model: BlockDiffusionModel | DiffusionGemma, budget: int) -> Policy | None:
    """The policy of a way that keeps to a budget; None where its blocks cannot."""
    policy = named(plan.ways[label].policy)
    if isinstance(model, DiffusionGemma):
        steps = budget // _canvases(plan, model)
        return with_steps(policy, steps) if steps else None
    per_step = plan.per_step(label, budget)
    return replace(policy, counts=(Fixed(per_step),)) if per_step else None


def _continued(plan: FrontierPlan, tokenizer: Any, pieces: Sequence[Document]) -> tuple[list[str], list[str]]:
    """The pieces' prompts and what follows them, as text."""
    prompts = [tokenizer.decode(piece.ids[: plan.prompt_tokens], skip_special_tokens=True) for piece in pieces]
    texts = [
        tokenizer.decode(piece.ids[plan.prompt_tokens : _length(plan)], skip_special_tokens=True) for piece in pieces
    ]
    return prompts, texts


def _length(plan: FrontierPlan) -> int:
    return plan.prompt_tokens + plan.new_tokens


def _pieces(plan: FrontierPlan, documents: Sequence[Document]) -> list[Document]:
    wanted = plan.groups * plan.texts
    found = stretches(documents, _length(plan), wanted)
    if len(found) < wanted:
        raise ValueError(
            f"the data has {len(found)} stretches of {_length(plan) + 1} tokens, and {wanted} are needed for "
            f"{plan.groups} groups of {plan.texts}: give more text, or lower texts, groups or new_tokens"
        )
    return found


def _write(
    plan: FrontierPlan,
    model: BlockDiffusionModel | DiffusionGemma,
    pieces: Sequence[Document],
    size: int,
    policy: Policy,
    temperature: float,
) -> list[Output]:
    form = _form(plan, model, policy, temperature)
    if not isinstance(model, DiffusionGemma):
        form = replace(form, block_size=size)
    requests = [
        replace(form, prompt=tuple(piece.ids[: plan.prompt_tokens].tolist()), seed=plan.seed + number)
        for number, piece in enumerate(pieces)
    ]
    return write(model, requests, plan.batch)


def _form(
    plan: FrontierPlan, model: BlockDiffusionModel | DiffusionGemma, policy: Policy, temperature: float
) -> Request:
    """How texts of one length are written, block size, prompt and seed apart: none ends before."""
    sampling = Sampling(temperature)
    if isinstance(model, DiffusionGemma):  # its sampler forbids nothing, so ends are written, and do not end the text
        asked = model.request(max_new_tokens=plan.new_tokens, policy=policy, sampling=sampling)
        return replace(asked, end_ids=())
    forbidden = (*model.control_ids, *model.end_ids)
    return Request((0,), max_new_tokens=plan.new_tokens, policy=policy, sampling=sampling, forbidden=forbidden)


def _judged(
    plan: FrontierPlan, judge: BlockDiffusionModel, prompts: Sequence[str], texts: Sequence[str]
) -> list[Judged]:
    """Each group under the judge; groups that are blank altogether are left out."""
    found = []
    for first in range(0, len(texts), plan.texts):
        group = slice(first, first + plan.texts)
        judged = judge_texts(judge, prompts[group], texts[group])
        if judged is not None:
            found.append(judged)
    return found


def _row(
    plan: FrontierPlan,
    label: str,
    model: BlockDiffusionModel | DiffusionGemma,
    outputs: Sequence[Output],
    judge: BlockDiffusionModel,
    reference: Reference,
    how: tuple[int, Policy, float, int],
) -> FrontierRow:
    size, policy, temperature, budget = how
    texts = [output.text for output in outputs]
    groups, whole = _judged(plan, judge, reference.prompts, texts), judge_texts(judge, reference.prompts, texts)
    if whole is None:
        raise ValueError(f"ways.{label}: every text at temperature {temperature} is blank")
    forwards = sum(output.forwards for output in outputs)
    return FrontierRow(
        way=label,
        model=plan.ways[label].model,
        block_size=size,
        policy=str(policy),
        temperature=temperature,
        budget=budget,
        forwards_per_text=forwards / len(outputs),
        tokens_per_forward=sum(len(output.tokens) for output in outputs) / forwards,
        judge_nll=fmean(group.nll for group in groups),
        judge_nll_sd=spread([group.nll for group in groups]) or 0.0,
        judge_nll_se=whole.se,
        entropy=fmean(group.entropy for group in groups),
        entropy_sd=spread([group.entropy for group in groups]) or 0.0,
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        distinct_3=distinct(texts, 3),
        self_bleu=self_bleu(texts[:MOST_SELF_BLEU]),
        repeated_4grams=repeated(texts),
        mauve=mauve_of(judge, texts, reference.texts, plan.seed),
        texts=len(texts),
        blank=sum(not text.strip() for text in texts),
        groups=len(groups),
    )


def mauve_of(judge: BlockDiffusionModel, texts: Sequence[str], reference: Sequence[str], seed: int) -> float | None:
    """MAUVE (Pillutla et al., arXiv 2102.01454) between texts and the data's, over the judge's last hidden states; None
    where the package `mauve` is not installed."""
    if importlib.util.find_spec("mauve") is None:
        return None
    import mauve

    found = mauve.compute_mauve(
        p_features=_features(judge, reference),
        q_features=_features(judge, texts),
        seed=seed,
        verbose=False,
    )
    return float(found.mauve)


@torch.inference_mode()
def _features(judge: BlockDiffusionModel, texts: Sequence[str]) -> Any:
    """The judge's hidden state after the last token of each text: float32 [texts, hidden]."""
    tokenizer, rows = tokenizer_of(judge), []
    for text in texts:
        ids = tokenizer(text or " ")["input_ids"][-judge.context_length :]
        given = torch.tensor([ids], device=judge.device)
        every = torch.ones_like(given, dtype=torch.bool)
        tokens = TokenMap.build(torch.zeros_like(given), every, every)  # a prompt, which is read causally
        output = judge.backbone(
            input_ids=given,
            position_ids=tokens.position,
            use_cache=False,
            output_hidden_states=True,
            visibility=Visibility(tokens, tokens, judge.spec.clean_context, judge.windows),
        )
        rows.append(output.hidden_states[-1][0, -1].float().cpu())
    return torch.stack(rows).numpy()
