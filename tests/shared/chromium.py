"""A headless Chromium, where one is installed, driven over a pipe: no driver, no package."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


class Page:
    """One page, spoken to in the DevTools protocol.

    Attributes:
        requests: Addresses of all that it asked for, the page's own included.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
        self._sent, self._session, self._buffer = 0, "", b""
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the browser and returns its result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while (answer := self._receive()).get("id") != self._sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._reading.fileno(), 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message

    def show(self, file: Path, width: int, dark: bool) -> None:
        """Loads a page as a screen of that width shows it."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=file.as_uri())
        while not self._loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, whole: bool = False) -> bytes:
        """Returns a PNG of what is on the screen, or of the whole page."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(taken["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Starts the browser with a profile of its own, and ends it.

    Args:
        profile: An empty folder.
    """
    assert BROWSER is not None
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()
    options = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
    # It reads from descriptor 3 and writes to 4; the shell puts ours there.
    command = f'exec "$0" "$@" 3<&{to_browser} 4>&{to_us}'
    process = subprocess.Popen(
        [
            "bash",
            "-c",
            command,
            BROWSER,
            *options.split(),
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ],
        pass_fds=(to_browser, to_us),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(to_us)
    try:
        page = Page(from_browser, from_us)
        yield page
        page.call("Browser.close")
    finally:
        process.kill()
        process.wait()
