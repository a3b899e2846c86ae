"""Where the time of a training goes, told without a profiler: always on, for a few numbers a call.

Many steps run in one call, and Python sees only the call. Two timestamps a step inside the compiled loop say when its
batch was there and when it was done, so that waiting for input is told from computing, and a straggling step has a
number. Where that would cost more than half a percent it is done for one call in many (`Timing.clocks`), and the others
are told by their means. Data that the loop gathers by itself (`resident`) are never waited for. On a GPU a step is done
when its kernels were launched, so that single steps there are those of the host; their sum over a call is right.

The rest is measured around the calls: callbacks, validation, handing over to the recorder, and what is left of Python.
Which callback is at work is looked up now and then by another thread, in the main thread's frames: nothing of the
user's objects is wrapped.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

PARTS = ("first_call", "input", "step", "callbacks", "validation", "writing", "probe", "trace", "host")
"""What the wall time of a training divides into: tracing and compiling up to the first step; waiting for batches; the
steps without that; callbacks; validation; handing the record over, which waits when the disk is slow; trainrt's own
looks into the model; profiling; and what is left of Python."""

STRAGGLER, STRAGGLER_S = 4.0, 0.02
"""A step straggles that takes so many times the median of those before, and so many seconds more than it."""

MEMORY, FRESH, WORST = 512, 32, 20
"""Steps whose median a straggler is measured by, after how many it is taken again, and how many stragglers are kept:
the worst."""

CLOCK_SHARE = 0.005
"""What the clock may take of a step."""

SPARED_AFTER_S, ONE_IN = 20.0, 16
"""Steps too short for it are clocked in one call of so many, once a training has gone on for so long: the loop without
a clock has to be compiled first, which takes some tenths of a second."""

TELL_AGAIN = 2.0
"""A document is written at an epoch's end when the training has grown by this factor since the last one."""


class Timing:
    """Adds up where the time went.

    Attributes:
      seconds: Part of `PARTS` -> seconds so far; "host" is known when it is told.
      steps: Steps so far, the first call's included.
      clock_s: What the clock takes of a step whose batch is waited for.
    """

    def __init__(self, data: str = "", pipeline: Sequence[str] = ()):
        self._begun = time.perf_counter()
        self._told = 0.0
        self._data = data
        self._pipeline = list(pipeline)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self.clock_s = 0.0
        self._calls = 0
        self._waited = False
        self._waited_share = 0.0
        self._spared = False
        self._unclocked = 0
        self._counted = 0.0
        self._recent: list[np.ndarray] = [np.zeros(0)]
        self._fresh = 0
        self._usual = float("nan")
        self._stragglers: list[dict[str, Any]] = []
        self._straggling = [0, 0.0]
        self._end: float | None = None
        self._inside: str | None = None
        self._main = threading.get_ident()
        self._seen: dict[str, int] = {}

    def of(self, part: str) -> contextlib.AbstractContextManager[None]:
        """Counts what runs in the context for a part, without what is counted inside it for another one."""
        return _Part(self, part)

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds
        self._counted += seconds

    @property
    def clocks(self) -> bool:
        """Whether the next call is to take the time of each step."""
        return not self._spared or self._calls % ONE_IN == 0

    def call(
        self, first: int, steps: int, begun: float, ended: float, clock: np.ndarray | None, traced: bool = False
    ) -> np.ndarray:
        """A call ran `steps` steps from `begun` to `ended`, in seconds since 1970; under a profiler if `traced`.

        Returns:
          [steps, 3]: seconds of each step, seconds of it that it waited for its batch (NaN: it gathers it by itself, or
          nobody knows; of a call without a clock the mean, and the share of the last call with one), and seconds since
          the end of the call before (0 but for the first step).
        """
        told = _told(steps, begun, ended, clock)
        spared = self._waited and (clock is None or not clock[:1, 0].any())
        if spared:
            self._unclocked += 1
            told[:, 1] = told[:, 0] * self._waited_share
        if self._end is not None and steps:
            told[0, 2] = max(begun - self._end, 0.0)
        self._end = ended
        self._calls += 1
        self.steps += steps
        if self._calls == 1 or (spared and self._unclocked == 1):  # it compiles
            self._add("first_call", ended - begun)
            return told
        if traced:
            self._add("trace", ended - begun)
            return told
        if not steps:
            return told
        spent, waited = told[0, :2].tolist() if steps == 1 else told[:, :2].sum(axis=0).tolist()
        known = waited == waited
        waited = waited if known else 0.0
        self._waited |= known
        if known and not spared:
            self._waited_share = waited / max(spent, 1e-9)
        self._add("input", waited)
        self._add("step", max(ended - begun - waited, 0.0))
        self._straggle(first, told)
        long_enough = time.perf_counter() - self._begun > SPARED_AFTER_S
        self._spared = self._waited and long_enough and CLOCK_SHARE * self._usual < self.clock_s
        return told

    def _straggle(self, first: int, told: np.ndarray) -> None:
        usual, step_s = self._usual, told[:, 0]
        limit = max(STRAGGLER * usual, usual + STRAGGLER_S)
        longest = step_s.item() if len(step_s) == 1 else step_s.max()
        if longest > limit:  # never where nothing is usual yet: that is NaN
            for i in np.flatnonzero(step_s > limit):
                self._straggling[0] += 1
                self._straggling[1] += float(step_s[i]) - usual
                waited = None if np.isnan(told[i, 1]) else float(told[i, 1])
                worst = {"step": first + int(i), "s": float(step_s[i]), "usual_s": usual, "input_s": waited}
                self._stragglers = sorted([*self._stragglers, worst], key=lambda s: -s["s"])[:WORST]
        self._recent.append(step_s)
        self._fresh += len(step_s)
        # A median takes as long as several steps may: now and then is enough.
        if self._fresh >= FRESH:
            self._settle()

    def _settle(self) -> None:
        self._recent = [np.concatenate(self._recent)[-MEMORY:]]
        self._fresh = 0
        if len(self._recent[0]) >= FRESH:
            self._usual = float(np.median(self._recent[0]))

    def glance(self) -> None:
        """Notes which callback the training thread is in, if it is in one. Called from another thread."""
        if self._inside not in ("callbacks", "validation"):
            return
        frame = sys._current_frames().get(self._main)
        found = None
        while frame is not None:
            owner = frame.f_locals.get("self") if frame.f_code.co_name.startswith("on_") else None
            if isinstance(owner, keras.callbacks.Callback) and not isinstance(owner, keras.callbacks.CallbackList):
                found = f"{type(owner).__name__}.{frame.f_code.co_name}"
            frame = frame.f_back
        if found:
            self._seen[found] = self._seen.get(found, 0) + 1

    @property
    def due(self) -> bool:
        return time.perf_counter() - self._begun > max(60.0, TELL_AGAIN * self._told)

    def told(self) -> dict[str, Any]:
        """What is known so far, for the document "timing".

        Returns:
          `seconds` by part and `wall_s`, their sum; `steps`, `per_second` of them without the first call; `step_s`:
          median, p90 and p99 of the last steps; `input_known`: whether waiting for input could be told; `data`: what
          the data come from and `pipeline`: the stages of a `tf.data.Dataset`, last one first; `stragglers`: `count`,
          `excess_s` of all of them, the `worst`; `callbacks`: `Class.method` -> share of the looks in which it ran.
        """
        wall = self._told = time.perf_counter() - self._begun
        seconds = dict(self.seconds)
        seconds["host"] = max(0.0, wall - sum(seconds.values()))
        self._settle()
        recent = self._recent[0]
        quantiles = np.quantile(recent, [0.5, 0.9, 0.99]) if len(recent) else [float("nan")] * 3
        looks = sum(self._seen.values())
        training = seconds["input"] + seconds["step"] + seconds["callbacks"] + seconds["writing"] + seconds["host"]
        return {
            "seconds": seconds,
            "wall_s": wall,
            "steps": self.steps,
            "calls": self._calls,
            "per_second": self.steps / training if training > 0 and self._calls > 1 else None,
            "step_s": dict(zip(("median", "p90", "p99"), map(float, quantiles), strict=True)) if len(recent) else None,
            "input_known": self._waited,
            "data": self._data,
            "pipeline": self._pipeline,
            "stragglers": {
                "count": self._straggling[0],
                "excess_s": self._straggling[1],
                "worst": list(self._stragglers),
            },
            "callbacks": {name: count / looks for name, count in sorted(self._seen.items(), key=lambda s: -s[1])[:8]},
        }


