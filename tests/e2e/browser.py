# SPDX-License-Identifier: Apache-2.0
"""A page in headless Chromium, driven over the browser's DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.e2e.server import poll

#: Where the browser is, or None. Debian's package is `chromium`.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
#: Seconds within which the browser must answer a command.
_TIMEOUT = 60


class Page:
    """A browser's only page.

    Attributes:
        problems: Exceptions, console errors and failed loads since the page was opened.
        requested: Addresses that the page has asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.problems: list[str] = []
        self.requested: list[str] = []
        self._socket = socket
        self._num_commands = 0
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol and return its result.

        Raises:
            RuntimeError: If the browser refuses it.
        """
        self._num_commands += 1
        number = self._num_commands
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(_TIMEOUT))
            if message.get("id") != number:
                self._note(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']['message']}")
            else:
                return message["result"]

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", details).get("description", str(details)))
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self.problems.clear()
        self.requested.clear()
        self.command("Page.navigate", url=path.as_uri())
        self.wait(f"location.href === {path.as_uri()!r} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; promises are waited for.

        Raises:
            RuntimeError: If it throws.
        """
        answer = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        return poll(lambda: self.evaluate(expression), expression)

    def fill(self, **values: str | bool) -> None:
        """Set fields by their id: text, or whether a box is checked."""
        for name, value in values.items():
            target = "checked" if isinstance(value, bool) else "value"
            self.evaluate(f"document.getElementById({name!r}).{target} = {json.dumps(value)}")

    def click(self, name: str) -> None:
        """Click on an element with the mouse: it must be visible, and not covered by another."""
        point = self.evaluate(
            f"""(() => {{
                const target = document.getElementById({name!r});
                target.scrollIntoView({{block: "center"}});
                const box = target.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                return target.contains(document.elementFromPoint(x, y)) ? {{x, y}} : null;
            }})()"""
        )
        assert point is not None, f"{name} cannot be clicked"
        for kind in ("mousePressed", "mouseReleased"):
            self.command(
                "Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **point
            )

    def press(self, key: str) -> None:
        """Press a key; the focused element receives it."""
        text = {"text": key} if len(key) == 1 else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", key=key)

    def choose_file(self, name: str, path: Path) -> None:
        """Choose a file in an input element."""
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector=f"#{name}")["nodeId"]
        self.command("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Give the window a size, in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """Prefer ``light`` or ``dark`` colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, selector: str = "html") -> None:
        """Write a PNG of an element, including parts outside the window."""
        box = self.evaluate(
            f"""(() => {{
                const box = document.querySelector({selector!r}).getBoundingClientRect();
                const [x, y] = [box.x + scrollX, box.y + scrollY];
                return {{x, y, width: box.width, height: box.height, scale: 1}};
            }})()"""
        )
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=box)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def running_page() -> Iterator[Page]:
    """Start a browser with a page; it ends with the context.

    Raises:
        RuntimeError: If there is no Chromium, or it ends by itself.
    """
    if CHROMIUM is None:
        raise RuntimeError("no Chromium; Debian's package is `chromium`")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(CHROMIUM, "--headless=new", "--remote-debugging-port=0"),
            *(f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu"),
            *("--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"),
            # The sandbox does not work for root, the usual user in containers.
            *(["--no-sandbox"] if os.getuid() == 0 else []),
            "about:blank",
        ]
        log = Path(profile) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            with connect(_address(process, Path(profile)), max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], profile: Path) -> str:
    """Wait until the browser reports the address of the page's DevTools, and return it."""
    told = profile / "DevToolsActivePort"

    def page() -> str | None:
        if process.poll() is not None:
            raise RuntimeError(f"{CHROMIUM} ended:\n{(profile / 'log').read_text()[-2000:]}")
        if not told.exists() or not told.read_text():
            return None
        port = told.read_text().splitlines()[0]
        targets = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
        return next((t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page"), None)

    return poll(page, "the browser")
