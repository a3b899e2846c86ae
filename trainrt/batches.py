"""The batches that `Model.fit` would read, in its order, with its bookkeeping of epochs and steps."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.audit import Watched
from trainrt.resident import BATCH_BYTES, TOTAL_BYTES, Resident


class Execution(NamedTuple):
    """A place in an epoch.

    Attributes:
      begin: Index of the next batch in the epoch.
      available: How many executions may run before the next decision; None when nobody knows.
      iterator: Where the batches come from: a `tf.data` or distributed iterator, or a `resident.Epoch`.
    """

    begin: int
    available: int | None
    iterator: Any


class Batches:
    """Batches of x, y and sample_weight, one epoch after the other.

    An *execution* is `steps_per_execution` steps: Keras counts, stops and warns by executions. What goes by is shown to
    `watched`.
    """

    def __init__(self, model: keras.Model, *, watched: Watched | None = None, steps_per_epoch: int | None, **data):
        most = keras.config.max_steps_per_epoch()
        if most and (not steps_per_epoch or most < steps_per_epoch):
            warnings.warn(f"Limiting steps_per_epoch to {most}", stacklevel=3)
            steps_per_epoch = most
        self._model = model
        self._watched = watched or Watched("unknown", None, enabled=False)
        self._steps_per_epoch = steps_per_epoch
        self._adapter = doors.data_adapter(steps_per_epoch=steps_per_epoch, **data)
        self._source: Any = self._resident() or doors.distributed(model, self._adapter.get_tf_dataset())
        self._size = self._adapter.num_batches
        self._iterator: Any = None
        self._seen = 0

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, as far as they are known."""
        return self._steps_per_epoch or self._size

    @property
    def element_spec(self):
        return self._source.element_spec

    def _resident(self) -> Resident | None:
        """The data as arrays that the compiled loop reads by itself, where that is possible and pays."""
        model = self._model
        own_loop = not model.run_eagerly and not doors.makes_own_train_function(model)
        if not own_loop or doors.made_under_strategy(model) or tf.distribute.has_strategy():
            return None
        arrays = doors.dense_arrays(self._adapter, TOTAL_BYTES, BATCH_BYTES)
        return Resident(*arrays) if arrays else None

    @property
    def arrays(self) -> tuple[Any, int] | None:
        """The arrays (x, y, sample_weight) that the loop reads itself, and their rows; None: a pipeline."""
        source = self._source
        return (source.arrays, source.samples) if isinstance(source, Resident) else None

    def reset(self) -> None:
        self._iterator = None
        self._size = self._adapter.num_batches
        self._seen = 0
        self._adapter.on_epoch_end()

    def __iter__(self):
        """As Keras's symbolic build reads it: one batch is enough for it."""
        yield 0, 0, iter(self._source)

    def epoch(self) -> Generator[Execution, tuple[int, bool], None]:
        """Yields where the epoch stands; is sent how many executions ran there and whether the data ended in them."""
        per = self._model.steps_per_execution
        self._adapter.on_epoch_begin()
        limit = self._steps_per_epoch or self._size
        if self._iterator is None or self._steps_per_epoch is None or not limit:
            self._begin()
        begin = 0
        while not limit or begin < limit:
            if self._size and self._seen >= self._size:
                if self._steps_per_epoch:
                    self._warn_interrupted()
                break
            bounds = [b for b in (limit and limit - begin, self._size and self._size - self._seen) if b]
            ran, ended = yield Execution(begin, -(-min(bounds) // per) if bounds else None, self._iterator)
            self._seen += ran * per
            begin += ran * per
            if ended:
                self._seen += per
                self._size = self._size or self._seen
                self._warn_interrupted()
                self._iterator = None
                self._adapter.on_epoch_end()
                return
        if self._size and self._seen >= self._size:
            self._begin(used=self._steps_per_epoch is not None)  # or else the next epoch begins once more, as in Keras
        self._adapter.on_epoch_end()

    def _begin(self, used: bool = True) -> None:
        if isinstance(self._source, Resident):
            self._iterator = self._source.epoch()
            if used:
                self._watched.arrays(self._iterator.arrays, self._iterator.order, self._iterator.batch_size)
        else:
            self._iterator = iter(self._watched.watch(self._source) if used else self._source)
        self._seen = 0

    def _warn_interrupted(self) -> None:
        warnings.warn(
            "Your input ran out of data; interrupting training. Make sure that your dataset or generator can generate "
            "at least `steps_per_epoch * epochs` batches. You may need to use the `.repeat()` function when building "
            "your dataset.",
            stacklevel=4,
        )
