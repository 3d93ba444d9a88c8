"""LLaDA 2 as GLM-4.5's mixture of experts: the same arithmetic under other names.

Both have grouped attention with a norm on every head's queries and keys, rotary positions over a part of the head,
dense first layers, and a router that takes the best experts (sigmoid scores plus a bias) of the best groups, weights
them by their scores without the bias and adds shared experts.

Names and arithmetic: inclusionAI/dFactory, models/llada2_moe; SGLang srt/models/llada2.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from blockdiff.conversion import Conversion, State

_QKV = ".attention.query_key_value.weight"
_NAMES = (
    (r"^model\.word_embeddings\.", "model.embed_tokens."),
    (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
)
_SAME = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps max_position_embeddings rope_theta partial_rotary_factor moe_intermediate_size num_experts_per_tok
    first_k_dense_replace n_group topk_group routed_scaling_factor
"""


def weights(state: State, config: PreTrainedConfig) -> State:
    """LLaDA 2's state dict as that of GLM-4.5: queries, keys and values apart, the rest renamed."""
    size = config.head_dim
    rows = [config.num_attention_heads * size, config.num_key_value_heads * size, config.num_key_value_heads * size]
    found: State = {}
    for name, tensor in state.items():
        if name.endswith(_QKV) and len(tensor) == sum(rows):
            prefix = name.removesuffix(_QKV)
            parts = zip("qkv", tensor.split(rows), strict=True)
            found |= {f"{prefix}.self_attn.{letter}_proj.weight": part for letter, part in parts}
        else:
            for pattern, ours in _NAMES:
                name = re.sub(pattern, ours, name)
            found[name] = tensor
    return found


def _settings(stated: Mapping[str, Any]) -> dict[str, Any]:
    rotary, stated_rotary = int(stated["head_dim"] * stated["partial_rotary_factor"]), stated.get("rotary_dim")
    if stated_rotary not in (None, rotary):
        raise ValueError(f"rotary_dim {stated_rotary}, and {rotary} by partial_rotary_factor; take out the wrong one")
    experts, groups, open_groups = (int(stated[name]) for name in ("num_experts", "n_group", "topk_group"))
    if groups < 1 or experts % groups:
        raise ValueError(f"{experts} experts in {groups} groups (n_group)")
    if open_groups > groups:
        raise ValueError(f"the best {open_groups} groups (topk_group) of {groups}")
    if int(stated["num_experts_per_tok"]) > open_groups * experts // groups:
        raise ValueError(f"{stated['num_experts_per_tok']} experts for each token (num_experts_per_tok) of too few")
    return {"use_qk_norm": True, "norm_topk_prob": True, "attention_bias": False, "tie_word_embeddings": False}


CONVERSION = Conversion(
    renamed={name: name for name in _SAME.split()}
    | {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"},
    only={
        "hidden_act": "silu",
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "use_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "using_split_qkv_in_self_attention": False,
    },
    ignored=(
        "attention_dropout",
        "embedding_dropout",
        "output_dropout",
        "initializer_range",
        "max_window_layers",
        "output_router_logits",
        "rotary_dim",
        "sliding_window",
        "use_qk_norm",
    ),
    settings=_settings,
    weights=weights,
)
