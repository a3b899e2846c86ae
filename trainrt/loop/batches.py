"""The batches that `Model.fit` would read, in its order, with its bookkeeping of epochs and steps."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.endurance import position
from trainrt.loop.resident import BATCH_BYTES, TOTAL_BYTES, Resident
from trainrt.passport.audit import Watched
from trainrt.passport.pipeline import pipeline


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
    `watched`, but for a pipeline whose position is kept: TensorFlow saves none that Python looks into.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        watched: Watched | None = None,
        steps_per_epoch: int | None,
        keeps_position: bool = False,
        **data,
    ):
        most = keras.config.max_steps_per_epoch()
        if most and (not steps_per_epoch or most < steps_per_epoch):
            warnings.warn(f"Limiting steps_per_epoch to {most}", stacklevel=3)
            steps_per_epoch = most
        self._model = model
        self._watched = watched or Watched("unknown", None, enabled=False)
        self._steps_per_epoch = steps_per_epoch
        self._adapter: Any = doors.data_adapter(steps_per_epoch=steps_per_epoch, **data)
        self._keeps_position = keeps_position
        self._shown: Any = None  # arrays that Keras's pipeline reads in an order that it tells
        self._source: Any = self._resident() or self._in_order() or self._dataset()
        self._size = self._adapter.num_batches
        self._iterator: Any = None
        self._spent: Any = None  # the iterator that has come to its end: it knows how the next epoch is shuffled
        self._seen = 0
        self._begun = 0  # the next batch of the epoch
        self._within = False
        self._log: list[str | int] = []

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

    def _dataset(self) -> Any:
        return doors.distributed(self._model, self._adapter.get_tf_dataset())

    def _in_order(self) -> Any:
        """Keras's pipeline over arrays, where it can be watched by the order of its rows instead of batch by batch."""
        if self._keeps_position or not self._watched.enabled or doors.made_under_strategy(self._model):
            return None
        arrays = doors.host_arrays(self._adapter)
        if arrays is None or tf.distribute.has_strategy():
            return None
        dataset = doors.dataset_telling_order(self._adapter, self._watched.in_order)
        if dataset is None:
            return None
        self._shown = arrays
        return doors.distributed(self._model, dataset)

    @property
    def arrays(self) -> tuple[Any, int] | None:
        """The arrays (x, y, sample_weight) that the loop reads itself, and their rows; None: a pipeline."""
        source = self._source
        return (source.arrays, source.samples) if isinstance(source, Resident) else None

    @property
    def uneven(self) -> bool:
        """Whether several replicas may be given shares of a batch that are not alike."""
        return doors.partial_batches(self._adapter, self._model.distribute_strategy.num_replicas_in_sync)

    def close(self) -> None:
        """Lets go of the data, of which nothing more is read."""
        self._adapter = self._source = self._iterator = self._spent = self._shown = None

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
        limit = self._steps_per_epoch or self._size
        if self._within:  # gone back into
            self._within = False
        else:
            self._begin_epoch()
            if self._iterator is None or self._steps_per_epoch is None or not limit:
                self._begin()
            self._begun = 0
        while not limit or self._begun < limit:
            if self._size and self._seen >= self._size:
                if self._steps_per_epoch:
                    self._warn_interrupted()
                break
            bounds = [b for b in (limit and limit - self._begun, self._size and self._size - self._seen) if b]
            ran, ended = yield Execution(self._begun, -(-min(bounds) // per) if bounds else None, self._iterator)
            self._seen += ran * per
            self._watched.passed(self._seen)
            self._begun += ran * per
            self._note(ran * per)
            if ended:
                self._seen += per
                self._size = self._size or self._seen
                self._warn_interrupted()
                self._iterator, self._spent = None, self._iterator
                self._end_epoch()
                return
        if self._size and self._seen >= self._size:
            self._begin(used=self._steps_per_epoch is not None)  # or else the next epoch begins once more, as in Keras
        self._end_epoch()

    def _begin_epoch(self) -> None:
        self._adapter.on_epoch_begin()
        self._note("epoch")

    def _end_epoch(self) -> None:
        self._adapter.on_epoch_end()
        self._note("end")

    def _begin(self, used: bool = True) -> None:
        if isinstance(self._source, Resident):
            self._iterator = self._source.epoch()
            if used:
                epoch = self._iterator
                self._watched.arrays(epoch.arrays, epoch.element_spec, epoch.order, epoch.batch_size)
        elif self._shown is not None:
            if used:
                self._watched.arrays(self._shown[0], self._source.element_spec, None, self._shown[1])
            self._iterator = iter(self._source)
        else:
            watched = used and not self._keeps_position
            self._iterator = iter(self._watched.watch(self._source) if watched else self._source)
        self._seen = 0
        self._note("iterator")

    def _note(self, what: str | int) -> None:
        """Keeps what has been read, for whom it has to be read once more."""
        if not self._keeps_position:
            return
        if isinstance(what, int) and self._log and isinstance(self._log[-1], int):
            self._log[-1] += what
        else:
            self._log.append(what)

    # ----------------------------------------------------------------------------------------------- going back into it

    @property
    def over_arrays(self) -> bool:
        """Whether Keras makes the batches, from arrays."""
        return doors.is_over_arrays(self._adapter)

    def check_position(self) -> None:
        """Checks that this source can be gone back into, before it has been read.

        Raises:
          ValueError: It cannot; the message names the remedy.
        """
        if self._adapter_shuffles_batches():
            raise self._unpositioned('shuffle="batch" draws its numbers where nobody can save them.')
        if isinstance(self._source, Resident):
            return
        if doors.reads_python(self._adapter):
            raise self._unpositioned(f"A {doors.source_name(self._adapter)} cannot be gone back into.")
        if not isinstance(self._source, tf.data.Dataset):
            raise self._unpositioned(f"A {type(self._source).__name__} of several replicas has no position to save.")
        position.check_repeats(self._source, pipeline)

    def position(self, source: str | None) -> dict[str, Any]:
        """Where the data stands between two executions, or between two epochs, as values and arrays.

        Raises:
          ValueError: The source cannot be gone back into.
        """
        if source == "skip":
            place: dict[str, Any] = {"kind": "log", "log": list(self._log)}
        else:
            try:
                place = position.state(self._iterator or self._spent, own=doors.is_over_arrays(self._adapter))
            except position.Unpositioned as error:
                raise self._unpositioned(str(error)) from error
        return {**place, "seen": self._seen, "size": self._size, "begun": self._begun, "spent": self._iterator is None}

    def go_back(self, saved: dict[str, Any], within: bool) -> None:
        """Stands where `position` was taken, `within` an epoch or after one.

        Raises:
          ValueError: The data is not what it was.
        """
        if saved["kind"] == "log":
            self._read_again(saved["log"])
        else:
            try:
                self._iterator = position.go_back(saved, self._fresh)
            except position.Unpositioned as error:
                raise ValueError(
                    f"A checkpoint goes back into the data that it was taken in. {error} "
                    "Pass the same data, or another directory."
                ) from error
        if saved["spent"]:
            self._iterator, self._spent = None, self._iterator
        self._seen, self._size, self._begun = saved["seen"], saved["size"], saved["begun"]
        self._within = within

    def _fresh(self) -> Any:
        return self._source.epoch() if isinstance(self._source, Resident) else iter(self._source)

    def _read_again(self, log: list[str | int]) -> None:
        for what in log:
            if what == "epoch":
                self._begin_epoch()
            elif what == "end":
                self._end_epoch()
            elif what == "iterator":
                self._begin(used=False)
            else:
                try:
                    position.skip(self._iterator, int(what))
                except position.Unpositioned as error:
                    raise ValueError(
                        f'`source="skip"` reads again what was trained on. {error} Pass the same source, from its '
                        "beginning."
                    ) from error
                self._note(int(what))

    def _adapter_shuffles_batches(self) -> bool:
        return doors.is_over_arrays(self._adapter) and doors.shuffles_within_batches(self._adapter)

    @staticmethod
    def _unpositioned(why: str) -> ValueError:
        return ValueError(
            f"A resumed run goes on where its data stood. {why} If the source gives the same batches in every "
            'run, pass checkpoint=trainrt.Checkpoint(directory, source="skip"): it is read again up to there.'
        )

    def _warn_interrupted(self) -> None:
        warnings.warn(
            "Your input ran out of data; interrupting training. Make sure that your dataset or generator can generate "
            "at least `steps_per_epoch * epochs` batches. You may need to use the `.repeat()` function when building "
            "your dataset.",
            stacklevel=4,
        )
