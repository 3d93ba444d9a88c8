"""The page of `blockdiff serve`, in a real browser against a real server process with a trained model."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_browser
from serving import Server, serving
from test_report import contrast, over

import blockdiff
from blockdiff.decode import Sampling

pytestmark = needs_browser
STATIC = Path(blockdiff.__file__).parent / "serve" / "static"
HOSTILE = "</span><img src=x onerror=hacked()><script>hacked()</script>"
SIZES = {"prompt": "the cat", "max_tokens": 24, "temperature": 1, "seed": 5}
SLOW = "random + reverse(steps=200) + remask(steps=200, eta=0.05)"  # 200 forwards a block
# how the browser itself reports an answer that is an error; nothing else may be on the console
REFUSED = re.compile(r"Failed to load resource: (the server responded with a status of (4\d\d|502)|net::ERR_)")


@pytest.fixture
def visit(browser):
    """Opens a server's page; a request to another host, or a complaint, is an error. page.sent: the bodies it sent."""
    contexts, foreign, said = [], [], []

    def opened(server: Server, *, ready: bool = True, routes: dict[str, Any] | None = None, **settings: Any) -> Any:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.sent = []
        page.on("request", lambda r: page.sent.append(r.post_data_json) if r.method == "POST" else None)
        page.on("request", lambda r: None if r.url.startswith(f"{server.url}/") else foreign.append(r.url))
        page.on("console", lambda message: None if REFUSED.match(message.text) else said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        for path, answer in (routes or {}).items():
            page.route(f"**/v1/{path}", answer)
        page.goto(f"{server.url}/")
        if ready:
            page.locator("#facts", has_text="context of").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert foreign == []
    assert said == []


def asked(server: Server, **body: Any) -> Any:
    """The answer of the API itself, without streaming."""
    return server.complete(**SIZES | body)


def settle(page: Any, **values: Any) -> None:
    for name, value in {**SIZES, **values}.items():
        page.locator(f"#{name.replace('_', '-')}").fill(str(value))


def finish(page: Any, words: str = "") -> None:
    """Waits for the end of what runs; with words that the page says then, or without an error."""
    page.locator("#generate[aria-disabled=false]").wait_for()
    assert words in page.inner_text("#status") + page.inner_text("#error")
    assert words or not page.inner_text("#error")


def texts(page: Any) -> list[str]:
    """What stands in each run, the prompt included."""
    return page.locator(".run .text").evaluate_all("found => found.map(one => one.textContent)")


def number(page: Any, name: str, run: int = 0) -> float:
    return float(page.locator(".run").nth(run).locator(f"[data-number={name}]").inner_text())


def fulfil(**answer: Any) -> Any:
    """A route that answers so."""
    return lambda route: route.fulfill(**answer)


WATCH = """() => {
  window.states = [];
  new MutationObserver(() => {
    const open = document.querySelector(".open");
    if (open) window.states.push({
      masks: open.querySelectorAll(".mask").length, filled: open.querySelectorAll(".token").length,
      fresh: open.querySelectorAll(".new").length, tokens: document.querySelectorAll("[data-tip]").length,
    });
  }).observe(document.getElementById("runs"), { childList: true, subtree: true });
}"""


def test_a_text_fills_and_is_the_apis_beside_one_token_at_a_time(server, visit):
    page = visit(server)
    page.evaluate(WATCH)
    settle(page)
    page.select_option("#block-size", "8")
    page.get_by_role("button", name="Generate").click()
    finish(page, "× the tokens per second")
    states = page.evaluate("window.states")
    assert any(state["masks"] and state["filled"] for state in states)  # a draft between its masks
    assert any(state["fresh"] for state in states)
    assert len({state["tokens"] for state in states}) > 2
    assert page.locator(".mask").count() == 1  # the legend's
    usages = []
    for run, size in enumerate((8, 1)):
        answer = asked(server, diffusion={"block_size": size})
        usages.append(answer["usage"])
        assert texts(page)[run] == "the cat" + answer["choices"][0]["text"]
        assert number(page, "tokens", run) == usages[run]["completion_tokens"]
        assert number(page, "forwards", run) == usages[run]["diffusion"]["forwards"]
        assert number(page, "tpf", run) == round(usages[run]["diffusion"]["tokens_per_forward"], 2)
    ratio = usages[0]["diffusion"]["tokens_per_forward"] / usages[1]["diffusion"]["tokens_per_forward"]
    assert f"{ratio:.2f} × its tokens per forward" in page.inner_text("#status")
    assert re.match(r"[\d.]+ × the tokens per second", page.inner_text("#status"))
    assert texts(page)[0] != texts(page)[1]
    settle(page, seed=6)
    page.uncheck("#compare")
    before = texts(page)[0]
    page.keyboard.press("Control+Enter")
    finish(page)
    assert len(texts(page)) == 1
    assert texts(page)[0] != before


def test_tokens_tell_their_step_and_block(server, visit, trained):
    page = visit(server)
    settle(page)
    page.select_option("#policy", "fixed_count")
    page.select_option("#block-size", "4")
    page.uncheck("#compare")
    page.keyboard.press("Control+Enter")
    finish(page)
    how = {"max_new_tokens": 24, "seed": 5, "block_size": 4, "policy": "fixed_count", "sampling": Sampling(1.0)}
    (output,) = blockdiff.load(trained / "checkpoint").generate("the cat", **how)
    tips = page.locator("[data-tip]").evaluate_all("found => found.map(one => [one.dataset.tip, one.className])")
    blocks = [at + 1 for at, delivered in enumerate(output.blocks) for _ in range(delivered)]
    shown = re.compile(r'"(.*)": (?:filled in step (\d+)|decided by the prefix) of block (\d+), token (\d+)')
    for tip, classes in tips:
        _, step, block, place = shown.fullmatch(tip).groups(default="0")
        assert int(step) == output.steps[int(place) - 1]
        assert int(block) == blocks[int(place) - 1]
        assert f"step-{step}" in classes.split()
    assert len({classes for _, classes in tips}) > 2
    token = page.locator("[data-tip]").nth(3)
    token.hover()
    assert page.inner_text(".tip") == tips[3][0]


def test_policy_block_size_threshold_and_lossless_are_what_is_asked(server, visit):
    page = visit(server)
    settle(page)
    page.uncheck("#compare")
    choices = [
        ({"policy": "fixed_count", "block_size": "8"}, {}, {"policy": "fixed_count", "block_size": 8}),
        ({"policy": "threshold", "block_size": "…"}, {"other_size": 3, "threshold": 0.3}, {"threshold": 0.3}),
        ({"policy": "…"}, {"parts": "random + fixed(3)", "other_size": 6}, {"policy": "random + fixed(3)"}),
    ]
    found = []
    for selected, typed, expected in choices:
        for name, value in selected.items():
            page.select_option(f"#{name.replace('_', '-')}", value)
        settle(page, **typed)
        page.locator("#prompt").press("Control+Enter")
        finish(page)
        sent = page.sent[-1]["diffusion"]
        assert expected.items() <= sent.items()
        wanted = {key: value for key, value in sent.items() if key != "stream_drafts"}
        assert texts(page) == ["the cat" + asked(server, diffusion=wanted)["choices"][0]["text"]]
        found.append(texts(page)[0])
    assert not page.locator("#threshold").is_visible()  # parts hold their own
    assert page.sent[-1]["diffusion"]["threshold"] is None
    assert len(set(found)) == 3
    page.select_option("#policy", "")
    page.check("#lossless")
    page.check("#compare")
    page.locator("#prompt").press("Control+Enter")
    finish(page, "×")
    assert texts(page)[0] == texts(page)[1] not in found


def test_a_model_without_drafts_or_blocks_says_so(server, visit):
    def changed(**capabilities: Any) -> Any:
        def answer(route: Any) -> None:
            listed = route.fetch().json()
            listed["data"][0]["blockdiff"] |= capabilities
            route.fulfill(json=listed)

        return answer

    page = visit(server)
    assert page.locator("#lossless").is_enabled()
    assert page.inner_text("#lossless-note") == ""
    page = visit(server, routes={"models": changed(lossless=False, chat=False)})
    assert page.locator("#lossless").is_disabled()
    assert "not trained" in page.inner_text("#lossless-note")
    assert not page.locator("#modes").is_visible()
    page = visit(server, routes={"models": changed(diffusion=False, block_sizes=[1], default_block_size=1)})
    assert page.locator("#policy").is_disabled()
    assert page.locator("#compare").is_disabled()
    settle(page)
    page.keyboard.press("Control+Enter")
    finish(page)
    assert len(texts(page)) == 1


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_ends_a_run_and_frees_the_server(server, visit, way):
    page = visit(server)
    settle(page, max_tokens=100)
    page.select_option("#policy", "…")
    page.fill("#parts", SLOW)
    page.select_option("#block-size", "4")
    page.get_by_role("button", name="Generate").click()
    page.locator("[data-tip]").nth(4).wait_for()
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    finish(page, "Stopped.")
    assert 4 < number(page, "tokens") < 100
    whole = asked(server, max_tokens=100, diffusion={"block_size": 4, "policy": SLOW})["choices"][0]["text"]
    assert ("the cat" + whole).startswith(texts(page)[0])
    assert page.locator(".open").count() == 0
    assert server.settled("running", 0)


def test_a_refusal_is_one_line_and_marks_its_field(server, visit):
    page = visit(server)
    settle(page)
    page.select_option("#policy", "…")
    page.fill("#parts", "nonsense")
    page.get_by_role("button", name="Generate").click()
    finish(page, "nonsense")
    alert = page.get_by_role("alert")
    assert "\n" not in alert.inner_text()
    assert page.locator("[aria-invalid]").evaluate_all("found => found.map(one => one.id)") == ["parts"]
    assert page.evaluate("document.activeElement.id") == "parts"
    assert contrast(alert.evaluate("one => getComputedStyle(one).color"), "rgb(255, 255, 255)") >= 4.5
    page.fill("#parts", "one_step")
    page.fill("#temperature", "1000")
    page.keyboard.press("Control+Enter")
    finish(page, "temperature")
    assert page.locator("[aria-invalid]").evaluate_all("found => found.map(one => one.id)") == ["temperature"]
    page.fill("#temperature", "1")
    page.keyboard.press("Control+Enter")
    finish(page)
    assert page.locator("[aria-invalid]").count() == 0
    assert alert.inner_text() == ""


def test_warnings_of_the_usage_are_shown(server, visit):
    page = visit(server)
    settle(page, max_tokens=100)
    page.uncheck("#compare")
    page.select_option("#block-size", "…")
    page.fill("#other-size", "16")  # training knew up to 8
    page.keyboard.press("Control+Enter")
    finish(page)
    assert "not covered by training" in page.inner_text("#warnings")
    page.select_option("#block-size", "4")
    settle(page)
    page.keyboard.press("Control+Enter")
    finish(page)
    assert page.inner_text("#warnings") == ""


def test_a_key_is_asked_for_and_kept_in_the_tab(trained, visit, tmp_path):
    with serving(trained / "checkpoint", tmp_path, BLOCKDIFF_API_KEY="right-key") as server:
        page = visit(server, ready=False)
        page.locator("#key-form").wait_for()
        for key in ("wrong", "right-key"):
            assert "key" in page.get_by_role("alert").inner_text().lower()
            assert page.evaluate("document.activeElement.id") == "key"
            with page.expect_response("**/v1/models") as answer:
                page.keyboard.press("Control+a")
                page.keyboard.type(key)
                page.keyboard.press("Enter")
            assert answer.value.status == (200 if key == "right-key" else 401)
            page.locator("#key-form" if key == "wrong" else "#facts:has-text('context of')").wait_for()
        assert not page.locator("#key-form").is_visible()
        settle(page)
        page.locator("#prompt").press("Control+Enter")
        finish(page)
        kept = "[sessionStorage.getItem('api-key'), localStorage.length, document.cookie, location.href]"
        assert page.evaluate(kept) == ["right-key", 0, "", f"{server.url}/"]


def test_a_busy_and_a_lost_server_are_told(trained, visit, tmp_path):
    busy = {"error": {"message": "the queue is full", "type": "x", "param": None, "code": None}}
    cut = 'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
    stream = {"status": 200, "content_type": "text/event-stream"}
    fault = 'data: {"error": {"message": "the engine failed", "type": "x", "param": null, "code": null}}\n\n'
    answers = [
        (
            {"status": 429, "headers": {"Retry-After": "7"}, "body": json.dumps(busy)},
            "the queue is full; try again in 7 s",
        ),
        ({"status": 502, "body": "<html>"}, "The server answered 502"),
        ({**stream, "body": cut}, "The connection was lost"),
        ({**stream, "body": cut + fault}, "the engine failed"),
    ]
    with serving(trained / "checkpoint", tmp_path) as server:
        page = visit(server)
        settle(page)
        for answer, words in answers:
            page.route("**/v1/completions", fulfil(**answer))
            page.keyboard.press("Control+Enter")
            finish(page, words)
            page.unroute("**/v1/completions")
        settle(page, max_tokens=100)
        page.keyboard.press("Control+Enter")
        page.locator(".token[data-tip]").first.wait_for()
        server.stop(signal.SIGKILL)
    page.locator("#generate[aria-disabled=false]").wait_for()
    if "lost" not in page.inner_text("#error"):  # it was done before it was killed
        page.keyboard.press("Control+Enter")
    finish(page, "is it still running?")


def test_a_conversation_goes_on(server, visit):
    page = visit(server)
    page.get_by_label("Chat").check()
    page.uncheck("#compare")
    answers = []
    for words in ("the cat", "a dog"):
        settle(page, prompt=words)
        page.locator("#prompt").press("Control+Enter")
        finish(page)
        answers += texts(page)
    first, second = (sent["messages"] for sent in page.sent)
    assert first == [{"role": "user", "content": "the cat"}]
    assert second == [*first, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "a dog"}]
    listed = page.locator("#conversation li").evaluate_all("found => found.map(one => one.textContent)")
    assert listed == ["You: the cat", f"Model: {answers[0]}", "You: a dog"]
    assert page.locator("#prompt").input_value() == ""
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#conversation li").count() == 0
    settle(page)
    page.locator("#prompt").press("Control+Enter")
    finish(page)
    assert page.sent[-1]["messages"] == first
    assert texts(page) == answers[:1]


