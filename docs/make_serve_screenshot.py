"""Picture of a finished run on the page of `blockdiff serve`:  python docs/make_serve_screenshot.py URL PICTURE.png

--prompt, --policy, --block-size, --max-tokens, --temperature: as on the page; --dark, --width: the window.
A server must answer at URL. Needs the extra `dev` (playwright) and a system Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--policy", default="")
    parser.add_argument("--block-size", default="8")
    parser.add_argument("--max-tokens", default="64")
    parser.add_argument("--temperature", default="0")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1200)
    asked = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": asked.width, "height": 600}, color_scheme="dark" if asked.dark else "light"
        )
        page.goto(asked.url)
        page.locator("#facts", has_text="context of").wait_for()
        page.fill("#prompt", asked.prompt)
        page.select_option("#policy", asked.policy)
        page.select_option("#block-size", asked.block_size)
        page.fill("#max-tokens", asked.max_tokens)
        page.fill("#temperature", asked.temperature)
        page.fill("#seed", "0")
        for _ in range(2):  # the first run of a process is slow for reasons of its own
            page.keyboard.press("Control+Enter")
            page.locator("#generate[aria-disabled=false]").wait_for(timeout=120_000)
        page.locator(".run [data-tip]").nth(9).focus()
        page.screenshot(path=asked.picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
