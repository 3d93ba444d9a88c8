"""Networks of released block diffusion models, written a second time in plain torch from their published descriptions.

No class of transformers and nothing of blockdiff is used here: weights come in under the format's own names, attention
is a softmax under a mask that the caller draws. What blockdiff computes for such a checkpoint must agree with this.

Shapes: T tokens of one text, H width, V vocabulary; sees [T, T] says which token (row) sees which (column).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]
Network = Callable[[Tensor, Tensor], Tensor]  # ids [T], sees [T, T] -> logits [T, V]


@dataclass(frozen=True)
class Shape:
    """Sizes and settings of a tiny network. rotary: how many numbers of a head turn with the position; yarn: factor and
    length before it, where the positions are scaled so."""

    layers: int = 2
    width: int = 16
    heads: int = 4
    pairs: int = 2
    size: int = 8
    rotary: int = 8
    theta: float = 500000.0
    inner: int = 24
    experts: int = 0
    chosen: int = 2
    expert_inner: int = 12
    eps: float = 1e-6
    yarn: tuple[float, int] | None = None
    activation: Callable[[Tensor], Tensor] = F.silu


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights, large enough that every part of the network matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 1 + 0.3 * torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight")
        else (0.4 if len(shape) > 1 else 0.7) * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def in_blocks(length: int, size: int, first: int = 0) -> Tensor:
    """The block-causal rule for one text: blocks of `size`, or `first` tokens and then blocks of `size`: [T, T]."""
    block = (torch.arange(length) + (size - first if first else 0)) // size
    return block[:, None] >= block[None, :]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def turned(x: Tensor, rotary: int, theta: float, yarn: tuple[float, int] | None = None) -> Tensor:
    """Rotary positions for x [heads, T, size]: number i of the first half turns with number i of the second."""
    half = rotary // 2
    speed, longer = theta ** (-torch.arange(half, dtype=x.dtype) / half), 1.0
    if yarn is not None:
        speed, longer = scaled(speed, theta, *yarn), 0.1 * math.log(yarn[0]) + 1
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * speed
    cos, sin = longer * angle.cos(), longer * angle.sin()
    a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def scaled(speed: Tensor, theta: float, factor: float, length: int) -> Tensor:
    """YaRN (arXiv 2309.00071): what turns less than once in the length it was trained with turns `factor` times slower,
    what turns more than 32 times as before, and between them a ramp over the numbers of the head."""

    def number(turns: int) -> float:
        return len(speed) * math.log(length / (2 * math.pi * turns)) / math.log(theta)

    low, high = max(math.floor(number(32)), 0), min(math.ceil(number(1)), 2 * len(speed) - 1)
    ramp = ((torch.arange(len(speed)) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return speed * (1 - ramp) + speed / factor * ramp


def attention(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """q [heads, T, size] over k, v [pairs, T, size]: [T, heads * size]."""
    shared = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    score = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    mixed = score.masked_fill(~sees, -torch.inf).softmax(-1) @ v
    return mixed.transpose(0, 1).flatten(1)


def swiglu(state: State, prefix: str, x: Tensor, activation: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    gate, up = x @ state[f"{prefix}gate_proj.weight"].T, x @ state[f"{prefix}up_proj.weight"].T
    return (activation(gate) * up) @ state[f"{prefix}down_proj.weight"].T


def experts(state: State, prefix: str, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """Token by token: the sum of the chosen experts [T, k] times their weights [T, k]."""
    rows = [
        sum(w * swiglu(state, f"{prefix}experts.{int(e)}.", x[t]) for e, w in zip(chosen[t], weight[t], strict=True))
        for t in range(len(x))
    ]
    return torch.stack(rows)  # type: ignore[arg-type]


# ---- SDAR, TraDo, SDAR-MoE, A2D, Fast-dLLM v2: Qwen's and Llama's layers --------------------------------------------


def qwen_shapes(
    shape: Shape, vocabulary: int, *, norms: bool = False, biases: str = "", tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights; norms: of queries and keys (Qwen3); biases: of which projections (Qwen2: qkv);
    tied: the head is the embedding."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, shape.width)}
    for number in range(shape.layers):
        at = f"model.layers.{number}."
        rows = {"q": shape.heads * shape.size, "k": shape.pairs * shape.size, "v": shape.pairs * shape.size}
        found |= {f"{at}{name}_layernorm.weight": (shape.width,) for name in ("input", "post_attention")}
        found |= {f"{at}self_attn.{name}_proj.weight": (count, shape.width) for name, count in rows.items()}
        found |= {f"{at}self_attn.{name}_proj.bias": (count,) for name, count in rows.items() if name in biases}
        found |= {f"{at}self_attn.{name}_norm.weight": (shape.size,) for name in "qk" if norms}
        found[f"{at}self_attn.o_proj.weight"] = (shape.width, rows["q"])
        found |= {f"{at}self_attn.o_proj.bias": (shape.width,)} if "o" in biases else {}
        found |= moe_shapes(shape, f"{at}mlp.") if shape.experts else mlp_shapes(f"{at}mlp.", shape.width, shape.inner)
    head = {} if tied else {"lm_head.weight": (vocabulary, shape.width)}
    return found | {"model.norm.weight": (shape.width,), **head}


def mlp_shapes(prefix: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    up = {f"{prefix}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    return up | {f"{prefix}down_proj.weight": (width, inner)}


def moe_shapes(shape: Shape, prefix: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{prefix}gate.weight": (shape.experts, shape.width)}
    for number in range(shape.experts):
        found |= mlp_shapes(f"{prefix}experts.{number}.", shape.width, shape.expert_inner)
    return found


def qwen(state: State, shape: Shape) -> Network:
    """Pre-norm layers with grouped attention and SwiGLU; what a layer has (norms, biases, experts), its names say."""

    def heads(at: str, x: Tensor, name: str, count: int) -> Tensor:
        y = x @ state[f"{at}{name}_proj.weight"].T + state.get(f"{at}{name}_proj.bias", 0)
        y = y.view(len(x), count, shape.size).transpose(0, 1)
        norm = state.get(f"{at}{name}_norm.weight")
        y = y if norm is None else rms_norm(y, norm, shape.eps)
        return y if name == "v" else turned(y, shape.rotary, shape.theta, shape.yarn)

    def mixture(at: str, x: Tensor) -> Tensor:
        """Softmax over all experts, the best k of them, their shares made to sum to one."""
        share, chosen = (x @ state[f"{at}gate.weight"].T).softmax(-1).topk(shape.chosen, -1)
        return experts(state, at, x, chosen, share / share.sum(-1, keepdim=True))

    def dense(at: str, x: Tensor) -> Tensor:
        return swiglu(state, at, x, shape.activation)

    def network(ids: Tensor, sees: Tensor) -> Tensor:
        x = state["model.embed_tokens.weight"][ids]
        for number in range(shape.layers):
            at = f"model.layers.{number}."
            y = rms_norm(x, state[f"{at}input_layernorm.weight"], shape.eps)
            q, k, v = (
                heads(f"{at}self_attn.", y, name, count)
                for name, count in (("q", shape.heads), ("k", shape.pairs), ("v", shape.pairs))
            )
            bias = state.get(f"{at}self_attn.o_proj.bias", 0)
            x = x + attention(q, k, v, sees) @ state[f"{at}self_attn.o_proj.weight"].T + bias
            y = rms_norm(x, state[f"{at}post_attention_layernorm.weight"], shape.eps)
            x = x + (mixture if shape.experts else dense)(f"{at}mlp.", y)
        head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
        return rms_norm(x, state["model.norm.weight"], shape.eps) @ head.T

    return network


# ---- LLaDA 2 --------------------------------------------------------------------------------------------------------

GROUPS, BEST_GROUPS, SCALE = 4, 2, 2.5


def llada2_shapes(shape: Shape, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The first layer is dense, the others have experts and a shared one."""
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (vocabulary, shape.width)}
    for number in range(shape.layers):
        at = f"model.layers.{number}."
        found |= {f"{at}{name}_layernorm.weight": (shape.width,) for name in ("input", "post_attention")}
        found |= {f"{at}attention.{name}_layernorm.weight": (shape.size,) for name in ("query", "key")}
        rows = (shape.heads + 2 * shape.pairs) * shape.size
        found[f"{at}attention.query_key_value.weight"] = (rows, shape.width)
        found[f"{at}attention.dense.weight"] = (shape.width, shape.heads * shape.size)
        if number == 0:
            found |= mlp_shapes(f"{at}mlp.", shape.width, shape.inner)
        else:
            found |= moe_shapes(shape, f"{at}mlp.") | {f"{at}mlp.gate.expert_bias": (shape.experts,)}
            found |= mlp_shapes(f"{at}mlp.shared_experts.", shape.width, shape.expert_inner)
    return found | {"model.norm.weight": (shape.width,), "lm_head.weight": (vocabulary, shape.width)}


