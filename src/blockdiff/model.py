"""The bridge to Hugging Face: any decoder becomes a block diffusion model, its modeling code untouched.

What the bridge adds to a checkpoint is a [MASK] row in the embedding, an attention function that obeys `Visibility`
(`blockdiff.attention`), and `block_diffusion.json` beside the weights, which says how the model was trained so that
decoding cannot silently do something else. `attach` and `load` run the capability probe (`blockdiff.probe`).

Shapes: B rows, T tokens of the pass, R rows of logits that are read, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from blockdiff import distributions, noise
from blockdiff.attention import NAMES, Implementation, UnsupportedModel
from blockdiff.files import replace_directory
from blockdiff.layout import TokenMap
from blockdiff.masks import CleanContext, Visibility
from blockdiff.objectives import Alignment
from blockdiff.probe import probe

SPEC_FILE = "block_diffusion.json"
FORMAT = 1


@dataclass(frozen=True)
class Spec:
    """What a decoder or an evaluation must know about a checkpoint: the contents of `block_diffusion.json`.

    mask_id is None for a plain AR checkpoint, which can be read at block size 1 only. trained_length is in tokens;
    ar_trained says whether the clean stream was trained as an AR model (its next-token loss was part of training).
    """

    mask_id: int | None = None
    clean_context: CleanContext = "context_causal"
    alignment: Alignment = field(default_factory=Alignment)
    layout: distributions.LayoutDistribution = field(default_factory=distributions.AR)
    noise: noise.Noise = field(default_factory=noise.ExactCount)
    trained_length: int = 0
    ar_trained: bool = True

    @property
    def is_diffusion(self) -> bool:
        return self.mask_id is not None

    @property
    def default_block_size(self) -> int:
        """The block size that decoding uses unless told otherwise: the largest that training names, up to 16."""
        return min(self.layout.largest_named, 16) if self.is_diffusion else 1

    def to_json(self) -> dict[str, Any]:
        share = self.layout.token_share(self.trained_length) if self.trained_length else torch.zeros(0)
        return {
            "format": FORMAT,
            "blockdiff_version": _version(),
            "mask_id": self.mask_id,
            "clean_context": self.clean_context,
            "prediction": self.alignment.prediction,
            "boundary": self.alignment.boundary,
            "layout": distributions.to_dict(self.layout),
            "token_share": {
                str(size): round(float(share[size]), 6) for size in range(len(share)) if share[size] > 5e-7
            },
            "noise": noise.to_dict(self.noise),
            "trained_length": self.trained_length,
            "ar_trained": self.ar_trained,
        }

    @staticmethod
    def from_json(path: Path) -> Spec:
        """Read `block_diffusion.json`; raises UnsupportedModel where it is not one of ours."""
        try:
            data = json.loads(path.read_text())
            return Spec(
                mask_id=data["mask_id"],
                clean_context=data["clean_context"],
                alignment=Alignment(data["prediction"], data["boundary"]),
                layout=distributions.from_dict(data["layout"]),
                noise=noise.from_dict(data["noise"]),
                trained_length=data["trained_length"],
                ar_trained=data["ar_trained"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{path}: not a blockdiff description of a checkpoint ({error})") from error


@dataclass
class Past:
    """Keys and values of the clean tokens of B rows, with their token map [B, K] (None while empty).

    A plain `DynamicCache()`: with a config it would drop what windowed layers can no longer see, while our visibility
    rule still addresses every token.
    """

    cache: DynamicCache = field(default_factory=DynamicCache)
    tokens: TokenMap | None = None

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.cache.batch_select_indices(rows)
        if self.tokens is not None:
            self.tokens = self.tokens[rows]


class BlockDiffusionModel(nn.Module):
    """A Hugging Face decoder that reads token maps and obeys the visibility rule."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        spec: Spec,
        implementation: Implementation = "sdpa",
    ) -> None:
        super().__init__()
        head = backbone.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise UnsupportedModel(f"{_kind(backbone)} has no language-model head; give a causal language model")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.spec = spec
        self.windows: dict[int, int | None] = {}
        self.notes: list[str] = []
        self._read: Tensor | None = None
        head.register_forward_pre_hook(self._keep_read_rows)
        backbone.set_attn_implementation(NAMES[implementation])
        self.train(backbone.training)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, the [MASK] row included."""
        return int(self.backbone.get_input_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int:
        """Positions that the model can address."""
        config = self.backbone.config.get_text_config(decoder=True)
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if getattr(config, name, None):
                return int(getattr(config, name))
        return 1 << 30

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a document, the one that training appends first (the generation config's first)."""
        for source in (self.backbone.generation_config, self.backbone.config):
            found = getattr(source, "eos_token_id", None)
            if found is not None:
                return tuple(found) if isinstance(found, list | tuple) else (int(found),)
        found = getattr(self.tokenizer, "eos_token_id", None)
        return () if found is None else (int(found),)

    def forward(
        self, ids: Tensor, tokens: TokenMap, *, read: Tensor | None = None, past: Past | None = None, keep: bool = False
    ) -> Tensor:
        """Logits of one pass.

        ids [B, T] with their token map. read [R] picks rows of the flattened [B * T] logits (None: all of them), so
        the head runs only where somebody looks. past holds earlier clean tokens; with `keep` the tokens of this pass
        join it (a commit), otherwise it is left as it was. Returns [R, V] (or [B * T, V]); the [MASK] column is -inf.
        """
        key = tokens if past is None or past.tokens is None else TokenMap.cat(past.tokens, tokens)
        visibility = Visibility(tokens, key, self.spec.clean_context, self.windows)
        self._read = read
        try:
            output = self.backbone(
                input_ids=ids,
                position_ids=tokens.position,
                past_key_values=None if past is None else past.cache,
                use_cache=past is not None,
                visibility=visibility,
            )
        finally:
            self._read = None
        if past is not None:
            if keep:
                past.tokens = key
            else:
                past.cache.crop(-ids.shape[1])
        logits: Tensor = output.logits.flatten(0, 1)
        if self.spec.mask_id is not None:
            logits[:, self.spec.mask_id] = -torch.inf
        return logits

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face directory and `block_diffusion.json`, replacing `path` in one step."""
        with replace_directory(Path(path)) as staging:
            self.save_into(staging)

    def save_into(self, directory: Path) -> None:
        """Write the checkpoint's files into an existing directory."""
        self.backbone.save_pretrained(directory, safe_serialization=True)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        if self.spec.is_diffusion:
            (directory / SPEC_FILE).write_text(json.dumps(self.spec.to_json(), indent=2) + "\n")

    def _keep_read_rows(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._read is None:
            return None
        hidden, *rest = inputs
        return (hidden.flatten(0, 1)[self._read][None], *rest)


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
    """Load a checkpoint: one of ours, or any AR decoder.

    An AR decoder has block size 1 only, until it is trained; `add_mask` gives it the [MASK] row to train with.

    Raises FileNotFoundError for a missing path and UnsupportedModel for pickled weights or a foreign architecture.
    """
    local = Path(path)
    if local.exists() or not _looks_like_hub_name(local):
        _check_directory(local)
    try:
        spec_file = cached_file(str(path), SPEC_FILE, _raise_exceptions_for_missing_entries=False)
        backbone = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: neither a model directory here nor a model that can be fetched ({str(error).splitlines()[0]})"
        ) from error
    model = attach(
        backbone.to(device).eval(),
        load_tokenizer(path),
        spec=Spec.from_json(Path(spec_file)) if spec_file else None,
        add_mask=add_mask,
        implementation=implementation,
        model_class=model_class,
    )
    if not spec_file and not add_mask:
        model.spec = replace(model.spec, trained_length=model.context_length)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a checkpoint, or None where there is none."""
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


def from_architecture(
    architecture: dict[str, Any], vocabulary: int, seed: int, **special: int | None
) -> PreTrainedModel:
    """A freshly initialised decoder: `architecture` is `{"type": "llama", ...}` with transformers' own config keys."""
    settings = dict(architecture)
    kind = settings.pop("type", None)
    try:
        config = AutoConfig.for_model(kind, vocab_size=vocabulary, **settings, **special)
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        torch.random.set_rng_state(state)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"model.architecture {architecture}: {error}") from error
    return model


def _add_mask_row(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """An embedding row for [MASK]: the tokenizer's own, a reserved row beyond the tokenizer, or a new one.

    Rows that no text uses may have decayed to nothing and then make training explode (LLaDA 2.0), so the row starts at
    the mean embedding plus a tenth of the embeddings' spread as noise. The tokenizer never learns a name for the new
    token: text that spells it stays text.
    """
    rows = int(backbone.get_input_embeddings().weight.shape[0])
    if tokenizer is not None and tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if tokenizer is not None and len(tokenizer) < rows:
        mask_id = len(tokenizer)
    else:
        mask_id = rows
        backbone.resize_token_embeddings(rows + 1, mean_resizing=False)
    used = torch.arange(rows) if mask_id >= rows else torch.arange(mask_id)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for embedding in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
            weight = embedding.weight
            known = weight[used.to(weight.device)].float()
            fresh = torch.randn(known.shape[1], generator=generator).to(weight.device)
            weight[mask_id] = (known.mean(0) + 0.1 * known.std(0) * fresh).to(weight.dtype)
            if backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight:
                break
    return mask_id


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


def _kind(backbone: PreTrainedModel) -> str:
    return str(backbone.config.model_type)


def _version() -> str:
    from blockdiff import __version__

    return __version__
