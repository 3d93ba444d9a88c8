"""Low-rank adapters (LoRA, through `peft`) with a trained [MASK] row.

lora    the whole model is adapted; a saved checkpoint holds the merged weights and is an ordinary one.
noisy   the adapter and the [MASK] row act on noisy-stream passes only: the clean stream runs with the adapter off and
        without gradient, so the AR model stays, bit for bit, the checkpoint that the user brought. Prefill, commits and
        block size 1 are that model's own. A training step costs an AR forward plus a forward and backward of the noisy
        stream. The checkpoint holds the untouched weights and `adapter.safetensors` beside them. (Ours; Orthrus,
        arXiv 2605.12825, is the same split with a module of its own.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blockdiff.attention import UnsupportedModel
from blockdiff.distributions import FORBID_EXTRA

if TYPE_CHECKING:
    from peft import PeftModel

FILE = "adapter.safetensors"


@dataclass(frozen=True)
class Adapter:
    """rank, alpha and dropout of LoRA; targets: ends of module names, none for every linear layer but the head."""

    kind: Literal["lora", "noisy"]
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    __pydantic_config__ = FORBID_EXTRA

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.kind not in ("lora", "noisy"):
            raise ValueError(f"adapter kind {self.kind!r} is unknown; known: lora, noisy")
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError("adapter: rank must be 1 or more, alpha above 0 and dropout in [0, 1)")


class AttachedAdapter(nn.Module):
    """An adapter in a network: the low-rank layers live in the network, the [MASK] row, as embedded, here."""

    def __init__(self, backbone: PreTrainedModel, settings: Adapter, mask_id: int) -> None:
        super().__init__()
        self.settings, self.mask_id = settings, mask_id
        self._peft: list[PeftModel] = [_inject(backbone, settings)]  # in a list: no submodule of ours
        embedding = backbone.get_input_embeddings()
        with torch.no_grad():
            row = embedding(torch.tensor([mask_id], device=backbone.device))[0]
        self.mask_row = nn.Parameter(row.detach().clone())
        self._scale = row.detach().norm() / embedding.weight[mask_id].detach().norm()  # Gemma 3 scales inside
        embedding.register_forward_hook(self._mask_embedding)

    @property
    def frozen(self) -> bool:
        """Whether the clean stream runs without the adapter."""
        return self.settings.kind == "noisy"

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the untouched network."""
        with self._peft[0].disable_adapter():
            yield

    def plain_state(self, backbone: PreTrainedModel) -> dict[str, Tensor]:
        """The network's weights under their own names: untouched for `noisy`, merged for `lora`."""
        merged = {}
        for name, tensor in backbone.state_dict().items():
            if "lora_" in name:
                continue
            owner, _, leaf = name.rpartition(".")
            if owner.endswith(".base_layer") and leaf == "weight" and not self.frozen:
                layer: Any = backbone.get_submodule(owner.removesuffix(".base_layer"))
                tensor = tensor + layer.get_delta_weight("default").to(tensor.dtype)
            merged[name.replace(".base_layer.", ".")] = tensor
        if not self.frozen:
            weight = backbone.get_input_embeddings().weight
            row = (self.mask_row / self._scale).to(weight.dtype)
            for name, tensor in list(merged.items()):  # tied heads share the row
                if tensor.data_ptr() == weight.data_ptr():
                    merged[name] = tensor.index_copy(0, torch.tensor([self.mask_id], device=tensor.device), row[None])
        return {name: tensor.detach().contiguous() for name, tensor in merged.items()}

    def save(self, directory: Path, backbone: PreTrainedModel) -> None:
        """Write the adapter alone."""
        tensors = {name: tensor for name, tensor in backbone.state_dict().items() if "lora_" in name}
        tensors["mask_row"] = self.mask_row.detach()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FILE)

    def load(self, directory: Path, backbone: PreTrainedModel) -> None:
        """Read what `save` wrote; raises UnsupportedModel where it belongs to another network."""
        tensors: Mapping[str, Tensor] = load_file(directory / FILE)
        own = {name for name in backbone.state_dict() if "lora_" in name} | {"mask_row"}
        if own != set(tensors):
            odd = sorted(own ^ set(tensors))[0]
            raise UnsupportedModel(f"{directory / FILE}: not the adapter of this model (first difference: {odd})")
        with torch.no_grad():
            self.mask_row.copy_(tensors["mask_row"])
        backbone.load_state_dict({n: t for n, t in tensors.items() if n != "mask_row"}, strict=False)

    def _mask_embedding(self, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        masked = inputs[0] == self.mask_id
        return torch.where(masked[..., None], self.mask_row.to(output.dtype), output)


def linear_names(backbone: PreTrainedModel) -> list[str]:
    """Names of the linear layers that an adapter may act on: all but the language-model head."""
    head = backbone.get_output_embeddings()
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _inject(backbone: PreTrainedModel, settings: Adapter) -> PeftModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UnsupportedModel("adapter: needs the package peft; pip install 'blockdiff[lora]'") from error
    names = linear_names(backbone)
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise UnsupportedModel(f"adapter.targets: no linear layer is called {target}; this model has {known}")
    chosen = [
        name
        for name in names
        if not settings.targets or any(name == t or name.endswith(f".{t}") for t in settings.targets)
    ]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=chosen,
        fan_in_fan_out=any(isinstance(backbone.get_submodule(name), Conv1D) for name in chosen),
    )
    # peft asks for an attribute that newer transformers call deprecated; its random start must not move ours
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        return get_peft_model(backbone, config)
