"""The report: its sections from saved files, and the page in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml
from conftest import needs_browser
from test_cli import run

from blockdiff import cli, report

HOSTILE = "<img src=x onerror=alert(1)>"
SECTIONS = {
    "bound": "Bounds on the validation text",
    "coverage": "Coverage of what is asked by what was trained",
    "length": "Length",
    "generation": "Generation",
    "traces": "Decoding, step by step",
}


def wave(at: int) -> float:
    return 0.05 * math.sin(at)


def lengths() -> dict[str, Any]:
    ways, caches = ("AR", "b = 4"), ("full", "window")
    rows, texts, histogram = [], [], [[0, 3], [16, 20], [32, 9]]
    for number, (way, cache) in enumerate((way, cache) for way in ways for cache in caches):
        for place in range(8):
            where = {"way": way, "cache": cache, "start": 64 * place, "end": 64 * (place + 1)}
            bound = {"nats_per_token": 2.0 + 0.1 * number + wave(place), "se": 0.02, "se_mc": 0.01, "variance": 0.3}
            rows.append({**where, **bound, "block_size": 1, "bin": place, "tokens": 512, "documents": 8})
            judged = {"judge_nll": 2.5 + wave(place), "judge_nll_se": 0.1, "entropy": 4.5, "repeated_4grams": 0.02}
            texts.append({**where, **judged, "chunk": place, "texts": 16})
    pairs = [{"way": way, "cache": cache} for way in ways for cache in caches]
    mean = {"mean": 25.0, "sd": 8.0, "median": 24, "p90": 40, "unended": 2, "histogram": histogram}
    held = {"held": True, "difference": 0.01, "se": 0.004, "says": "within 0.05 nats"}
    undecided = {**pairs[0], **held, "held": None, "difference": 0.05}
    return {
        "command": "eval length",
        "invocation": "blockdiff eval length runs/a/checkpoint --json runs/a/results/length.json",
        "seed": 3,
        "trained_length": 64,
        "criterion": {"cache": "window", "below": 0.05, "entropy": 0.9},
        "rows": rows,
        "texts": texts,
        "lengths": [{**pair, **mean} for pair in pairs],
        "differences": [{**pair, "bin": at, "max_abs_difference": 1e-6 * (at + 1)} for pair in pairs for at in (0, 7)],
        "verdicts": [undecided, *({**pair, **held} for pair in pairs[1:])],
    }


def generations() -> dict[str, Any]:
    rows = []
    for way, budgets, shift in (("AR", (64,), 0.0), ("b = 8", (16, 64), 0.2)):
        for budget in budgets:
            for temperature in (0.7, 1.0, 1.2):
                quality = {"judge_nll": 2.0 + temperature + shift, "judge_nll_sd": 0.1, "judge_nll_se": 0.05}
                quality |= {"entropy": 4.0 + temperature, "entropy_sd": 0.03, "distinct_1": 0.4, "mauve": None}
                speed = {"forwards_per_text": 1.1 * budget, "tokens_per_forward": 64 / budget}
                nearest = {"texts": 64, "blank": 0, "groups": 4, "nearest_to_data": temperature == 1.0}
                rows.append({"way": way, "temperature": temperature, "budget": budget, **quality, **speed, **nearest})
    data = {"judge_nll": 3.0, "judge_nll_se": 0.04, "entropy": 5.0, "texts": 64}
    return {"command": "eval generation", "seed": 5, "judge": "a-judge", "data": data, "rows": rows}


def coverages() -> dict[str, Any]:
    cells = [([16, 31], [1, 1], 0.1, 0.2, 0.0), ([16, 31], [8, 15], 0.5, 0.1, 0.0), ([32, 63], [8, 15], 0.4, 0.0, 0.4)]
    keys = ("before", "size", "asked", "trained", "uncovered")
    rows = [dict(zip(keys, cell, strict=True)) for cell in cells]
    return {"command": "eval coverage", "seed": 0, "calls": 64, "uncovered": 0.4, "max_ratio": 5.0, "rows": rows}


def summaries() -> dict[str, Any]:
    rows = []
    for number, setting in enumerate(("plain", "changed")):
        places = [("bound", {"block_size": b, "offset": o, "left_bias": 0.0}) for b in (1, 4, 16) for o in (0, 1)]
        places += [("worst_offset", {"block_size": b}) for b in (4, 16)]
        places += [("gradient_noise", {"group": "all"}), ("exact_match", {"decode": "b8"})]
        for measure, place in places:
            by_seed = {str(seed): 1.0 + 0.1 * number + 0.01 * seed for seed in range(3)}
            errors = {"value": 1.01 + 0.1 * number, "sd": 0.01, "n": 3, "se": 0.03, "se_mc": 0.005, "by_seed": by_seed}
            counts = {"tokens": 900, "documents": 20, "draws": 2}
            rows.append({"setting": setting, "measure": measure, "place": place, **errors, "counts": counts})
    test = {"mean": 0.1, "n": 3, "se": 0.01, "t": 10.0, "p": 0.01, "ci": [0.06, 0.14]}
    where = {"block_size": 4, "offset": 0, "left_bias": 0.0}
    claim = {"says": "changed is worse", "source": "a paper", "setting": "changed", "baseline": "plain"}
    claim |= {"measure": "bound", "below": None, "above": 0.0, "outcome": "holds"}
    claim |= {"verdicts": [{"at": {"block_size": 4}, "outcome": "holds", **test}]}
    return {
        "command": "experiment",
        "seed": 0,
        "name": "ablation",
        "about": "One part changed.",
        "seeds": [0, 1, 2],
        "settings": {"plain": {}, "changed": {"noise.kind": "bernoulli"}},
        "rows": rows,
        "compare": [{"setting": "changed", "baseline": "plain", "measure": "bound", "place": where, **test}],
        "correlations": [{"group": "all", "place": where, "spearman": 0.5, "n": 4}],
        "claims": [claim, {**claim, "says": "changed is better", "outcome": "does not hold"}],
        "runs": [],
        "missing": [],
        "file": "experiments/ablation.yaml",
    }


def command(*arguments: object) -> int:
    """One command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["blockdiff", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """A folder of two runs with every results file, measured by the commands, and the summary of an experiment."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        shutil.copytree(trained, folder / name)
        model, results = folder / name / "checkpoint", folder / name / "results"
        valid = yaml.safe_load((folder / name / "config.yaml").read_text())["data"]["valid"]
        sizes = ["--block-sizes", "1,3,4,8", "--offsets", "0,1,2", "--draws", 2, "--seed", seed]
        assert command("eval", "bound", model, "--data", valid, *sizes, "--json", results / "bound.json") == 0
        asked = ["--prompt", "the cat", "--max-new-tokens", 12, "--block-size", 4, "--seed", seed]
        assert command("generate", model, *asked, "--prompt", "a dog", "--trace", results / "traces.json") == 0
        drafts = ["--lossless", "--policy", "fixed_count", "--trace", results / "traces-lossless.json"]
        assert command("generate", model, *asked, *drafts) == 0
        for file, made in (("length", lengths()), ("generation", generations()), ("coverage", coverages())):
            (results / f"{file}.json").write_text(json.dumps({**made, "seed": seed}))
    (folder / "summary.json").write_text(json.dumps(summaries()))
    return folder


def text_of(page: str, figure: str) -> str:
    """The HTML of one figure."""
    found = re.search(rf'<figure id="figure-{figure}">.*?</figure>', page, re.S)
    assert found is not None, f"no figure {figure}"
    return found[0]


def test_a_run_has_every_section_whose_file_is_there_and_no_other(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs / "first", folder)
    code, out, _ = run("report", folder, capsys=capsys)
    assert code == 0
    assert out.strip() == f"report: {folder / 'report.html'}"
    page = (folder / "report.html").read_text()
    pictures = re.findall(r'<figure id="figure-([^"]*)">\s*(?:<h3>[^<]*</h3>\s*)?<div class="scroll picture"', page)
    assert {"bounds", "off-grid", "coverage", "length", "length-texts", "frontier", "training"} <= set(pictures)
    assert sorted(file.stem for file in (folder / "figures").glob("*.png")) == sorted(pictures)
    for name, title in SECTIONS.items():
        assert f"<h2>{title}</h2>" in page
        for file in (folder / "results").glob(f"{name}*.json"):
            file.unlink()
    without = report.write(folder).read_text()
    assert not [title for title in SECTIONS.values() if f"<h2>{title}</h2>" in without]
    assert "<h2>Training</h2>" in without


def test_captions_say_what_how_many_seeds_errors_and_the_command(runs):
    page = report.write(runs / "second").read_text()
    bounds = text_of(page, "bounds")
    data = json.loads((runs / "second" / "results" / "bound.json").read_text())
    row = data["rows"][0]
    for words in ("Perplexity (upper bound) against block size", "seed 1", "95 % intervals", "clustered by document"):
        assert words in bounds
    assert f"{row['tokens']} scored tokens of {row['documents']} documents" in bounds
    assert f"blockdiff eval bound {runs}/second/checkpoint --data" in bounds
    assert "sizes between the powers of two: 3" in bounds
    for name in ("off-grid", "coverage", "length", "frontier", "frontier-speed", "traces-0"):
        figure = text_of(page, name)
        assert all(f"<p>{part}: " in figure for part in ("n", "Seeds", "Errors")), name
        assert "Made by <code>blockdiff " in figure, name
    assert "16 texts" in text_of(page, "length-texts")
    assert all(
        f">{words}<" in text_of(page, "length-verdicts") for words in ("held", "not decided", "+0.0100 ± 0.0040")
    )
    assert "64 texts a point in 4 groups; the data: 64 texts; judge a-judge" in text_of(page, "frontier")


def test_the_page_asks_no_host_for_anything(compared):
    page = compared.read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert link.startswith(("#", "data:")), link
    assert set(re.findall(r"url\(.", page)) <= {"url(#"}
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    stand_ins = ("#010203", "#fcfdfe", "#0072b2")
    assert not any(f": {colour}" in svg for svg in re.findall(r"<svg.*?</svg>", page, re.S) for colour in stand_ins)


def test_several_runs_are_one_page_with_a_colour_each(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("report", runs / "first", runs / "second", capsys=capsys)
    assert (code, out.strip()) == (0, "report: report.html")
    page = (tmp_path / "report.html").read_text()
    bounds = text_of(page, "bounds")
    for at, name in enumerate(("first", "second")):
        assert f">{name}</text>" in bounds
        assert f"stroke: var(--series-{at})" in bounds
    assert "var(--series-2)" not in bounds
    assert "first: seed 0; second: seed 1" in bounds
    assert "first: b = 4" in text_of(page, "length")
    assert not list(tmp_path.glob("*.png"))
    single = report.write(runs / "first", tmp_path / "single.html").read_text()
    assert "var(--series-1)" not in text_of(single, "bounds")


def test_differences_between_runs_are_paired_where_they_were_compared(runs, tmp_path):
    paths = [tmp_path / "first", tmp_path / "second"]
    files = [path / "results" / "bound.json" for path in paths]
    results = [json.loads((runs / path.name / "results" / "bound.json").read_text()) for path in paths]
    for path in paths:
        (path / "results").mkdir(parents=True)
        (path / "config.yaml").touch()
    for number, (file, result) in enumerate(zip(files, results, strict=True)):
        result["rows"] = [row for row in result["rows"] if row["block_size"] == 4 and row["offset"] == 0]
        result["rows"][0] |= {"nats_per_token": 2.0 + 0.1 * number, "se": 0.5, "tokens": 60, "documents": 3}
        file.write_text(json.dumps(result))

    def cells() -> list[str]:
        figure = text_of(report.compare(paths, tmp_path / "a.html").read_text(), "differences")
        return re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", figure)[5:]

    # not compared: the widest interval
    assert cells() == ["second − first", "block size 4", "+0.1000", "-1.8600 to +2.0600", "no"]
    row = {"block_size": 4, "other_block_size": 4, "nats_per_token": 0.1, "nats_ci": [0.06, 0.14]}
    files[1].write_text(json.dumps(results[1] | {"against": f"{paths[0]}/checkpoint", "compared": [row]}))
    assert cells() == ["second − first", "block size 4", "+0.1000", "+0.0600 to +0.1400", "yes"]
    # of another text there are no differences
    files[1].write_text(json.dumps(results[1] | {"data": ["another.jsonl"]}))
    assert "figure-differences" not in report.compare(paths, tmp_path / "a.html").read_text()


def test_one_file_of_results_is_a_page_too(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("report", runs / "first" / "results" / "length.json", capsys=capsys)
    assert (code, out.strip()) == (0, "report: report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Length</h2>" in page
    assert "eval length" in page
    assert "<h2>Generation</h2>" not in page
    assert not (tmp_path / "figures").exists()


def test_an_experiment_shows_both_errors_its_claims_and_its_tests(runs, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(runs / "summary.json", tmp_path / "out" / "summary.json")
    page = report.write(tmp_path / "out").read_text()
    assert (tmp_path / "out" / "figures" / "experiment-0-settings.png").stat().st_size > 5000
    claims = text_of(page, "experiment-0-claims")
    assert "changed is worse" in claims
    assert ">holds<" in claims
    assert ">does not hold<" in claims
    settings = text_of(page, "experiment-0-settings")
    for words in ("± sd over seeds", "± se of the draws", "gradient variance / |mean|²", "rank correlation", "+0.50"):
        assert words in settings, words
    assert "900 tokens, 20 documents, 2 draws" in settings
    assert "<td>1.0100</td><td>0.0100</td><td>0.0300</td><td>0.0050</td>" in settings
    assert "+0.1000 (+0.0600 to +0.1400)" in text_of(page, "experiment-0-differences")
    assert "Share of right answers" in text_of(page, "experiment-0-exact_match")
    assert "worst offset" in text_of(page, "experiment-0-offsets")
    assert "blockdiff experiment experiments/ablation.yaml" in settings


def test_a_run_of_an_experiment_shows_what_the_experiment_measured(runs, tmp_path):
    folder = tmp_path / "seed0"
    (folder / "results").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    place = {"offset": 0, "left_bias": 0.0}
    counts = {"tokens": 60, "documents": 3, "draws": 2}
    rows = [
        {"measure": "bound", "place": {"block_size": b, **place}, "value": b / 8, "se": 0.1, "se_mc": 0.0}
        for b in (1, 4)
    ]
    result = {"command": "experiment", "seed": 0, "rows": [{**row, "counts": counts} for row in rows]}
    (folder / "results" / "experiment.json").write_text(json.dumps(result))
    figure = text_of(report.write(folder).read_text(), "bound-table")
    assert f"<td>0.5000</td><td>0.1000</td><td>0.0000</td><td>{math.exp(0.5):.2f}</td>" in figure


def test_bad_paths_and_damaged_files_are_one_line(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs / "first", folder)
    (tmp_path / "other.json").write_text('{"command": "bench decode", "rows": []}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "old.json").write_text('{"command": "experiment", "rows": []}')
    cases = [
        ([tmp_path / "nowhere"], "nowhere: no such run; give its directory"),
        ([tmp_path], "no config.yaml in it"),
        ([folder, folder], "run: given twice; give every run or experiment once"),
        ([tmp_path / "other.json"], "other.json: neither the summary of an experiment nor a result of eval bound"),
        ([tmp_path / "list.json"], "list.json: neither the summary of an experiment"),
        ([tmp_path / "broken.json"], "broken.json: not JSON"),
        ([tmp_path / "old.json"], "old.json: no about; write it anew"),
        ([folder, runs / "second", "--out", tmp_path], "is a directory; give --out a file"),
    ]
    for arguments, words in cases:
        code, _, error = run("report", *arguments, capsys=capsys)
        assert (code, error.count("\n")) == (2, 1), error
        assert words in error
    damages = [
        ("results/length.json", '{"rows": [], "seed"', "length.json: not JSON"),
        ("results/length.json", '{"rows": [{"way": "a"}], "trained_length": 4}', "length.json: no bin in row 0"),
        ("results/generation.json", '{"rows": []}', "generation.json: no data; write it anew"),
        ("results/bound.json", "[]", "bound.json: not a JSON object"),
        ("metrics.jsonl", '{"step": 1}\n{', "metrics.jsonl:2: not JSON"),
    ]
    for name, text, words in damages:
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        code, _, error = run("report", folder, capsys=capsys)
        assert code == 2
        assert words in error
        (folder / name).write_text(before)
    assert run("report", folder, capsys=capsys)[0] == 0


def test_names_and_texts_are_shown_as_they_are(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "first", folder)
    for name in ("length", "generation", "traces", "traces-lossless"):
        file = folder / "results" / f"{name}.json"
        made = json.loads(file.read_text())
        for row in made["rows"]:
            row |= {key: HOSTILE for key in ("way", "prompt", "name") if key in row}
            row |= {"tokens": [{**t, "text": "</script>" + HOSTILE} for t in row["tokens"]]} if "frames" in row else {}
        file.write_text(json.dumps(made))
    page = report.write(folder).read_text()
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("</script>") == page.count("<script")


def test_traces_are_what_was_decoded(runs, trained, tmp_path, capsys):
    made = json.loads((runs / "first" / "results" / "traces.json").read_text())
    assert [row["prompt"] for row in made["rows"]] == ["the cat", "a dog"]
    options = ["--prompt", "the cat", "--max-new-tokens", 12, "--block-size", 4, "--json", tmp_path / "o.json"]
    assert run("generate", trained / "checkpoint", *options, capsys=capsys)[0] == 0
    output, row = json.loads((tmp_path / "o.json").read_text()), made["rows"][0]
    assert "".join(token["text"] for token in row["tokens"]) == output["text"]
    assert [token["step"] for token in row["tokens"]] == output["steps"]
    assert row["forwards"] == output["forwards"] == row["denoise_forwards"] + row["commit_forwards"]
    starts = list(dict.fromkeys(frame["start"] for frame in row["frames"]))
    assert starts == [0, 4, 8]
    for start in starts:
        frames = [frame["tokens"] for frame in row["frames"] if frame["start"] == start]
        masks = [tokens.count(None) for tokens in frames]
        assert masks == sorted(masks, reverse=True)
        assert masks[0] > masks[-1] == 0
        assert frames[-1] == [token["text"] for token in row["tokens"][start : start + 4]]
    drafted = json.loads((runs / "first" / "results" / "traces-lossless.json").read_text())["rows"][0]
    assert "".join(token["text"] for token in drafted["tokens"]) != ""
    assert drafted["frames"] != row["frames"]
    assert drafted["name"].endswith("lossless")


@pytest.fixture(scope="module")
def compared(runs):
    return report.compare([runs / "first", runs / "second", runs / "summary.json"], runs / "compared.html")


@pytest.fixture
def visit(compared, browser):
    """Opens the page of both runs and the experiment; whatever it asks for or complains of is an error."""
    contexts, asked, said = [], [], []

    def opened(**settings: Any) -> Any:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(compared.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith("data:")] == [compared.as_uri()] * len(contexts)
    assert said == []


@needs_browser
def test_traces_are_stepped_through_by_click_slider_and_key(runs, visit):
    row = json.loads((runs / "first" / "results" / "traces.json").read_text())["rows"][0]
    page = visit()
    trace = page.locator(".trace").first
    stage, status = trace.locator(".stage"), trace.locator("output")
    last = len(row["frames"]) + 1

    def shown() -> tuple[str, int]:
        return stage.text_content().removeprefix("the cat"), stage.locator(".mask").count()

    def state(at: int) -> tuple[str, int]:
        if at == last:
            return "".join(token["text"] for token in row["tokens"]), 0
        frame = row["frames"][at - 1]
        before = "".join(token["text"] for token in row["tokens"][: frame["start"]])
        return before + "".join(text or "" for text in frame["tokens"]), frame["tokens"].count(None)

    assert not trace.locator(".static").is_visible()
    assert shown() == state(1)
    assert status.text_content().startswith(f"1 of {last}")
    trace.get_by_role("button", name="Next").click()
    assert shown() == state(2) != state(1)
    trace.get_by_role("button", name="Previous").click()
    assert shown() == state(1)
    stage.focus()
    for at, key in ((2, "ArrowRight"), (3, "ArrowRight"), (2, "ArrowLeft"), (last, "End"), (1, "Home")):
        page.keyboard.press(key)
        assert shown() == state(at)
    slider = trace.get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert shown() == state(2)
    slider.evaluate("(s, to) => { s.value = to; s.dispatchEvent(new Event('input')); }", 4)
    assert shown() == state(5)
    assert page.locator(".trace").nth(1).locator("output").text_content().startswith("1 of ")  # the others stay
    trace.get_by_role("button", name="Play").click()
    trace.locator("output", has_text="the whole text").wait_for(timeout=20_000)
    assert shown() == state(last)


@needs_browser
def test_without_scripts_the_texts_are_there(visit):
    page = visit(java_script_enabled=False)
    static = page.locator(".trace .static").first
    assert static.is_visible()
    assert static.locator(".token").count() == 12
    assert page.locator(".stage").count() == 0


def luminance(colour: str) -> float:
    parts = [int(float(part)) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def over(colour: str, paper: str) -> str:
    """A colour of `color-mix` with its opacity, laid over the paper."""
    *parts, opacity = [float(part) for part in re.findall(r"[\d.]+", colour)]
    below = [int(part) for part in re.findall(r"\d+", paper)]
    mixed = [255 * part * opacity + under * (1 - opacity) for part, under in zip(parts, below, strict=True)]
    return f"rgb({mixed[0]:.0f}, {mixed[1]:.0f}, {mixed[2]:.0f})"


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_dark_mode_changes_the_colours_and_text_stays_readable(visit):
    found = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        texts = page.evaluate(
            """() => Object.fromEntries(
              ["body", "figcaption", "figcaption b", "a", "summary", "td", "button", ".prompt", "output", "code"]
              .map(name => [name, getComputedStyle(document.querySelector(name)).color])
              .concat([...document.querySelectorAll("svg.chart")].map(
                (svg, at) => [`svg ${at}`, getComputedStyle(svg.querySelector("text")).fill])))"""
        )
        assert len([name for name in texts if name.startswith("svg")]) > 10
        for name, colour in texts.items():
            assert contrast(colour, paper) >= 4.5, (scheme, name, colour, paper)
        lines = page.evaluate(
            """() => [...Array(7).keys()].map(n => { const span = document.createElement("span");
                span.style.color = `var(--series-${n})`; document.body.append(span);
                return getComputedStyle(span).color; })"""
        )
        assert all(contrast(colour, paper) >= 3 for colour in lines)
        tokens = page.evaluate(
            """() => [...Array(13).keys()].map(n => { const token = document.createElement("span");
                token.className = `token step-${n}`; document.body.append(token);
                const style = getComputedStyle(token); return [style.color, style.backgroundColor]; })"""
        )
        assert all(contrast(colour, over(background, paper)) >= 4.5 for colour, background in tokens)
        assert len({background for _, background in tokens}) == 13
        found[scheme] = (paper, texts["body"], texts["svg 0"], lines[0])
    assert all(light != dark for light, dark in zip(found["light"], found["dark"], strict=True))


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_never_scrolls_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_print_has_everything_on_white_and_the_final_texts(runs, visit):
    page = visit(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".controls").first.is_visible()
    assert page.locator(".trace .static").first.is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details table").first.is_visible()
    titles = page.locator("h2").all_inner_texts()
    assert {*SECTIONS.values(), "Experiment ablation", "Training", "Configuration"} <= set(titles)
    assert page.pdf(path=runs / "page.pdf").startswith(b"%PDF")
    if reader := shutil.which("pdftotext"):
        text = subprocess.run([reader, runs / "page.pdf", "-"], capture_output=True, text=True, check=True).stdout
        assert all(title in text for title in titles)
