"""Making block diffusion models: from a checkpoint, from a decoder in hand, or from nothing.

`attach` and `load` end with the capability probe (`blockdiff.probe`), so a model that they return obeys the mask.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from blockdiff.attention import NAMES, Implementation, UnsupportedModel
from blockdiff.foreign import UNBUILDABLE, Foreign, read_config, read_foreign
from blockdiff.model import SPEC_FILE, BlockDiffusionModel, Spec
from blockdiff.probe import probe

M = TypeVar("M", bound=BlockDiffusionModel)


def attach(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    spec: Spec | None = None,
    add_mask: bool = True,
    implementation: Implementation = "sdpa",
    model_class: type[M] = BlockDiffusionModel,  # type: ignore[assignment]
) -> M:
    """Make a block diffusion model of a decoder, and probe that it obeys the mask.

    With `add_mask` (and no mask id in `spec`) the model gets a [MASK] row; without, it stays the AR model it was.
    Raises UnsupportedModel for a model without attention we can steer, naming the layers.
    """
    spec = spec or Spec()
    if spec.mask_id is None and add_mask:
        spec = replace(spec, mask_id=_add_mask_row(backbone, tokenizer))
    native = backbone.config._attn_implementation
    if native in NAMES.values():
        raise ValueError("this model is attached already: use the BlockDiffusionModel it is part of")
    model = model_class(backbone, tokenizer, spec, implementation)
    try:
        model.notes = probe(model)
    except Exception:
        backbone.set_attn_implementation(native)
        raise
    return model


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    add_mask: bool = False,
    implementation: Implementation = "sdpa",
    model_class: type[M] = BlockDiffusionModel,  # type: ignore[assignment]
) -> M:
    """Load a checkpoint: one of ours, one of another project that `blockdiff.families` knows, or any AR decoder.

    An AR decoder has block size 1 only, until it is trained; `add_mask` gives it the [MASK] row to train with.

    Raises FileNotFoundError for a missing path and UnsupportedModel for pickled weights or a foreign architecture.
    """
    with reading(path):
        spec_file = cached_file(str(path), SPEC_FILE, _raise_exceptions_for_missing_entries=False)
        foreign = read_foreign(path)
        settings = generation_settings(path)
        backbone, found = _read(path, foreign, dtype)
    check_whole(path, found)
    if settings is not None and foreign is not None:
        backbone.generation_config = settings  # which transformers reads for its own classes alone
    spec = Spec.from_json(Path(spec_file)) if spec_file else None
    tokenizer = load_tokenizer(path, None if foreign is None else foreign.config)
    if foreign is not None:
        spec = _foreign_spec(foreign, spec, tokenizer, backbone, found)
    rows = int(backbone.get_input_embeddings().weight.shape[0])
    if spec is not None and spec.mask_id is not None and spec.mask_id >= rows:
        raise UnsupportedModel(
            f"{spec_file or path}: mask_id {spec.mask_id} lies beyond the model's {rows} embedding rows"
        )
    model = attach(
        backbone.to(device).eval(),
        tokenizer,
        spec=spec,
        add_mask=add_mask,
        implementation=implementation,
        model_class=model_class,
    )
    if spec_file and model.spec.adapter is not None:
        model.attach_adapter(model.spec.adapter)
        assert model.adapter is not None
        model.adapter.load(Path(spec_file).parent, model.backbone)
        model.eval()
    if found["unexpected_keys"]:
        model.notes.append(left_out(found))
    if foreign is not None and not spec_file:
        model.notes.append(foreign.family.advice(sized=foreign.family.block_key in foreign.stated))
    if spec is None and not add_mask:
        model.spec = replace(model.spec, trained_length=model.context_length)
    return model


def _read(
    path: str | Path, foreign: Foreign | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The decoder at a path, and what its weights were found to lack or to have beside."""
    options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
    if foreign is not None and foreign.family.conversion is not None:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(foreign.config)]
        read = kind.from_pretrained(None, config=foreign.config, state_dict=foreign.weights(), **options)
    else:
        read = AutoModelForCausalLM.from_pretrained(
            path,
            config=None if foreign is None else foreign.config,
            use_safetensors=True,
            trust_remote_code=False,  # said aloud, since transformers would ask at a terminal
            **options,
        )
    backbone, found = read
    if backbone.dtype == torch.float64 and hasattr(backbone, "set_experts_implementation"):
        backbone.set_experts_implementation("eager")  # the grouped kernels have no float64
    return backbone, found


