# SPDX-License-Identifier: Apache-2.0
"""Make docs/viewer.png: the page showing an answer of the embedded model, in headless Chromium.

``python examples/viewer/screenshot.py [OUTPUT]``; needs Debian's package ``chromium``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.e2e.browser import running_page  # noqa: E402
from tests.e2e.server import running_server, tiny_llada  # noqa: E402

PAGE = Path(__file__).with_name("index.html")
WIDTH, HEIGHT = 1100, 900
ALLOW_FILES = ("--allowed-origins", '["null"]')
#: Passes shown as done in the picture.
PASSES = 13


def main(output: Path) -> None:
    """Start a server, submit a request from the page and save a screenshot to ``output``."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder) / "log", tiny_llada(), *ALLOW_FILES) as server,
        running_page() as page,
    ):
        page.resize(WIDTH, HEIGHT)
        page.prefer("light")
        page.open(PAGE)
        page.fill(server=str(server.client.base_url), model="tiny")
        page.fill(block_length="16", keep_ratio="0.7")
        page.evaluate("document.getElementById('example').selectedIndex = 1")
        page.evaluate("document.getElementById('example').dispatchEvent(new Event('change'))")
        page.click("ask")
        page.wait("shown !== null")
        page.evaluate(f"stop(), go({PASSES}), scrollTo(0, 0)")
        print(page.evaluate("answer.choices[0].message.content"))
        # Show the page's default server and model instead of the temporary ones.
        page.fill(server="http://localhost:8000", model="tiny-llada")
        page.screenshot(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "viewer.png")
