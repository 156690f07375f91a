"""Pictures of a report, as people see it on a desk and on a phone: opens the page in Chromium and looks at what it did.

    python benchmarks/screenshots.py [RESULTS] [--folder docs] [--dark]

needs Chromium and `pip install playwright`. Exit code 1 where the page logs an error, asks for anything over the network, or is wider than its window.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.bench.cells import load_results
from peftkit.bench.page import html

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SIZES = {1280: 900, 390: 844}
TALLEST = {1280: 2200, 390: 2400}  # what of a long page is worth a picture


def chromium() -> str | None:
    """The path of a browser on this machine."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


@dataclass
class Watched:
    """A page and what it did: messages on its console, errors, requests other than for itself."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def opened(browser: Any, file: Path, width: int, scheme: str = "light") -> Watched:
    """The page of a file in a window of that width, watched from its first moment."""
    page = browser.new_page(viewport={"width": width, "height": SIZES.get(width, 900)}, color_scheme=scheme)
    watched, own = Watched(page), file.resolve().as_uri()
    page.on("console", lambda message: watched.said.append(message.text))
    page.on("pageerror", lambda error: watched.said.append(str(error)))
    page.on("request", lambda request: None if request.url == own else watched.asked.append(request.url))
    page.goto(own)
    return watched


def main() -> int:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", default=str(ROOT / "benchmarks" / "results" / "ci.json"))
    parser.add_argument("--folder", default=str(ROOT / "docs"))
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true", help="pictures of the whole page, however long")
    arguments = parser.parse_args()
    browser_path = chromium()
    if browser_path is None:
        print("no Chromium on this machine", file=sys.stderr)
        return 1
    wrong = []
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        file = Path(temporary) / "report.html"
        file.write_text(html(load_results(arguments.results)))
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        for width in SIZES:
            watched = opened(browser, file, width, "dark" if arguments.dark else "light")
            height = watched.page.evaluate("document.documentElement.scrollHeight")
            height = height if arguments.whole else min(height, TALLEST[width])
            path = Path(arguments.folder) / f"report-{width}.png"
            watched.page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
            wrong += [f"{width}: {text}" for text in (*watched.said, *watched.asked)]
            wrong += [f"{width}: {watched.overflow()} pixels wider than the window"] if watched.overflow() > 0 else []
            print(path)
        browser.close()
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
