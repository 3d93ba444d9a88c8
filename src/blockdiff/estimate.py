"""What a training will need, before anything is loaded: memory of a process, arithmetic of a step, time and price.

The network is built on the meta device, where tensors have shapes and no contents: its parameters are counted there,
and so is what a pass keeps for its backward. How many tokens a pass runs and how many rows of logits it reads comes
from the objective's own draws. Rows are taken to be full.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from blockdiff import cross_entropy
from blockdiff.adapters import Adapter, adapted_layers
from blockdiff.budget import Budget, step_rows
from blockdiff.building import objective_of
from blockdiff.config import RunConfig
from blockdiff.foreign import read_foreign
from blockdiff.loading import from_architecture, load_tokenizer

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_KEEPS = "blockdiff_keeps"  # an attention that computes nothing and keeps what fused kernels keep


@dataclass(frozen=True)
class Estimate:
    """parameters, trained: of the model; tokens, reads: tokens that a pass runs (both streams) and rows of logits that
    it reads, for one row of data; memory: bytes of one process by what they hold (activations missing where a network
    cannot be followed); flops: floating point operations of an optimizer step, all processes together; steps: of the
    run, None where it is not said beforehand."""

    parameters: int
    trained: int
    tokens: int
    reads: int
    memory: dict[str, int]
    flops: float
    budget: Budget
    rows: int
    passes: int
    processes: int
    steps: int | None

    @property
    def bytes(self) -> int:
        """Of one process, all together."""
        return sum(self.memory.values())

    def hours(self, tflops: float) -> float | None:
        """At so many TFLOP/s of each process."""
        return None if self.steps is None else self.steps * self.flops / (tflops * 1e12 * self.processes) / 3600


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """Raises FileNotFoundError or ValueError for a model that cannot be read, and for rows that do not divide over the
    processes."""
    network = _network(config)
    budget = Budget(1, step_rows(config, processes))
    rows, passes = budget.passes(config.train.rows, processes)
    tokens, reads, learning = _drawn(config)
    parameters = sum(p.numel() for p in network.parameters())
    trained = parameters if config.model.adapter is None else _adapted(network, config.model.adapter)
    width = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    shards = processes if config.train.parallel == "fsdp" else 1
    memory = {
        "weights": parameters * width // shards,
        "gradients": trained * width // shards,
        "Adam": 2 * trained * width // shards,
    }
    if processes > 1 and shards == 1:
        memory["gradients in flight"] = trained * width  # DDP's buckets
    if shards > 1:
        memory["gathered layers"], memory["their gradients"] = _gathered(network, config, width)
    elif config.train.mixed_precision == "bf16":
        memory["weights in bfloat16"] = 2 * parameters
    kept = _kept(network, config, rows, learning)
    if kept is not None:
        memory["activations"], memory["a layer's backward"] = kept
    memory["logits"] = 2 * 4 * min(cross_entropy.CHUNK, rows * reads * _vocabulary(network))
    flops = budget.rows * _flops_of_row(network, config, tokens, reads, learning / tokens, trained / parameters)
    return Estimate(
        parameters, trained, tokens, reads, memory, flops, budget, rows, passes, processes, _steps(config, budget)
    )


def describe(found: Estimate, tflops: float | None = None, price: float | None = None) -> str:
    """The estimate in lines; tflops: TFLOP/s that a process reaches (None: matrix products are timed here); price: of
    an hour of one process."""
    parts = ", ".join(f"{name} {_size(value)}" for name, value in found.memory.items())
    if "activations" not in found.memory:
        parts += "; activations not known for this network"
    lines = [
        f"  parameters  {found.parameters / 1e6:,.1f} M, {found.trained / 1e6:,.1f} M trained",
        f"  step        {found.budget.rows} rows: {found.processes} processes x {found.passes} passes x {found.rows}; "
        f"{found.tokens} tokens and {found.reads} rows of logits for a row",
        f"  memory      {_size(found.bytes)} a process, above the libraries: {parts}",
        f"  arithmetic  {found.flops / 1e12:,.3g} TFLOP a step",
    ]
    said = tflops is not None
    rate = tflops if tflops is not None else _measured_tflops()
    hours = found.hours(rate)
    where = f"{rate:.3g} TFLOP/s a process" + ("" if said else ", matrix products on this machine")
    if hours is None:
        seconds = found.flops / (rate * 1e12 * found.processes)
        lines.append(
            f"  time        {seconds:,.3g} s a step at {where}; the number of steps is known when data are read"
        )
    else:
        total = (
            f"; {hours * found.processes * price:,.2f} at {price:g} an hour and process" if price is not None else ""
        )
        lines.append(f"  time        {_hours(hours)} for {found.steps:,} steps at {where}{total}")
    return "\n".join(lines)


def _network(config: RunConfig) -> PreTrainedModel:
    settings = config.model
    tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
    with torch.device("meta"):
        if settings.architecture is not None:
            vocabulary = settings.vocabulary if tokenizer is None else len(tokenizer)
            special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            network = from_architecture(settings.architecture, vocabulary + 1, 0, **special)
        else:
            assert settings.init is not None
            _check_there(settings.init)
            foreign = read_foreign(settings.init)
            stated = AutoConfig.from_pretrained(settings.init) if foreign is None else foreign.config
            network = AutoModelForCausalLM.from_config(stated)
    network.set_attn_implementation(_KEEPS)
    return network.train()


def _check_there(init: str) -> None:
    """Refuse a model of which not even the config is on this machine: an estimate fetches nothing."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(init, "config.json", local_files_only=True, **quiet)
    except OSError:  # no name of a hub either
        file = None
    if file is None:
        raise FileNotFoundError(
            f"the config.json of {init} is not on this machine; fetch it (hf download {init} config.json) or name a "
            "directory with --set model.init=..."
        )