def llada2(state: State, shape: Shape) -> Network:
    def mixture(at: str, x: Tensor) -> Tensor:
        """Sigmoid scores; with a bias they choose groups by their two best experts, then experts; without it they
        weight them, summing to the scale."""
        score = torch.sigmoid(x @ state[f"{at}gate.weight"].T)
        choice = (score + state[f"{at}gate.expert_bias"]).view(len(x), GROUPS, -1)
        open_groups = choice.topk(2, -1).values.sum(-1).topk(BEST_GROUPS, -1).indices
        closed = torch.ones(len(x), GROUPS, dtype=torch.bool).scatter(1, open_groups, False)
        chosen = choice.masked_fill(closed[..., None], -torch.inf).flatten(1).topk(shape.chosen, -1).indices
        weight = score.gather(1, chosen)
        weight = SCALE * weight / weight.sum(-1, keepdim=True)
        return experts(state, at, x, chosen, weight) + swiglu(state, f"{at}shared_experts.", x)

    def network(ids: Tensor, sees: Tensor) -> Tensor:
        x = state["model.word_embeddings.weight"][ids]
        for number in range(shape.layers):
            at = f"model.layers.{number}."
            y = rms_norm(x, state[f"{at}input_layernorm.weight"])
            rows = (y @ state[f"{at}attention.query_key_value.weight"].T).view(len(ids), -1, shape.size).transpose(0, 1)
            q, k, v = rows.split([shape.heads, shape.pairs, shape.pairs])
            q, k = (
                turned(rms_norm(z, state[f"{at}attention.{name}_layernorm.weight"]), shape.rotary, shape.theta)
                for z, name in ((q, "query"), (k, "key"))
            )
            x = x + attention(q, k, v, sees) @ state[f"{at}attention.dense.weight"].T
            y = rms_norm(x, state[f"{at}post_attention_layernorm.weight"])
            x = x + (swiglu(state, f"{at}mlp.", y) if number == 0 else mixture(f"{at}mlp.", y))
        return rms_norm(x, state["model.norm.weight"]) @ state["lm_head.weight"].T

    return network


