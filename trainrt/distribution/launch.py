"""Starts the workers of a `MultiWorkerMirroredStrategy` on this machine, and keeps them together.

Each worker is the same script with a `TF_CONFIG` of its own, on loopback. TensorFlow cannot replace a worker that died:
the others are stopped and all start again, and go on from their checkpoint where the script has one. On several
machines something else sets `TF_CONFIG` (Ray, Kubeflow), or `SlurmClusterResolver` reads Slurm's variables; the script
is the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

GRACE_S = 15.0
"""Seconds that a worker has to save and end after SIGTERM, before it is killed."""

POLL_S = 0.05
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_WRITING = threading.Lock()
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def launch(
    command: Sequence[str], workers: int, restarts: int = 0, environment: Mapping[str, str] | None = None
) -> int:
    """Runs `command` as so many workers until all have ended.

    SIGINT and SIGTERM are passed on to the workers, once; a second one kills them.

    Args:
      command: What each worker runs.
      workers: How many.
      restarts: How often all are started again after one has died.
      environment: Of the workers, beside `TF_CONFIG`; None is that of this process.

    Returns:
      The exit status: 0 when all ended well, else that of the worker that died first; 128 and the signal's number where
      a signal ended it, or ended the launcher.
    """
    environment = dict(os.environ if environment is None else environment)
    told = _Signals()
    with told:
        for attempt in range(restarts + 1):
            group = _Group(command, workers, environment, attempt)
            dead = group.wait(told)
            if told.first:
                return 128 + told.first
            if dead is None:
                return 0
            status = group.processes[dead].returncode
            group.stop()
            again = f"starting all {workers} again ({attempt + 1} of {restarts})" if attempt < restarts else "giving up"
            _say(f"worker {dead} {_ended(status)}; the others were stopped; {again}.")
    return status if status > 0 else 128 - status


def cluster(workers: int) -> list[str]:
    """Addresses on loopback that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def variables(addresses: Sequence[str], worker: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of one worker: `TF_CONFIG`, and its share of the GPUs in `CUDA_VISIBLE_DEVICES`, if it is set.

    >>> variables(["127.0.0.1:1", "127.0.0.1:2"], 1, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})["CUDA_VISIBLE_DEVICES"]
    '2,3'
    """
    task = {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": worker}}
    result = {**environment, "TF_CONFIG": json.dumps(task), "PYTHONUNBUFFERED": "1"}
    devices = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    each = len(devices) // len(addresses)
    if each:
        result["CUDA_VISIBLE_DEVICES"] = ",".join(devices[worker * each : (worker + 1) * each])
    return result


class _Signals(contextlib.AbstractContextManager):
    """Notes the signals that ask the launcher to end.

    Attributes:
      first: Number of the first; None before it.
      count: How many came.
    """

    def __init__(self):
        self.first: int | None = None
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number, _frame):
        self.first = self.first or number
        self.count += 1


class _Group:
    """The workers of one attempt."""

    def __init__(self, command: Sequence[str], workers: int, environment: Mapping[str, str], attempt: int):
        addresses = cluster(workers)
        self.processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        for worker in range(workers):
            process = subprocess.Popen(
                list(command),
                env={**variables(addresses, worker, environment), "TRAINRT_RESTART": str(attempt)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C of the terminal comes to us alone, and is passed on once
                preexec_fn=_die_with_the_launcher,
            )
            self.processes.append(process)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=_pass_on, args=(source, target, f"[{worker}] "), daemon=True)
                reader.start()
                self._readers.append(reader)

    def wait(self, told: _Signals) -> int | None:
        """Waits until all have ended, or one has died: its number, else None. Passes signals on."""
        passed = 0
        until = None
        while True:
            states = [process.poll() for process in self.processes]
            if all(state is not None for state in states) and passed:
                self._drain()
                return None
            died = next((i for i, state in enumerate(states) if state), None)
            if died is not None and not passed:
                return died
            if all(state is not None for state in states):
                self._drain()
                return None
            if told.count > passed:
                self._send(told.first if not passed else signal.SIGKILL)
                passed, until = told.count, time.monotonic() + GRACE_S
            if until is not None and time.monotonic() > until:
                self._send(signal.SIGKILL)
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ends those that still run: SIGTERM, and SIGKILL for who does not listen."""
        self._send(signal.SIGTERM)
        until = time.monotonic() + GRACE_S
        while any(process.poll() is None for process in self.processes) and time.monotonic() < until:
            time.sleep(POLL_S)
        self._send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self._drain()

    def _send(self, number: int | None) -> None:
        for process in self.processes:
            if process.poll() is None and number:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def _drain(self) -> None:
        for reader in self._readers:
            reader.join(timeout=2.0)  # a grandchild that holds the pipe must not hold us


def _pass_on(source: IO[bytes], target: IO[str], prefix: str) -> None:
    """Copies lines, each behind the worker's number."""
    with source:
        for line in source:
            with contextlib.suppress(ValueError, OSError), _WRITING:
                target.write(prefix + line.decode(errors="replace").rstrip("\r\n") + "\n")
                target.flush()


def _die_with_the_launcher() -> None:
    """Asks Linux to end this process when the launcher is killed; elsewhere nothing happens."""
    if _LIBC is not None and hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def _say(words: str) -> None:
    print(f"trainrt launch: {words}", file=sys.stderr, flush=True)