def generation_settings(path: str | Path, kind: type[GenerationConfig] = GenerationConfig) -> GenerationConfig | None:
    """The generation_config.json saved with a checkpoint, which says what ends a text, or None where there is none.

    Raises UnsupportedModel for a damaged one, which transformers would pass over.
    """
    file = cached_file(str(path), "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    read_config(Path(file))
    try:
        found = kind.from_pretrained(path)
    except (OSError, *UNBUILDABLE) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(f"{file}: cannot be read ({reason}); correct it or take it out") from error
    ends = found.eos_token_id
    if any(type(end) is not int for end in (ends if isinstance(ends, list) else [ends]) if ends is not None):
        raise UnsupportedModel(f"{file}: eos_token_id: {ends!r} are no tokens; correct it or take it out")
    return found


def load_tokenizer(path: str | Path, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a checkpoint, or None where there is none; config: the checkpoint's, where its own is
    none of transformers'."""
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    except UNBUILDABLE as error:
        raise UnsupportedModel(
            f"{path}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    return tokenizer


def _foreign_spec(
    foreign: Foreign,
    own: Spec | None,
    tokenizer: PreTrainedTokenizerBase | None,
    backbone: PreTrainedModel,
    found: dict[str, Any],
) -> Spec:
    """What a checkpoint of another project is, once its weights turn out to be those of the class that read them."""
    if found["unexpected_keys"]:
        raise UnsupportedModel(
            f"{foreign.where}: weights that transformers' {foreign.family.backbone} has no place for, among them "
            f"{min(found['unexpected_keys'])}; this is more than {foreign.family.name}"
        )
    return foreign.spec(own, tokenizer, int(backbone.config.max_position_embeddings))


def from_architecture(
    architecture: dict[str, Any], vocabulary: int, seed: int, **special: int | None
) -> PreTrainedModel:
    """A freshly initialised decoder: `architecture` is `{"type": "llama", ...}` with transformers' own config keys."""
    settings = dict(architecture)
    kind = settings.pop("type", None)
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "give a model type of transformers, e.g. llama"
        raise UnsupportedModel(f"model.architecture.type: {kind!r} is unknown; {hint}")
    known = {*CONFIG_MAPPING[kind]().to_dict(), *CONFIG_MAPPING[kind].attribute_map}
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UnsupportedModel(f"model.architecture.{key}: {kind} has no such key{hint}")
    try:
        config = AutoConfig.for_model(kind, vocab_size=vocabulary, **settings, **special)
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        torch.random.set_rng_state(state)
    except UNBUILDABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModel(f"model.architecture: {kind} cannot be built so ({reason})") from error
    return model


def _add_mask_row(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """An embedding row for [MASK]: the tokenizer's own, a reserved row beyond the tokenizer, or a new one.

    Rows that no text uses may have decayed to nothing and then make training explode (LLaDA 2.0), so a row that is new,
    reserved or next to nothing starts at the mean embedding plus a tenth of the embeddings' spread as noise. The
    tokenizer never learns a name for a new token: text that spells it stays text.
    """
    rows = int(backbone.get_input_embeddings().weight.shape[0])
    named = None if tokenizer is None else tokenizer.mask_token_id
    used = rows if tokenizer is None else min(max(tokenizer.get_vocab().values()) + 1, rows)
    mask_id = used if named is None else int(named)
    if mask_id >= rows:
        backbone.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    if mask_id < used and not _next_to_nothing(backbone.get_input_embeddings().weight, mask_id):
        return mask_id
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for embedding in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
            weight = embedding.weight
            known = weight[:used].float()
            fresh = torch.randn(known.shape[1], generator=generator).to(weight.device)
            weight[mask_id] = (known.mean(0) + 0.1 * known.std(0) * fresh).to(weight.dtype)
            if backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight:
                break
    return mask_id


def _next_to_nothing(weight: Tensor, row: int) -> bool:
    """Whether an embedding row has less than a tenth of the usual norm."""
    norms = weight.detach().float().norm(dim=1)
    return bool(norms[row] < 0.1 * norms.median())


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What goes wrong while a network is read from a path, as FileNotFoundError or UnsupportedModel of one line."""
    local = Path(path)
    if local.exists() or not _looks_like_hub_name(local):
        _check_directory(local)
    try:
        yield
    except UnsupportedModel:
        raise
    except (SafetensorError, *UNBUILDABLE) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModel(f"{path}: its config and weights cannot be read ({reason[:300]})") from error
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: neither a model directory here nor a model that can be fetched ({str(error).splitlines()[0]})"
        ) from error


def check_whole(path: str | Path, found: dict[str, Any]) -> None:
    """Raise UnsupportedModel where transformers found weights missing."""
    if problem := lacking(found):  # transformers would go on with random numbers in their places
        raise UnsupportedModel(f"{path}: {problem}")


def lacking(found: dict[str, Any]) -> str:
    """Which weights transformers missed in a checkpoint, or found in another shape; empty: none."""
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        return f"{len(missing)} weights are missing, among them {missing[0]}; take a whole copy"
    for name, shape, wanted in sorted(found["mismatched_keys"])[:1]:
        return f"{name} is {list(shape)}, and {list(wanted)} by its config.json"
    return ""


def left_out(found: dict[str, Any]) -> str:
    """Which weights of a checkpoint transformers' class leaves out; empty: none."""
    odd = found["unexpected_keys"]
    return f"weights that its class in transformers has no place for are left out, among them {min(odd)}" if odd else ""


def _check_directory(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such model directory; give a Hugging Face directory or a hub name")
    if not (path / "config.json").exists():
        raise UnsupportedModel(f"{path}: no config.json; give a Hugging Face model directory")
    if not any(path.glob("*.safetensors")):
        pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if pickles:
            raise UnsupportedModel(
                f"{path}: {pickles[0].name} is a pickle, which can run code when it is read; "
                "save the model as safetensors (save_pretrained does) and try again"
            )
        raise UnsupportedModel(f"{path}: no .safetensors weights")


def _looks_like_hub_name(path: Path) -> bool:
    """owner/name or name: at most two parts, the first of them no directory here."""
    return len(path.parts) <= 2 and not str(path).startswith((".", "/", "~")) and not Path(path.parts[0]).is_dir()
