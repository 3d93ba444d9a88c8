"""Checkpoints of other projects, read through transformers' own classes: their config, their conventions, their Spec.

No code of a checkpoint is run and none is copied: a family of `blockdiff.families` is loaded where its weights have the
arithmetic of a class in transformers, under the same names or through a conversion, and every key of its config is
understood. Anything else is refused in one line, with what it would take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from blockdiff.attention import UnsupportedModel
from blockdiff.distributions import Fixed
from blockdiff.families import BOOKKEEPING, Fact, Family, family_of
from blockdiff.model import SPEC_FILE, Spec
from blockdiff.noise import Bernoulli
from blockdiff.objectives import Alignment

_NEEDED = ("prediction", "clean_context", "block_size", "mask_id")
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
_SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "decoder_sparse_step",
]
_OF_DIFFUSION = ("mask_token_id", "text_mask_token_id", "block_size", "bd_size")
# keys that a config class takes without listing them among its own
_TAKEN = ("head_dim", "max_window_layers")
# what transformers raises, by its version and by the key, for a config or a tokenizer that it cannot build
UNBUILDABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of a known family: what its config.json says, and transformers' config for its weights."""

    where: str
    family: Family
    stated: Mapping[str, Any]
    config: PreTrainedConfig

    def weights(self) -> dict[str, Tensor]:
        """The weights of a family with a conversion, all of them, as transformers' class has them."""
        local = Path(self.where)
        folder = local if local.is_dir() else Path(snapshot_download(self.where, allow_patterns="*.safetensors"))
        state: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        return self.converted(state)

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's state dict as transformers' class has it; raises UnsupportedModel where one is missing."""
        if self.family.conversion is None:
            return state
        try:
            return self.family.conversion.weights(state, self.config)
        except KeyError as error:
            raise UnsupportedModel(
                f"{self.where}: weights are missing, among them {error.args[0]}; take a whole copy"
            ) from error
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UnsupportedModel(
                f"{self.where}: its weights do not have the shapes that its config.json says ({reason}); copy it again"
            ) from error

    def spec(self, own: Spec | None, tokenizer: PreTrainedTokenizerBase | None, context_length: int) -> Spec:
        """The checkpoint's Spec: its own `block_diffusion.json` where it has one, else what the table says.

        Raises UnsupportedModel where a convention is unknown, or where two sources contradict each other.
        """
        known = conventions(self.where, self.family, self.stated, tokenizer)
        if own is not None:
            _check_own(self.where, own, known)
        spec = own or self._spec(known, context_length)
        if spec.mask_id is not None and spec.mask_id >= self.config.vocab_size:
            raise UnsupportedModel(
                f"{self.where}: mask id {spec.mask_id} lies beyond the model's {self.config.vocab_size} embedding rows"
            )
        return spec

    def _spec(self, known: Mapping[str, Fact], context_length: int) -> Spec:
        missing = [name for name in _NEEDED if name not in known]
        if missing:
            raise UnsupportedModel(
                f"{self.where}: neither its config nor its tokenizer says its {', '.join(missing)} "
                f"({self.family.name}); write a {SPEC_FILE} beside the weights that does (docs/checkpoints.md)"
            )
        said = {name: known[name].value for name in ("prediction", "boundary") if name in known}
        size = known["block_size"].value
        if size > context_length:
            raise UnsupportedModel(
                f"{self.where}: blocks of {size} ({known['block_size'].source}) are longer than its context of "
                f"{context_length}"
            )
        return Spec(
            mask_id=known["mask_id"].value,
            clean_context=known["clean_context"].value,
            alignment=Alignment(**said),
            layout=Fixed(size, offset=size - 1),  # the grid begins at the document's first token, which is given
            noise=Bernoulli(),
            trained_length=context_length,
            ar_trained=False,
        )


def read_foreign(path: str | Path) -> Foreign | None:
    """The checkpoint at a path or hub name as one of another project's; None where the table does not know it.

    Raises UnsupportedModel for a family that blockdiff cannot load, for a config that it does not understand, and for
    one that is of no family and of no AR model of transformers either, unless a `block_diffusion.json` describes it.
    """
    stated = _stated(path)
    if stated is None:
        return None
    family = family_of(stated)
    if family is None:
        problem = not_plain(stated)
        if problem and _file(path, SPEC_FILE) is None:
            raise UnsupportedModel(f"{path}: {problem}")
        return None
    return Foreign(str(path), family, stated, backbone_config(str(path), family, stated))


def foreign_family(path: str | Path) -> Family | None:
    """The family of the checkpoint at a path or hub name; None where the table does not know it."""
    stated = _stated(path)
    return None if stated is None else family_of(stated)


def not_plain(stated: Mapping[str, Any]) -> str:
    """Why a config with the model type of a decoder in transformers is more than that decoder; empty: it is not."""
    kind = stated.get("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    plain = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]].__name__
    code = stated.get("auto_map")
    named = [code.get("AutoModelForCausalLM")] if isinstance(code, dict) else []
    classes = [*(stated.get("architectures") or ()), *(str(name).rpartition(".")[2] for name in named if name)]
    others = [f"architecture {name}" for name in dict.fromkeys(classes) if name.casefold() != plain.casefold()]
    own = CONFIG_MAPPING[kind]().to_dict()
    others += [f"{key} {stated[key]}" for key in _OF_DIFFUSION if stated.get(key) is not None and key not in own]
    if not others:
        return ""
    return (
        f"its config has {', '.join(others)}, and transformers' {kind} is {plain}, an AR model: its prediction, clean "
        f"context, block size and mask id would be needed; if its weights are those of {plain}, write a {SPEC_FILE} "
        "beside them that says the four (docs/checkpoints.md)"
    )


def _stated(path: str | Path) -> dict[str, Any] | None:
    file = _file(path, "config.json")
    return None if file is None else read_config(file)


def _file(path: str | Path, name: str) -> Path | None:
    file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def read_config(file: Path) -> dict[str, Any]:
    """A config.json; raises UnsupportedModel where it is not an object of JSON."""
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UnsupportedModel(f"{file}: no JSON ({error}); copy the checkpoint again") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{file}: no configuration of a model; copy the checkpoint again")
    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str | None) or not isinstance(named, list | None):
        raise UnsupportedModel(f"{file}: model_type must be a name and architectures a list; copy the checkpoint again")
    if any(not isinstance(name, str) for name in named or ()):
        raise UnsupportedModel(f"{file}: architectures must be names, not {named!r}; copy the checkpoint again")
    return config


def conventions(
    where: str, family: Family, stated: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Fact]:
    """What is known of a checkpoint: prediction, boundary, clean_context, block_size, mask_id, each with its source.

    The config's block size stands before the family's usual one. Raises UnsupportedModel where sources of the mask id
    contradict each other.
    """
    found = {name: fact for name in ("boundary", *_NEEDED) if (fact := getattr(family, name)) is not None}
    for name, key, least in (("block_size", family.block_key, 1), ("mask_id", family.mask_key, 0)):
        value = stated.get(key)
        if value is None:
            continue
        if type(value) is not int or value < least:
            raise UnsupportedModel(f"{where}: config.json, {key}: {value!r} is no {name.replace('_', ' ')}")
        if name == "mask_id":
            _check_mask(where, found.get(name), value, f"config.json, {key}")
        found[name] = Fact(value, f"config.json, {key}")
    named = None if tokenizer is None else tokenizer.mask_token_id
    if named is not None:
        _check_mask(where, found.get("mask_id"), int(named), "the tokenizer's mask token")
        found.setdefault("mask_id", Fact(int(named), "the tokenizer's mask token"))
    return found


def backbone_config(where: str, family: Family, stated: Mapping[str, Any]) -> PreTrainedConfig:
    """Transformers' config for a checkpoint's weights; raises UnsupportedModel where a key is not understood."""
    if family.needs:
        raise UnsupportedModel(f"{where}: {family.name} is not loaded; it would need {family.needs}")
    settings = _settings(family) - BOOKKEEPING
    ours = {family.block_key, family.mask_key, *family.extra}
    unknown = sorted(set(stated) - settings - BOOKKEEPING - ours)
    if unknown:
        raise UnsupportedModel(
            f"{where}: config.json has keys that blockdiff does not know for {family.name}: {', '.join(unknown)}; find "
            "out from the model's own code what they do, and take out those that change nothing at inference"
        )
    unsaid = [key for key in family.stated if stated.get(key) is None]
    if unsaid:
        raise UnsupportedModel(
            f"{where}: config.json does not say {', '.join(unsaid)}, and those who read it take different values; add "
            "what the checkpoint was trained with"
        )
    _check_rope_types(where, stated)
    if family.conversion is None:
        taken = {key: value for key, value in stated.items() if key in settings and key not in _ROPE}
        taken["rope_parameters"] = _rope(where, stated)
    else:
        taken = family.conversion.config(where, stated)
    special = {key: value for key, value in stated.items() if key.endswith("_token_id") and key != family.mask_key}
    dtype = stated.get("dtype") or stated.get("torch_dtype")
    try:
        config = AutoConfig.for_model(family.backbone, **{**taken, **special}, dtype=dtype)
    except UNBUILDABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModel(
            f"{where}: config.json does not fit transformers' {family.backbone} ({reason})"
        ) from error
    _check_sizes(where, config)
    return config


def _check_sizes(where: str, config: PreTrainedConfig) -> None:
    """What transformers' config classes let through and their networks stumble over."""
    for name in _SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise UnsupportedModel(f"{where}: config.json: {name} would be {value}; copy the checkpoint again")
    experts, chosen = getattr(config, "num_experts", None), getattr(config, "num_experts_per_tok", None)
    if experts is not None and chosen is not None and chosen > experts:
        raise UnsupportedModel(f"{where}: config.json: {chosen} experts for each token, and there are {experts}")
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        raise UnsupportedModel(
            f"{where}: config.json contradicts itself: layer_types has sliding_attention, and no sliding window is in "
            "use; take out the wrong one"
        )


