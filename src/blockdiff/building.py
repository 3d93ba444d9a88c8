"""What a configuration starts from: the model, its tokenizer, and the data in rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blockdiff import data, loading
from blockdiff.adapters import Adapter
from blockdiff.config import ConfigError, ModelConfig, RunConfig
from blockdiff.coverage import SpanShare, histogram
from blockdiff.data import Corpus, Encoder, PackedRows
from blockdiff.datafiles import read_rows, texts_of
from blockdiff.diffusion_gemma import DiffusionGemma
from blockdiff.model import BlockDiffusionModel, Spec
from blockdiff.passes import Objective
from blockdiff.tokenizer import train_tokenizer


def build_model(config: RunConfig, device: str | None = None) -> BlockDiffusionModel:
    """The model that the config starts from, with its tokenizer, ready to be trained as the config says.

    device: where its weights are put; None: where training wants them first.
    """
    if config.model.attention == "flex" and not torch.cuda.is_available():
        raise ConfigError("model.attention: flex trains on CUDA alone (torch has no CPU backward for it); use sdpa")
    make = _from_checkpoint if config.model.init is not None else _from_scratch
    bridge = make(config, device or _device(config))
    if bridge.tokenizer is None:
        raise ConfigError(f"model.init: {config.model.init} holds no tokenizer; name one with model.tokenizer")
    if config.data.end_token is not None:
        _set_end_token(bridge, bridge.tokenizer, config.data.end_token)
    if config.data.length > bridge.context_length:
        raise ConfigError(
            f"data.length: {config.data.length} tokens do not fit the model's context of {bridge.context_length}"
        )
    adapter = _adapter_of(bridge, config)
    frozen = adapter is not None and adapter.kind == "noisy"
    if adapter is not None and bridge.adapter is None:
        bridge.attach_adapter(adapter)
    if config.train.gradient_checkpointing:
        allow_checkpointing(bridge.backbone)
    causal = config.model.clean_context == "context_causal"
    bridge.spec = replace(
        bridge.spec,
        clean_context=config.model.clean_context,
        alignment=config.model.alignment,
        layout=config.layout,
        noise=config.noise,
        trained_length=config.data.length,
        ar_trained=causal and (config.objective.trains_ar or config.layout.kind == "ar" or frozen),
        documents=(),
        trained_tokens=0,
        adapter=adapter if frozen else None,
    )
    return bridge


def allow_checkpointing(backbone: PreTrainedModel) -> None:
    """Have a network's layers recompute their activations in the backward."""
    newer = getattr(backbone, "activation_checkpointing_enable", None)  # its name in newer transformers
    (newer or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def encoder_of(bridge: BlockDiffusionModel | DiffusionGemma) -> Encoder:
    """How this model's documents are made: its tokenizer, and the token that ends them.

    Raises ConfigError where there is no tokenizer or no end token is known.
    """
    if bridge.tokenizer is None:
        raise ConfigError("the model has no tokenizer: save one beside it, or name one with model.tokenizer")
    if not bridge.end_ids:
        raise ConfigError(
            "neither the model nor its tokenizer names an end token, so no document could end; set data.end_token"
        )
    return Encoder(bridge.tokenizer, bridge.end_ids[0], bridge.end_ids)


def objective_of(config: RunConfig) -> Objective:
    """What a step of this configuration draws and minimises, before any schedule."""
    settings = config.objective
    return Objective(
        layout=config.layout,
        noise=config.noise,
        weighting=settings.weighting,
        ar_weight=settings.ar_weight,
        draws=settings.draws_per_pass,
        complementary=settings.complementary,
        active=settings.active,
        prefix_noise=settings.prefix_noise,
        suffix_visible=settings.suffix_visible,
        apart=settings.passes == 2,
    )


def training_rows(config: RunConfig, encoder: Encoder) -> tuple[Corpus, PackedRows]:
    """The training documents, and the same cut to the row length and packed."""
    corpus = data.read_corpus(config.data.train, encoder, config.data.bad_rows)
    corpus.documents = corpus.documents[: config.data.limit]
    rows = packed(corpus, config.data.length)
    if not len(rows):
        raise ConfigError(f"data.length: every prompt fills a row of {config.data.length} tokens; give longer rows")
    if config.data.eos_fill != "none":
        multiple = config.layout.largest_named if config.data.eos_fill == "block" else config.data.length
        documents = [document for row in rows.rows for document in row]
        filled = [data.fill_end(document, multiple, config.data.length, encoder.end_ids) for document in documents]
        rows = PackedRows(data.pack(filled, config.data.length))
    return corpus, rows


def packed(corpus: Corpus, length: int) -> PackedRows:
    """The documents cut to `length` and packed into rows of it."""
    pieces, corpus.cut = data.cut(corpus.documents, length)
    kept = {piece.name.partition("+")[0] for piece in pieces}
    corpus.left_out = sum(document.name not in kept for document in corpus.documents) if corpus.cut else 0
    return PackedRows(data.pack(pieces, length))


def trained_documents(rows: PackedRows) -> tuple[SpanShare, ...]:
    """The lengths of what is trained, for the checkpoint: each span of scored tokens with what is given before it."""
    return histogram(span for row in rows.rows for document in row for span in document.spans())


def validation_corpus(config: RunConfig, encoder: Encoder) -> Corpus | None:
    """The validation documents, where the config names some."""
    if config.data.valid is None:
        return None
    return data.read_corpus(config.data.valid, encoder, config.data.bad_rows)


def _adapter_of(bridge: BlockDiffusionModel, config: RunConfig) -> Adapter | None:
    """The adapter that is trained: the config's, or the frozen one that the checkpoint came with, trained on."""
    own, asked = bridge.spec.adapter, config.model.adapter
    if own is None:
        return asked
    words = f"{{kind: {own.kind}, rank: {own.rank}, alpha: {own.alpha:g}}}"
    if asked is not None and asked != own:
        raise ConfigError(
            f"model.adapter: {config.model.init} has a frozen adapter {words} already, which can only be trained on as "
            "it is; leave the key out, or start from the checkpoint without an adapter"
        )
    if asked is None and config.objective.trains_ar:
        raise ConfigError(
            f"objective.ar_weight: {config.model.init} has a frozen adapter {words}, whose clean stream is not "
            "trained; set ar_weight to 0"
        )
    return own


def _from_checkpoint(config: RunConfig, device: str) -> BlockDiffusionModel:
    settings = config.model
    assert settings.init is not None
    bridge: BlockDiffusionModel = loading.load(
        settings.init,
        dtype=getattr(torch, settings.dtype),
        device=device,
        add_mask=config.layout.kind != "ar",
        implementation=settings.attention,
    )
    _agree(bridge.spec, settings)
    if settings.tokenizer is not None:
        bridge.tokenizer = loading.load_tokenizer(settings.tokenizer)
    return bridge


def _from_scratch(config: RunConfig, device: str) -> BlockDiffusionModel:
    settings = config.model
    assert settings.architecture is not None
    tokenizer = loading.load_tokenizer(settings.tokenizer) if settings.tokenizer else _new_tokenizer(config)
    if tokenizer is None:
        raise ConfigError(f"model.tokenizer: {settings.tokenizer} holds no tokenizer")
    backbone = loading.from_architecture(
        settings.architecture,
        vocabulary=len(tokenizer) + 1,  # one row more, for [MASK]
        seed=config.seed,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return loading.attach(
        backbone.to(device=device, dtype=getattr(torch, settings.dtype)),
        tokenizer,
        add_mask=config.layout.kind != "ar",
        implementation=settings.attention,
    )


def _device(config: RunConfig) -> str:
    """Where the weights are first put: sharding takes them from the CPU, so that no GPU need hold them all."""
    return "cuda" if torch.cuda.is_available() and config.train.parallel != "fsdp" else "cpu"


def _agree(spec: Spec, settings: ModelConfig) -> None:
    """A checkpoint that is a block diffusion model already keeps its way of reading tokens."""
    if spec.layout.kind == "ar":  # nothing in an AR decoder is fixed yet
        return
    fixed: list[tuple[str, str, str]] = [("prediction", spec.alignment.prediction, settings.prediction)]
    if spec.alignment.shift:
        fixed.append(("boundary", spec.alignment.boundary, settings.boundary))
    if spec.layout.kind != "full":  # of a whole text in one block there is no clean context that could look back
        fixed.append(("clean_context", spec.clean_context, settings.clean_context))
    for key, kept, asked in fixed:
        if kept != asked:
            raise ConfigError(
                f"model.{key}: the checkpoint {settings.init} was trained with {kept}, not {asked}; set "
                f"model.{key}={kept}"
            )


def _set_end_token(bridge: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Make `token` the one that ends documents, in training and, through the checkpoint, in decoding."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ConfigError(f"data.end_token: the tokenizer has no token {token!r}")
    bridge.backbone.generation_config.eos_token_id = [found, *(other for other in bridge.end_ids if other != found)]


def _new_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the training files."""
    paths = [config.data.train] if isinstance(config.data.train, str) else config.data.train

    def texts() -> Iterator[str]:
        for path in paths:
            for _, row in read_rows(Path(path), config.data.bad_rows):
                yield from texts_of(row)

    return train_tokenizer(texts(), config.model.vocabulary)
