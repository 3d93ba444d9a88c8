"""blockdiff: train, adapt, measure, decode and serve block diffusion language models.

model = blockdiff.load("runs/demo/checkpoint")
model.generate(["The with statement"])[0].text
blockdiff.bound(model, ["some text"], block_sizes=[1, 4, 16])
blockdiff.train("configs/adapt.yaml")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockdiff.api import Model, bound, load, load_writer, train
    from blockdiff.attention import UnsupportedModel
    from blockdiff.config import ConfigError
    from blockdiff.datafiles import DataError
    from blockdiff.decode import Policy, Sampling

__version__ = "0.1.0"
__all__ = ["ConfigError", "DataError", "Model", "Policy", "Sampling", "UnsupportedModel"]
__all__ += ["bound", "load", "load_writer", "train"]

_HOMES = {
    "ConfigError": "blockdiff.config",
    "DataError": "blockdiff.datafiles",
    "Policy": "blockdiff.decode",
    "Sampling": "blockdiff.decode",
    "UnsupportedModel": "blockdiff.attention",
}


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `import blockdiff` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'blockdiff' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "blockdiff.api")), name)
