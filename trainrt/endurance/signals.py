"""Ends well: what asks a process to end lets it finish the step, save and close its record first.

SIGTERM is how a cluster, a container or a shutdown asks; SIGINT is Ctrl-C. The first of either is answered between two
steps. A second SIGINT ends the process at once, even inside a call of TensorFlow, where no handler of Python's runs.

What a scheduler sends before it takes a machine away is a SIGTERM: Kubernetes, Slurm (`sbatch --signal=TERM@60`), cloud
machines that shut down. Several workers agree on one, whoever of them it came to (`lockstep.py`): none can end alone,
as the others would wait for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

DEFAULTS = {signal.SIGTERM: (signal.SIG_DFL,), signal.SIGINT: (signal.SIG_DFL, signal.default_int_handler)}
"""What stands there when nobody has said otherwise; a user's own handler is left alone."""


class Terminated(SystemExit):
    """SIGTERM came: the process ends with the conventional status, 128 + 15, unless somebody catches it."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "SIGTERM"


class Signals(contextlib.AbstractContextManager):
    """As a context: catches the two signals where nobody else does, in the main thread.

    Args:
      enabled: Whether to catch any.
      together: Whether there are other workers that have to end at the same step.

    Attributes:
      came: The signal that came, as long as it has not been answered.
      waits: Whether somebody will soon ask for it; otherwise a signal is answered where it comes, if nobody else has
        to end with this process.
      agreed: With `together`: the signal that all workers know of, which alone is answered.
    """

    def __init__(self, enabled: bool, together: bool = False):
        self._together = together
        self.agreed: int | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, object] = {}
        self._impatience = Impatience()
        self.came: signal.Signals | None = None
        self.waits = False

    def __enter__(self) -> Signals:
        if self._enabled:
            for number, defaults in DEFAULTS.items():
                if signal.getsignal(number) in defaults:
                    self._before[number] = signal.signal(number, self._handle)
            if signal.SIGINT in self._before:
                self._impatience.watch()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._impatience.end()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        if kind is None:
            self.agreed = self.agreed or self.came
            self.answer()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self.waits:
            self.answer()
        again = " Ctrl-C again ends it at once." if number == signal.SIGINT else ""
        print(f"\ntrainrt: {self.came.name} came; the step is finished and saved first.{again}", file=sys.stderr)

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Signals are answered while the context lasts; later ones wait until all is saved and closed."""
        try:
            yield
        finally:
            self.waits = True

    @property
    def asked(self) -> int | None:
        """The signal to end by, if there is one."""
        return self.agreed if self._together else self.came

    def answer(self) -> None:
        """Ends the training if a signal came.

        Raises:
          KeyboardInterrupt: SIGINT came.
          Terminated: SIGTERM came.
        """
        asked = self.asked
        if asked is None:
            return
        self.came = self.agreed = None
        self.waits = True
        if asked == signal.SIGINT:
            raise KeyboardInterrupt("SIGINT")
        raise Terminated


class Impatience:
    """Ends the process at a second SIGINT while its main thread is in a call of TensorFlow's that takes long.

    Python runs handlers in the main thread, between two of its instructions. What the system delivers is written to a
    descriptor at once, though, and a thread reads it there. Where an event loop has that descriptor nothing is watched.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._written = -1

    def watch(self) -> None:
        """Begins; in the main thread."""
        if not hasattr(os, "register_at_fork"):  # Windows
            return
        reads, self._written = os.pipe()
        os.set_blocking(self._written, False)
        others = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        if others != -1:
            signal.set_wakeup_fd(others)
            os.close(self._written)
            os.close(reads)
            return
        _watching.append(self._written)
        self._thread = threading.Thread(target=_leave_at_the_second, args=[reads], name="trainrt-signals", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ends, if it began."""
        if self._thread is None:
            return
        others = signal.set_wakeup_fd(-1)
        if others != self._written:
            signal.set_wakeup_fd(others)
        _watching.remove(self._written)
        os.close(self._written)  # which the thread reads as the end
        self._thread.join()
        self._thread = None


_watching: list[int] = []


def _leave_at_the_second(reads: int) -> None:
    with open(reads, "rb", buffering=0) as file:
        count = 0
        while written := file.read(64):
            count += written.count(signal.SIGINT)
            if count > 1:
                os._exit(128 + signal.SIGINT)


def _forked() -> None:
    """A child that was forked gets the same Ctrl-C, and would write it to the same pipe."""
    if _watching:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
