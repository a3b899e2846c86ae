"""The data passport: what the data looked like where it entered the training, and how the pipeline orders it.

Batches are watched as they go by, in the input pipeline (`tap`), on the first, second, fourth, eighth... pass; the
passes between run the pipeline as it is. Of a pass, some are looked at (`survey.scheduled`) and all are asked whether
they are finite. Arrays are looked at on the host, meanwhile, in the order in which the loop or Keras's pipeline reads
them.
Nothing is read twice, drawn, reordered or changed: weights, history and every random state are those of a fit without.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.passport import survey
from trainrt.passport.pipeline import graph_of, kind_of
from trainrt.passport.survey import Leaf, Survey
from trainrt.passport.tap import Tap

FEW = 128
"""Passes of at most so many batches have each looked at."""

FIRST_DRAFT_S = 30.0
"""A first pass that takes longer is described before it is over, and again whenever twice the time has passed."""

KEPT_ROWS = 256
KEPT_BYTES = 16 << 20
"""Most rows that are kept of a data set that is no array, and most bytes of one of its batches."""


class Audit:
    """Watches the data of one fit, until its context ends.

    Args:
      x: The `x` that `fit` was given.
      validation_data: The `validation_data`.
      shuffle: The `shuffle` that `fit` was given; it counts for arrays.
      enabled: False watches nothing.
    """

    def __init__(self, x: Any = None, validation_data: Any = None, shuffle: Any = None, enabled: bool = True):
        self._enabled = enabled
        validation = validation_data[0] if isinstance(validation_data, tuple) and validation_data else validation_data
        self.train = Watched(kind_of(x), graph_of(x) if enabled else None, enabled)
        self.validation = Watched(kind_of(validation), graph_of(validation) if enabled else None, enabled)
        self._shuffle = shuffle if isinstance(shuffle, (bool, str)) else None
        self._told = 0
        self._began = time.monotonic()
        self._next_draft = FIRST_DRAFT_S

    def __enter__(self) -> Audit:
        return self

    def __exit__(self, *error: object) -> None:
        self.train.close()
        self.validation.close()

    @property
    def due(self) -> bool:
        """Whether a pass has begun that `passport` has not told of, or a long first one has gone on."""
        if not self._enabled or not self.train.surveys:
            return False
        return self._told < self.train.watched + self.validation.watched

    @property
    def known_at_once(self) -> bool:
        """Whether the training data can be described before it has gone by: it lies there as arrays."""
        return self._enabled and not self._told and self.train.lies_there

    @property
    def draft_due(self) -> bool:
        """Whether the first pass has lasted so long that it should be described before its end."""
        if not self._enabled or self._told or time.monotonic() - self._began < self._next_draft:
            return False
        self._next_draft *= 2
        return True

    def told(self) -> None:
        self._told = self.train.watched + self.validation.watched

    def passport(self) -> dict[str, Any]:
        """What is known by now, as JSON-able values with string keys."""
        result: dict[str, Any] = {"train": {**self.train.summary(), "shuffle": self._shuffle}}
        if self.validation.watched:
            result["validation"] = self.validation.summary()
            train, validation = self.train.surveys.get(0), self.validation.surveys.get(0)
            if train and validation:
                result["overlap"] = survey.overlap(train.known, validation.known, train.share)
        return _finite(result)

    @contextlib.contextmanager
    def validating(self, iterator: Any) -> Iterator[None]:
        """Watches the evaluation that runs inside, if it is the first one."""
        dataset = doors.evaluation_dataset(iterator) if self._enabled and not self.validation.begun else None
        if not isinstance(dataset, tf.data.Dataset):
            yield
            return
        doors.set_evaluation_dataset(iterator, self.validation.watch(dataset))
        try:
            yield
        finally:
            doors.set_evaluation_dataset(iterator, dataset)


class _Pass(NamedTuple):
    """A pass over arrays: the arrays, a batch's spec, the order of the rows once it is known, and the batch size."""

    arrays: Any
    spec: Any
    order: Any
    batch_size: int