def hostile_answers() -> dict[str, Any]:
    """Routes of a server that has been taken over, as far as what it says goes."""
    policy = {"name": HOSTILE, "parts": HOSTILE, "note": HOSTILE, "threshold": True}
    about = {"diffusion": True, "context_length": HOSTILE, "max_tokens": 64, "default_block_size": 4}
    about |= {"block_sizes": [4], "lossless": True, "chat": True, "policies": [policy]}
    counts = dict.fromkeys(("forwards", "denoise_forwards", "commit_forwards", "verify_forwards", "blocks"), HOSTILE)
    usage = {"prompt_tokens": HOSTILE, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": HOSTILE}}
    usage["diffusion"] = {**counts, "forwards": 2, "seed": HOSTILE, "warnings": [HOSTILE]}
    token = {"index": 0, "start": 0, "tokens": [{"text": HOSTILE, "step": HOSTILE}], "forwards": 1}
    draft = {"choices": [], "index": 0, "start": 0, "step": 1, "tokens": [HOSTILE, None], "forwards": 1}
    chunk = {"choices": [{"index": 0, "delta": {"content": HOSTILE}}], "diffusion": token}
    stream = f"event: draft\ndata: {json.dumps(draft)}\n\ndata: {json.dumps(chunk)}\n\n"
    stream += f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
    body = stream + f"data: {json.dumps({'error': {'message': HOSTILE, 'param': HOSTILE}})}\n\n"
    return {
        "models": fulfil(json={"data": [{"id": HOSTILE, "blockdiff": about}]}),
        "chat/completions": fulfil(content_type="text/event-stream", body=body),
        "completions": fulfil(content_type="text/event-stream", body=stream + "data: [DONE]\n\n"),
    }


def test_what_a_model_writes_is_never_markup(server, visit):
    page = visit(server, routes=hostile_answers())
    before = page.locator("script, img").count()
    page.evaluate("() => { window.hacked = () => { window.wasHacked = true; }; }")
    settle(page, prompt=HOSTILE)
    page.locator("#prompt").press("Control+Enter")
    finish(page, "×")
    assert texts(page) == [HOSTILE + HOSTILE] * 2
    assert page.inner_text("h1") == page.inner_text("#warnings") == HOSTILE
    page.get_by_label("Chat").check()
    page.locator("#prompt").press("Control+Enter")
    finish(page, HOSTILE)
    assert page.inner_text("#error") == HOSTILE
    assert page.locator("script, img").count() == before == 1
    assert not page.evaluate("window.wasHacked")
    policy = page.request.get(f"{server.url}/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


def test_everything_works_by_keyboard(server, visit):
    page = visit(server)
    order: list[str] = []
    while (name := page.evaluate("document.activeElement.id || document.activeElement.name")) not in order:
        order.append(name)
        page.keyboard.press("Tab")
        style = page.evaluate(
            "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
        )
        assert style == ["solid", "2px"] or page.evaluate("document.activeElement === document.body"), name
    fields = ["prompt", "policy", "block-size", "threshold", "temperature", "max-tokens", "seed", "lossless"]
    assert [name for name in order if name] == [*fields, "compare", "generate", "stop", "mode"]
    assert (
        page.locator("input, select, textarea").evaluate_all(
            "found => found.filter(one => !one.labels.length && !one.ariaLabel).map(one => one.id)"
        )
        == []
    )
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.id") != "prompt":
        page.keyboard.press("Tab")
    page.keyboard.type("the cat")
    while page.evaluate("document.activeElement.id") != "generate":
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "seed":
            page.keyboard.type("5")
    page.keyboard.press("Enter")
    finish(page, "×")
    assert page.evaluate("document.activeElement.id") == "generate"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    tips = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        page.keyboard.press(key)
        tips.append(page.inner_text(".tip >> nth=0"))
    assert tips[0] == tips[2] == tips[4]
    assert len(set(tips)) == 3
    assert [tip.rpartition(" ")[2] for tip in tips[:2]] == ["1", "2"]


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_never_scrolls_sideways(server, visit, width):
    page = visit(server, viewport={"width": width, "height": 800})
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= width
    page.get_by_label("Chat").check()
    settle(page, prompt="catcat" * 9, max_tokens=32)
    page.select_option("#policy", "…")
    page.select_option("#block-size", "…")
    page.fill("#parts", "confidence + threshold(0.5) + everything_that_is_no_part_and_long_beyond_all_measure(1)")
    page.fill("#other-size", "4")
    page.keyboard.press("Control+Enter")
    finish(page, "everything_that")
    assert page.evaluate(wide) <= width
    page.fill("#parts", "one_step")
    page.keyboard.press("Control+Enter")
    finish(page, "×")
    assert page.evaluate(wide) <= width


def test_dark_mode_changes_the_colours_and_text_stays_readable(server, visit):
    found = {}
    for scheme in ("light", "dark"):
        page = visit(server, color_scheme=scheme)
        settle(page)
        page.keyboard.press("Control+Enter")
        finish(page, "×")
        page.evaluate("document.getElementById('error').textContent = 'wrong'")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        names = [
            "body",
            "h1",
            "h2",
            ".soft",
            "small",
            "label",
            "input",
            "select",
            "textarea",
            "#stop",
            "#error",
            ".prompt",
        ]
        names += ["#status", ".numbers dt", ".numbers dd", ".tip", ".summary", ".text .token", ".legend .token.step-12"]
        for name in names:
            ink, *backs = page.evaluate(
                "name => (s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector(name)))", name
            )
            back = paper if "rgba(0, 0, 0, 0)" in backs else over(backs[0], paper) if " / " in backs[0] else backs[0]
            assert contrast(ink, back) >= 4.5, (scheme, name, ink, back)
        main = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('.main')))")
        assert contrast(*main) >= 4.5
        faint = "getComputedStyle(document.querySelector('#seed'), '::placeholder').color"
        assert contrast(page.evaluate(faint), paper) >= 4.5
        tokens = page.evaluate(
            """() => [...Array(13).keys()].map(n => { const token = document.createElement("span");
                token.className = `token step-${n}`; document.body.append(token);
                const style = getComputedStyle(token); return [style.color, style.backgroundColor]; })"""
        )
        assert all(contrast(ink, over(back, paper)) >= 4.5 for ink, back in tokens)
        assert len({back for _, back in tokens}) == 13
        found[scheme] = paper
    assert found["light"] != found["dark"]


