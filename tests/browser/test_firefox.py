"""The page in Firefox, driven over its own Marionette protocol: no driver and no download."""

import contextlib
import itertools
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from trainrt.plugin import report_html
from trainrt.record.run import Run

from .conftest import HOME, PREFERENCES, Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

MAP = 'canvas[aria-label="Map of layers and steps"]'
FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)


class Firefox:
    """A headless Firefox with a profile of its own; what it says on the console is in `said`."""

    def __init__(self, profile):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        profile.mkdir()
        lines = {**PREFERENCES, "marionette.port": port}.items()
        (profile / "user.js").write_text("".join(f'user_pref("{k}", {json.dumps(v)});\n' for k, v in lines))
        self._output = (profile / "output").open("wb")
        self._process = subprocess.Popen(
            [FIREFOX, "--headless", "--marionette", "--no-remote", "--profile", str(profile)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=HOME | {"HOME": str(profile)},
        )
        self._numbers = itertools.count(1)
        for _ in range(240):
            with contextlib.suppress(OSError):
                self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
                break
            time.sleep(0.25)
        self._stream = self._socket.makefile("rb")
        self._read()
        self.ask("WebDriver:NewSession", capabilities={"alwaysMatch": {"pageLoadStrategy": "eager"}})
        self.ask("WebDriver:SetWindowRect", width=1280, height=900)

    def _read(self):
        length = b""
        while (byte := self._stream.read(1)) != b":":
            length += byte
        return json.loads(self._stream.read(int(length)))

    def ask(self, command, **parameters):
        message = json.dumps([0, next(self._numbers), command, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._read()
        assert error is None, error
        return result

    def go(self, url):
        self.ask("WebDriver:Navigate", url=url)

    def run(self, script, *arguments):
        return self.ask("WebDriver:ExecuteScript", script=script, args=list(arguments))["value"]

    def until(self, script, seconds=40):
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} did not come true. {self.said}"
            time.sleep(0.1)
        return value

    def enter(self):
        """Goes into our frame in TensorBoard's page."""
        self.until("return document.querySelector('iframe[src*=\"name=trainrt\"]') !== null")
        frame = self.ask("WebDriver:FindElement", using="css selector", value='iframe[src*="name=trainrt"]')["value"]
        self.ask("WebDriver:SwitchToFrame", element=next(iter(frame.values())), focus=True)

    @property
    def said(self):
        """Errors on the console of a page, ours or TensorBoard's."""
        self._output.flush()
        lines = Path(self._output.name).read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith(("JavaScript error: http", 'console.error: "'))]

    def stop(self):
        with contextlib.suppress(Exception):
            self.ask("Marionette:Quit", flags=["eForceQuit"])
        self._stream.close()
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)
        self._output.close()


@pytest.fixture(scope="module")
def firefox(tmp_path_factory):
    if FIREFOX is None:
        pytest.skip("no Firefox is installed: apt-get install firefox-esr")
    found = Firefox(tmp_path_factory.mktemp("firefox") / "profile")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def tensorboard(logdir):
    server = Server(logdir)
    yield server
    server.stop()


def key(firefox, name):
    firefox.run(
        "document.querySelector(arguments[0]).dispatchEvent(new KeyboardEvent('keydown', {key: arguments[1]}))",
        MAP,
        name,
    )


def test_firefox_shows_the_verdict_the_map_and_the_way_to_a_finding(firefox, tensorboard):
    firefox.go(f"{tensorboard.url}#trainrt")
    firefox.enter()
    firefox.until("return document.body.dataset.ready")
    assert firefox.run("return document.querySelector('h1').innerText") == "Likely cause: clip too tight"
    colour = firefox.run(
        "const c = document.querySelector(arguments[0]), r = c.width / c.clientWidth;"
        "return [...c.getContext('2d').getImageData(490 * r, 29 * r, 1, 1).data]",
        MAP,
    )
    assert colour[2] > colour[0] + 50, "a strangled layer is blue"
    before = firefox.run("return Number(document.body.dataset.ready)")
    firefox.run("document.querySelector('.findings button').click()")
    firefox.until(f"return Number(document.body.dataset.ready) > {before}")
    assert firefox.run("return document.querySelectorAll('.chip').length") == 3
    key(firefox, "ArrowRight")
    key(firefox, "+")
    firefox.until("return !document.querySelector('.range').innerText.startsWith('steps 0 to 134')")
    assert firefox.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert firefox.said == []


def test_firefox_opens_a_report_from_disk(firefox, logdir, tmp_path):
    file = tmp_path / "report.html"
    report_html.write(file, [(path.parent.name, Run.open(path)) for path in Run.find(logdir)[::-1]])
    firefox.go(file.as_uri())
    firefox.until("return document.body.dataset.ready")
    assert firefox.run("return document.querySelector('h1').innerText") == "Likely cause: clip too tight"
    firefox.run(
        "const s = document.querySelector('[aria-label=\"Compare with\"]');"
        "s.value = [...s.options].find((o) => o.text === 'healthy').value;"
        "s.dispatchEvent(new Event('change'))"
    )
    firefox.until("return document.body.innerText.includes('The losses first differ at step')")
    assert firefox.said == []