# ---- BD3-LM: a diffusion transformer with adaptive layer norm -------------------------------------------------------

CONDITION, FREQUENCIES = 6, 10


def dit_shapes(shape: Shape, vocabulary: int) -> dict[str, tuple[int, ...]]:
    width = shape.width
    found: dict[str, tuple[int, ...]] = {
        "backbone.vocab_embed.embedding": (vocabulary, width),
        "backbone.sigma_map.mlp.0.weight": (CONDITION, FREQUENCIES),
        "backbone.sigma_map.mlp.0.bias": (CONDITION,),
        "backbone.sigma_map.mlp.2.weight": (CONDITION, CONDITION),
        "backbone.sigma_map.mlp.2.bias": (CONDITION,),
    }
    for number in range(shape.layers):
        at = f"backbone.blocks.{number}."
        found |= {f"{at}norm{i}.weight": (width,) for i in (1, 2)}
        found |= {f"{at}attn_qkv.weight": (3 * width, width), f"{at}attn_out.weight": (width, width)}
        found |= {f"{at}mlp.0.weight": (4 * width, width), f"{at}mlp.0.bias": (4 * width,)}
        found |= {f"{at}mlp.2.weight": (width, 4 * width), f"{at}mlp.2.bias": (width,)}
        found |= {f"{at}adaLN_modulation.weight": (6 * width, CONDITION), f"{at}adaLN_modulation.bias": (6 * width,)}
    at = "backbone.output_layer."
    found |= {f"{at}norm_final.weight": (width,)}
    found |= {f"{at}linear.weight": (vocabulary, width), f"{at}linear.bias": (vocabulary,)}
    return found | {f"{at}adaLN_modulation.weight": (2 * width, CONDITION), f"{at}adaLN_modulation.bias": (2 * width,)}


