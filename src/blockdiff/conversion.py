"""Checkpoints whose arithmetic a class of transformers has under other names: how config and weights become its own.

`blockdiff.dit` and `blockdiff.llada2` are such conversions; `blockdiff.families` says which family has which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from blockdiff.attention import UnsupportedModel

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """From a checkpoint's config.json and weights to those of a class in transformers.

    renamed: keys of the config that must be there, with transformers' names for them. only: keys that the class has no
    switch for, with the one value that it computes. ignored: keys that change nothing at inference. settings: what the
    class needs beside the renamed keys, a ValueError where they contradict each other. weights: a state dict of the
    checkpoint as the class has it, given its config; weights that it does not know keep their names, one that is
    missing is a KeyError.
    """

    renamed: Mapping[str, str]
    only: Mapping[str, Any]
    ignored: tuple[str, ...]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    weights: Callable[[State, PreTrainedConfig], State]

    @property
    def keys(self) -> set[str]:
        """Keys of the config that are understood."""
        return {*self.renamed, *self.only, *self.ignored}

    def config(self, where: str, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Transformers' settings for a config.json; raises UnsupportedModel where it asks for something else."""
        missing = sorted(key for key in self.renamed if key not in stated)
        if missing:
            raise UnsupportedModel(f"{where}: config.json does not say {', '.join(missing)}; take a whole copy")
        for key, value in self.only.items():
            if stated.get(key, value) != value:
                raise UnsupportedModel(
                    f"{where}: config.json, {key}: {stated[key]!r}; transformers has the parts for {value!r} alone"
                )
        taken = {name: stated[key] for key, name in self.renamed.items()}
        try:
            return taken | self.settings(stated)
        except (TypeError, ValueError) as error:
            raise UnsupportedModel(f"{where}: config.json contradicts itself or is damaged: {error}") from error