class Watched:
    """One of the two data sets, pass by pass.

    Attributes:
      begun: Passes that have begun.
      watched: Those of them that were watched.
      surveys: Number of the pass -> what was seen of it.
      unseen: Why nothing is seen.
      enabled: False watches nothing.
    """

    def __init__(self, kind: str, graph: dict[str, Any] | None, enabled: bool):
        self.kind = kind
        self.begun = 0
        self.watched = 0
        self.surveys: dict[int, Survey] = {}
        self.unseen: str | None = None if enabled else "switched off"
        self.enabled = enabled
        self._graph = graph
        self._arrays: dict[int, _Pass] = {}
        self._first: _Pass | None = None
        self._awaited: tuple[int, _Pass] | None = None
        self._cached: tuple[tuple, dict] | None = None
        self._tap: Tap | None = None
        self._gone = (0, 0)  # a pass, and how many of its batches have gone by
        self._lock = threading.Lock()
        self._kept: list[list[np.ndarray]] = []
        self._kept_rows = 0
        self._structure: tuple[Any, list[int]] | None = None

    def watch(self, dataset: Any) -> Any:
        """The same elements in the same order; a pass over them is watched, where it is due."""
        if not self._due():
            return dataset
        if not isinstance(dataset, tf.data.Dataset):
            self.unseen = f"a {type(dataset).__name__} is read by several replicas"
            return dataset
        try:
            return self._tapped(dataset)
        except Exception as error:  # the training goes on without
            self.unseen = f"{type(error).__name__}: {error}"[:500]
            return dataset

    def arrays(self, arrays: Any, spec: Any, order: Any, batch_size: int) -> None:
        """A pass over arrays begins; they are looked at when somebody asks.

        Args:
          arrays: In the structure of a batch.
          spec: Of a batch.
          order: [rows] numbers of rows; None: `in_order` tells.
          batch_size: Rows a batch.
        """
        self._awaited = None
        if not self._due():
            return
        number, one = self.begun - 1, _Pass(arrays, spec, order, batch_size)
        if order is None:
            self._awaited = number, one
        else:
            self._begin(number, one)

    def in_order(self, order: np.ndarray) -> None:
        """The order of the pass over arrays that has begun; a pass that is not watched tells it too."""
        if self._awaited is not None:
            (number, one), self._awaited = self._awaited, None
            self._begin(number, one._replace(order=np.array(order)))

    def _begin(self, number: int, one: _Pass) -> None:
        self._arrays[number] = one
        self._first = self._first or one
        self.watched += 1
        self.surveys.setdefault(number, Survey(()))

    def passed(self, batches: int) -> None:
        """So many batches of the pass that began last have gone by."""
        self._gone = self.begun - 1, batches

    @property
    def lies_there(self) -> bool:
        """Whether there are arrays that nobody has looked at yet."""
        return bool(self._arrays)

    def _due(self) -> bool:
        if not self.enabled:
            return False
        self.begun += 1
        return self.begun & (self.begun - 1) == 0

    def _tapped(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        self._settle()
        leaves, indices = leaves_of(dataset.element_spec)
        if not leaves:
            self.unseen = "no dense tensors of numbers"
            return dataset
        if self._tap is None or self._tap.source is not dataset:
            self.close()
            self._tap = self._make_tap(dataset, indices)
        number, size = self.begun - 1, int(dataset.cardinality())
        self._structure = self._structure or (dataset.element_spec, indices)
        self.surveys[number] = Survey(leaves, full=number == 0, expected=_expected(dataset.element_spec, size))
        self.watched += 1
        return self._tap.dataset

    def _make_tap(self, dataset: tf.data.Dataset, indices: Sequence[int]) -> Tap:
        """Traced once: passes over the same dataset have the same tap."""
        size = int(dataset.cardinality())
        if 0 <= size <= FEW:
            return Tap(dataset, indices, lambda _: tf.constant(True), lambda _, *arrays: self._look(None, *arrays))
        return Tap(dataset, indices, lambda number: survey.scheduled(number) | (number == size - 1), self._look)

    def close(self) -> None:
        """Watches no more and lets go of the data; what was seen stays."""
        if self._tap is not None:
            self._settle()
            self._tap.close()
        self._arrays, self._kept = {}, []
        self._first = self._awaited = self._tap = None

    def _settle(self) -> None:
        """Returns when all that went by has been seen."""
        if self._tap is not None:
            self._tap.settle()
            self.unseen = self._tap.failure or self.unseen
        number, batches = self._gone
        seen = self.surveys.get(number)
        if seen is not None and seen.batches:
            seen.passed(batches)

    def _look(self, number: int | None, *arrays: np.ndarray) -> None:
        """A batch of the pass that began last goes by."""
        seen = self.surveys[max(self.surveys)]
        if seen.full:
            self._keep(arrays)
        seen.see(*arrays, number=number)

    def _keep(self, arrays: Sequence[np.ndarray]) -> None:
        """Copies the first rows that go by, for `first_rows`."""
        if self._kept_rows < KEPT_ROWS and sum(a.nbytes for a in arrays) <= KEPT_BYTES:
            self._kept.append([a[: KEPT_ROWS - self._kept_rows].copy() for a in arrays])
            self._kept_rows += len(self._kept[-1][0]) if arrays and arrays[0].ndim else KEPT_ROWS

    def first_rows(self) -> Any:
        """The first rows of the first pass in the structure of a batch, as far as they have gone by.

        None where there are none yet, or something in a batch is no dense tensor of numbers.
        """
        self._settle()
        if self._structure is None or not self._kept:
            return self._first_of_arrays()
        spec, indices = self._structure
        parts = list(self._kept)
        columns: dict[int, np.ndarray] = {
            index: np.concatenate([part[i] for part in parts]) for i, index in enumerate(indices)
        }
        flat = tf.nest.flatten(spec)
        missing = (None.__class__, tf.OptionalSpec)
        if any(i not in columns and not isinstance(item, missing) for i, item in enumerate(flat)):
            return None
        return tf.nest.pack_sequence_as(spec, [columns.get(i) for i in range(len(flat))])

    def _first_of_arrays(self) -> Any:
        one = self._first
        if one is None:
            return None
        flat = [None if a is None else np.asarray(a) for a in tf.nest.flatten(one.arrays)]
        row_bytes = max(sum(a[:1].nbytes for a in flat if a is not None), 1)
        first = np.asarray(one.order[: min(KEPT_ROWS, KEPT_BYTES // row_bytes)])
        if not len(first):
            return None
        kinds = [getattr(spec, "dtype", None) for spec in tf.nest.flatten(one.spec)]
        rows = [
            None if a is None or kind is None else a[first].astype(kind.as_numpy_dtype)
            for a, kind in zip(flat, kinds, strict=True)
        ]
        return tf.nest.pack_sequence_as(one.arrays, rows)

    def summary(self) -> dict[str, Any]:
        """What was seen so far."""
        self._settle()
        with self._lock:
            self._look_at_arrays()
        first = self.surveys.get(0)
        result: dict[str, Any] = {"source": self.kind, "pipeline": self._graph, "unseen": self.unseen}
        if first is not None and first.batches:
            key = (first.batches, first.rows)
            if self._cached is None or self._cached[0] != key:
                self._cached = (key, first.summary())
            result |= self._cached[1]
        result["passes"] = sorted(self.surveys)
        result["order"] = self._order()
        later = [s for n, s in self.surveys.items() if n and s.batches]
        for role in ("inputs", "targets"):
            shares = [leaf["nan_share"] + leaf["inf_share"] for s in later for leaf in s.summary()[role]]
            if any(shares):
                result.setdefault("nonfinite_later", {})[role] = max(shares)
        return result

    def _look_at_arrays(self) -> None:
        for number, one in list(self._arrays.items()):
            leaves, indices = leaves_of(one.spec)
            flat, specs = tf.nest.flatten(one.arrays), tf.nest.flatten(one.spec)
            seen = Survey(leaves, full=number == 0)
            try:
                dtypes = [specs[i].dtype.as_numpy_dtype for i in indices]
                seen.see_all([np.asarray(flat[i]) for i in indices], np.asarray(one.order), one.batch_size, dtypes)
            except Exception as error:
                self.unseen = f"{type(error).__name__}: {error}"[:500]
            self.surveys[number] = seen
            del self._arrays[number]

    def _order(self) -> dict[str, Any] | None:
        """Does the order repeat from pass to pass? None: only one pass was watched."""
        hashes = [list(self.surveys[n].hashes) for n in sorted(self.surveys) if self.surveys[n].hashes]
        if len(hashes) < 2:
            return None
        pairs = [(a[: len(b)], b[: len(a)]) for a, b in itertools.pairwise(hashes)]

        def repeats(column: int) -> bool:
            return any([h[column] for h in a] == [h[column] for h in b] for a, b in pairs)

        return {"inputs_repeat": repeats(0), "targets_repeat": repeats(1), "batches": min(len(a) for a, _ in pairs)}


def _finite(value: Any) -> Any:
    """The same with None for floats that JSON does not know."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _expected(spec: Any, batches: int) -> int:
    """About how many rows of so many batches are shown; 0 where that is not known."""
    sizes = [leaf.shape[0] for leaf in tf.nest.flatten(spec) if getattr(getattr(leaf, "shape", None), "rank", None)]
    if batches <= FEW or not sizes or sizes[0] is None:
        return 0
    return sizes[0] * (survey.FIRST + (batches - survey.FIRST) // survey.THINNED)


def leaves_of(batch: Any) -> tuple[list[Leaf], list[int]]:
    """The dense tensors of numbers in a batch (or its spec): what they are, and their places in `tf.nest.flatten`."""
    flat = tf.nest.flatten(batch)
    places = tf.nest.pack_sequence_as(batch, range(len(flat)))
    parts = places if isinstance(batch, (tuple, list)) else (places,)
    leaves, indices = [], []
    for role, part in zip(("input", "target", "weight"), parts, strict=False):
        for path, index in keras.tree.flatten_with_path(part):
            dtype = getattr(flat[index], "dtype", None)
            numbers = dtype is not None and (dtype.is_floating or dtype.is_integer or dtype.is_bool)
            if numbers and isinstance(flat[index], (tf.TensorSpec, tf.Tensor)):
                leaves.append(Leaf(role, "/".join(map(str, path))))
                indices.append(index)
    return leaves, indices
