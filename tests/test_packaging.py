"""The wheel and the sdist: what is in them, and that the quick start runs from nothing but the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pages
import pytest
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
