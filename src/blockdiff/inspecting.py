"""What a checkpoint is, which conventions it has, where each is known from, and whether blockdiff loads it.

Everything is read from the config, the tokenizer and the headers of the weights' files; no weight is loaded and no code
of the checkpoint is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff.attention import UnsupportedModel
from blockdiff.distributions import to_dict
from blockdiff.families import Fact, Family, family_of
from blockdiff.foreign import Foreign, backbone_config, conventions, not_plain, read_config
from blockdiff.loading import generation_settings, lacking, left_out, load_tokenizer, reading
from blockdiff.model import SPEC_FILE, Spec

_NAMES = ("prediction", "boundary", "clean_context", "block_size", "mask_id")
_AR = {
    "prediction": "shift",
    "boundary": "clean",
    "clean_context": "context_causal",
    "block_size": 1,
    "mask_id": "none",
}
_SAMPLER = ("max_denoising_steps", "sampler_config", "t_max", "t_min", "stability_threshold", "confidence_threshold")
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Weights:
    """What the headers of the safetensors files say: shapes {name: shape}, dtypes {name of the type: tensors}."""

    files: int
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, int]

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as it lies there. conventions holds what is known; `problem` says why blockdiff would not load it
    and what would be needed (empty: it loads, if the probe at load agrees); commands: those that run it, where not all
    do."""

    path: str
    family: str
    model_type: str
    architectures: tuple[str, ...]
    reader: str
    conventions: Mapping[str, Fact]
    weights: Weights
    vocabulary: int | None
    problem: str
    note: str
    commands: tuple[str, ...] = ()

    @property
    def loads(self) -> bool:
        return not self.problem

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "family": self.family,
            "model_type": self.model_type,
            "architectures": list(self.architectures),
            "read_by": self.reader or None,
            "conventions": {
                name: {"value": self.conventions[name].value, "source": self.conventions[name].source}
                if name in self.conventions
                else None
                for name in dict.fromkeys((*_NAMES, *self.conventions))
            },
            "weights": {
                "files": self.weights.files,
                "tensors": len(self.weights.shapes),
                "parameters": self.weights.parameters,
                "dtypes": dict(self.weights.dtypes),
            },
            "tokenizer": self.vocabulary,
            "loads": self.loads,
            "commands": list(self.commands) or None,
            "problem": self.problem or None,
            "note": self.note or None,
        }

    def __str__(self) -> str:
        weights = self.weights
        named = ", ".join(self.architectures) or "no architecture named"
        read = f", read by transformers' {self.reader}" if self.reader else ""
        types = ", ".join(sorted(weights.dtypes)) or "none"
        held = f"{weights.files} files, {len(weights.shapes)} tensors, {weights.parameters:,} parameters, {types}"
        tokenizer = "none" if self.vocabulary is None else f"{self.vocabulary:,} tokens"
        lines = [f"{self.path}: {self.family}", _line("network", f"{self.model_type} ({named}){read}")]
        lines += [_line("weights", held), _line("tokenizer", tokenizer)]
        for name in dict.fromkeys((*_NAMES, *self.conventions)):
            fact = self.conventions.get(name)
            if fact is not None or name != "boundary":  # a matter of prediction `shift` alone
                said = "unknown" if fact is None else f"{fact.value}  ({fact.source})"
                lines.append(_line(name.replace("_", " "), said))
        able = f"for {', '.join(self.commands)} alone" if self.commands else "yes, if the probe at load agrees"
        lines.append(_line("loads", f"no: {self.problem}" if self.problem else able))
        return "\n".join(lines + ([_line("note", self.note)] if self.note else []))


