"""The configuration tree: presets, --set, and one-line errors that name the nearest key."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from blockdiff.config import PRESETS, ConfigError, load_config, make_config
from blockdiff.distributions import ScaleMixture
from blockdiff.explain import explanation

BASE = {"output": "x", "model": {"init": "a"}, "data": {"train": "t"}, "train": {"steps": 3}}


def changed(**changes):
    tree = copy.deepcopy(BASE)
    for dotted, value in changes.items():
        *groups, last = dotted.split("__")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    return tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layuot": {}}, "unknown key layuot; did you mean layout?"),
        ({"data__lenght": 3}, "unknown key data.lenght; did you mean length?"),
        ({"layout": {"kind": "fixed", "sise": 3}}, "unknown key layout.sise; did you mean size?"),
        ({"noise": {"kind": "clipped", "lo": 0.1, "high": 0.2}}, "unknown key noise.lo; did you mean low?"),
        ({"layout": {"kind": "fixd", "size": 3}}, "'fixd' found using 'kind' does not match any of the expected tags"),
        ({"layout": {"kind": "fixed"}}, "layout.size is missing; set it in the file or with --set layout.size=..."),
        ({"layout": {"kind": "fixed", "size": 0}}, "block size 0 is not possible; give 1 or more"),
        ({"layout": {"kind": "fixed", "size": 600}}, "block size 600 is longer than the data"),
        ({"layout": {"kind": "mixture", "shares": {4: -1}}}, "shares {4: -1.0} must be positive"),
        ({"train__steps": None}, "train: give exactly one of steps, tokens, minutes"),
        ({"train__minutes": 2}, "train: give exactly one of steps, tokens, minutes"),
        ({"train__learning_rate": "fast"}, "train.learning_rate: Input should be a valid number"),
        ({"objective__ar_weight": -1}, "objective.ar_weight: Input should be greater than or equal to 0 (got -1)"),
        ({"model__prediction": "shft"}, "model.prediction: Input should be 'same' or 'shift' (got 'shft')"),
        ({"model__init": None}, "model: give either init (a checkpoint) or architecture (from scratch)"),
        ({"preset": "abdd"}, "preset 'abdd' is unknown; did you mean abd?"),
        (
            {"objective__ar_weight": 0.5, "model__clean_context": "block_causal"},
            "objective.ar_weight needs model.clean_context = context_causal",
        ),
    ],
)
def test_errors_are_one_line_and_name_the_key(changes, message):
    with pytest.raises(ConfigError) as caught:
        make_config(changed(**changes), "run.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("run.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_resolved_config_reads_back_as_itself():
    config = make_config(changed(preset="abd", layout={"kind": "scale_mixture", "max_size": 16, "atoms": {4: 0.2}}))
    assert make_config(yaml.safe_load(config.dump())) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_lie_beneath_what_the_user_says(preset):
    config = make_config(changed(preset=preset))
    assert config.layout.kind == PRESETS[preset].tree["layout"]["kind"]
    over = make_config(changed(preset=preset, layout={"kind": "fixed", "size": 7}))
    assert (over.layout.kind, over.layout.largest_named) == ("fixed", 7)


def test_part_of_a_preset_can_be_changed():
    config = make_config(changed(preset="abd", layout={"max_size": 64}))
    assert config.layout == ScaleMixture(64, {4: 0.1, 8: 0.1, 16: 0.1})


def test_set_changes_keys_with_yaml_values(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    config = load_config(path, ["data.length=64", "layout={kind: fixed, size: 4}", "eval.block_sizes=[1, 2]"], seed=7)
    assert (config.data.length, config.layout.largest_named, config.eval.block_sizes, config.seed) == (64, 4, [1, 2], 7)
    with pytest.raises(ConfigError, match=r"--set data\.length: write it as key\.subkey=value"):
        load_config(path, ["data.length"])
    with pytest.raises(ConfigError, match="output is a value, not a group of keys"):
        load_config(path, ["output.x=1"])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"a\.yaml: not YAML"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="a config is a mapping"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_explained(path):
    missing = ["data.train=x"] if path.stem != "adapt-stories260K" else []
    missing += ["model.init=x"] if path.stem in ("adapt", "adapt-frozen", "draft", "joint-draft", "sft") else []
    text = explanation(load_config(path, missing))
    assert "share of the tokens by block size" in text
    assert "■" in text