def _drawn(config: RunConfig) -> tuple[int, int, int]:
    """Tokens of a pass, rows of logits read and tokens that gradients flow through, on average over a few full rows."""
    count, length = 8, config.data.length
    doc = torch.arange(count)[:, None].expand(count, length).contiguous()
    batch = {"input_ids": torch.zeros_like(doc), "doc": doc, "prompt": torch.arange(length).expand(count, length) < 1}
    seen: list[tuple[int, int, int]] = []
    adapter = config.model.adapter

    def note(ids: Tensor, tokens: Any, read: Tensor, **_: Any) -> Tensor:
        there = tokens.doc >= 0
        learning = there & tokens.noisy if adapter is not None and adapter.kind == "noisy" else there
        seen.append((int(there.sum()), len(read), int(learning.sum())))
        return torch.zeros(len(read))

    objective = objective_of(config)
    if config.growth is not None:  # the layout that training ends with
        objective = replace(objective, layout=config.growth.layout(config.layout, 1.0, 0.999))
    objective.terms(note, batch, config.model.alignment, 1, config.seed)
    tokens, reads, learning = seen[0]
    return tokens // count, reads // count, learning // count


def _kept(network: PreTrainedModel, config: RunConfig, rows: int, tokens: int) -> tuple[int, int] | None:
    """Bytes that a pass keeps for its backward, and that the backward of a layer has beside them (taken as twice what
    a layer keeps: gradients and temporaries); None where the network does what the meta device cannot."""
    low = config.train.mixed_precision == "bf16"
    network = network.to(torch.bfloat16 if low else getattr(torch, config.model.dtype))
    if config.model.adapter is not None:  # a layer that learns nothing keeps no input
        network.requires_grad_(False)
        for name in adapted_layers(network, config.model.adapter):
            network.get_submodule(name).requires_grad_(True)
        network.get_input_embeddings().requires_grad_(True)
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = network.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    total, layers = sum(held.values()), network.config.get_text_config().num_hidden_layers
    if config.train.gradient_checkpointing:
        stream = alive.last_hidden_state
        return layers * stream.numel() * stream.element_size() + total // layers, 2 * total // layers
    return total, 2 * total // layers


def _flops_of_row(
    network: PreTrainedModel, config: RunConfig, tokens: int, reads: int, learning: float, trained: float
) -> float:
    """Forward and backward of one row; attention over all pairs of tokens. learning: share of the tokens that gradients
    flow through; trained: of the parameters."""
    text = network.config.get_text_config()
    experts = next((n for name in _EXPERTS if (n := getattr(text, name, None))), 0)
    share = getattr(text, "num_experts_per_tok", experts) / max(experts, 1)
    embedding = network.get_input_embeddings().weight
    products = sum(
        p.numel() * (share if p.ndim == 3 and len(p) == experts else 1)  # a stack of experts, few of which work
        for p in network.base_model.parameters()
        if p.ndim > 1 and p is not embedding
    )
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    forward = 2 * products * tokens + 4 * width * text.num_hidden_layers * tokens**2
    head = 2 * _vocabulary(network) * text.hidden_size * reads
    backward = 1 + min(trained, 1.0)  # of the inputs, and of what is trained
    again = 1 if config.train.gradient_checkpointing else 0
    return forward * (1 + learning * (again + backward)) + head * (2 + backward)  # the head's logits are computed again


def _adapted(network: PreTrainedModel, settings: Adapter) -> int:
    """Parameters of an adapter: two thin matrices for each linear layer, and the [MASK] row."""
    total = int(network.config.get_text_config().hidden_size)
    for name in adapted_layers(network, settings):
        total += settings.rank * sum(network.get_submodule(name).weight.shape)
    return total


def _gathered(network: PreTrainedModel, config: RunConfig, width: int) -> tuple[int, int]:
    """Bytes that a process holds whole while it works on a layer: weights of the root and of two layers, and gradients
    of the root (the head's come first and stay) and of a layer, which is summed up in another buffer."""
    low, summed = (2, 4) if config.train.mixed_precision == "bf16" else (width, width)
    stacks = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m)]
    layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    inside = sum(p.numel() for p in layers.parameters())
    root, layer = sum(p.numel() for p in network.parameters()) - inside, inside // len(layers)
    return (root + 2 * layer) * low, (root + layer) * low + layer * summed


def _steps(config: RunConfig, budget: Budget) -> int | None:
    if config.train.steps is not None:
        return config.train.steps
    if config.train.tokens is not None:
        return max(1, round(config.train.tokens / (budget.rows * config.data.length)))
    return None


def _vocabulary(network: PreTrainedModel) -> int:
    return int(network.get_input_embeddings().weight.shape[0])


def _measured_tflops(size: int = 1024, seconds: float = 0.3) -> float:
    """What matrix products reach on the first device here, in float32 on a CPU and bfloat16 on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else size
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ a
    wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        wait()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - began) / 1e12


class _Kept(torch.autograd.Function):
    """Keeps queries, keys, values and the output for a backward that never comes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


def _keeps(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    out: Tensor = _Kept.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_KEEPS, _keeps)


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
