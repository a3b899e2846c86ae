"""Where runs come from: the event files below the log directory, or what TensorBoard itself loaded.

Files are read with `Run.open`, which follows a growing file and keeps the moments on disk. So every window is there
whatever TensorBoard's data server samples (10 or 100 values a tag by default), with either of its readers and in a
notebook; 50 runs cost a listing, and the one that is looked at is the one that is read; copied directories are just
directories. Where TensorBoard has no local directory (`gs://`, `--logdir_spec`, a hosted server) its data provider is
asked instead: the events it kept are put back into a temporary event file, and the same reader reads them.

A name from a request is a key into the listing and never becomes part of a path.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Protocol

from tensorboard import context
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.data import provider

from trainrt.record import events
from trainrt.record.run import Run

LISTING_S = 1.0
"""A listing is as fresh as this; a page asks several questions at once."""

_TYPES = {"<f4": types_pb2.DT_FLOAT, "<f8": types_pb2.DT_DOUBLE, "<i8": types_pb2.DT_INT64}


class Source(Protocol):
    def names(self) -> list[str]:
        """The names of the runs, as TensorBoard calls them, the newest first."""

    def open(self, name: str) -> Run:
        """Opens a run of the listing. Raises KeyError if it is not there, ValueError or OSError if unreadable."""

    def stale(self, name: str, run: Run) -> bool:
        """Whether the run has to be opened anew; growth alone is read by `Run.refresh`."""

    def traced(self, name: str) -> bool:
        """Whether a device trace lies with the run."""


def local(logdir: str | None, logdir_spec: str | None = "") -> bool:
    """Whether a log directory is one on this machine."""
    return bool(logdir) and not logdir_spec and "://" not in str(logdir)


class Files:
    """The runs in and below a directory."""

    def __init__(self, logdir: str | os.PathLike):
        self.logdir = Path(logdir).expanduser()
        self._listed: dict[str, Path] = {}
        self._inodes: dict[str, int] = {}
        self._when = -float("inf")
        self._lock = threading.Lock()

    def _directories(self) -> dict[str, Path]:
        with self._lock:
            if time.monotonic() - self._when > LISTING_S:
                found = reversed(Run.find(self.logdir))
                self._listed = {path.relative_to(self.logdir).as_posix(): path for path in found}
                self._when = time.monotonic()
            return self._listed

    def names(self) -> list[str]:
        return list(self._directories())

    def open(self, name: str) -> Run:
        directory = self._directories()[name]
        top = self.logdir.resolve()
        for file in directory.glob(f"*{events.SUFFIX}"):
            if not (file.is_file() and file.resolve().is_relative_to(top)):
                raise ValueError(
                    f"{file.name} in {name} is no file of the log directory, or a link that leads out of it."
                )
        run = Run.open(directory)
        if run.path is not None:
            self._inodes[name] = os.stat(run.path).st_ino
        return run

    def stale(self, name: str, run: Run) -> bool:
        """The file was replaced or taken away, as when somebody trains into an emptied directory."""
        try:
            return run.path is None or os.stat(run.path).st_ino != self._inodes.get(name)
        except OSError:
            return True

    def traced(self, name: str) -> bool:
        return any((self._directories()[name] / "plugins" / "profile").glob("*/*.xplane.pb"))


class Loaded:
    """The runs that TensorBoard's data provider holds."""

    def __init__(self, data_provider: provider.DataProvider, experiment: str = ""):
        self._provider = data_provider
        self._experiment = experiment
        self._context = context.RequestContext()
        self._state: dict[str, tuple] = {}

    def _listing(self) -> dict:
        return self._provider.list_tensors(self._context, experiment_id=self._experiment, plugin_name="trainrt")

    def names(self) -> list[str]:
        newest = {
            run: max((t.max_wall_time for t in tags.values()), default=0.0) for run, tags in self._listing().items()
        }
        return sorted(newest, key=lambda run: (-newest[run], run))

    def open(self, name: str) -> Run:
        tags = self._listing()[name]
        self._state[name] = _state(tags)
        read = self._provider.read_tensors(
            self._context,
            experiment_id=self._experiment,
            plugin_name="trainrt",
            downsample=10**9,
            run_tag_filter=provider.RunTagFilter(runs=[name], tags=list(tags)),
        )
        # A run keeps its file open, so the name may go at once and nothing is left behind.
        with tempfile.TemporaryDirectory(prefix="trainrt-") as folder:
            file = Path(folder) / events.file_name()
            file.write_bytes(b"".join(map(events.frame, _events(read.get(name, {})))))
            return Run.open(file)

    def stale(self, name: str, run: Run) -> bool:
        return _state(self._listing()[name]) != self._state.get(name)

    def traced(self, name: str) -> bool:
        return False


def _state(tags) -> tuple:
    return tuple(sorted((tag, series.max_step, series.max_wall_time) for tag, series in tags.items()))


def _events(tags) -> list[bytes]:
    """The events again: the values of one tag of a chunk belong to the same step and wall time."""
    groups: dict[tuple, list] = {}
    for tag, data in tags.items():
        single = _is_json(tag)
        for datum in data:
            order = {"trainrt/roster": 0, "trainrt/findings": 2, "trainrt/end": 3}.get(tag, 1)
            key = (order, datum.step, datum.wall_time, tag if single else "")
            groups.setdefault(key, []).append(_value(tag, datum.numpy))
    header = event_pb2.Event(file_version="brain.Event:2").SerializeToString()
    return [header] + [
        event_pb2.Event(step=step, wall_time=wall_time, summary=summary_pb2.Summary(value=values)).SerializeToString()
        for (_, step, wall_time, _), values in sorted(groups.items(), key=lambda item: item[0])
    ]


def _is_json(tag: str) -> bool:
    """Whether a tag holds JSON in an event of its own."""
    return tag in ("trainrt/roster", "trainrt/epoch", "trainrt/findings", "trainrt/end")


def _value(tag: str, array) -> summary_pb2.Summary.Value:
    dims = [tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in array.shape]
    tensor = tensor_pb2.TensorProto(tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=dims))
    if array.dtype.str in _TYPES:
        tensor.dtype, tensor.tensor_content = _TYPES[array.dtype.str], array.tobytes()
    else:
        text = array.reshape(-1)[0] if array.size else json.dumps(None)
        tensor.dtype = types_pb2.DT_STRING
        tensor.string_val.append(text if isinstance(text, bytes) else str(text).encode())
    return summary_pb2.Summary.Value(tag=tag, tensor=tensor)
