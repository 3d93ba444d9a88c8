"""Picture of a report in a headless Chromium:  python docs/make_screenshot.py PAGE.html PICTURE.png [options]

--dark, --width, --height: the window; --step N: go N steps into every trace; --at ID: begin at this section or figure.
Needs the extra `dev` (playwright) and a system Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1400)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--at", help="id of the element to begin at")
    asked = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": asked.width, "height": asked.height}, color_scheme="dark" if asked.dark else "light"
        )
        page.goto(asked.page.resolve().as_uri())
        for trace in page.locator(".trace").all():
            for _ in range(asked.step):
                trace.get_by_role("button", name="Next").click()
        if asked.at:
            page.evaluate("id => document.getElementById(id).scrollIntoView()", asked.at)
        page.screenshot(path=asked.picture)
        browser.close()


if __name__ == "__main__":
    main()
