"""The data passport: what the data looked like where it entered the training, and how the pipeline orders it.

Batches are watched as they go by, in the input pipeline, on the first, second, fourth, eighth... pass; the passes
between run the pipeline as it is. Arrays that the compiled loop reads itself are looked at on the host, meanwhile.
Nothing is read twice, drawn, reordered or changed: weights, history and every random state are those of a fit without.

What TensorFlow has no public name for is in `inputs_of` alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors, survey
from trainrt.survey import Leaf, Survey

EVERY_BATCH = 4096
"""Batches of a watched pass of which each is looked at; after them every `THINNED`-th."""

THINNED = 16
FIRST_DRAFT_S = 30.0
"""A first pass that takes longer is described before it is over, and again whenever twice the time has passed."""

KEPT_ROWS = 256
KEPT_BYTES = 16 << 20
"""Most rows that are kept of a data set that is no array, and most bytes of one of its batches."""

_MOST_ARGUMENTS = ("_buffer_size", "_batch_size", "_count", "_num_parallel_calls")


class Audit:
    """Watches the data of one fit.

    Args:
      x: The `x` that `fit` was given.
      validation_data: The `validation_data`.
      shuffle: The `shuffle` that `fit` was given; it counts for arrays.
      enabled: False watches nothing.
    """

    def __init__(self, x: Any = None, validation_data: Any = None, shuffle: Any = None, enabled: bool = True):
        self._enabled = enabled
        validation = validation_data[0] if isinstance(validation_data, tuple) and validation_data else validation_data
        self.train = Watched(_kind(x), _graph(x) if enabled else None, enabled)
        self.validation = Watched(_kind(validation), _graph(validation) if enabled else None, enabled)
        self._shuffle = shuffle if isinstance(shuffle, (bool, str)) else None
        self._told = 0
        self._began = time.monotonic()
        self._next_draft = FIRST_DRAFT_S

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
                result["overlap"] = survey.overlap(train.known, validation.known)
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


class Watched:
    """One of the two data sets, pass by pass.

    Attributes:
      begun: Passes that have begun.
      watched: Those of them that were watched.
      surveys: Number of the pass -> what was seen of it.
      unseen: Why nothing is seen.
    """

    def __init__(self, kind: str, graph: dict[str, Any] | None, enabled: bool):
        self.kind = kind
        self.begun = 0
        self.watched = 0
        self.surveys: dict[int, Survey] = {}
        self.unseen: str | None = None if enabled else "switched off"
        self._enabled = enabled
        self._graph = graph
        self._arrays: dict[int, tuple] = {}
        self._cached: tuple[tuple, dict] | None = None
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

    def arrays(self, arrays: Any, order: Any, batch_size: int) -> None:
        """A pass over arrays begins, in an order [rows] of rows; they are looked at when somebody asks."""
        if self._due():
            self._arrays[self.begun - 1] = (arrays, order, batch_size)
            self.watched += 1
            self.surveys.setdefault(self.begun - 1, Survey(()))

    @property
    def lies_there(self) -> bool:
        """Whether there are arrays that nobody has looked at yet."""
        return bool(self._arrays)

    def _due(self) -> bool:
        if not self._enabled:
            return False
        self.begun += 1
        return self.begun & (self.begun - 1) == 0

    def _tapped(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        number = self.begun - 1
        leaves, indices = leaves_of(dataset.element_spec)
        seen = Survey(leaves, full=number == 0)

        def look(*arrays) -> None:
            try:
                if not number:
                    self._keep(arrays)
                seen.see(*arrays)
            except Exception as error:  # a fault of ours must not take the training down
                self.unseen = f"{type(error).__name__}: {error}"[:500]

        def show(batch) -> tf.Operation:
            return tf.numpy_function(look, [tf.nest.flatten(batch)[i] for i in indices], [])

        @tf.autograph.experimental.do_not_convert
        def tap_each(*batch):
            batch = batch if isinstance(dataset.element_spec, tuple) else batch[0]
            show(batch)
            return batch

        @tf.autograph.experimental.do_not_convert
        def tap_some(batch_number, batch):
            due = (batch_number < EVERY_BATCH) | (batch_number % THINNED == 0)
            tf.cond(due, lambda: _after(show(batch)), _after)
            return batch

        if not leaves:
            self.unseen = "no dense tensors of numbers"
            return dataset
        if not number:
            self._structure = dataset.element_spec, indices
        # A `tf.cond` costs a fit some 40 ms of tracing and optimizing, so it is there only for data that is so long.
        few = 0 <= int(dataset.cardinality()) <= EVERY_BATCH
        tapped = dataset.map(tap_each) if few else dataset.enumerate().map(tap_some)
        self.surveys[number] = seen
        self.watched += 1
        return tapped

    def _keep(self, arrays: Sequence[np.ndarray]) -> None:
        """Copies the first rows that go by, for `first_rows`."""
        if self._kept_rows < KEPT_ROWS and sum(a.nbytes for a in arrays) <= KEPT_BYTES:
            self._kept.append([a[: KEPT_ROWS - self._kept_rows].copy() for a in arrays])
            self._kept_rows += len(self._kept[-1][0]) if arrays and arrays[0].ndim else KEPT_ROWS

    def first_rows(self) -> Any:
        """The first rows of the first pass in the structure of a batch, as far as they have gone by.

        None where there are none yet, or something in a batch is no dense tensor of numbers.
        """
        if self._structure is None or not self._kept:
            return None
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

    def summary(self) -> dict[str, Any]:
        """What was seen so far."""
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
        for number, (arrays, order, batch_size) in list(self._arrays.items()):
            leaves, indices = leaves_of(arrays)
            flat = tf.nest.flatten(arrays)
            seen = Survey(leaves, full=number == 0)
            try:
                seen.see_all([np.asarray(flat[i]) for i in indices], np.asarray(order), batch_size)
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


def _after(operation: tf.Operation | None = None) -> tf.Tensor:
    with tf.control_dependencies([] if operation is None else [operation]):
        return tf.constant(0, tf.uint8)


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


# ------------------------------------------------------------------------------------------------- the pipeline's graph


def inputs_of(dataset: tf.data.Dataset) -> list[tf.data.Dataset] | None:
    """The datasets that a dataset is made from; None where TensorFlow does not tell.

    `_inputs` is private; the public `DatasetToGraphV2` would copy the data that lies in the graph.
    """
    inputs = getattr(dataset, "_inputs", None)
    try:
        return [d for d in inputs() if isinstance(d, tf.data.Dataset)] if callable(inputs) else None
    except Exception:
        return None


def pipeline(dataset: tf.data.Dataset) -> dict[str, Any]:
    """How a `tf.data` pipeline orders its elements, as far as its graph tells.

    Returns:
      `stages`: names and arguments, from the source to the end, the longest branch.
      `shuffles`: for each shuffle its `buffer`, the `cardinality` of what it shuffles (None: unknown or infinite),
        whether it comes `before_batch` (None: nothing is batched here), before a `cache`, or after a `repeat`.
      `complete`: False where TensorFlow does not tell what lies before; what happens inside `interleave` and `flat_map`
        is not looked at.
    """
    found: dict[str, Any] = {"stages": [], "shuffles": [], "complete": True}
    stages = _walk(dataset, (), found, depth=0)
    found["stages"] = stages
    return found


def _walk(dataset, later: tuple[str, ...], found: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    inputs = inputs_of(dataset)
    if inputs is None or depth > 200:
        found["complete"] = False
        inputs = []
    name = type(dataset).__name__.strip("_").removesuffix("Dataset").removesuffix("V2") or "Dataset"
    stage: dict[str, Any] = {"name": name}
    for attribute in _MOST_ARGUMENTS:
        value = _plain(getattr(dataset, attribute, None))
        if value is not None:
            stage[attribute.strip("_")] = value
    before = [_walk(d, (name, *later), found, depth + 1) for d in inputs]
    stages = max(before, key=len, default=[])
    if name == "Shuffle":
        earlier = {s["name"] for s in stages}
        batched = any("Batch" in n for n in (*earlier, *later))
        found["shuffles"].append(
            {
                "buffer": stage.get("buffer_size"),
                "cardinality": _cardinality(inputs[0]) if inputs else None,
                "before_batch": not any("Batch" in n for n in earlier) if batched else None,
                "before_cache": any(n.startswith("Cache") for n in later),
                "after_repeat": any(n.startswith("Repeat") for n in earlier),
                "reshuffles": _plain(getattr(dataset, "_reshuffle_each_iteration", None)),
            }
        )
    return [*stages, stage]


def _plain(value: Any) -> int | bool | None:
    if isinstance(value, tf.Tensor):
        try:
            value = tf.get_static_value(value)
        except Exception:
            return None
    if isinstance(value, (np.ndarray, np.generic)) and np.ndim(value) == 0:
        value = value.item()
    return value if isinstance(value, (int, bool)) else None


def _cardinality(dataset: tf.data.Dataset) -> int | None:
    size = int(dataset.cardinality())
    return size if size >= 0 else None


def _graph(data: Any) -> dict[str, Any] | None:
    if not isinstance(data, tf.data.Dataset):
        return None
    try:
        return pipeline(data)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _kind(data: Any) -> str:
    """What the data comes from: "arrays", "dataset", or the name of a type."""
    if data is None:
        return "none"
    if isinstance(data, tf.data.Dataset):
        return "dataset"
    leaves = keras.tree.flatten(data) if isinstance(data, (Mapping, list, tuple)) else [data]
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        return "arrays"
    return type(data).__name__
