"""BD3-LM's diffusion transformer as GPT-NeoX: the same arithmetic once its constant conditioning is multiplied in.

A DiT block modulates what it computes by functions of the noise level: `norm(x) * (1 + scale) + shift` before, `gate *
f(...)` after. Released BD3-LM checkpoints run without time conditioning, at noise level 0 always, so shift, scale and
gate are constants of each block: (weight * (1 + scale), shift) is a LayerNorm, and a gate belongs into the projection
before it. What is left is GPT-NeoX with sequential residuals, rotary positions over whole heads, tanh GELU and no
biases in attention, but for one thing: BD3-LM's head has a bias.

Block diffusion, arXiv 2503.09573; names and shapes: kuleshov-group/bd3lms, models/hf; DiT: arXiv 2212.09748.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedConfig

from blockdiff.conversion import Conversion, State

MODEL_TYPE = "gpt_neox_head_bias"
_END = 50256  # GPT-2's only special token, around and between the texts that BD3-LM was trained on
_UNUSED = ("sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq")  # the first two: of its training


class HeadBiasConfig(GPTNeoXConfig):
    """GPT-NeoX whose head has a bias: a type of its own, so that nothing reads its checkpoints without the bias."""

    model_type = MODEL_TYPE


class GPTNeoXWithHeadBias(GPTNeoXForCausalLM):
    """Transformers' GPT-NeoX with a bias in its head."""

    config_class = HeadBiasConfig

    def __init__(self, config: HeadBiasConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()


AutoConfig.register(MODEL_TYPE, HeadBiasConfig, exist_ok=True)
AutoModelForCausalLM.register(HeadBiasConfig, GPTNeoXWithHeadBias, exist_ok=True)


def weights(state: State, config: PreTrainedConfig) -> State:
    """BD3-LM's state dict as that of `GPTNeoXWithHeadBias`, its conditioning multiplied in."""
    left = {name: tensor for name, tensor in state.items() if name not in _UNUSED}
    level = _level(left)
    found = {"gpt_neox.embed_in.weight": left.pop("backbone.vocab_embed.embedding")}
    for number in range(config.num_hidden_layers):
        theirs, ours = f"backbone.blocks.{number}.", f"gpt_neox.layers.{number}."
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation(left, theirs, level, 6)
        found |= _norm(f"{ours}input_layernorm", left.pop(f"{theirs}norm1.weight"), shift, scale)
        found |= _norm(f"{ours}post_attention_layernorm", left.pop(f"{theirs}norm2.weight"), mlp_shift, mlp_scale)
        found |= {
            f"{ours}attention.query_key_value.weight": _by_head(
                left.pop(f"{theirs}attn_qkv.weight"), config.num_attention_heads
            ),
            f"{ours}attention.dense.weight": _times(left.pop(f"{theirs}attn_out.weight"), gate[:, None]),
            f"{ours}mlp.dense_h_to_4h.weight": left.pop(f"{theirs}mlp.0.weight"),
            f"{ours}mlp.dense_h_to_4h.bias": left.pop(f"{theirs}mlp.0.bias"),
            f"{ours}mlp.dense_4h_to_h.weight": _times(left.pop(f"{theirs}mlp.2.weight"), mlp_gate[:, None]),
            f"{ours}mlp.dense_4h_to_h.bias": _times(left.pop(f"{theirs}mlp.2.bias"), mlp_gate),
        }
    theirs = "backbone.output_layer."
    shift, scale = _modulation(left, theirs, level, 2)
    found |= _norm("gpt_neox.final_layer_norm", left.pop(f"{theirs}norm_final.weight"), shift, scale)
    found |= {f"lm_head.{name}": left.pop(f"{theirs}linear.{name}") for name in ("weight", "bias")}
    return found | left


def _level(left: State) -> Tensor:
    """What a DiT is conditioned on at noise level 0, whose sinusoidal embedding is cos 0 = 1, then sin 0 = 0: [C]."""
    first, second = (
        (
            left.pop(f"backbone.sigma_map.mlp.{at}.weight").double(),
            left.pop(f"backbone.sigma_map.mlp.{at}.bias").double(),
        )
        for at in (0, 2)
    )
    half = first[0].shape[1] // 2
    embedded = torch.cat([torch.ones(half), torch.zeros(first[0].shape[1] - half)]).to(first[0])
    return F.silu(F.linear(F.silu(F.linear(embedded, *first)), *second))


def _modulation(left: State, theirs: str, level: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates of a block, [H] each."""
    weight, bias = (left.pop(f"{theirs}adaLN_modulation.{name}").double() for name in ("weight", "bias"))
    return F.linear(level, weight, bias).chunk(parts)


def _norm(name: str, weight: Tensor, shift: Tensor, scale: Tensor) -> State:
    return {f"{name}.weight": _times(weight, 1 + scale), f"{name}.bias": shift.to(weight.dtype)}


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    return (weight.double() * factor).to(weight.dtype)


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """Rows (q, k, v) x heads x size, as BD3-LM has them, to heads x (q, k, v) x size, as GPT-NeoX has them."""
    rows, width = weight.shape
    return weight.view(3, heads, rows // (3 * heads), width).transpose(0, 1).reshape(rows, width)


def _settings(stated: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": 4 * int(stated["hidden_dim"]),
        "hidden_act": "gelu_pytorch_tanh",
        "use_parallel_residual": False,
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "bos_token_id": _END,
        "eos_token_id": _END,
    }


CONVERSION = Conversion(
    renamed={
        "vocab_size": "vocab_size",
        "model_length": "max_position_embeddings",
        "hidden_dim": "hidden_size",
        "n_blocks": "num_hidden_layers",
        "n_heads": "num_attention_heads",
    },
    only={"adaln": True, "cross_attn": True, "causal": False, "time_conditioning": False},
    ignored=("attn_backend", "cond_dim", "dropout", "var_min", "sampling_eps_min", "sampling_eps_max"),
    settings=_settings,
    weights=weights,
)
