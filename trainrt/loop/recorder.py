"""From the device's vectors to records, on a thread of its own.

The training loop hands over one packed tensor a chunk and goes on. Where a sink is slower than the training, chunks
become windows of their own until it has caught up: the resolution falls, and no step is left out. The training waits
for a moment before that, and then no more.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainrt.record.vocabulary import DEVICE_MOMENTS, GRADIENT, JOINT, Document, Epoch, Moments, Record, Roster
from trainrt.record.windows import Windows
from trainrt.sinks import Sink
from trainrt.update.observer import unpack

HOST_SCALARS = ("gradient_norm", "clipped_gradient_norm", "step_s", "input_wait_s", "between_s")
"""Scalars that the host adds: L2 norm over all weights before and after the clip; seconds a step, those of it that the
step waited for its batch (NaN: not known), and those between the call of the step and the one before, see `timing`."""

DELIVERY_S = 1.0
"""Windows wait at most so long before they go to the sinks."""

DELIVERY_WINDOWS = 64
QUEUE_CHUNKS = 8
"""Chunks that wait at full resolution."""

PATIENCE_S = 5.0
"""How long, all in all, a training waits for its record before this gets coarser."""

LATE_WINDOWS = 64
"""Windows that the chunks behind them become; two of them become one when there are more."""


class _Chunk(NamedTuple):
    first: int
    every: int
    vectors: tf.Tensor
    begun: float
    ended: float
    times: np.ndarray | None


class _Pending(NamedTuple):
    kind: str
    step: int
    describe: Callable[[], Mapping[str, Any]]


class _Finish(NamedTuple):
    findings: Sequence[Mapping[str, Any]]
    end: Mapping[str, Any]


class Recorder:
    """Turns what `Step` saw into records and hands them to the sinks.

    Args:
      roster: The names along the axes of the vectors.
      environment: Returns the passport of the run; called on the recorder's thread, so that the training does not wait.
      sinks: Where the records go.
      budget_bytes: About how large the record may grow: windows widen as it does, and no step is left out of them.
    """

    def __init__(
        self, roster: Roster, environment: Callable[[], Mapping[str, Any]], sinks: Sequence[Sink], budget_bytes: int
    ):
        self._device_roster = roster
        self.roster = Roster(roster.parameters, roster.subjects, (*roster.scalars, *HOST_SCALARS))
        self._environment = environment
        self._sinks = list(sinks)
        self._windows = Windows(self.roster, budget_bytes)
        self._waiting: list[Record] = []
        self._delivered = time.monotonic()
        self._queue: queue.Queue = queue.Queue()
        self._lock = threading.Condition()
        self._patience_s = PATIENCE_S
        self._underway = 0  # chunks in the queue, or being taken from it
        self._late: list[Record] = []
        self._told = False
        self._thread = threading.Thread(target=self._work, name="trainrt-recorder", daemon=True)
        self._thread.start()

    def push(
        self, first: int, every: int, vectors: tf.Tensor, begun: float, ended: float, times: np.ndarray | None = None
    ) -> None:
        """A chunk of steps, the first one numbered `first`, that ran from `begun` to `ended` (seconds since 1970).

        `times`: [steps, 3] as `Timing.call` returns them; None: nothing is known of single steps.
        """
        chunk = _Chunk(first, every, vectors, begun, ended, times)
        with self._lock:
            if self._underway >= QUEUE_CHUNKS and not self._late and self._patience_s > 0:
                since = time.monotonic()
                self._lock.wait_for(lambda: self._underway < QUEUE_CHUNKS, self._patience_s)
                self._patience_s -= time.monotonic() - since
            if self._underway < QUEUE_CHUNKS and not self._late:
                self._underway += 1
                self._queue.put(chunk)
                return
        self._guarded(lambda: self._come_late(chunk))

    def _come_late(self, chunk: _Chunk) -> None:
        record = self._record(chunk)
        if not len(record):
            return
        with self._lock:
            self._late.append(record.merge())
            if len(self._late) > LATE_WINDOWS:
                pairs = [self._late[i : i + 2] for i in range(0, len(self._late), 2)]
                self._late = [Record.concatenate(pair).merge() for pair in pairs]
        if not self._told:
            self._told = True
            _warn(
                "trainrt: the record cannot be written as fast as the training runs, so it gets coarser: windows of "
                "many steps, in which no step is missing. Write it to a faster disk, or observe fewer steps: "
                "trainrt.fit(..., observe=10)."
            )

    def epoch(self, epoch: Epoch) -> None:
        self._queue.put(epoch)

    def document(self, kind: str, step: int, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Writes a document; `describe` returns its content, and is called on the recorder's thread."""
        self._queue.put(_Pending(kind, step, describe))

    def drain(self) -> None:
        """Returns when all that was pushed has reached the sinks."""
        self.mark().wait()

    def mark(self) -> threading.Event:
        """Ends the window that is open; the event is set when all that was pushed by now has reached the sinks."""
        done = threading.Event()
        self._queue.put(done)
        return done

    def close(self, findings: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> None:
        """Delivers what is left, closes the sinks and ends the thread."""
        self._queue.put(_Finish(findings, end))
        self._thread.join()

    def _work(self) -> None:
        passport: Mapping[str, Any] = {}
        try:
            passport = self._environment()
        except Exception as error:  # without its thread the training would wait for its record for ever
            _warn(f"trainrt: the run has no passport. {type(error).__name__}: {error}")
        self._each(lambda sink: sink.open(self.roster, passport))
        while True:
            try:
                item = self._queue.get(timeout=DELIVERY_S)
            except queue.Empty:
                self._take_late()
                self._deliver()
                continue
            if isinstance(item, _Chunk):
                self._guarded(lambda item=item: self._take(item))
                with self._lock:
                    self._underway -= 1
                    self._lock.notify()
                self._take_late()
                due = time.monotonic() - self._delivered > DELIVERY_S
                if due or sum(len(r) for r in self._waiting) >= DELIVERY_WINDOWS:
                    self._deliver()
                continue
            if isinstance(item, _Pending):
                self._guarded(lambda item=item: self._describe(item))
                continue
            self._take_late()
            self._guarded(lambda: self._waiting.extend(self._windows.rest()))
            self._deliver()
            if isinstance(item, threading.Event):
                item.set()
            elif isinstance(item, Epoch):
                self._each(lambda sink, item=item: sink.write(item))
            else:
                self._each(lambda sink, item=item: sink.close(item.findings, item.end))
                return

    def _take_late(self) -> None:
        """Takes what came late, once all that came before it has been taken."""
        with self._lock:
            if self._underway or not self._late:
                return
            late, self._late = self._late, []
        self._guarded(lambda: self._waiting.extend([*self._windows.rest(), *late]))

    def _describe(self, pending: _Pending) -> None:
        document = Document(pending.kind, pending.step, pending.describe())
        self._each(lambda sink: sink.write(document))

    def _take(self, chunk: _Chunk) -> None:
        self._waiting.extend(self._windows.add(self._record(chunk)))

    def _record(self, chunk: _Chunk) -> Record:
        """A chunk as windows of one step."""
        vectors = np.asarray(chunk.vectors)
        numbers = np.arange(chunk.first, chunk.first + len(vectors))
        spent = chunk.times
        if spent is None:
            spent = np.full((len(vectors), 3), np.nan)
            spent[:, 0] = (chunk.ended - chunk.begun) / max(len(vectors), 1)
        times = chunk.begun + np.cumsum(spent[:, 0])
        seen = numbers % chunk.every == 0
        moments, joint, scalars = unpack(vectors[seen], self._device_roster)
        subjects = {
            name: Moments.from_device(moments[:, :, i]).array for i, name in enumerate(self._device_roster.subjects)
        }
        norm, clipped = _global_norms(moments[:, :, self._device_roster.subjects.index(GRADIENT)], joint)
        host = np.concatenate([np.stack([norm, clipped], axis=1), spent[seen]], axis=1)
        values = np.concatenate([scalars, host], axis=1)
        steps = numbers[seen].astype(np.int64)
        return Record(
            np.stack([steps, steps], axis=1), times[seen], subjects, joint, np.repeat(values[:, :, None], 3, axis=2)
        )

    def _deliver(self) -> None:
        self._delivered = time.monotonic()
        if self._waiting:
            record = Record.concatenate(self._waiting)
            self._waiting = []
            self._each(lambda sink: sink.write(record))

    def _each(self, call) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                _warn(
                    f"trainrt: the sink {type(sink).__name__} failed and gets no more of this run, training goes on. "
                    f"What it wrote before stays. {type(error).__name__}: {error}"
                )

    def _guarded(self, call) -> None:
        try:
            call()
        except Exception as error:  # a fault of ours must not take the training down
            _warn(f"trainrt: a chunk of the record was lost. {type(error).__name__}: {error}")


def _warn(message: str) -> None:
    """A warning that cannot kill the recorder's thread where warnings are errors."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning as warning:
        print(warning)


def _global_norms(gradient: np.ndarray, joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K] L2 norms over all weights, before and after the clip; NaN where an element was not finite."""
    column = {name: gradient[..., i] for i, name in enumerate(DEVICE_MOMENTS)}
    scale = joint[..., JOINT.index("scale")] / np.maximum(joint[..., JOINT.index("steps")], 1)
    broken = np.nansum(column["nonfinite"], axis=1) > 0
    norm = np.sqrt(np.nansum(column["sumsq"], axis=1))
    clipped = np.sqrt(np.nansum(column["sumsq"] * scale**2, axis=1))
    return np.where(broken, np.nan, norm), np.where(broken, np.nan, clipped)
