"""Take pictures of the live page: `python tools/take_picture.py DIRECTORY`, with Chromium installed.

It takes one for each state of tests/page_states.py, at two widths and in both colour schemes.
Without a directory, it renews the README's pictures, in docs/images.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import CHROMIUM, OPTIONS, TOKEN, Site  # noqa: E402
from tests.page_states import RATES, STATES, later  # noqa: E402

WIDTHS = {"wide": (1280, 900), "narrow": (390, 844)}


def main() -> None:
    """Serve the states, and take a picture of each."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    open_site, closed_site = Site(DBPOOL_DETAILS="always"), Site(DBPOOL_TOKEN=TOKEN)
    with open_site.serving(), closed_site.serving(), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        if len(sys.argv) == 1:
            for scheme in ("light", "dark"):
                open_site.show(*seconds_of("locked"))
                path = ROOT / "docs" / "images" / f"page-{scheme}.png"
                take(browser, open_site.url, path, (1120, 850), scheme, is_cut=True)
            return
        directory = Path(sys.argv[1])
        directory.mkdir(exist_ok=True)
        for scheme in ("light", "dark"):
            for width, size in WIDTHS.items():
                for name in STATES:
                    open_site.show(*seconds_of(name))
                    take(
                        browser,
                        open_site.url,
                        directory / f"{name}-{width}-{scheme}.png",
                        size,
                        scheme,
                    )
                path = directory / f"sign-in-{width}-{scheme}.png"
                take(browser, closed_site.url, path, size, scheme, is_cut=True)


def seconds_of(name: str) -> list[dict[str, Any]]:
    """Return the answers of some seconds that lead to a state, so that the page can show rates."""
    answers = [STATES[name]()]
    while len(answers) < 4:  # the page asks more often until it has all parts
        answers.append(later(answers[-1], RATES.get(name, 0)))
    return [each | {"time": each["time"] - len(answers) + 1} for each in answers]


def take(
    browser: Any, url: str, path: Path, size: tuple[int, int], scheme: str, *, is_cut: bool = False
) -> None:
    """Take the picture once all parts have arrived; *is_cut* cuts it to the size of the window."""
    page = browser.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme,
        device_scale_factor=2 if is_cut else 1, locale="en-GB", timezone_id="UTC",
    )  # fmt: skip
    page.goto(url)
    if page.locator("#token").count() == 0:
        page.locator("#application").wait_for()
        page.wait_for_timeout(500)  # the bars move
    page.screenshot(path=path, full_page=not is_cut)
    page.close()


if __name__ == "__main__":
    main()
