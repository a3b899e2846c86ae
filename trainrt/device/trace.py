"""A window of steps under TensorFlow's profiler: what ran when, on the host and on the device.

The steps of the window run one a call, each under a marker, so that their times are those of single steps; around the
window nothing changes. The step before it runs alone as well: the single step has to be compiled once, and that is
nothing to trace. TensorFlow writes its file to a temporary place; `trace_reading` reads it, adds a row for each phase
and moves it to where TensorBoard's Profile tab finds it, so that nobody opens one without them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainrt.device import trace_reading
from trainrt.device.phases import Scopes

MOST_STEPS = 100
"""Most steps of a window. A step of a model with 200 layers takes about half a megabyte of trace."""

AUTO_STEPS = 10
AUTO_WINDOWS = 3
"""How many steps `trace="auto"` traces at a time, and how often at most."""

SETTLED_CALLS, SETTLED_SPREAD, PATIENCE_CALLS = 4, 1.3, 40
"""The step time has settled when the last calls differ by no more than the spread, or after so many calls."""

SLOWER, SLOWER_S, KEPT_CALLS = 1.5, 3.0, 512
"""A slow-down: over so many seconds a step took so many times what it took before the last trace."""


class Tracing(contextlib.AbstractContextManager):
    """Says which steps to trace, and traces them. As a context: a window that is open when training ends is closed.

    Args:
      asked: (start, stop): these steps, the last one excluded; "auto"; None: none.
      path: The run's directory; None: the file is thrown away once it has been read.
      document: Takes the kind of a document and what describes it, see `Journal.document`.
      scopes: Called once a window is over, for what the names of its ops are read with.
      per: Steps of an execution; a window holds whole ones.
    """

    def __init__(
        self,
        asked: tuple[int, int] | str | None,
        path: Path | None,
        document: Callable[[str, Callable[[], Mapping[str, Any]]], None],
        scopes: Callable[[], Scopes],
        per: int = 1,
    ):
        self._asked = asked
        self._path = path
        self._document = document
        self._scopes = scopes
        self._auto = asked == "auto"
        self._per = per
        self._window: tuple[int, int] | None = None
        if isinstance(asked, tuple):
            stop = min(asked[1], asked[0] + MOST_STEPS)
            if stop < asked[1]:
                _say(f"`trace` holds at most {MOST_STEPS} steps: it ends at step {stop}, not {asked[1]}")
            self._window = asked[0] // per * per, -(-stop // per) * per
        self._calls: list[tuple[int, float]] = []
        self._usual_s = float("nan")
        self._done = 0
        self._into: str | None = None
        self._first = 0
        self._last = 0
        self._begun = 0.0
        self._why = "asked for"
        self._failed = False

    def room(self, step: int) -> int:
        """How many steps from `step` on may run in one go: none of them may begin or end a window but the last."""
        if self._window is None or step >= self._window[1]:
            return 1 << 30
        start, stop = self._window
        return stop - step if step >= start else max(start - self._per - step, 1)

    def singly(self, step: int) -> bool:
        """Whether the steps from `step` on run one a call."""
        return self._window is not None and self._window[0] - self._per <= step < self._window[1]

    def begin(self, step: int) -> bool:
        """Starts the profiler where a window begins with `step`; returns whether it runs."""
        if self._failed:
            return False
        if self._into is None and self._window is not None and self._window[0] <= step < self._window[1]:
            self._start(step)
        return self._into is not None

    def took(self, step: int, steps: int, seconds: float) -> None:
        """Told after each call: `steps` steps up to before `step` took so long in all."""
        if self._into is not None:
            self._last = step
            if self._window is not None and step >= self._window[1]:
                self.stop()
        elif steps and not (self._window and step >= self._window[0]):
            self._calls.append((steps, seconds))
            del self._calls[1:-KEPT_CALLS]  # the first call, which compiles, holds its place
            if self._auto and self._window is None and not self._failed:
                self._consider(step)

    def _consider(self, step: int) -> None:
        """For "auto": sets a window when there is something new to see."""
        recent = self._calls[1:]
        if not self._done:
            last = [seconds / steps for steps, seconds in recent[-SETTLED_CALLS:]]
            settled = len(last) == SETTLED_CALLS and max(last) <= SETTLED_SPREAD * min(last)
            if settled or len(recent) >= PATIENCE_CALLS:
                self._usual_s = statistics.median(last)
                self._window, self._why = self._from(step + self._per), "the step time had settled"
        elif self._done < AUTO_WINDOWS:
            last_s, last_steps = 0.0, 0
            for steps, seconds in reversed(recent):
                last_s, last_steps = last_s + seconds, last_steps + steps
                if last_s >= SLOWER_S:
                    break
            now = last_s / max(last_steps, 1)
            if last_s < SLOWER_S:
                return
            if self._usual_s != self._usual_s:
                self._usual_s = now
            if now > SLOWER * self._usual_s:
                self._why = f"a step took {now / self._usual_s:.1f} times what it took before"
                self._usual_s = float("nan")
                self._window = self._from(step + self._per)

    def _from(self, start: int) -> tuple[int, int]:
        return start, start + -(-AUTO_STEPS // self._per) * self._per

    def _start(self, step: int) -> None:
        into = tempfile.mkdtemp(prefix="trainrt-trace-")
        try:
            tf.profiler.experimental.start(into, options=tf.profiler.experimental.ProfilerOptions(host_tracer_level=2))
        except Exception as error:  # whatever a driver or another profiler says, training goes on
            shutil.rmtree(into, ignore_errors=True)
            self._failed = True  # the steps still run one a call, as other workers' do
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, tf.errors.AlreadyExistsError):
                words = "another profiler is running; stop it, or leave `trace` out"
            _say(f"steps {step} and later are not traced, training goes on: {words}")
            return
        self._into, self._first, self._last, self._begun = into, step, step, time.time()

    def stop(self) -> None:
        """Stops the profiler if it runs: the window or the epoch is over."""
        if self._into is None:
            return
        into, self._into = self._into, None
        asked, self._window = self._window, None
        self._done += 1
        # The first calls are short ones, or compile: the quickest says what a step takes when all is well.
        usual = min((seconds / steps for steps, seconds in self._calls[1:]), default=None)
        self._calls = self._calls[:1]
        begun = time.perf_counter()
        try:
            tf.profiler.experimental.stop()
        except Exception as error:
            shutil.rmtree(into, ignore_errors=True)
            _say(f"the trace of steps {self._first} to {self._last - 1} was lost, training goes on: {error}")
            return
        content = {
            "steps": [self._first, self._last - 1],
            "asked": list(asked) if asked else None,
            "why": self._why,
            "begun": self._begun,
            "untraced_step_s": usual,
            "stop_s": time.perf_counter() - begun,
            "gpus": len(tf.config.list_physical_devices("GPU")),
        }
        scopes, path = self._scopes(), self._path
        if self._last > self._first:
            self._document("trace", lambda: _told(into, path, scopes, content))
        else:
            shutil.rmtree(into, ignore_errors=True)

    def __exit__(self, kind, error, traceback) -> None:
        self.stop()
        if self._auto and not self._done and not self._failed and kind is None:
            _say(
                "`trace='auto'` traced nothing: the training ended before its step time had settled. "
                "Name the steps: trace=(start, stop)"
            )


@contextlib.contextmanager
def step(number: int, marked: bool) -> Iterator[None]:
    """Around one step: the marker that tools compute step times from. Without `_r=1` they do not see it."""
    if not marked:
        yield
        return
    with tf.profiler.experimental.Trace(trace_reading.MARKER, step_num=number, _r=1):
        yield


@contextlib.contextmanager
def fetching(marked: bool) -> Iterator[None]:
    """Around the wait for a batch."""
    if not marked:
        yield
        return
    with tf.profiler.experimental.Trace(trace_reading.INPUT):
        yield


def _told(into: str, path: Path | None, scopes: Scopes, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the trace in a temporary directory says; the file goes to where the Profile tab finds it."""
    try:
        files = sorted(Path(into).rglob("*.xplane.pb"))
        if not files:
            return {**content, "notes": ["The profiler wrote no file."]}
        begun = time.perf_counter()
        told, annotated = trace_reading.read(files[0].read_bytes(), scopes, content["steps"])
        told = {**content, **told, "bytes": len(annotated)}
        if content["gpus"] and not told["device"]:
            told["notes"] = [
                *told["notes"],
                "No event of a GPU is in the trace: CUPTI is missing, or may not be used by this user "
                "(NVreg_RestrictProfilingToAdminUsers=0 lets everybody).",
            ]
        if path is not None:
            stamp = time.strftime("%Y_%m_%d_%H_%M_%S", time.localtime(content["begun"]))
            directory = path / "plugins" / "profile" / stamp
            directory.mkdir(parents=True, exist_ok=True)
            final = directory / f"{socket.gethostname()}.xplane.pb"
            if final.exists():
                final = directory / f"{socket.gethostname()}-{os.getpid()}.xplane.pb"
            part = final.with_suffix(".part")
            part.write_bytes(annotated)
            os.replace(part, final)
            told["file"] = final.relative_to(path).as_posix()
        return {**told, "reading_s": time.perf_counter() - begun}
    finally:
        shutil.rmtree(into, ignore_errors=True)


def _say(words: str) -> None:
    warnings.warn(f"trainrt: {words}.", RuntimeWarning, stacklevel=4)
