"""TensorBoard in a process of its own, and a headless Chromium that reaches nothing but it."""

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from trainrt.record import events

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
]


HOME = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
PREFERENCES = {
    "devtools.console.stdout.content": True,
    "browser.dom.window.dump.enabled": True,
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "messaging-system.rsexperimentloader.enabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "network.dns.disablePrefetch": True,
    "services.settings.server": "",
    "toolkit.telemetry.enabled": False,
}
"""Of a Firefox that says on its output what its console says, and asks nobody anything."""


class Writer:
    """Writes a run to an event file, piece by piece."""

    def __init__(self, directory, run, environment=None):
        directory.mkdir(parents=True)
        self.run = run
        self.file = directory / events.file_name()
        self.put(events.encode_header())
        self.put(events.encode_roster(run.roster, environment or run.environment))

    def put(self, event):
        with self.file.open("ab") as stream:
            stream.write(events.frame(event))

    def windows(self, first, stop):
        self.put(events.encode_record(self.run._chunks[0][first:stop], self.run.roster))
        return self

    def close(self, findings=()):
        self.put(events.encode_findings([dict(f) for f in findings], len(self.run)))
        self.put(events.encode_end("finished", step=len(self.run)))


LIGHT = "import sys; sys.modules['tensorflow'] = None; from tensorboard.main import run_main; run_main()"
"""TensorBoard where TensorFlow is not installed, which saves each start the seconds of its import."""


class Server:
    """TensorBoard on a free port; `plain`: as who has TensorFlow starts it."""

    def __init__(self, logdir, *options, plain=False):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = () if any(option.startswith("--logdir") for option in options) else (f"--logdir={logdir}",)
        prefix = next((option.partition("=")[2] for option in options if option.startswith("--path_prefix=")), "")
        self.url = f"http://127.0.0.1:{port}{prefix}/"
        program = ["-m", "tensorboard.main"] if plain else ["-c", LIGHT]
        self.process = subprocess.Popen(
            [sys.executable, *program, *where, f"--port={port}", "--reload_interval=1", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        )
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError("TensorBoard did not come up in a minute.")

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


class Proxy:
    """Hands what comes below an address of its own on to a server, as notebooks do: /proxy/6006/ is its /."""

    def __init__(self, server, below="/proxy/6006/"):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                if self.path == "/notebook":
                    page = f'<!doctype html><iframe src="{below}#trainrt" width="1200" height="800"></iframe>'.encode()
                    self.answer(200, {"Content-Type": "text/html"}, page)
                elif self.path.startswith(below):
                    sent = ("Accept-Encoding", "Content-Type")
                    headers = {name: self.headers[name] for name in sent if self.headers.get(name)}
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
                    inner = urllib.request.Request(server.url + self.path.removeprefix(below), body, headers)
                    try:
                        with urllib.request.urlopen(inner) as found:
                            self.answer(found.status, found.headers, found.read())
                    except urllib.error.HTTPError as error:
                        self.answer(error.code, error.headers, error.read())
                else:
                    self.answer(200 if self.path == "/favicon.ico" else 404, {}, b"")

            do_POST = do_GET

            def answer(self, code, headers, body):
                self.send_response(code)
                for name in ("Content-Type", "Content-Encoding", "Content-Security-Policy", "Cache-Control"):
                    if headers.get(name):
                        self.send_header(name, headers[name])
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.root = f"http://127.0.0.1:{self._server.server_port}"
        self.url = self.root + below
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: pip install trainrt[browser]"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def logdir(tmp_path_factory):
    """The demo's two real runs, one healthy and one strangled by its clip."""
    path = tmp_path_factory.mktemp("runs")
    subprocess.run(
        [sys.executable, "-m", "trainrt", "demo", "--logdir", str(path), "--epochs", "3"],
        check=True,
        capture_output=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    return path


@pytest.fixture(scope="session")
def server(browser, logdir):
    server = Server(logdir, plain=True)
    yield server
    server.stop()


@pytest.fixture
def serve(browser):
    """Starts further servers, or proxies of servers, which stop with the test."""
    started = []

    def start(*arguments, **keywords):
        started.append(Proxy(*arguments) if isinstance(arguments[0], Server) else Server(*arguments, **keywords))
        return started[-1]

    yield start
    for each in started[::-1]:
        each.stop()


class Tab:
    """A page of TensorBoard with our frame in it, and all that went wrong in them."""

    def __init__(self, page):
        self.page = page
        self.errors = []
        page.on("console", lambda m: self.note(m.text, m.location["url"]) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.note(str(error)))
        page.on("requestfailed", lambda request: self.note("failed", request.url))
        page.on("response", lambda r: self.note(str(r.status), r.url) if r.status >= 400 else None)

    def note(self, what, url=""):
        """Keeps an error, unless it is TensorBoard's own: it asks for its fonts at the root, below whatever it is."""
        if "/font-roboto/" not in url:
            self.errors.append(f"{what}: {url}")

    def go(self, server, place="#trainrt"):
        self.page.goto(server.url + place)
        self.frame = self.page.frame_locator('iframe[src*="name=trainrt"]')
        self.frame.locator("body[data-ready]").wait_for(timeout=30_000)
        return self

    def go_around(self, url):
        """Opens a page that has TensorBoard in a frame of its own, as a notebook has."""
        self.page.goto(url)
        self.frame = self.page.frame_locator("iframe").frame_locator('iframe[src*="name=trainrt"]')
        self.frame.locator("body[data-ready]").wait_for(timeout=30_000)
        return self

    @property
    def inner(self):
        return next(frame for frame in self.page.frames if "name=trainrt" in frame.url)

    def text(self, selector):
        return self.frame.locator(selector).first.inner_text()

    def drawn(self):
        return int(self.inner.evaluate("document.body.dataset.ready"))

    def after(self, act):
        """Acts, and waits for the picture that follows."""
        before = self.drawn()
        act()
        self.inner.wait_for_function(f"Number(document.body.dataset.ready) > {before}", timeout=20_000)

    def keep(self, name):
        """A screenshot of the whole page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        size = self.page.viewport_size
        height = self.inner.evaluate("document.documentElement.scrollHeight") + 70
        self.page.set_viewport_size({"width": size["width"], "height": min(height, 3200)})
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")
        self.page.set_viewport_size(size)


@pytest.fixture
def tab(browser, serve):
    """Opens tabs that must end without an error on the console and without a failed request, before servers stop."""
    opened = []

    def open_tab(width=1280, height=900, dark=False):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        opened.append((context, Tab(context.new_page())))
        return opened[-1][1]

    yield open_tab
    for context, each in opened:
        errors = list(each.errors)  # what closing the tab cuts off is no failed request
        context.close()
        assert not errors
