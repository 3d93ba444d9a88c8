"""The shape of the code: imports go one way, files stay small, the public names exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import blockdiff

ROOT = Path(blockdiff.__file__).parent
# each layer may import the ones before it; modules of one layer as listed in SIDEWAYS only
LAYERS = [
    {"rng", "files", "runtime", "layout", "distributions", "noise", "masks", "objectives", "reference", "decode"}
    | {"cross_entropy", "shards"}
    | {"partitions", "masking", "ablations", "curriculum", "draws", "passes", "coverage", "statistics", "arithmetic"}
    | {"own_layouts"},
    {
        "attention",
        "tiled",
        "reading",
        "adapters",
        "model",
        "probe",
        "loading",
        "conversion",
        "dit",
        "llada2",
        "families",
        "foreign",
        "inspecting",
        "export",
        "prompting",
        "data",
        "datafiles",
        "parts",
        "longtext",
        "tokenizer",
        "presets",
        "config",
        "progress",
    },
    {"trainer", "engine", "evaluate", "explain", "diffusion_gemma"},
    {
        "building",
        "run_directory",
        "training",
        "api",
        "report",
        "demo",
        "experiment",
        "sample",
        "owntext",
        "bench",
        "frontier",
        "curves",
    }
    | {"harness", "trace", "batch", "rays", "budget", "estimate", "recipes"},
    {"serve", "chat"},
    {"cli_options", "cli_data", "cli_evaluate", "cli_experiment", "cli_generate", "cli_bench", "cli_tasks", "cli_serve"}
    | {"cli", "cli_chat", "cli_batch", "cli_checkpoints", "cli_recipes", "__main__"},
]
MATH = {"rng", "layout", "distributions", "noise", "masks", "objectives", "reference", "decode", "curriculum"}
MATH |= {"coverage", "cross_entropy", "draws", "passes", "partitions", "masking", "ablations", "own_layouts"}


def modules() -> dict[str, set[str]]:
    """Top-level part of each module -> the parts of blockdiff that it imports, anywhere in its code."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        names = found.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "blockdiff":
                inside = (node.module or "").split(".")[1:2]
                names.update(inside or (alias.name for alias in node.names))
        names.discard(part)
    return found


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_imports_go_one_way():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    for part, imports in modules().items():
        assert part in layer, f"{part} has no layer"
        for other in imports - {"__version__"}:
            assert layer[other] <= layer[part], f"{part} imports {other}, which lies above it"


def test_neighbours_that_must_not_know_each_other():
    imports = modules()
    assert not {"engine", "evaluate"} & imports["trainer"]
    assert "trainer" not in imports["engine"] | imports["evaluate"]
    assert imports["report"] <= {"files"}
    commands = {"__main__"} | {name for name in imports if name.startswith("cli")}
    assert not any((commands | {"demo"}) & used for name, used in imports.items() if name not in commands)
    for name in ("render.py", "plots.py"):  # tables and plots come from the saved JSON and nothing else
        assert "from blockdiff" not in (ROOT / "experiment" / name).read_text()
    assert imports["coverage"] <= {"distributions", "noise", "masking", "objectives", "decode", "partitions"}


def test_the_mathematics_knows_torch_only():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0].removesuffix(".py") in MATH:
            allowed = {"torch", "blockdiff"} | set(sys.stdlib_module_names)
            if path.name == "automaton.py":  # patterns and schemas are read by libraries made for it
                allowed |= {"interegular", "outlines_core", "numpy"}
            assert imported_packages(path) <= allowed, path


def test_there_is_no_modeling_file_and_no_drawer_for_everything():
    names = {path.name for path in ROOT.rglob("*.py")}
    assert not [
        name for name in names if name.startswith("modeling") or name in ("utils.py", "common.py", "helpers.py")
    ]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_person_can_hold_a_file_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 430


def test_public_names_exist_and_importing_is_cheap():
    for name in blockdiff.__all__:
        assert getattr(blockdiff, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        blockdiff.nothing  # noqa: B018
    code = "import sys, blockdiff; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_changelog_names_the_version():
    changelog = (ROOT.parents[1] / "CHANGELOG.md").read_text()
    assert f"## {blockdiff.__version__}" in changelog
