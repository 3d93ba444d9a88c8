"""The capability probe: does this model see exactly what the visibility rule says, no more and no less?

Equality tests cannot tell: a linear-attention layer ignores the mask and may still agree on the states one happens to
compare. So the probe is an *influence test*. On a small two-stream input it changes one token at a time and looks which
logits move, then compares with the rule's closure over the layers (each with its own sliding window). It also checks
that our attention computes what the model's own does, and that a cached pass equals an uncached one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockdiff.attention import UnsupportedModel
from blockdiff.layout import Layout, TokenMap
from blockdiff.masks import visible
from blockdiff.model import BlockDiffusionModel, Past

_LAYOUT = Layout(prompt=2, blocks=(3, 3))
_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def probe(model: BlockDiffusionModel) -> list[str]:
    """Check a model. Returns notes a user should know.

    Raises UnsupportedModel, naming the layers that break the rule.
    """
    was_training = model.training
    model.eval()
    try:
        influence, tokens = _influence(model)
        _check_influence(model, influence, tokens)
        _check_own_attention(model)
        _check_cache(model)
        model.reading.plain_head = _has_plain_head(model)
        model.reading.narrows = _narrows(model)
    finally:
        model.train(was_training)
    return _window_notes(model)


def _influence(model: BlockDiffusionModel) -> tuple[Tensor, TokenMap]:
    """influence [T, T]: how far the logits of slot q (row) move when the token of slot k (column) changes."""
    clean = TokenMap.from_layouts([[_LAYOUT]])
    noisy = clean.as_noisy()[:, _LAYOUT.prompt :]
    tokens = TokenMap.cat(noisy, clean)
    slots = tokens.shape[1]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary, (slots,), generator=generator)
    rows = ids.repeat(slots + 2, 1)  # two unchanged rows measure the arithmetic's own noise
    change = torch.randint(1, model.vocabulary, (slots,), generator=generator)
    rows[torch.arange(slots) + 2, torch.arange(slots)] = (ids + change) % model.vocabulary
    batch = tokens.map(lambda tensor: tensor.expand(slots + 2, -1)).to(model.device)
    try:
        logits = model(rows.to(model.device), batch).view(slots + 2, slots, -1).float()
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(
            f"{model.backbone.config.model_type} does not run in {str(model.dtype).removeprefix('torch.')} on "
            f"{model.device.type} ({reason}); try another dtype, or a config that fits it"
        ) from error
    if model.spec.mask_id is not None:
        logits[..., model.spec.mask_id] = 0
    if not logits.isfinite().all():
        raise UnsupportedModel(
            f"{model.backbone.config.model_type}: the logits are not finite; these weights are broken, as after a "
            "training that diverged"
        )
    moved = (logits - logits[0]).abs().amax(-1).cpu()
    return (moved[2:].T - moved[1][:, None]).clamp(min=0), tokens


def _check_influence(model: BlockDiffusionModel, influence: Tensor, tokens: TokenMap) -> None:
    kind = model.backbone.config.model_type
    layers = _layer_count(model)
    if not model.windows:
        raise UnsupportedModel(
            f"{kind} builds its own attention and never asks for ours: it cannot be given a block mask"
        )
    slots = influence.shape[0]
    reach = torch.eye(slots, dtype=torch.bool)
    direct = torch.ones(slots, slots, dtype=torch.bool)
    for layer in range(layers):
        window = model.windows.get(layer)
        sees = visible(tokens[:, :, None], tokens[:, None, :], model.spec.clean_context, window)[0]
        reach = ((sees | torch.eye(slots, dtype=torch.bool)).float() @ reach.float()) > 0
        direct &= sees
    direct &= ~torch.eye(slots, dtype=torch.bool)
    typical = float(influence[direct].median())
    leaking = (~reach & (influence > 1e-3 * typical + 1e-12)).sum()
    missing = (direct & (influence <= 1e-6 * typical)).sum() if typical > 0 else direct.sum()
    if leaking or missing:
        unheard = [layer for layer in range(layers) if layer not in model.windows]
        named = f"layers {_ranges(unheard)} ({_names(model, unheard)})" if unheard else "its attention layers"
        raise UnsupportedModel(
            f"{kind} does not obey the mask: {named} let {int(leaking)} token pairs through that must not see each "
            f"other and lose {int(missing)} that must (of {slots * slots}); block diffusion needs attention there"
        )


def _check_own_attention(model: BlockDiffusionModel) -> None:
    """Our attention under a causal layout must give what the model's own gives: its eager code, which is its definition
    (some releases of transformers run gemma2 under sdpa without its soft-capping)."""
    ours = model.backbone.config._attn_implementation
    tokens = TokenMap.from_layouts([[Layout(12, ())]]).to(model.device)
    ids = torch.randint(model.vocabulary, (1, 12), generator=torch.Generator().manual_seed(1)).to(model.device)

    def both() -> tuple[Tensor, Tensor]:
        got = model(ids, tokens)
        model.backbone.set_attn_implementation("eager")
        expected = model.backbone(input_ids=ids, position_ids=tokens.position).logits.flatten(0, 1)
        model.backbone.set_attn_implementation(ours)
        return got, expected

    away = _apart(model, both)
    if away:
        raise UnsupportedModel(
            f"{model.backbone.config.model_type}: its attention computes something that ours does not "
            f"(causal logits differ by {away:.2g} standard deviations)"
        )


def _check_cache(model: BlockDiffusionModel) -> None:
    """Prefix, an open block that is thrown away, then the block committed: equal to one pass over everything."""
    clean = TokenMap.from_layouts([[_LAYOUT]]).to(model.device)
    ids = torch.randint(model.vocabulary, (1, _LAYOUT.length), generator=torch.Generator().manual_seed(2))
    ids = ids.to(model.device)

    def both() -> tuple[Tensor, Tensor]:
        past = Past()
        model(ids[:, :5], clean[:, :5], past=past, keep=True)
        model(ids[:, 2:5], clean[:, 5:].as_noisy(), past=past)
        return model(ids[:, 5:], clean[:, 5:], past=past, keep=True), model(ids, clean)[-3:]

    try:
        away = _apart(model, both)
    except (ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UnsupportedModel(f"{model.backbone.config.model_type} cannot decode from a cache: {error}") from error
    if away:
        raise UnsupportedModel(
            f"{model.backbone.config.model_type}: decoding from a cache differs from a full pass "
            f"by {away:.2g} standard deviations"
        )


def _has_plain_head(model: BlockDiffusionModel) -> bool:
    """Whether the logits are the head's output alone, seen on hidden states large enough to meet any soft cap."""
    head: Any = model.reading.head
    if type(head) is not nn.Linear:
        return False
    rows = 1e3 * torch.randn(3, head.in_features, generator=torch.Generator().manual_seed(3)).to(head.weight)

    def feed(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rows[None], *inputs[1:])

    hook = head.register_forward_pre_hook(feed)
    try:
        tokens = TokenMap.from_layouts([[Layout(3, ())]]).to(model.device)
        got = model(torch.zeros_like(tokens.doc), tokens)
    finally:
        hook.remove()
    return bool(_distance(model, got, head(rows)) < _tolerance(model.dtype))


