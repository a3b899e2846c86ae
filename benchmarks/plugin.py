"""How soon the page shows a run, how fast it zooms, and what it sends.

    python -m benchmarks.plugin [--steps 1000000] [--weights 200] [--runs 50] [--rounds 5]

Writes a bounded record of a million steps as `fit` would, windows widening as the run grows, beside 49 short ones, and
opens it in TensorBoard with a headless Chromium (`pip install trainrt[browser]`, `apt-get install chromium`):

  server       start of TensorBoard to its first answer
  frame, map,  from opening the address, with a fresh server and browser each round: until TensorBoard has made our
  picture      frame, before which nothing of ours runs; until the map is drawn; until the chosen layer's curves are
  ours         of that from the frame on, by the frame's own clock
  alone        the page without TensorBoard's around it, `data/plugin_entry.html?name=trainrt`, in a browser that has it
  zoom         from the key to the new picture, in the browser; and the answer of the route alone
  bytes        of one map and of all that was sent for the first picture
  memory       of the TensorBoard process, before the run is opened and after
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np

from trainrt.record import events
from trainrt.record.run import Run
from trainrt.record.vocabulary import Parameter

CHUNK = 64
BUDGET, DOUBLINGS = 256 << 20, 24
"""As `fit` bounds a record: `trainrt.loop.recorder` widens windows 24 times within 256 MB."""

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]


def window_widths(steps: int, weights: int, subjects: int) -> np.ndarray:
    """[T] steps of each window of a run of so many steps."""
    size = weights * (subjects * 8 * 4 + 5 * 8) + 5 * 24 + 400
    per_width = int(np.clip(BUDGET // (DOUBLINGS * size), 16, 1024))
    widths: list[int] = []
    width = 1
    while (left := steps - sum(widths)) > 0:
        widths += [width] * min(per_width, -(-left // width))
        width *= 2
    widths[-1] -= sum(widths) - steps
    return np.array([w for w in widths if w > 0])


def write(directory: Path, steps: int, weights: int, ended: bool = True) -> int:
    """Writes a run whose later layers slow down in its second half; returns the bytes of its file."""
    rng, slots = np.random.default_rng(0), ("momentum", "velocity")
    names = [f"block_{i // 8}/layer_{i // 2:03d}" for i in range(weights)]
    parameters = [
        Parameter(f"{name}/{'bias' if i % 2 else 'kernel'}", name, (64, 64), "float32") for i, name in enumerate(names)
    ]
    widths = window_widths(steps, weights, 3 + len(slots))
    last = np.cumsum(widths) - 1
    part, depth = (last / steps)[:, None], np.linspace(0, 1, weights)
    ratio = 10 ** (-2.6 - part - 2.5 * depth**2 * (part > 0.3) + 0.15 * rng.standard_normal((len(widths), weights)))
    loss = 2.3 * np.exp(-3 * part[:, 0]) + 0.05 * rng.random(len(widths))
    directory.mkdir(parents=True)
    file = directory / events.file_name()
    with file.open("wb") as stream:

        def put(event: bytes) -> None:
            stream.write(events.frame(event))

        put(events.encode_header())
        for start in range(0, len(widths), CHUNK):
            at = slice(start, start + CHUNK)
            run = Run.synthetic(
                len(widths[at]), parameters, slots=slots, update_ratio=ratio[at], loss=loss[at],
                gradient_norm=0.1 - 0.09 * depth[None], momentum_norm=1e-2, velocity_norm=1e-4,
            )  # fmt: skip
            if not start:
                put(events.encode_roster(run.roster, {"model": {"name": "large"}, "start": 1.7e9 - 1}))
            record, width = run._chunks[0], widths[at].astype(float)[:, None]
            record.steps = np.stack([last[at] - widths[at] + 1, last[at]], axis=1).astype(np.int64)
            record.wall_time = 1.7e9 + 0.01 * last[at]
            for cube in record.moments.values():
                cube[..., [0, 1, 2, 4, 5]] *= width[..., None]
            record.joint *= width[..., None]
            put(events.encode_record(record, run.roster))
        if ended:
            put(events.encode_findings([], steps - 1))
            put(events.encode_end("finished", step=steps - 1))
    return file.stat().st_size


class Server:
    """TensorBoard on a free port."""

    def __init__(self, logdir: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        begun = time.perf_counter()
        self.url = f"http://127.0.0.1:{port}/"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        while True:
            try:
                urllib.request.urlopen(self.url).read()
                break
            except OSError:
                time.sleep(0.05)
        self.up_s = time.perf_counter() - begun

    @property
    def memory_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def ask(self, route: str, **query) -> tuple[float, int]:
        """Seconds and bytes of an answer."""
        begun = time.perf_counter()
        url = f"{self.url}data/plugin/trainrt/api/{route}?{urllib.parse.urlencode(query)}"
        size = len(urllib.request.urlopen(url).read())
        return time.perf_counter() - begun, size

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--weights", type=int, default=200)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--running", action="store_true", help="a run without an end, which the rules judge on opening")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logdir = Path(folder)
        for i in range(options.runs - 1):
            write(logdir / f"short{i:02d}", 500, 20)
        size = write(logdir / "zlarge", options.steps, options.weights, ended=not options.running)
        print(
            f"record: {options.steps:,} steps x {options.weights} weights, {size / 1e6:.0f} MB, in {options.runs} runs"
        )
        rounds = [_round(logdir, options) for _ in range(options.rounds)]
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        print(f"{name:24} median {statistics.median(values):10,.3f}   worst {max(values):10,.3f}")


def _round(logdir: Path, options: argparse.Namespace) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    server = Server(logdir)
    result = {"server s": server.up_s, "memory before MB": server.memory_bytes / 1e6}
    sent = []
    with sync_playwright() as driver:
        executable = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = driver.chromium.launch(executable_path=executable, headless=True, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("response", lambda r: sent.append(r) if "plugin/trainrt/" in r.url else None)
        begun = time.perf_counter()
        page.goto(f"{server.url}#trainrt&run=zlarge")
        page.wait_for_selector('iframe[src*="name=trainrt"]', state="attached")
        result["frame s"] = time.perf_counter() - begun
        frame = page.frame_locator('iframe[src*="name=trainrt"]')
        frame.locator("body[data-map]").wait_for()
        result["map s"] = time.perf_counter() - begun
        frame.locator("body[data-ready]").wait_for()
        result["picture s"] = time.perf_counter() - begun
        inner = next(f for f in page.frames if "name=trainrt" in f.url)
        inner = next(f for f in page.frames if "name=trainrt" in f.url)
        drawn = inner.evaluate("performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime / 1e3])")
        result |= {f"ours: {name.removeprefix('trainrt ')} s": at for name, at in drawn if name.startswith("trainrt ")}
        result["picture sent kB"] = sum(len(r.body()) for r in sent) / 1e3
        chart = frame.locator('canvas[aria-label="Map of layers and steps"]')
        chart.focus()
        chart.press("End")
        took = []
        for key in "++++----":
            took.append(
                inner.evaluate(
                    """(key) => new Promise((done) => {
                        const begun = performance.now();
                        new MutationObserver((_, seen) => { seen.disconnect(); done(performance.now() - begun); })
                          .observe(document.body, { attributeFilter: ['data-ready'] });
                        document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
                    })""",
                    key,
                )
            )
        result["zoom in the browser s"] = statistics.median(took) / 1e3
        result["zoom, slowest s"] = max(took) / 1e3
        begun = time.perf_counter()
        page.goto(f"{server.url}data/plugin_entry.html?name=trainrt#trainrt&run=zlarge")
        page.locator("body[data-ready]").wait_for()
        result["alone s"] = time.perf_counter() - begun
        browser.close()
    query = {"run": "zlarge", "columns": 560, "statistic": "update_ratio", "first": 1000, "last": options.steps // 2}
    result["map route s"], size = server.ask("map", **query)
    result["map sent kB"] = size / 1e3
    result["new statistic route s"], _ = server.ask("map", **{**query, "statistic": "gradient_ratio"})
    result["memory after MB"] = server.memory_bytes / 1e6
    server.stop()
    return result


if __name__ == "__main__":
    main()
