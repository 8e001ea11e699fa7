"""A headless Chromium, driven over a pipe with the standard library alone.

The protocol is JSON, one message up to each NUL: chromedevtools.github.io/devtools-protocol.
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 60.0

# The browser reads from descriptor 3 and writes to 4.
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def binary() -> str | None:
    """The path of a browser, None where there is none."""
    return next((found for name in BINARIES if (found := shutil.which(name))), None)


class Page:
    """One tab: commands, and what the page has complained about since it was opened."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._session: str | None = None
        self._numbers = itertools.count(1)
        self._unread = b""
        self._loaded = False
        self.complaints: list[str] = []

    def attach(self) -> None:
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        made = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = made["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run one command and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params or {}}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write_fd, data) :]
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read_fd], [], [], left)[0]:
                raise TimeoutError(f"the browser said nothing for {TIMEOUT_S:.0f} s")
            received = os.read(self._read_fd, 1 << 16)
            if not received:
                raise RuntimeError("the browser ended")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled":
            said = [arg.get("value", arg.get("description")) for arg in params["args"]]
            self.complaints.append(f"console.{params['type']}: {said}")
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", details["text"])
            self.complaints.append(f"exception: {thrown}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"log: {params['entry']['text']}")
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {params['message']}")
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.complaints.append(f"network: {url}")

    def window(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the window's size and the colour scheme that the page is asked for."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, path: pathlib.Path) -> None:
        """Load a file and wait until its first map is drawn."""
        self._loaded = False
        self.send("Page.navigate", {"url": path.resolve().as_uri()})
        deadline = time.monotonic() + TIMEOUT_S
        while not self._loaded:
            self._receive(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, once it is there."""
        made = self.send(
            "Runtime.evaluate",
            {"expression": expression, "returnByValue": True, "awaitPromise": True},
        )
        if "exceptionDetails" in made:
            raise RuntimeError(f"{expression}: {made['exceptionDetails']}")
        return made["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} is still {value!r}; {self.complaints}")
            time.sleep(0.01)
        return value

    def settle(self) -> None:
        """Wait until no head is being unpacked and what was asked for is on the screen."""
        self.wait("document.getElementById('map-panel').getAttribute('aria-busy') === 'false'")
        self.evaluate("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Move, press or release the mouse: kind is "Moved", "Pressed" or "Released"."""
        button = {} if kind == "Moved" else {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", {"type": f"mouse{kind}", "x": x, "y": y, **button})
        self.settle()

    def wheel(self, x: float, y: float, *, by: float, modifiers: int) -> None:
        """Turn the wheel; modifiers 2 is Ctrl."""
        params = {"x": x, "y": y, "deltaX": 0, "deltaY": by, "modifiers": modifiers}
        self.send("Input.dispatchMouseEvent", {"type": "mouseWheel", **params})
        self.settle()

    def click(self, x: float, y: float) -> None:
        for kind in ("Moved", "Pressed", "Released"):
            self.mouse(kind, x, y)

    def key(self, name: str, text: str = "") -> None:
        """Press and release a key."""
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        key = {"key": name, "windowsVirtualKeyCode": codes.get(name, 0)}
        self.send("Input.dispatchKeyEvent", {"type": "keyDown", **key, "text": text})
        self.send("Input.dispatchKeyEvent", {"type": "keyUp", **key})
        self.settle()

    def screenshot(self, path: pathlib.Path, *, whole: bool = False) -> None:
        """Write what the window shows, or the whole page, as PNG."""
        made = self.send("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(made["data"]))


@contextlib.contextmanager
def browser(profile: pathlib.Path) -> Iterator[Page]:
    """Start a browser with an empty profile in a folder, and end it whatever happens."""
    found = binary()
    assert found, "no browser"
    flags = [
        "--headless",
        "--no-sandbox",  # it shows only files that the tests have written
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-extensions",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-breakpad",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
    ]
    commands, answers = os.pipe(), os.pipe()
    # Out of the way of 3 and 4, which they become.
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (commands[0], answers[1])]
    process = None
    try:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", LAUNCH, *map(str, given), found, *flags],
            pass_fds=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (*given, commands[0], answers[1]):
            os.close(fd)
        given = []
        page = Page(answers[0], commands[1])
        page.attach()
        yield page
    finally:
        if process:
            # Its helpers are in its session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for fd in (answers[0], commands[1], *given):
            with contextlib.suppress(OSError):
                os.close(fd)