def _narrows(model: BlockDiffusionModel) -> bool:
    """Whether the last layer, run for some rows alone, gives what it gives in a whole pass."""
    clean = TokenMap.from_layouts([[_LAYOUT], [Layout(1, (2, 4, 1))]])
    tokens = TokenMap.cat(clean.as_noisy()[:, _LAYOUT.prompt :], clean).to(model.device)
    length = tokens.shape[1]
    ids = torch.randint(model.vocabulary, tokens.shape, generator=torch.Generator().manual_seed(4)).to(model.device)
    read = torch.tensor([3, 1, length - 2, 2 * length - 1, 3], device=model.device)

    def both() -> tuple[Tensor, Tensor]:
        model.reading.narrows = False
        expected = model(ids, tokens)[read]
        model.reading.narrows = True
        return model(ids, tokens, read=read), expected

    try:
        return not _apart(model, both)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def _apart(model: BlockDiffusionModel, both: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """How far two ways to the same logits are apart, in standard deviations; 0 where rounding explains it.

    Rounding to bfloat16 adds up in a deep network, and with experts it sends tokens to other experts, so a difference
    there counts only if it is one in float32 too.
    """
    away = _distance(model, *both())
    if not away < _tolerance(model.dtype) and model.dtype in _HALF:
        with _in_float32(model.backbone):
            away = _distance(model, *both())
        return 0.0 if away < _tolerance(torch.float32) else away
    return 0.0 if away < _tolerance(model.dtype) else away


@contextmanager
def _in_float32(network: nn.Module) -> Iterator[None]:
    """Within, every module computes in float32; only the weights of the one at work are held so.

    Afterwards all of them are bit for bit what they were.
    """

    def own(module: nn.Module) -> list[Tensor]:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return [tensor for tensor in tensors if tensor in half]

    def cast(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype or half[tensor])

    half = {t: t.dtype for t in (*network.parameters(), *network.buffers()) if t.dtype in _HALF}
    hooks = []
    for module in network.modules():
        if own(module):
            hooks.append(module.register_forward_pre_hook(lambda module, _: cast(own(module), torch.float32)))
            hooks.append(module.register_forward_hook(lambda module, _, __: cast(own(module))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        cast(half)  # one that an exception left


def _distance(model: BlockDiffusionModel, got: Tensor, expected: Tensor) -> float:
    """Largest difference of two sets of logits, in standard deviations of the second."""
    if got.shape != expected.shape:
        return math.inf
    real = torch.arange(got.shape[1], device=got.device) != (-1 if model.spec.mask_id is None else model.spec.mask_id)
    got, expected = got[:, real].float(), expected[:, real].float()
    return float((got - expected).abs().max() / expected.std().clamp(min=1e-6))


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-4, torch.float32: 1e-3}.get(dtype, 0.1)


def _window_notes(model: BlockDiffusionModel) -> list[str]:
    """Sentences about windowed layers: kept where the layer hands us its window, and said where it does not."""
    config = model.backbone.config.get_text_config(decoder=True)
    kinds = list(getattr(config, "layer_types", None) or [])
    kept = [layer for layer, window in sorted(model.windows.items()) if window is not None]
    lost = [i for i, kind in enumerate(kinds) if kind not in ("full_attention", "attention") and i not in kept]
    notes = []
    if kept:
        windows = sorted({int(model.windows[layer] or 0) for layer in kept})
        notes.append(f"layers {_ranges(kept)} keep their sliding window of {', '.join(map(str, windows))} tokens")
    if lost:
        notes.append(
            f"layers {_ranges(lost)} ({kinds[lost[0]]}) attend without their window: the model does not tell it"
        )
    return notes


def _layer_count(model: BlockDiffusionModel) -> int:
    return int(model.backbone.config.get_text_config(decoder=True).num_hidden_layers)


def _names(model: BlockDiffusionModel, layers: list[int]) -> str:
    """Class names of what mixes tokens in these layers."""
    count = _layer_count(model)
    stacks = [m for m in model.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found: list[str] = []
    for stack in stacks[:1]:
        for layer in layers:
            mixers = [
                type(child).__name__
                for child in stack[layer].children()
                if not any(
                    word in type(child).__name__.lower() for word in ("mlp", "norm", "moe", "dropout", "linear4")
                )
            ]
            found += mixers or [type(stack[layer]).__name__]
    return ", ".join(dict.fromkeys(found)) or "unnamed"


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> '0-2, 5'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