def dit(state: State, shape: Shape, noise_level: float = 0.0) -> Network:
    """DiT as BD3-LM has it, its conditioning on the noise level computed as published (0 without time conditioning)."""

    def affine(prefix: str, x: Tensor) -> Tensor:
        return x @ state[f"{prefix}.weight"].T + state[f"{prefix}.bias"]

    def normed(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        return x * (1 + scale) + shift

    half = FREQUENCIES // 2
    angle = noise_level * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    embedded = torch.cat([angle.cos(), angle.sin()])
    level = F.silu(affine("backbone.sigma_map.mlp.2", F.silu(affine("backbone.sigma_map.mlp.0", embedded))))

    def network(ids: Tensor, sees: Tensor) -> Tensor:
        x = state["backbone.vocab_embed.embedding"][ids]
        for number in range(shape.layers):
            at = f"backbone.blocks.{number}."
            shift, scale, gate, shift_2, scale_2, gate_2 = affine(f"{at}adaLN_modulation", level).chunk(6)
            y = normed(x, state[f"{at}norm1.weight"], shift, scale) @ state[f"{at}attn_qkv.weight"].T
            q, k, v = y.view(len(ids), 3, shape.heads, -1).permute(1, 2, 0, 3)
            q, k = (turned(z, q.shape[-1], 10000.0) for z in (q, k))
            x = x + gate * (attention(q, k, v, sees) @ state[f"{at}attn_out.weight"].T)
            y = normed(x, state[f"{at}norm2.weight"], shift_2, scale_2)
            y = affine(f"{at}mlp.2", F.gelu(affine(f"{at}mlp.0", y), approximate="tanh"))
            x = x + gate_2 * y
        at = "backbone.output_layer."
        shift, scale = affine(f"{at}adaLN_modulation", level).chunk(2)
        return affine(f"{at}linear", normed(x, state[f"{at}norm_final.weight"], shift, scale))

    return network


# ---- decoding -------------------------------------------------------------------------------------------------------


def decode(network: Network, prompt: list[int], blocks: int, size: int, mask: int, *, shift: bool = False) -> list[int]:
    """Greedy text after a prompt that is read token by token: of each block the surest masked token at a time.

    shift: row i predicts token i + 1, a block's first token coming from the finished text before the block begins.
    """
    text = list(prompt)
    for number in range(blocks):
        own = [*range(len(prompt)), *(len(prompt) + i // size for i in range((number + 1) * size))]
        block = torch.tensor(own)
        sees = block[:, None] >= block[None, :]

        def chances(ids: list[int], sees: Tensor = sees) -> Tensor:
            count = len(ids)
            logits = network(torch.tensor(ids), sees[:count, :count]).clone()
            logits[:, mask] = -torch.inf
            return logits.softmax(-1)

        window = [mask] * size
        if shift:
            window[0] = int(chances(text)[-1].argmax())
        while mask in window:
            chance = chances(text + window)
            chance = chance[len(text) - 1 : -1] if shift else chance[len(text) :]
            sure, token = chance.max(-1)
            at = max((i for i in range(size) if window[i] == mask), key=lambda i: float(sure[i]))
            window[at] = int(token[at])
        text += window
    return text[len(prompt) :]