def inspect(path: str | Path) -> Inspection:
    """Look at the checkpoint in a directory.

    Raises FileNotFoundError where there is none, UnsupportedModel where its files cannot be read.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json here; give a Hugging Face model directory")
    stated = read_config(folder / "config.json")
    weights = read_weights(folder)
    own = Spec.from_json(folder / SPEC_FILE) if (folder / SPEC_FILE).exists() else None
    family = family_of(stated)
    if family is not None:
        return _foreign(folder, stated, weights, own, family)
    return _plain(folder, stated, weights, own)


def read_weights(folder: Path) -> Weights:
    """Names, shapes and types of the weights, from the files' headers."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != "adapter.safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    part = opened.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    dtypes[part.get_dtype()] += 1
        except SafetensorError as error:
            raise UnsupportedModel(f"{file}: damaged ({error}); copy it again") from None
    return Weights(len(files), shapes, dict(dtypes))


def _foreign(folder: Path, stated: Mapping[str, Any], weights: Weights, own: Spec | None, family: Family) -> Inspection:
    """A checkpoint of the table. What would stop `load` becomes its problem."""
    where, tokenizer, known, problem = str(folder), None, {}, "" if weights.files else "no .safetensors weights"
    try:
        config = None if family.needs else backbone_config(where, family, stated)
        if config is not None:
            generation_settings(folder)
        tokenizer = load_tokenizer(folder, config) if config is not None else None
        known = {**conventions(where, family, stated, tokenizer), **family.others}
        if family.commands:
            return _by_itself(folder, stated, weights, family, known, problem)
        if config is None:
            problem = f"it would need {family.needs}"
        else:
            foreign = Foreign(where, family, stated, config)
            foreign.spec(own, tokenizer, config.max_position_embeddings)
            with reading(folder):
                problem = problem or _unlike(foreign, weights)
    except UnsupportedModel as error:
        problem = str(error).removeprefix(f"{where}: ")
    said = {**known, **(_said(own) if own is not None else {})}
    note = family.advice(sized=own is not None or family.block_key in stated)
    return _inspection(folder, stated, weights, family.name, family.backbone, said, tokenizer, problem, note)