def _settings(family: Family) -> set[str]:
    """Keys of a family's config that transformers' class, or the conversion to it, understands."""
    if family.conversion is not None:
        return family.conversion.keys
    plain = AutoConfig.for_model(family.backbone)
    return {*plain.to_dict(), *plain.attribute_map, *_ROPE, *_TAKEN}


def _rope(where: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary positions as transformers 5 names them, `rope_parameters`.

    Their base stands in the config, at one of its places or alike at several: its default suits almost no checkpoint.
    """
    newer, older = (
        {"rope_type" if key == "type" else key: value for key, value in (stated.get(name) or {}).items()}
        for name in ("rope_parameters", "rope_scaling")
    )
    places = {"rope_theta": stated, "rope_parameters": newer, "rope_scaling": older}
    bases = {name: place["rope_theta"] for name, place in places.items() if place.get("rope_theta") is not None}
    if not bases:
        raise UnsupportedModel(
            f"{where}: config.json has no rope_theta, and 10000 would be taken; add the value of the checkpoint that "
            "this one was made from"
        )
    if len(set(bases.values())) > 1:
        said = ", ".join(f"{name if name == 'rope_theta' else f'in {name}'} {base}" for name, base in bases.items())
        raise UnsupportedModel(f"{where}: config.json contradicts itself: {said}; take out the wrong one")
    older, scaling = ({key: value for key, value in rope.items() if key != "rope_theta"} for rope in (older, newer))
    if scaling and older and older != scaling:
        raise UnsupportedModel(
            f"{where}: config.json contradicts itself: rope_scaling {older}, rope_parameters {scaling}; take out the "
            "wrong one"
        )
    return {"rope_type": "default", **(scaling or older), "rope_theta": next(iter(bases.values()))}


def _check_rope_types(where: str, stated: Mapping[str, Any]) -> None:
    nested = [rope for name in ("rope_parameters", "rope_scaling") if (rope := stated.get(name)) is not None]
    for rope in nested:
        if not isinstance(rope, dict):
            raise UnsupportedModel(f"{where}: config.json, rotary positions: {rope!r} is no object of settings")
    for place in (stated, *nested):
        base = place.get("rope_theta")
        if base is not None and (type(base) not in (int, float) or base <= 0):
            raise UnsupportedModel(f"{where}: config.json, rope_theta: {base!r} is no base of rotary positions")


def _check_mask(where: str, known: Fact | None, value: int, source: str) -> None:
    if known is not None and known.value != value:
        raise UnsupportedModel(
            f"{where}: {source} says mask id {value}, but it is {known.value} according to {known.source}; which one "
            "the model was trained with must be known first"
        )


def _check_own(where: str, own: Spec, known: Mapping[str, Fact]) -> None:
    said: dict[str, Any] = {
        "prediction": own.alignment.prediction,
        "clean_context": own.clean_context,
        "mask_id": own.mask_id,
    }
    if own.alignment.shift:
        said["boundary"] = own.alignment.boundary
    for name, value in said.items():
        if name in known and known[name].value != value:
            raise UnsupportedModel(
                f"{where}: {SPEC_FILE} says {name} {value}, but it is {known[name].value} according to "
                f"{known[name].source}; correct the file or take it out"
            )
    size = known.get("block_size")
    if size is None or not size.source.startswith("config.json") or not isinstance(own.layout, Fixed):
        return  # the family's usual size binds nobody
    if size.value not in (own.layout.size, own.default_block_size):
        raise UnsupportedModel(
            f"{where}: {SPEC_FILE} says blocks of {own.layout.size}, but they are {size.value} according to "
            f"{size.source}; correct the file or take it out"
        )
