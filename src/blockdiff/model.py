"""The bridge to Hugging Face: any decoder becomes a block diffusion model, its modeling code untouched.

What the bridge adds to a checkpoint is a [MASK] row in the embedding, an attention function that obeys `Visibility`
(`blockdiff.attention`), and `block_diffusion.json` beside the weights, which says how the model was trained so that
decoding cannot silently do something else. `blockdiff.loading` makes such models.

Shapes: B rows, T tokens of the pass, R rows of logits that are read, V vocabulary.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff import distributions, noise
from blockdiff.adapters import Adapter, AttachedAdapter
from blockdiff.attention import NAMES, Implementation, PagedVisibility, UnsupportedModel
from blockdiff.coverage import SpanShare
from blockdiff.cross_entropy import cross_entropy, linear_cross_entropy
from blockdiff.files import replace_directory
from blockdiff.layout import TokenMap
from blockdiff.masks import CLEAN_CONTEXTS, Annealing, CleanContext, Visibility
from blockdiff.objectives import Alignment
from blockdiff.reading import Reading

SPEC_FILE = "block_diffusion.json"
FORMAT = 1
Streams = Literal["clean", "noisy", "both"]  # what the tokens of a pass belong to


@dataclass(frozen=True)
class Spec:
    """What a decoder or an evaluation must know about a checkpoint: the contents of `block_diffusion.json`.

    mask_id is None for a plain AR checkpoint, which can be read at block size 1 only. trained_length is in tokens;
    ar_trained says whether the clean stream was trained as an AR model (its next-token loss was part of training).
    documents: what share of the training spans had how many scored tokens after how many given ones (empty: unknown);
    trained_tokens: scored tokens that training went through, repetitions counted (0: unknown).
    uniform_state: whether the noisy stream was trained on random tokens in place of [MASK] (none of ours is).
    adapter describes the noisy-stream adapter in `adapter.safetensors`, where there is one.
    """

    mask_id: int | None = None
    clean_context: CleanContext = "context_causal"
    alignment: Alignment = field(default_factory=Alignment)
    layout: distributions.LayoutDistribution = field(default_factory=distributions.AR)
    noise: noise.Noise = field(default_factory=noise.ExactCount)
    trained_length: int = 0
    ar_trained: bool = True
    documents: tuple[SpanShare, ...] = ()
    trained_tokens: int = 0
    uniform_state: bool = False
    adapter: Adapter | None = None

    @property
    def is_diffusion(self) -> bool:
        return self.mask_id is not None

    @property
    def default_block_size(self) -> int:
        """The block size that decoding uses unless told otherwise: of those that training had often (a tenth of the
        share of the most frequent, or more) the largest up to 16, else the most frequent."""
        if not self.is_diffusion or not self.trained_length:
            return 1
        length = max(self.trained_length - 1, 1)
        share = self.layout.token_share(length)
        # what a grid leaves over at the end of a text differs from length to length, and is no size of its own
        lasting = torch.minimum(share, self.layout.token_share(length + 1)[: length + 1])
        if float(lasting.sum()) < 0.5:
            lasting = share
        often = [size for size in range(1, min(length, 16) + 1) if lasting[size] >= lasting.max() / 10]
        return max(often) if often else int(lasting.argmax())

    def offset_of(self, block_size: int) -> int:
        """Where the first block of a span ends on the grid that blocks of this size were trained on; 0: after a whole
        block, or no such grid."""
        layout = self.layout
        return (
            layout.offset % block_size if isinstance(layout, distributions.Fixed) and layout.size == block_size else 0
        )

    def alignment_of(self, block_size: int) -> Alignment:
        """The alignment under which blocks of this size are decoded and scored. Blocks of one token are read from the
        clean stream where that is an AR model: a seeded block would ask the noisy one, which an adapter changes."""
        if block_size == 1 and self.ar_trained and self.alignment.seeded:
            return Alignment("shift", "clean")
        return self.alignment.scoring()

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
            "documents": [[given, scored, float(f"{share:.6g}")] for given, scored, share in self.documents],
            "trained_tokens": self.trained_tokens,
            "uniform_state": self.uniform_state,
            "adapter": None if self.adapter is None else asdict(self.adapter),
        }

    @staticmethod
    def from_json(path: Path) -> Spec:
        """Read `block_diffusion.json`; raises UnsupportedModel where it is not one of ours."""
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
            if data["clean_context"] not in CLEAN_CONTEXTS:
                raise ValueError(f"clean_context {data['clean_context']!r}")
            for name in ("mask_id", "trained_length"):
                if type(data[name]) is not int and not (name == "mask_id" and data[name] is None):
                    raise ValueError(f"{name} {data[name]!r} is no whole number")
                if (data[name] or 0) < 0:
                    raise ValueError(f"{name} {data[name]} is negative")
            return Spec(
                mask_id=data["mask_id"],
                clean_context=data["clean_context"],
                alignment=Alignment(data["prediction"], data["boundary"]),
                layout=distributions.from_dict(data["layout"]),
                noise=noise.from_dict(data["noise"]),
                trained_length=data["trained_length"],
                ar_trained=data["ar_trained"],
                documents=tuple(SpanShare(*span) for span in data.get("documents", [])),
                trained_tokens=data.get("trained_tokens", 0),
                uniform_state=bool(data.get("uniform_state", False)),
                adapter=Adapter(**data["adapter"]) if data.get("adapter") else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnsupportedModel(f"{path}: not a blockdiff description of a checkpoint ({error})") from error


@dataclass
class Past:
    """Keys and values of the clean tokens of B rows, with their token map [B, K] (None while empty).

    A plain `DynamicCache()`: with a config it would drop what windowed layers can no longer see, while our visibility
    rule still addresses every token.
    """

    cache: DynamicCache = field(default_factory=DynamicCache)
    tokens: TokenMap | None = None


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
        self.cache_window: int | None = None  # tokens that every layer looks back at most: the mask of a bounded cache
        self.notes: list[str] = []
        self.adapter: AttachedAdapter | None = None
        self.reading = Reading(backbone, head)
        self._blend: tuple[Tensor, Tensor] | None = None
        backbone.get_input_embeddings().register_forward_hook(self._blended)
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

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Special tokens that are never part of a text: all but those that end it."""
        special = () if self.tokenizer is None else self.tokenizer.all_special_ids
        return tuple(sorted(set(special) - set(self.end_ids)))

    def forward(
        self,
        ids: Tensor,
        tokens: TokenMap,
        *,
        read: Tensor | None = None,
        target: Tensor | None = None,
        past: Past | None = None,
        keep: bool = False,
        annealing: Annealing | None = None,
        apart: bool = False,
    ) -> Tensor:
        """Logits of one pass, or losses.

        ids [B, T] with their token map. read [R] picks rows of the flattened [B * T] logits (None: all of them), so
        the head and the last layer run only where somebody looks. target [R]: the result is the cross-entropy of these
        tokens (`objectives.token_losses`) and not the logits, which then need not exist all at once.
        past holds earlier clean tokens; with `keep` the tokens of this pass join it (a commit). `annealing` narrows
        the rule (a training baseline, not for frozen adapters). `apart` runs [noisy ; clean] as two passes, as BD3-LM
        first did (arXiv 2503.09573, section 3.2): the same numbers. Returns [R, V] (or [B * T, V]), the [MASK] column
        -inf, or [R].
        """
        frozen = self.adapter is not None and self.adapter.frozen
        if apart or frozen:
            noisy = int(tokens.noisy[0].sum())
            learning = self.training or torch.is_grad_enabled()  # training also tries candidates, without gradients
            if noisy == 0 and past is None and target is not None and learning:
                # blocks of one token: every process runs the same layers all the same, every weight gets a gradient
                ids, tokens, read = _with_idle_slot(ids, tokens, read, self.spec.mask_id or 0)
                noisy = 1
            if noisy == 0 and frozen:
                return self._clean_pass(ids, tokens, read, target, past, keep)
            if 0 < noisy < ids.shape[1]:
                if past is not None:
                    raise ValueError("two passes begin with their own clean tokens: give no past, or one stream")
                return self._two_passes(ids, tokens, noisy, read, target, annealing)
        return self._pass(ids, tokens, read, target, past, keep, annealing)

    def read_rows(
        self,
        ids: Tensor,
        position: Tensor,
        read: Tensor,
        visibility: PagedVisibility,
        streams: Streams = "noisy",
        clean: int = 0,
        blend: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits [R, V] at the slots read [R] of one packed pass: ids and position [T], over keys and values that
        `visibility` keeps. Of both streams the first `clean` tokens are clean: a frozen adapter is off there. The
        [MASK] column is the caller's to close."""
        adapted: AbstractContextManager[None] = nullcontext()
        if self.adapter is not None and self.adapter.frozen and streams != "noisy":
            adapted = self.adapter.off() if streams == "clean" else self.adapter.after(clean)
        self._blend = None if blend is None else (blend[0][None], blend[1][None])
        try:
            with adapted, self.reading.only(read, ids[None].shape, narrow=False):
                output = self.backbone(
                    input_ids=ids[None], position_ids=position[None], use_cache=False, visibility=visibility
                )
        finally:
            self._blend = None
        logits: Tensor = output.logits
        return logits[0]

    def attach_adapter(self, settings: Adapter) -> None:
        """Put an adapter into the network; from now on only it and its [MASK] row are trained."""
        if self.spec.mask_id is None:
            raise UnsupportedModel("adapter: a plain AR checkpoint has no [MASK] row to adapt; load it with add_mask")
        self.adapter = AttachedAdapter(self.backbone, settings, self.spec.mask_id)

    def _two_passes(
        self,
        ids: Tensor,
        tokens: TokenMap,
        noisy: int,
        read: Tensor | None,
        target: Tensor | None,
        annealing: Annealing | None,
    ) -> Tensor:
        """[noisy ; clean] in two: the clean stream, then the noisy one over its keys and values.

        Neither calls `forward`: accelerate wraps that in one autocast, which does not end when it is entered twice.
        """
        width = ids.shape[1]
        read = torch.arange(ids.numel(), device=ids.device) if read is None else read
        row, column = read // width, read % width
        from_clean = column >= noisy
        past = Past()
        read_clean, read_noisy = row * (width - noisy) + column - noisy, row * noisy + column
        of_clean, of_noisy = (None if target is None else target[rows] for rows in (from_clean, ~from_clean))
        clean = self._clean_pass(ids[:, noisy:], tokens[:, noisy:], read_clean[from_clean], of_clean, past, True)
        denoised = self._pass(
            ids[:, :noisy], tokens[:, :noisy], read_noisy[~from_clean], of_noisy, past, annealing=annealing
        )
        result = torch.empty(len(read), *denoised.shape[1:], dtype=denoised.dtype, device=denoised.device)
        places = torch.arange(len(read), device=read.device)
        result = result.index_copy(0, places[from_clean], clean)
        return result.index_copy(0, places[~from_clean], denoised)

    def _clean_pass(
        self,
        ids: Tensor,
        tokens: TokenMap,
        read: Tensor | None,
        target: Tensor | None,
        past: Past | None,
        keep: bool,
    ) -> Tensor:
        """Clean tokens alone; a frozen adapter is off and has no gradient there."""
        if self.adapter is None or not self.adapter.frozen:
            return self._pass(ids, tokens, read, target, past, keep)
        with self.adapter.off(), torch.no_grad():
            return self._pass(ids, tokens, read, target, past, keep)

    def _pass(
        self,
        ids: Tensor,
        tokens: TokenMap,
        read: Tensor | None,
        target: Tensor | None,
        past: Past | None,
        keep: bool = False,
        annealing: Annealing | None = None,
    ) -> Tensor:
        key = tokens if past is None or past.tokens is None else TokenMap.cat(past.tokens, tokens)
        visibility = Visibility(
            tokens, key, self.spec.clean_context, self.windows, annealing, cache_window=self.cache_window
        )
        fused = target is not None and self.reading.plain_head
        whole = past is not None or self._checkpoints
        with self.reading.only(read, ids.shape, narrow=not whole, stop=fused):
            output = self.backbone(
                input_ids=ids,
                position_ids=tokens.position,
                past_key_values=None if past is None else past.cache,
                use_cache=past is not None,
                visibility=visibility,
            )
            hidden = self.reading.hidden if fused else None
        if past is not None:
            if keep:
                past.tokens = key
            else:
                past.cache.crop(-ids.shape[1])
        if hidden is not None and target is not None:
            head: Any = self.reading.head
            return linear_cross_entropy(hidden, head.weight, head.bias, target, self.spec.mask_id)
        logits: Tensor = output.logits.flatten(0, 1)
        if self.spec.mask_id is not None:
            logits[:, self.spec.mask_id] = -torch.inf
        return logits if target is None else cross_entropy(logits, target)

    @property
    def _checkpoints(self) -> bool:
        """Whether layers run again in the backward: the last one then cannot stop at its keys."""
        return self.training and bool(getattr(self.reading.last_layer, "gradient_checkpointing", False))

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face directory and `block_diffusion.json`, replacing `path` in one step."""
        with replace_directory(Path(path)) as staging:
            self.save_into(staging)

    def save_into(self, directory: Path) -> None:
        """Write the checkpoint's files into an existing directory."""
        state = None if self.adapter is None else self.adapter.plain_state(self.backbone)
        self.backbone.save_pretrained(directory, state_dict=state, safe_serialization=True)
        if self.adapter is not None and self.adapter.frozen:
            self.adapter.save(directory, self.backbone)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        (directory / SPEC_FILE).write_text(json.dumps(self.spec.to_json(), indent=2) + "\n")

    def _blended(self, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._blend is None:
            return output
        (ids, weight), self._blend = self._blend, None  # the lookup below comes here, too
        return (1 - weight.sum(-1, keepdim=True)).to(output.dtype) * output + (
            weight[..., None].to(output.dtype) * embedding(ids)
        ).sum(-2)


def _with_idle_slot(
    ids: Tensor, tokens: TokenMap, read: Tensor | None, mask_id: int
) -> tuple[Tensor, TokenMap, Tensor]:
    """The pass with a noisy slot of padding before each row, which nobody reads."""
    read = torch.arange(ids.numel(), device=ids.device) if read is None else read
    first = tokens[:, :1].as_noisy()
    idle = replace(first, doc=torch.full_like(first.doc, -1))
    ids_with = torch.cat([torch.full_like(ids[:, :1], mask_id), ids], 1)
    return ids_with, TokenMap.cat(idle, tokens), read + read // ids.shape[1] + 1


def _kind(backbone: PreTrainedModel) -> str:
    return str(backbone.config.model_type)


def _version() -> str:
    from blockdiff import __version__

    return __version__
