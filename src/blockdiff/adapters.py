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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
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
        self._off = False
        self._clean: int | None = None
        self.version = 0  # of the sums of `prepare`
        self._sums: dict[Any, tuple[tuple[Any, ...], Tensor]] = {}
        self._layers: list[Any] = []
        if self.frozen:  # switched twice for every token that is decoded: peft's own switch takes longer than a pass
            for module in backbone.modules():
                if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                    object.__setattr__(module, "forward", partial(self._adapted, module))
                    self._layers.append(module)

    @property
    def frozen(self) -> bool:
        """Whether the clean stream runs without the adapter."""
        return self.settings.kind == "noisy"

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the untouched network."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    @contextmanager
    def after(self, clean: int) -> Iterator[None]:
        """Run the adapter on the tokens of a pass that follow its first `clean` ones."""
        self._clean = clean
        try:
            yield
        finally:
            self._clean = None

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
            filled = weight.index_copy(0, torch.tensor([self.mask_id], device=weight.device), row[None])
            # tied heads share it: one tensor under both names, so that it is saved once
            merged |= {name: filled for name, tensor in merged.items() if tensor.data_ptr() == weight.data_ptr()}
        return {name: tensor.detach().contiguous() for name, tensor in merged.items()}

    def save(self, directory: Path, backbone: PreTrainedModel) -> None:
        """Write the adapter alone."""
        tensors = {name: tensor for name, tensor in backbone.state_dict().items() if "lora_" in name}
        tensors["mask_row"] = self.mask_row.detach()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FILE)

    def load(self, directory: Path, backbone: PreTrainedModel) -> None:
        """Read what `save` wrote; raises UnsupportedModel where it belongs to another network."""
        try:
            tensors: Mapping[str, Tensor] = load_file(directory / FILE)
        except SafetensorError as error:
            raise UnsupportedModel(f"{directory / FILE}: damaged ({error}); copy it again") from None
        own = {name for name in backbone.state_dict() if "lora_" in name} | {"mask_row"}
        if own != set(tensors):
            odd = sorted(own ^ set(tensors))[0]
            raise UnsupportedModel(f"{directory / FILE}: not the adapter of this model (first difference: {odd})")
        shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items() if "lora_" in name}
        for name, shape in {**shapes, "mask_row": self.mask_row.shape}.items():
            if tensors[name].shape != shape:
                raise UnsupportedModel(
                    f"{directory / FILE}: not the adapter of this model ({name} is {list(tensors[name].shape)}, not "
                    f"{list(shape)})"
                )
        with torch.no_grad():
            self.mask_row.copy_(tensors["mask_row"])
        backbone.load_state_dict({n: t for n, t in tensors.items() if n != "mask_row"}, strict=False)

    def _adapted(self, layer: Any, x: Tensor) -> Tensor:
        """A layer with its low-rank part, on the tokens that it is switched on for."""
        if self._off:
            return layer.base_layer(x)
        if self._clean is not None:
            clean, noisy = x[:, : self._clean], x[:, self._clean :]
            return torch.cat([layer.base_layer(clean), self._summed(layer, noisy)], 1)
        return self._summed(layer, x)

    def _summed(self, layer: Any, x: Tensor) -> Tensor:
        weight = self._sums.get(layer) if torch.is_inference_mode_enabled() else None
        if weight is not None:
            return nn.functional.linear(x, weight[1], layer.base_layer.bias)
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        part: Tensor = up(down(layer.lora_dropout["default"](x.to(down.weight.dtype)))) * layer.scaling["default"]
        out: Tensor = layer.base_layer(x)
        return out + part.to(out.dtype)

    def prepare(self) -> None:
        """Before decoding: sum up layers whose low-rank part would cost more than a sixteenth of the layer."""
        for layer in self._layers if self.frozen else ():
            base, down, up = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if not isinstance(base, nn.Linear) or 16 * len(down) * sum(base.weight.shape) < base.weight.numel():
                continue
            version = (base.weight._version, down._version, up._version, base.weight.device, base.weight.dtype)
            if layer not in self._sums or self._sums[layer][0] != version:
                delta = (up.double() @ down.double()) * layer.scaling["default"]
                self.version += 1
                self._sums[layer] = (version, (base.weight.double() + delta).to(base.weight.dtype))

    def _mask_embedding(self, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        masked = inputs[0] == self.mask_id
        return torch.where(masked[..., None], self.mask_row.to(output.dtype), output)


def adapted_layers(backbone: PreTrainedModel, settings: Adapter) -> list[str]:
    """Names of the linear layers that an adapter acts on: its targets, or all but the language-model head.

    Raises UnsupportedModel for a target that names none.
    """
    head = backbone.get_output_embeddings()
    names = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    for target in settings.targets:
        if not any(_is_called(name, target) for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise UnsupportedModel(f"adapter.targets: no linear layer is called {target}; this model has {known}")
    return [name for name in names if not settings.targets or any(_is_called(name, t) for t in settings.targets)]


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _inject(backbone: PreTrainedModel, settings: Adapter) -> PeftModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UnsupportedModel("adapter: needs the package peft; pip install 'blockdiff[lora]'") from error
    chosen = adapted_layers(backbone, settings)
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
