"""The bash and Python blocks of README and docs are run here, and what they print compared (the quick start in
test_packaging.py)."""

from __future__ import annotations

import re
import subprocess

import pages
import pytest
from pages import PAGES, ROOT

from blockdiff.decode import PARTS
from blockdiff.experiment.page import page as page_of_results
from blockdiff.own_layouts import OWN_LAYOUTS

FOLLOWED = [page for page in PAGES if page != pages.INSTALLED and pages.blocks(page.read_text())]


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page, trained, tmp_path, monkeypatch, request):
    """Its blocks in order, in one folder, as a reader would."""
    pages.workspace(tmp_path, trained, qwen3="Qwen3-0.6B-Base" in page.read_text())
    monkeypatch.chdir(tmp_path)
    for registry in (PARTS, OWN_LAYOUTS):  # pages show how to add to them
        kept = dict(registry)
        request.addfinalizer(lambda registry=registry, kept=kept: (registry.clear(), registry.update(kept)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pages.follow(page.read_text())


def test_make_demo_is_the_demo():
    """Which test_cli.py runs with a small budget, and test_packaging.py from a wheel."""
    command = ["make", "--no-print-directory", "--dry-run", "demo", "DEMO=runs/mine", "DEMO_OPTIONS=--minutes 0.02"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ".venv/bin/blockdiff demo --out runs/mine --minutes 0.02"


def test_the_tests_that_pages_name_exist():
    for page in PAGES:
        for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text()):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{page.name}: {file}::{name}"


def test_the_page_of_results_is_made_from_the_saved_summaries():
    """Words beside them, every number from the JSON: an edited or outdated page fails."""
    folder = ROOT / "docs" / "results"
    assert (ROOT / "docs" / "results.md").read_text() == page_of_results(folder, "results")
    for summary in folder.glob("*.json"):
        assert (folder / f"{summary.stem}.png").exists()
        assert (ROOT / "experiments" / f"{summary.stem}.yaml").exists()
