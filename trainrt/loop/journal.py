"""One run's record from the first step to the last word: sinks, findings, and how the training ended."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainrt.endurance.signals import Terminated
from trainrt.findings import Finding, diagnose
from trainrt.findings.render import printable, render
from trainrt.loop.recorder import Recorder
from trainrt.passport.audit import Audit
from trainrt.passport.environment import clean, essence
from trainrt.record.run import Run
from trainrt.record.vocabulary import Epoch, Roster
from trainrt.record.windows import BUDGET_BYTES
from trainrt.sinks import Sink
from trainrt.sinks.memory import Memory
from trainrt.sinks.tensorboard import TensorBoard, run_directory

FIRST_LOOK_S = 2.0
"""Seconds before the record is looked at for the first time: what is over by then is told at the end."""


PATIENCE_S = 1.0
"""How long a look waits for what was pushed."""


class Resumed(NamedTuple):
    """That a run goes on.

    Attributes:
      run: The name of its directory below `logdir`; None: it was not written.
      step: Number of the next step.
      over: Whether it is over already, so that there is nothing to write.
    """

    run: str | None
    step: int
    over: bool


class Journal(contextlib.AbstractContextManager):
    """As a context: whatever ends the training, the record is complete and says how it ended.

    Args:
      logdir: Directory below which the run gets one of its own; None keeps it in memory.
      sinks: The user's sinks.
      audit: What watches the data; the record tells what it saw.
      weights: Returns the digest of the model's weights, for the end of the record.
      resumed: The run that goes on; the record goes on in its directory, if it is below `logdir`. None: a new one.
      budget_bytes: About how large the record may grow.

    Raises:
      OSError: `logdir` cannot be written; said before the first step.

    Attributes:
      run: The run, when it has ended.
      findings: What was found, likeliest root cause first.
      judge: What has the last word on the findings of a training that came to its end; None: nobody.
      unbegun: Opens the record of a training that ended before its first step.
    """

    def __init__(
        self,
        logdir: str | None,
        sinks: Sequence[Sink],
        audit: Audit | None = None,
        weights: Callable[[], str | None] = lambda: None,
        resumed: Resumed | None = None,
        budget_bytes: int = BUDGET_BYTES,
    ):
        self._budget_bytes = budget_bytes
        self._logdir = logdir
        self._audit = audit or Audit(enabled=False)
        self._weights = weights
        self.path: Path | None = None
        self._files: tuple[Sink, ...] = ()
        self._resumed = resumed
        if logdir is not None:
            before = None if resumed is None else _below(logdir, resumed.run)
            self.path = before or _made(logdir)
            self._files = () if resumed is not None and resumed.over else (TensorBoard(self.path),)
        self._memory = Memory(self.path)
        self._sinks = (self._memory, *self._files, *sinks)
        self._recorder: Recorder | None = None
        self._last_step = 0
        self._next_look = time.monotonic() + FIRST_LOOK_S
        self._said: set[tuple] = set()
        self._end = {"how": "finished", "detail": ""}
        self.judge: Callable[[list[Finding]], list[Finding]] | None = None
        self.unbegun: Callable[[], None] = lambda: self.open(None, dict)
        self.run: Run | None = None
        self.findings: list[Finding] = []

    @property
    def open_already(self) -> bool:
        return self._recorder is not None

    def open(self, roster: Roster | None, environment: Callable[[], Mapping[str, Any]]) -> None:
        roster = roster or Roster((), (), ())
        if self._resumed is not None:
            step, passport = self._resumed.step, environment

            def environment():
                return {**passport(), "resumed": {"step": step}}

        self._recorder = Recorder(roster, environment, self._sinks, self._budget_bytes)
        if self._audit.known_at_once:  # while the first steps run: at the end, the training would wait for it
            self._tell_data()

    def push(
        self, first: int, every: int, vectors: tf.Tensor, begun: float, ended: float, times: np.ndarray | None = None
    ) -> None:
        assert self._recorder is not None, "open() comes first"
        self._recorder.push(first, every, vectors, begun, ended, times)
        self._last_step = first + int(vectors.shape[0]) - 1
        if self._audit.draft_due:
            self.document("data", self._audit.passport)

    def document(self, kind: str, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Writes what `describe` returns, called later on the recorder's thread; nothing before the record is open."""
        if self._recorder is not None:
            self._recorder.document(kind, self._last_step, describe)

    def mark(self) -> Callable[[], Any]:
        """Call what is returned to wait until all that was recorded by now is on disk, in windows that end here."""
        return (lambda: None) if self._recorder is None else self._recorder.mark().wait

    def epoch(self, epoch: Epoch) -> None:
        if self._recorder is not None:
            self._recorder.epoch(epoch)
            self._tell_data()

    def _tell_data(self) -> None:
        if self._recorder is not None and self._audit.due:
            self._audit.told()
            self.document("data", self._audit.passport)

    def look(self) -> list[Finding]:
        """What is wrong so far and has not been said yet; looks only as often as costs a hundredth of the training."""
        begun = time.monotonic()
        if self._recorder is None or begun < self._next_look:
            return []
        if not self._recorder.mark().wait(PATIENCE_S):
            return []  # a sink is slow: the training does not wait for it
        run = self._so_far()
        found = diagnose(run) if run is not None and len(run) else []
        new = [f for f in found if f.severity != "info" and (f.rule, f.causes[:1]) not in self._said]
        self._said.update((f.rule, f.causes[:1]) for f in new)
        now = time.monotonic()
        self._next_look = now + 100 * (now - begun)
        return new

    def stopped(self, by: str) -> None:
        """`model.stop_training` was set, as far as is known by whom."""
        self._end = {"how": "stopped", "detail": by}

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            interrupted = issubclass(kind, (KeyboardInterrupt, Terminated))
            how = "interrupted" if interrupted else "exception"
            self._end = {
                "how": how,
                "detail": str(error) if interrupted else clean(f"{kind.__name__}: {essence(error)}"),
            }
        if self._recorder is None:
            self.unbegun()
        recorder = self._recorder
        assert recorder is not None
        self._tell_data()
        recorder.drain()
        end = {**self._end, "step": self._last_step, "wall_time": time.time(), "weights_digest": self._weights()}
        run = self._so_far()
        if run is not None:
            run.end = end  # what came of a run is judged when it is over
        found = diagnose(run) if run is not None else []
        self.findings = found if kind is not None or self.judge is None else self.judge(found)
        recorder.close([finding.to_dict() for finding in self.findings], end)
        self.run = self._so_far()
        if error is not None and self._end["how"] == "exception":
            self._explain(error)

    def _explain(self, error: BaseException) -> None:
        """Lets the error say what was found, below its own words: nobody reads what was printed above a traceback."""
        wrong = [finding for finding in self.findings if finding.severity == "error"][:3]
        for finding in wrong if hasattr(error, "add_note") else ():
            tries = "".join(f"\n  try: {printable(line)}" for line in finding.advice[:1])
            error.add_note(f"trainrt: {printable(str(finding))}{tries}")

    def _so_far(self) -> Run | None:
        """The run as recorded by now; of one that went on after a death, what it wrote before as well."""
        if self._resumed is not None and self.path is not None:
            with contextlib.suppress(OSError, ValueError):
                return Run.open(self.path)
        return self._memory.run()

    def tell(self) -> None:
        """Prints a line for each thing that is wrong and has not been said yet, under the progress bar of an epoch."""
        for finding in self.look():
            print(f"trainrt: {printable(str(finding))}")

    def show(self) -> None:
        """Prints what was found, and how to look at it."""
        if self.findings:
            render(self.findings, file=sys.stdout)
        if self.path is not None:
            print(f"trainrt: the record is in {self.path}; see it with: tensorboard --logdir {self._logdir}")


def floats(logs: Mapping[str, Any]) -> dict[str, float]:
    """The logs that are numbers, as Python floats."""
    result = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            result[name] = float(value)
    return result


def _below(logdir: str, name: str | None) -> Path | None:
    """The directory of that name in `logdir`, if there is one: a checkpoint leads to no other place."""
    if not name or name != Path(name).name or name in (".", ".."):
        return None
    path = Path(logdir) / name
    return path if path.is_dir() and not path.is_symlink() else None


def _made(logdir: str) -> Path:
    try:
        path = run_directory(logdir)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"no permission to write in {path}")
        return path
    except OSError as error:
        raise type(error)(
            f"`logdir` cannot be written. Received: logdir={logdir!r}: {error}. "
            "Pass a directory that you may write, or logdir=None to keep the record in memory."
        ) from error
