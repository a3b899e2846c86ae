"""`Run`: what a training recorded, from a log directory or from memory; rules, comparison, CLI and plugin take it.

A run is read lazily. Opening it checks every byte and keeps the places of the moments; a statistic reads the subjects
that it needs, and nothing big is kept. Slicing, narrowing and joining give runs again, and cost nothing until asked.

>>> run = Run.synthetic(steps=4, update_ratio=[1e-3, 1e-3, 1e-6, 1e-9])
>>> run["update_ratio"][:, 0]
array([1.e-03, 1.e-03, 1.e-06, 1.e-09])
>>> len(run[-2:]), run[-2:].steps.tolist()
(2, [[2, 2], [3, 3]])
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trainrt.record import event_files, reading, statistics
from trainrt.record.columns import Columns, RunMoments, Weights
from trainrt.record.vocabulary import (
    JOINT,
    SCALAR,
    Document,
    Epoch,
    Moments,
    Parameter,
    Record,
    Roster,
)

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")
CERTIFICATE = "certificate"
"""Kind of the document with which `trainrt determinism prove` signs a run; it shows in the passport."""

_SILENCE_S = 300.0


class Run:
    """A recorded run, finished or not.

    Args:
      roster: The names along its axes.
      record: Its windows, or None before the first.
      environment: The run's passport.
      epochs: What Keras reported after each epoch.
      findings: What was found while it ran.
      end: `how`, `detail` and `wall_time` of its end; None: it still runs, or was killed.
      path: The event file that it comes from.
      problems: What could not be read, a line each.
      documents: What else is known: the data passport, what a trace says, digests.

    Attributes:
      roster, environment, epochs, end, path, documents: As above.
      recorded_findings: The `findings` above.
    """

    def __init__(
        self,
        roster: Roster,
        record: Record | None = None,
        environment: Mapping[str, Any] | None = None,
        epochs: Sequence[Epoch] = (),
        findings: Sequence[Mapping[str, Any]] = (),
        end: Mapping[str, Any] | None = None,
        path: str | os.PathLike | None = None,
        problems: Sequence[str] = (),
        documents: Sequence[Document] = (),
    ):
        self.roster = roster
        self.environment: dict[str, Any] = dict(environment or {})
        self.documents = list(documents)
        self.epochs = list(epochs)
        self.recorded_findings = [dict(finding) for finding in findings]
        self.end = None if end is None else dict(end)
        self.path = None if path is None else Path(path)
        self._problems = list(problems)
        self._reader: reading.Reader | None = None
        self._chunks: list[Record | reading.StoredRecord] = [] if record is None or not len(record) else [record]
        # Of a narrowed or joined run: for each weight its indices along the P of the chunks. None: all, as they are.
        self._groups: list[np.ndarray] | None = None
        self._joined = False
        self._small: dict[str, np.ndarray] = {}
        self._kept: dict[str, Any] | None = None

    @classmethod
    def from_records(cls, roster: Roster, records: Iterable[Record], **keywords) -> Run:
        """A run of consecutive records, which are referred to and not copied. Keywords as for `Run`."""
        run = cls(roster, None, **keywords)
        run._chunks = [record for record in records if len(record)]
        return run

    @classmethod
    def find(cls, logdir: str | os.PathLike) -> list[Path]:
        """The directories of all runs in and below a directory, the oldest first."""
        files = event_files.within(Path(logdir), deep=True)
        return list(dict.fromkeys(file.parent for file in reversed(files)))[::-1]

    @classmethod
    def open(cls, logdir: str | os.PathLike) -> Run:
        """Opens a run: that of a directory, the newest below it, or that of an event file.

        Raises:
          FileNotFoundError: There is none.
          ValueError: A file that is no event file of trainrt, or one that was recorded by a newer trainrt that writes
            another version of the record.
        """
        path = Path(logdir)
        problems = []
        if path.is_dir():
            files = event_files.within(path) or event_files.within(path, deep=True)
            if not files:
                raise FileNotFoundError(
                    f"A run is a directory with an event file of trainrt, {event_files.PATTERN}. Received: "
                    f"{str(logdir)!r}, with none in it or below. Pass logdir= to trainrt.fit to record one."
                )
            beside = [file for file in files if file.parent == files[-1].parent]
            path = beside[event_files.begin(beside)]
            others = beside.index(path)
            if others:
                problems.append(f"{path.parent} holds {others + 1} runs; only the newest is read, {path.name}.")
        elif not path.exists():
            raise FileNotFoundError(
                f"A run is opened by its log directory. Received: {str(logdir)!r}, which does not exist. "
                "Pass the logdir= that was given to trainrt.fit."
            )
        elif not path.match(event_files.PATTERN):
            raise ValueError(
                f"A run is opened by its log directory, or by its event file, {event_files.PATTERN}. Received: "
                f"{str(logdir)!r}, a file of another name. Pass the logdir= that was given to trainrt.fit."
            )
        run = cls(Roster((), (), ()), path=path, problems=problems)
        run._reader = reading.Reader(path)
        run.refresh()
        return run

    def refresh(self) -> int:
        """Reads what was written since the run was opened; returns how many windows that added.

        Runs sliced or narrowed from this one stay as they are. A run in memory has nothing to read.
        """
        if self._reader is None:
            return 0
        before, chunks = len(self), list(self._chunks)
        try:
            for item in self._items():
                if isinstance(item, reading.StoredRecord):
                    self._take_back(chunks, int(item.steps[0, 0]))
                    chunks.append(item)
                elif isinstance(item, Epoch):
                    self.epochs.append(item)
                elif isinstance(item, Document):
                    self.documents.append(item)
                    if item.kind == CERTIFICATE:
                        self.environment[CERTIFICATE] = dict(item.content)
                elif isinstance(item, reading.Findings):
                    self.recorded_findings += [f for f in item.findings if f not in self.recorded_findings]
                elif isinstance(item, reading.End):
                    self.end = {k: v for k, v in dataclasses.asdict(item).items() if v is not None}
                else:
                    self._open(item, chunks)
        finally:
            self._chunks = chunks
            self._small.clear()
        return len(self) - before

    def _items(self) -> Iterator[reading.Item]:
        """What has become readable, in the files of a run that went on after a death one after the other."""
        assert self._reader is not None
        while True:
            yield from self._reader.read()
            if (continued := event_files.continuation(self._reader.path)) is None:
                return
            self._problems += self._reader.damage
            self._reader = reading.Reader(continued)

    def _open(self, opening: reading.Opening, chunks: list) -> None:
        resumed = event_files.resumed(opening)
        if resumed is None or not self.environment:
            self.roster, self.environment = opening.roster, opening.environment
            return
        if not event_files.same_weights(opening.roster, self.roster):
            raise ValueError(
                f"A run that goes on has the weights it had. Received: another roster in {self._reader.path}. "  # type: ignore[union-attr]
                "Open that file by its own path."
            )
        self._take_back(chunks, resumed)
        self.epochs = [epoch for epoch in self.epochs if epoch.step < resumed]
        self.end, self.recorded_findings = None, []
        first = {"weights_digest": self.environment.get("weights_digest"), "began": self.began}
        self.environment = {**opening.environment, **first}

    @property
    def began(self) -> float | None:
        """When the run began, in seconds since 1970, if its passport says: that of its first process."""
        return self.environment.get("began", self.environment.get("start"))

    def _take_back(self, chunks: list, first: int) -> None:
        """Drops what was recorded from step `first` on: a run that resumes from a checkpoint writes it again."""
        if not chunks or chunks[-1].steps[-1, 1] < first:
            return
        self.epochs = [epoch for epoch in self.epochs if epoch.step < first]
        while chunks and chunks[-1].steps[-1, 1] >= first:
            chunk = chunks.pop()
            kept = int(np.searchsorted(chunk.steps[:, 1], first))
            if kept:
                chunks.append(chunk[:kept])

    @property
    def problems(self) -> list[str]:
        """What could not be read, a line each."""
        return self._problems + (self._reader.problems if self._reader else [])

    @property
    def state(self) -> str:
        """How it ended: "finished", "stopped", "interrupted", "exception"; without an end "running" or "killed".

        A process that is gone was killed. Of one on another host it is "running" until its file has not grown for five
        minutes.
        """
        if self.end is not None:
            return str(self.end["how"])
        pid = self.environment.get("pid")
        if isinstance(pid, int) and self.environment.get("host") == socket.gethostname():
            return "running" if _lives(pid, self.environment.get("start")) else "killed"
        try:
            written = self.path.stat().st_mtime if self.path else math.inf
        except OSError:
            written = -math.inf
        return "running" if time.time() - written < _SILENCE_S else "killed"

    def document(self, kind: str) -> dict[str, Any]:
        """The content of the newest document of that kind, e.g. `"data"`; empty when there is none."""
        return next((dict(d.content) for d in reversed(self.documents) if d.kind == kind), {})

    @property
    def data(self) -> dict[str, Any]:
        """The data passport: what the data looked like, see `trainrt.passport.audit`; empty until it is known."""
        return self.document("data")

    def __len__(self) -> int:
        return sum(map(len, self._chunks))

    def __repr__(self) -> str:
        span = f"steps {self.steps[0, 0]} to {self.steps[-1, 1]} in {len(self)} windows" if len(self) else "no steps"
        return f"<Run of {len(self.roster.parameters)} weights, {span}{f', {self.path}' if self.path else ''}>"

    # ------------------------------------------------------------------------------------------------------ reading

    @property
    def steps(self) -> np.ndarray:
        """[T, 2] int64: first and last step of each window."""
        return self._of_windows("steps")

    @property
    def wall_time(self) -> np.ndarray:
        """[T] float64: seconds since the epoch at the end of each window."""
        return self._of_windows("wall_time")

    def _of_windows(self, name: str) -> np.ndarray:
        if name not in self._small:
            parts = [getattr(chunk, name) for chunk in self._chunks] or [getattr(Record.empty(self.roster), name)]
            self._small[name] = np.concatenate(parts)
        return self._small[name]

    def moments(self, subject: str) -> Moments:
        """Moments [T, P] of a subject: `"gradient"`, `"update"`, `"weight"` or a slot.

        Raises:
          KeyError: The run has no such subject.
        """
        if subject not in self.roster.subjects:
            raise KeyError(f"No subject {subject!r}. This run has {', '.join(self.roster.subjects)}.")
        return self.memo(
            f"moments of {subject}",
            lambda: RunMoments(Columns.of_subject(self._chunks, self._weights, subject).__getitem__),
        )

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, what is read or computed once is kept for the next who asks: for readers that take turns."""
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    def memo(self, key: str, make: Callable[[], T]) -> T:
        """What `make` returns; inside `keeping`, what it returned the first time. Nobody may change it."""
        if self._kept is None:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def joint(self, name: str) -> np.ndarray:
        """[T, P]: a sum of `record.JOINT` over the steps of each window.

        Raises:
          KeyError: There is no such sum.
        """
        if name not in JOINT:
            raise KeyError(f"No joint sum {name!r}. A run has {', '.join(JOINT)}.")
        return self.memo("joint", lambda: Columns.of_joints(self._chunks, self._weights))[name]

    @property
    def _weights(self) -> Weights:
        return Weights(len(self.roster.parameters), self._groups, self._joined)

    def scalar(self, name: str, column: str = "mean") -> np.ndarray:
        """[T]: a scalar's `"mean"`, `"min"` or `"max"` over the steps of each window.

        Raises:
          KeyError: The run has no such scalar, or scalars no such column.
        """
        if name not in self.roster.scalars:
            raise KeyError(f"No scalar {name!r}. This run has {', '.join(self.roster.scalars)}.")
        if column not in SCALAR:
            raise KeyError(f"No column {column!r}. A scalar has {', '.join(SCALAR)}.")
        return self._of_windows("scalars")[:, self.roster.scalars.index(name), SCALAR.index(column)]

    def __getitem__(self, key: str | slice) -> Any:
        """A statistic [T, P] by its name, or the run of a slice of the windows.

        Raises:
          KeyError: No such statistic, or the run did not record what it needs.
        """
        if isinstance(key, slice):
            return self._slice(key)
        if not isinstance(key, str):
            raise TypeError(
                "A run is indexed with the name of a statistic or a slice of its windows. "
                f"Received: {key!r}. For one window write run[i:i + 1]."
            )
        try:
            statistic = statistics.find(key, self.roster.subjects)
        except KeyError:
            if key in self.roster.scalars:
                raise KeyError(f"{key!r} is a scalar of the run: run.scalar({key!r}).") from None
            raise
        values = statistic({need: self._argument(need, key) for need in statistic.needs})
        shape = (len(self), len(self.roster.parameters))
        try:
            return np.broadcast_to(values, shape)
        except ValueError:
            raise ValueError(
                f"A statistic returns a value for each window and weight, [T, P] = {list(shape)}. "
                f"Received: shape {list(values.shape)} from {key!r}. Reduce no axis in it."
            ) from None

    def _argument(self, name: str, statistic: str) -> Moments | np.ndarray:
        kind = statistics.kind(name, self.roster.subjects, self.roster.scalars)
        if kind == "subject":
            return self.moments(name)
        if kind == "joint":
            return self.joint(name)
        if kind == "scalar":
            return self.scalar(name)[:, None]
        if not self.roster.subjects:
            raise KeyError(
                f"{statistic!r} needs {name!r}, and this run observed nothing. Train with observe=True, the default."
            )
        recorded = (*self.roster.subjects, *JOINT, *self.roster.scalars)
        raise KeyError(f"{statistic!r} needs {name!r}, which this run did not record. It has {', '.join(recorded)}.")

    @property
    def statistics(self) -> list[str]:
        """The names of the statistics whose arguments this run recorded."""
        known = statistics.names(self.roster.subjects)
        needs = {name: statistics.find(name, self.roster.subjects).needs for name in known}
        has = {
            need: statistics.kind(need, self.roster.subjects, self.roster.scalars) for n in needs.values() for need in n
        }
        return [name for name in known if all(has[need] for need in needs[name])]

    # ---------------------------------------------------------------------------------------------- runs from a run

    def _slice(self, windows: slice) -> Run:
        if windows.step not in (None, 1):
            raise ValueError(
                f"Windows are taken in one piece. Received: a stride of {windows.step}. Slice the statistic instead, "
                f'as in run["update_ratio"][::{windows.step}].'
            )
        first, stop, _ = windows.indices(len(self))
        chunks, at = [], 0
        for chunk in self._chunks:
            a, b = max(first - at, 0), min(stop - at, len(chunk))
            if a < b:
                chunks.append(chunk if b - a == len(chunk) else chunk[a:b])
            at += len(chunk)
        return self._derive(chunks, self.roster.parameters, self._groups, self._joined)

    def between(self, first_step: int, last_step: int) -> Run:
        """The windows that hold any of the steps from `first_step` to `last_step`, both included."""
        first = int(np.searchsorted(self.steps[:, 1], first_step, side="left"))
        stop = int(np.searchsorted(self.steps[:, 0], last_step, side="right"))
        return self[first : stop if first_step <= last_step else first]

    def select(self, parameters: str | int | Iterable[str | int]) -> Run:
        """The run of some of its weights, named by path or index, in the order given.

        Raises:
          KeyError: No weight has that path; the message lists similar ones.
          IndexError: There are fewer weights.
        """
        wanted = [parameters] if isinstance(parameters, str | int | np.integer) else list(parameters)
        at = {path: index for index, path in enumerate(self.roster.paths)}
        indices = []
        for one in wanted:
            if isinstance(one, str):
                if one not in at:
                    close = difflib.get_close_matches(one, at, n=5, cutoff=0.3) or list(at)[:10]
                    raise KeyError(f"No weight {one!r}. Like it: {', '.join(close)}.")
                indices.append(at[one])
            else:
                indices.append(range(len(at))[one])
        groups = [np.array([i]) for i in range(len(at))] if self._groups is None else self._groups
        chosen = tuple(self.roster.parameters[i] for i in indices)
        return self._derive(self._chunks, chosen, [groups[i] for i in indices], self._joined)

    def by_layer(self) -> Run:
        """The run whose weights are the layers: the moments of each are those of its weights' elements together.

        A layer's clip scale is the mean of its weights', its steps the most of any. `peak_norm` and `trough_norm` are
        exact in windows of one step and bounds from above and below in wider ones.
        """
        layers: dict[str, list[int]] = {}
        for index, parameter in enumerate(self.roster.parameters):
            layers.setdefault(parameter.layer, []).append(index)
        before = [np.array([i]) for i in range(len(self.roster.parameters))] if self._groups is None else self._groups
        joined = []
        for layer, indices in layers.items():
            weights = [self.roster.parameters[i] for i in indices]
            dtypes = {weight.dtype for weight in weights}
            size = sum(weight.size for weight in weights)
            joined.append(Parameter(layer, layer, (size,), dtypes.pop() if len(dtypes) == 1 else "mixed"))
        groups = [np.concatenate([before[i] for i in indices]) for indices in layers.values()]
        return self._derive(self._chunks, tuple(joined), groups, True)

    def _derive(self, chunks: list, parameters: tuple[Parameter, ...], groups, joined: bool) -> Run:
        run = Run(
            dataclasses.replace(self.roster, parameters=parameters),
            None,
            self.environment,
            self.epochs,
            self.recorded_findings,
            self.end,
            self.path,
            self.problems,
            self.documents,
        )
        run._chunks, run._groups, run._joined = list(chunks), groups, joined
        return run

    def to_pandas(self, names: Sequence[str] | None = None) -> pandas.DataFrame:
        """A long table: a row for each window and weight, a column for each statistic.

        Args:
          names: The statistics; None: all that the run has.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("A table needs pandas, which is not installed. Run: pip install pandas.") from error
        windows, weights = len(self), len(self.roster.parameters)
        columns: dict[str, Any] = {
            "first_step": np.repeat(self.steps[:, 0], weights),
            "last_step": np.repeat(self.steps[:, 1], weights),
            "wall_time": np.repeat(self.wall_time, weights),
            "layer": [parameter.layer for parameter in self.roster.parameters] * windows,
            "weight": self.roster.paths * windows,
        }
        columns |= {name: self[name].reshape(-1) for name in (self.statistics if names is None else names)}
        return pandas.DataFrame(columns)

    @classmethod
    def synthetic(
        cls,
        steps: int = 64,
        parameters: int | Sequence[str | Parameter] = 1,
        *,
        size: int = 100,
        dtype: str = "float32",
        slots: Sequence[str] = (),
        scalars: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        epochs: Sequence[Epoch] = (),
        end: Mapping[str, Any] | None = None,
        documents: Sequence[Document] = (),
        **values: Any,
    ) -> Run:
        """A run of windows of one step whose statistics are the values given, and those of a healthy run otherwise.

        Args:
          steps: Windows, from step 0.
          parameters: How many weights, or their paths, such as `"dense/kernel"`, or the parameters themselves.
          size: Elements of each weight that is not given as a parameter.
          dtype: Its dtype.
          slots: Slots of the optimizer; all zeros unless given a norm.
          scalars: More scalars, name -> value or [T].
          environment: As for `Run`; so are `epochs`, `end` and `documents`.
          **values: `loss`, `learning_rate`: a number or [T]. Any of the following, a number, [T] or [T, P]:
            `update_ratio`, `clip_scale`, `clip_share`, `rounded_share`, `gradient_update_cosine`; and for each subject
            `<subject>_norm`, `_rms`, `_mean`, `_absmax`, `_zero_share`, `_nonfinite_share`, `_nonfinite`. A norm of NaN
            is a weight that was not measured; one whose gradient was not measured was not updated either.

        Raises:
          TypeError: A value has another name.
          ValueError: Values contradict each other, or have another shape.

        >>> run = Run.synthetic(steps=3, gradient_norm=[1, 2, np.nan], clip_scale=0.5)
        >>> run["clipped_gradient_norm"][:, 0]
        array([0.5, 1. , nan])
        """
        from trainrt.record.synthetic import build

        roster, record = build(steps, parameters, size, dtype, tuple(slots), dict(scalars or {}), values)
        return cls(roster, record, environment=environment, epochs=epochs, end=end, documents=documents)


def _lives(pid: int, start: Any) -> bool:
    """Whether the process of a run lives: there is one with its number, and it was there when the run began."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return True
    if fields[0] == "Z":
        return False
    begun = time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return not isinstance(start, int | float) or begun <= start + 1
