"""The memory that `blockdiff explain` says a training step takes, over what it takes, for networks of several shapes.

    python benchmarks/memory_estimate.py --json docs/speed/estimate.json

One step (pass, backward, AdamW) in a process of its own: the highest resident memory above what the process held before
the model was built.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from blockdiff.bench.memory import peak_memory
from blockdiff.building import allow_checkpointing, objective_of
from blockdiff.config import RunConfig, make_config
from blockdiff.estimate import estimate
from blockdiff.files import write_json
from blockdiff.loading import attach, from_architecture
from blockdiff.runtime import record

_LLAMA = {"type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
_SHAPES: dict[str, dict[str, Any]] = {
    "llama 8 layers": {**_LLAMA, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8},
    "llama wide": {**_LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4},
    "gpt_neox": {
        "type": "gpt_neox",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
    },
}
_WAYS: dict[str, dict[str, Any]] = {"": {}, "checkpointed": {"gradient_checkpointing": True}}


def config_of(shape: str, way: str) -> RunConfig:
    """A configuration of that network and way, on rows that nobody reads."""
    return make_config(
        {
            "output": "unused",
            "model": {"architecture": _SHAPES[shape], "vocabulary": 4096},
            "data": {"train": "unused", "length": 512},
            "layout": {"kind": "fixed", "size": 16},
            "train": {"steps": 1, "rows": 4, **_WAYS[way]},
        }
    )


class Step:
    """One optimizer step on random rows; built empty, since the model is what is measured, too."""

    def __init__(self, shape: str, way: str) -> None:
        self.config = config_of(shape, way)

    def __call__(self) -> None:
        config = self.config
        assert config.model.architecture is not None
        model = attach(
            from_architecture(config.model.architecture, config.model.vocabulary + 1, 0), None, add_mask=True
        )
        if config.train.gradient_checkpointing:
            allow_checkpointing(model.backbone)
        model.train()
        rows, length = config.train.rows, config.data.length
        batch = {
            "input_ids": torch.randint(4096, (rows, length)),
            "doc": torch.arange(rows)[:, None].expand(rows, length).contiguous(),
            "prompt": (torch.arange(length) < 1).expand(rows, length).contiguous(),
        }
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):  # the optimizer's memory exists from the first step on
            terms = objective_of(config).terms(model, batch, config.model.alignment, model.spec.mask_id or 0, 0)
            torch.autograd.backward(terms.loss(terms.tokens.sum(), 0.0))
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for shape in _SHAPES:
        for way in _WAYS:
            said = estimate(config_of(shape, way)).bytes / 1e6
            _, took = peak_memory(Step, shape, way)
            rows.append({"network": f"{shape} {way}".strip(), "said_mb": said, "took_mb": took, "ratio": said / took})
            print("{network:28}  said {said_mb:8.1f} MB  took {took_mb:8.1f} MB  ratio {ratio:.2f}".format(**rows[-1]))
    if options.json is not None:
        write_json(options.json, record("memory_estimate", 0, rows=rows))


if __name__ == "__main__":
    main()
