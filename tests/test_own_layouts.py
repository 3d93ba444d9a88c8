"""A layout distribution of the user's own: in a configuration, in training, in a checkpoint, in coverage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import yaml
from conftest import tiny_config
from test_cli import run

import blockdiff
from blockdiff.config import ConfigError, make_config
from blockdiff.distributions import Fixed, from_dict, to_dict
from blockdiff.own_layouts import OWN_LAYOUTS, LayoutDistribution, Own
from blockdiff.partitions import tabulate


@dataclass(frozen=True)
class Opening(LayoutDistribution):
    """A first block of `first` tokens, then blocks of `rest`."""

    first: int = 2
    rest: int = 4
    kind: Literal["opening"] = "opening"

    @property
    def largest_named(self) -> int:
        return max(self.first, self.rest)

    def starts(self, length: int) -> torch.Tensor:
        place = torch.arange(length)
        return (place == 0) | ((place >= self.first) & ((place - self.first) % self.rest == 0))

    def draw(self, lengths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self.starts(int(lengths.max())).expand(len(lengths), -1).clone()

    def configurations(self, length: int) -> torch.Tensor:
        return tabulate(self.starts(length)[None], torch.ones(1, dtype=torch.float64))


@pytest.fixture
def opening(monkeypatch):
    monkeypatch.setitem(OWN_LAYOUTS, "opening", Opening)


def test_it_draws_and_tabulates_as_the_class_does(opening):
    own, generator = Own("opening", {"first": 3}), torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 5])
    assert own.draw(lengths, generator)[0].int().tolist() == [1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert torch.equal(own.configurations(9), Opening(3).configurations(9))
    assert not torch.equal(own.configurations(9), Own("opening").configurations(9))
    grid = Own("opening", {"first": 4})
    assert torch.equal(grid.token_share(9), Fixed(4).token_share(9))
    assert from_dict(to_dict(own)) == own != grid


def test_a_model_is_trained_saved_and_loaded_with_it(opening, tmp_path, monkeypatch):
    config = make_config(tiny_config(tmp_path, layout={"kind": "own", "name": "opening"}, train={"steps": 2}))
    assert make_config(tiny_config(tmp_path)).layout != config.layout
    run = blockdiff.train(config)
    model = blockdiff.load(run / "checkpoint")
    assert model.spec.layout == Own("opening")
    assert model.coverage(prompt_tokens=3, max_new_tokens=4, block_size=4).covered
    assert not model.coverage(prompt_tokens=4, max_new_tokens=4, block_size=4).covered
    monkeypatch.delitem(OWN_LAYOUTS, "opening")
    with pytest.raises(blockdiff.UnsupportedModel, match="no distribution is called 'opening' in this program"):
        blockdiff.load(run / "checkpoint")


def test_what_is_not_registered_or_does_not_fit_is_one_line(opening, tmp_path):
    for layout, message in (
        ({"kind": "own", "name": "closing"}, r"'closing' in this program \(registered are opening\)"),
        ({"kind": "own", "name": "opening", "settings": {"last": 2}}, "opening does not take these settings"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            make_config(tiny_config(tmp_path, layout=layout))
        assert "\n" not in str(caught.value)


def test_an_error_of_the_class_is_one_line_and_costs_no_earlier_run(opening, tmp_path, capsys):
    tree = tiny_config(tmp_path, layout={"kind": "own", "name": "opening"}, train={"steps": 1})
    before = blockdiff.train(make_config(tree)) / "checkpoint" / "model.safetensors"
    file = tmp_path / "config.yaml"
    for settings, message in (({"rest": 0}, "ZeroDivisionError"), ({"first": "two"}, "TypeError")):
        tree["layout"] = {"kind": "own", "name": "opening", "settings": settings}
        file.write_text(yaml.safe_dump(tree))
        code, _, error = run("train", file, "--overwrite", capsys=capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert "layout own: opening does not take these settings" in error
        assert message in error
        assert before.exists()


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        (
            "draw",
            lambda self, lengths, generator: torch.ones(1, 3, dtype=torch.bool),
            r"draw gives no block starts, bool",
        ),
        ("configurations", lambda self, length: torch.zeros(length), r"configurations gives no table \[5, 6\]"),
    ],
)
def test_a_class_that_gives_something_else_is_refused(opening, monkeypatch, method, wrong, message):
    Own("opening")
    monkeypatch.setattr(Opening, method, wrong)
    with pytest.raises(ValueError, match=message):
        Own("opening")