def _by_itself(
    folder: Path,
    stated: Mapping[str, Any],
    weights: Weights,
    family: Family,
    known: Mapping[str, Fact],
    problem: str,
) -> Inspection:
    """A checkpoint that transformers' own `generate` runs, with the settings of its sampler."""
    file = folder / "generation_config.json"
    generation_settings(folder, getattr(transformers, family.reader).generation_config_class)
    settings = read_config(file) if file.is_file() else {}
    said = ", ".join(f"{name} {settings[name]}" for name in _SAMPLER if settings.get(name) is not None)
    sampler = (
        Fact(said, "generation_config.json")
        if said
        else Fact("transformers' own settings", "no generation_config.json says others")
    )
    tokenizer = load_tokenizer(folder)
    known = {**known, "sampler": sampler}
    with reading(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        lacks, beside = _found(getattr(transformers, family.reader), config, weights)
    problem = problem or lacks or beside
    problem = problem or ("" if tokenizer is not None else "no tokenizer")
    found = _inspection(folder, stated, weights, family.name, family.reader, known, tokenizer, problem, family.note)
    return replace(found, commands=family.commands)


def _plain(folder: Path, stated: Mapping[str, Any], weights: Weights, own: Spec | None) -> Inspection:
    """One of ours, an AR model of transformers, or something that the table does not know."""
    kind = stated.get("model_type")
    causal = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    more = not_plain(stated) if own is None else ""
    problem = more or ("" if weights.files else "no .safetensors weights")
    if not causal:
        problem = (
            f"model type {kind!r} is no decoder of transformers, and blockdiff's table of families does not know it: "
            "its conventions and a class for its weights would be needed"
        )
    name = "unknown" if more or not causal else "an AR model (block size 1 until it is trained on)"
    if own is not None and causal:
        name = "a block diffusion model of blockdiff" if own.is_diffusion else "an AR model of blockdiff"
    known = {} if own is None else _said(own)
    if own is None and causal and not more:
        known = {name: Fact(value, f"transformers' {kind} as it is") for name, value in _AR.items()}
    tokenizer, note = None, ""
    if causal and not problem:
        try:
            with reading(folder):
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                problem, note = _found(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, weights)
            rows = config.get_text_config(decoder=True).vocab_size
            if own is not None and own.mask_id is not None and own.mask_id >= rows:
                problem = f"{SPEC_FILE}: mask_id {own.mask_id} lies beyond the model's {rows} embedding rows"
            generation_settings(folder)
            tokenizer = load_tokenizer(folder)
        except UnsupportedModel as error:
            problem = str(error).removeprefix(f"{folder}: ")
    return _inspection(
        folder, stated, weights, name, str(kind) if causal and not more else "", known, tokenizer, problem, note
    )


def _inspection(
    folder: Path,
    stated: Mapping[str, Any],
    weights: Weights,
    family: str,
    reader: str,
    known: Mapping[str, Fact],
    tokenizer: PreTrainedTokenizerBase | None,
    problem: str,
    note: str,
) -> Inspection:
    return Inspection(
        path=str(folder),
        family=family,
        model_type=str(stated.get("model_type")),
        architectures=tuple(stated.get("architectures") or ()),
        reader=reader,
        conventions=known,
        weights=weights,
        vocabulary=None if tokenizer is None else len(tokenizer),
        problem=problem,
        note="" if problem else note,
    )


def _said(own: Spec) -> dict[str, Fact]:
    """The conventions in a checkpoint's own block_diffusion.json."""
    size = str(own.default_block_size)
    values = {
        "prediction": own.alignment.prediction,
        "boundary": own.alignment.boundary if own.alignment.shift else None,
        "clean_context": own.clean_context,
        "block_size": f"{size} by default, trained with {to_dict(own.layout)['kind']}",
        "mask_id": own.mask_id,
    }
    return {name: Fact(value, SPEC_FILE) for name, value in values.items() if value is not None}


def _found(kind: type[PreTrainedModel], config: PreTrainedConfig, weights: Weights) -> tuple[str, str]:
    """What transformers says of weights of these names and shapes: why they are not the whole of the class that reads
    them, and what lies beside it; empty where there is nothing to say."""
    state = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
    options: dict[str, Any] = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
    _, found = kind.from_pretrained(None, config=config, state_dict=state, **options)
    return lacking(found), left_out(found)


def _unlike(foreign: Foreign, weights: Weights) -> str:
    """Why these weights are not those of the class that would read them, from names and shapes; empty: they are."""
    with torch.device("meta"):
        state = foreign.converted({name: torch.empty(shape) for name, shape in weights.shapes.items()})
        model = AutoModelForCausalLM.from_config(foreign.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = dict(part for name, tensor in model.state_dict().items() for part in _stored(name, tuple(tensor.shape)))
    tied = {"lm_head.weight"} if foreign.config.tie_word_embeddings else set()
    missing = sorted(set(wanted) - set(shapes) - tied)
    if missing:
        return f"{len(missing)} weights are missing, among them {missing[0]}; take a whole copy"
    odd = sorted(set(shapes) - set(wanted))
    if odd:
        return (
            f"weights that transformers' {foreign.family.backbone} has no place for, among them {odd[0]}; this is more "
            f"than {foreign.family.name}"
        )
    bent = [name for name, shape in shapes.items() if shape != wanted[name]]
    if bent:
        return f"{bent[0]} is {list(shapes[bent[0]])}, and {list(wanted[bent[0]])} by its config.json"
    return ""


def _stored(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """A weight of transformers' class as files hold it: experts one by one, which transformers fuses while it reads."""
    layer, marked, leaf = name.partition(_EXPERTS)
    if not marked or leaf not in ("gate_up_proj", "down_proj"):
        return [(name, shape)]
    count, rows, columns = shape
    gates = leaf == "gate_up_proj"
    parts = ("gate_proj", "up_proj") if gates else ("down_proj",)
    each = (rows // 2, columns) if gates else (rows, columns)
    return [(f"{layer}{_EXPERTS}{expert}.{part}.weight", each) for expert in range(count) for part in parts]


def _line(name: str, value: str) -> str:
    return f"  {name:<14}{value}"
