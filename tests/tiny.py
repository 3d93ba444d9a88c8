"""Tiny random models and batches for the tests: every architecture, three layers, float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from blockdiff.layout import Layout, TokenMap
from blockdiff.loading import attach
from blockdiff.masks import CleanContext
from blockdiff.model import BlockDiffusionModel, Spec
from blockdiff.objectives import Alignment
from blockdiff.reference import Denoise

VOCABULARY = 37
WINDOW = {"sliding_window": 6}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
    "qwen3_moe": {**_COMMON, **_EXPERTS, "head_dim": 8},
    "mistral": {**_COMMON, **WINDOW},
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "gemma": {**_COMMON, "head_dim": 8},
    "gemma2": {**_COMMON, **WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_COMMON,
        **WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": _COMMON,
    "olmo3": {**_COMMON, **WINDOW},
    "phi3": _COMMON,
    "smollm3": _COMMON,
    "granite": _COMMON,
    "starcoder2": _COMMON,
    "cohere": _COMMON,
    "glm4": {**_COMMON, "head_dim": 8},
    "gpt_oss": {**_COMMON, **WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": _GPT,
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "init_std": 0.2,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_COMMON, **_EXPERTS, **_LINEAR, "head_dim": 8},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2},
    "gptj": {**_GPT, "rotary_dim": 4},
    "mamba2": {**_COMMON, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
}


def backbone(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random decoder of the given architecture, with an output head of its own [MASK]-free vocabulary."""
    settings = {**(SUPPORTED | REFUSED)[kind], **changes}
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    return model.to(dtype).eval()


def model(
    kind: str = "llama",
    prediction: str = "shift",
    boundary: str = "clean",
    clean_context: CleanContext = "context_causal",
    **options: Any,
) -> BlockDiffusionModel:
    """A tiny block diffusion model with the given conventions."""
    spec = Spec(clean_context=clean_context, alignment=Alignment(prediction, boundary), trained_length=64)  # type: ignore[arg-type]
    return attach(backbone(kind, **options), spec=spec)


def native_denoise(bridge: BlockDiffusionModel) -> Denoise:
    """The model as `reference` wants it: transformers' own sdpa attention with a 4D mask, no code of ours.

    (Its eager attention rounds the softmax to float32, too coarse for these tests.) The model is switched to sdpa for
    the call and back again. A 4D mask overrides sliding windows, so references are for models without one.
    """

    def denoise(ids: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        ours = bridge.backbone.config._attn_implementation
        bridge.backbone.set_attn_implementation("sdpa")
        try:
            logits = bridge.backbone(
                input_ids=ids[None], position_ids=positions[None], attention_mask=sees[None, None], use_cache=False
            ).logits[0]
        finally:
            bridge.backbone.set_attn_implementation(ours)
        logits = logits.clone()
        logits[:, bridge.spec.mask_id] = -torch.inf
        return logits

    return denoise


def random_layout(generator: torch.Generator, longest: int = 6, documents: int = 3) -> list[Layout]:
    """A row of documents with random prompts and blocks of random lengths."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    return [Layout(pick(1, 4), tuple(pick(1, longest) for _ in range(pick(1, 3)))) for _ in range(pick(1, documents))]


def random_batch(seed: int, rows: int = 2, longest: int = 6) -> tuple[Tensor, TokenMap, list[list[Layout]]]:
    """Random token ids with a random ragged packed layout: ids [B, L], its map, and the layouts row by row."""
    generator = torch.Generator().manual_seed(seed)
    layouts = [random_layout(generator, longest) for _ in range(rows)]
    tokens = TokenMap.from_layouts(layouts)
    ids = torch.randint(3, VOCABULARY, tokens.shape, generator=generator)
    return ids, tokens, layouts