def test_masks_shimmer_unless_motion_is_unwanted(server, visit):
    shimmer = """() => { const open = document.createElement("span"); open.className = "open";
        open.append(Object.assign(document.createElement("span"), { className: "mask" })); document.body.append(open);
        return getComputedStyle(open.firstChild).animationName; }"""
    assert visit(server, reduced_motion="no-preference").evaluate(shimmer) == "shimmer"
    assert visit(server, reduced_motion="reduce").evaluate(shimmer) == "none"


def test_streams_are_read_however_they_are_cut(server, visit):
    stream = ': hello\n\ndata: {"é": "𝄞"}\r\n\r\nevent: draft\rdata:one\rdata: two: 2\r\rid: 3\n\nretry\ndata\n\n'
    stream += "event: other\r\ndata:  x\n\r\n: a\n\ndata: [DONE]\r\n\r\ndata: cut off\n"
    wanted = [
        ["message", '{"é": "𝄞"}'],
        ["draft", "one\ntwo: 2"],
        ["message", ""],
        ["other", " x"],
        ["message", "[DONE]"],
    ]
    found = visit(server).evaluate(
        """async (text) => {
          const { events } = await import("/page.js");
          const bytes = new TextEncoder().encode(text);
          const results = [];
          for (let size = 1; size <= bytes.length; size += 1) {
            const chunks = [...Array(Math.ceil(bytes.length / size)).keys()];
            const body = new ReadableStream({ start(controller) {
              for (const at of chunks) controller.enqueue(bytes.slice(at * size, (at + 1) * size));
              controller.close();
            }});
            const seen = [];
            for await (const { name, data } of events(body)) seen.push([name, data]);
            results.push(seen);
          }
          return results;
        }""",
        stream,
    )
    assert len(found) > 100
    assert all(seen == wanted for seen in found)


def test_the_page_is_three_files_that_name_no_host():
    assert sorted(path.name for path in STATIC.iterdir()) == ["index.html", "page.css", "page.js"]
    page = (STATIC / "index.html").read_text()
    for path in STATIC.iterdir():
        assert "://" not in path.read_text()
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"page.css", "page.js", "#"}
    assert not re.search(r"\s(style|on\w+)=", page)
    assert "innerHTML" not in (STATIC / "page.js").read_text()