class _Part(contextlib.AbstractContextManager):
    """Around what counts for a part; nine of them stand around a call, which may be a single step."""

    __slots__ = ("_begun", "_counted", "_outer", "_part", "_timing")

    def __init__(self, timing: Timing, part: str):
        self._timing, self._part = timing, part

    def __enter__(self) -> None:
        timing = self._timing
        self._counted, self._outer = timing._counted, timing._inside
        timing._inside = self._part
        self._begun = time.perf_counter()

    def __exit__(self, *_) -> None:
        timing = self._timing
        timing._inside = self._outer
        timing._add(self._part, time.perf_counter() - self._begun - (timing._counted - self._counted))


def _told(steps: int, begun: float, ended: float, clock: np.ndarray | None) -> np.ndarray:
    """[steps, 3] as `Timing.call` returns it, as far as the call alone tells."""
    if steps == 1:  # where somebody listens to every batch there are as many calls as steps
        step_s, waited = ended - begun, float("nan")
        if clock is not None:
            ready, done = clock[0].tolist()
            step_s = max(done - begun, 0.0)
            waited = max(min(ready, done) - begun, 0.0) if ready else waited
        return np.array([[step_s, waited, 0.0]])
    told = np.zeros((steps, 3))
    told[:, 0], told[:, 1] = (ended - begun) / max(steps, 1), np.nan
    if clock is not None:
        ready, done = clock[:, 0], clock[:, 1]
        before = np.concatenate([[begun], done[:-1]])
        told[:, 0] = np.maximum(done - before, 0.0)
        if ready.any():
            told[:, 1] = np.maximum(np.minimum(ready, done) - before, 0.0)
    return told


def stages(data: Any) -> list[str]:
    """The stages of a `tf.data.Dataset`, the last one first, by the names of their classes; [] for other data.

    >>> import tensorflow as tf
    >>> stages(tf.data.Dataset.range(8).map(lambda x: x).batch(2).prefetch(1))
    ['Prefetch', 'Batch', 'Map', 'Range']
    """
    found: list[str] = []
    while hasattr(data, "element_spec") and hasattr(data, "_inputs") and len(found) < 64:
        found.append(type(data).__name__.lstrip("_").removesuffix("Dataset").removesuffix("V2"))
        inputs = data._inputs()
        data = inputs[0] if inputs else None
    return found


def kind(data: Any) -> str:
    """What the data come from, in a word: "arrays", "tf.data", or the class of what gives them."""
    if hasattr(data, "element_spec"):
        return "tf.data"
    if isinstance(data, (np.ndarray, list, tuple, Mapping)) or hasattr(data, "shape"):
        return "arrays"
    return type(data).__name__
