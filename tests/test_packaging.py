"""The wheel and the sdist: what is in them, and that the quick start runs from nothing but the wheel."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pages
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import ROOT

import blockdiff
from blockdiff.recipes import FOLDERS


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command, which must succeed; this process's PYTHONPATH is not handed on."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def shipped() -> set[str]:
    """The files that `blockdiff recipes` hands out."""
    return {
        file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of this tree and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def names(built) -> set[str]:
    return set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())


def test_the_wheel_holds_the_package_and_nothing_else(names):
    source = {
        file.relative_to(ROOT / "src").as_posix()
        for file in (ROOT / "src" / "blockdiff").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    recipes = {f"blockdiff/recipe_files/{recipe}" for recipe in shipped()}
    about = f"blockdiff-{blockdiff.__version__}.dist-info"
    files = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == source | recipes | files
    assert {"blockdiff/py.typed", "blockdiff/serve/static/index.html", "blockdiff/report/static/page.html"} <= source


def test_the_metadata_says_what_pyproject_says(built):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    text = wheel.read(f"blockdiff-{blockdiff.__version__}.dist-info/METADATA").decode()
    fields = Parser().parsestr(text)
    assert (fields["Version"], fields["License-Expression"]) == (blockdiff.__version__, "Apache-2.0")
    assert fields["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in fields.get_all("Classifier")
    assert {"serve", "lora", "constrain", "evaluation", "docs"} <= set(fields.get_all("Provides-Extra"))


def test_the_sdist_holds_what_the_wheel_is_made_of_and_the_tests(built, names):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"src/{name}" for name in names if name.endswith(".py")} <= inside
    assert shipped() | {"LICENSE", "README.md", "pyproject.toml", "mkdocs.yml", "tests/pages.py"} <= inside
    outside = [name for name in inside if re.match(r"(runs|dist|build|site|\.venv|\.git/|\.ci)", name)]
    assert not outside


def test_the_quick_start_runs_from_the_wheel_alone(built, tmp_path):
    """In a fresh environment that sees this one's libraries but not this tree's blockdiff, in an empty folder."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    # a path in a .pth file is searched, and the .pth files in it (an editable blockdiff) are not read
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (Path(paths["purelib"]) / "libraries.pth").write_text("\n".join(libraries))
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, *install, next(built.glob("*.whl")), cwd=tmp_path)

    assert f"pip install dist/{next(built.glob('*.whl')).name}" in pages.INSTALLED.read_text()
    folder = tmp_path / "empty"
    folder.mkdir()
    assert run(python.with_name("blockdiff"), "--version", cwd=folder).strip() == blockdiff.__version__
    follow = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import blockdiff, pages\n"
        "print('from', blockdiff.__file__)\n"
        "ran = pages.follow(pages.INSTALLED.read_text(), pages.budgeted)\n"
        "print(ran, 'commands')"
    )
    said = run(python, "-c", follow, cwd=folder, OMP_NUM_THREADS="1")
    assert f"from {tmp_path / 'venv'}" in said
    assert re.search(r"^([89]|1\d) commands$", said, re.M)
    assert (folder / "runs" / "scratch" / "checkpoint" / "block_diffusion.json").exists()
    assert (folder / "configs" / "adapt.yaml").read_bytes() == (ROOT / "configs" / "adapt.yaml").read_bytes()


def test_recipes_are_listed_and_written_over_nothing(tmp_path, capsys):
    assert pages.run_here(["blockdiff", "recipes"]) == 0
    listed = capsys.readouterr().out
    assert {line.split(" ")[0] for line in listed.splitlines()} == set(shipped()) - {
        name for name in shipped() if name.startswith("examples/")
    }
    assert "A small block diffusion model from scratch" in listed

    mine = tmp_path / "configs" / "adapt.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert pages.run_here(["blockdiff", "recipes", str(tmp_path)]) == 0
    assert f"{len(shipped()) - 1} files written to {tmp_path}, 1 were there and stay" in capsys.readouterr().out
    assert mine.read_text() == "mine"
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert written == shipped()


OPTIONAL = {"tensorboard", "mauve"}  # used where they are installed, and in no extra
NEEDS_EXTRA = ("serve/", "harness.py", "rays.py")  # modules that only an extra's commands load


def imports(node: ast.AST, at_once: bool = True) -> Iterator[tuple[str, bool]]:
    """The top-level packages that are imported below a node, and whether that happens when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], at_once) for alias in child.names)
        if isinstance(child, ast.ImportFrom) and child.module:
            yield child.module.partition(".")[0], at_once
        yield from imports(child, at_once and not isinstance(child, ast.FunctionDef | ast.Try))


def undeclared(project: dict[str, Any], source: Path = ROOT / "src" / "blockdiff") -> set[str]:
    """Packages that are imported and that nothing a user installs names: what a module needs when it is loaded must
    stand in the dependencies, what it imports later may stand in an extra."""
    plain = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    everything = plain | {canonicalize_name(Requirement(line).name) for line in extras}
    owners, found = packages_distributions(), set()
    for file in source.rglob("*.py"):
        at_home = file.relative_to(source).as_posix().startswith(NEEDS_EXTRA)
        for name, at_once in imports(ast.parse(file.read_text())):
            if name in sys.stdlib_module_names | OPTIONAL | {"blockdiff"}:
                continue
            own = {canonicalize_name(owner) for owner in owners.get(name, [name])}
            if not own & (plain if at_once and not at_home else everything):
                found.add(name)
    return found


def test_every_package_that_is_imported_is_declared():
    """The quick start above runs among the developer's packages, and would not miss one that pyproject lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert undeclared(project) == set()
    for line, name in (("pyyaml", "yaml"), ("rich", "rich"), ("psutil", "psutil"), ("safetensors", "safetensors")):
        kept = [other for other in project["dependencies"] if not other.startswith(line)]
        assert undeclared({**project, "dependencies": kept}) == {name}
    extras = {**project["optional-dependencies"], "lora": [], "serve": []}
    assert {"peft", "fastapi", "uvicorn"} <= undeclared({**project, "optional-dependencies": extras})
    moved = {**project["optional-dependencies"], "lora": ["numpy"]}  # an extra is too late for what is always loaded
    kept = [line for line in project["dependencies"] if not line.startswith("numpy")]
    assert undeclared({**project, "dependencies": kept, "optional-dependencies": moved}) >= {"numpy"}
