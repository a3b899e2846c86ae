"""Trains a model for a few steps and takes every one of them back, bit for bit.

`Replay` holds a few batches and the state in which the model was found: weights, slots, metrics, seeds. What is run
under it starts from that state each time, and leaves the model in it, whatever happens.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.clip import Clip
from trainrt.update.observer import Observer

MEASURED_ROWS = 512
"""Rows on which the loss before and after is taken: enough that one row does not count, few enough to cost little."""


class Replay:
    """A few batches, and a way to train on them that leaves nothing behind.

    Args:
      model: A compiled model; it is built here if it is not.
      x, y, sample_weight: As for `fit`: arrays, a `tf.data.Dataset`, or a `keras.utils.PyDataset`.
      batch_size: Rows a batch, for arrays; None is 32.
      batches: How many to hold.
      shuffle: Whether rows of arrays come in random order, as `fit` has it.
      clip: As for `fit`.

    Attributes:
      batches: The batches, (x, y, sample_weight) of NumPy arrays.
      measured: Rows from all over the data, on which the loss is taken.

    Raises:
      TypeError: Not a Keras model, or data that can be read only once, such as a generator: taking batches from it
        could not be undone.
      ValueError: A model that is not compiled, no batch, or arrays of different lengths.
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        batches: int = 8,
        shuffle: bool = True,
        clip: Clip | None = None,
    ):
        _assert_ready(model)
        self.model = model
        self.clip = clip
        with _random_states():
            self.batches, self.measured = _taken(x, y, sample_weight, batch_size or 32, batches, shuffle)
            if not self.batches:
                raise ValueError("The data is empty: there is no batch to replay.")
            self._build()

    def _build(self) -> None:
        """Builds what the first step would; optimizers too, whose slots begin at fixed values."""
        if not self.model.built:
            self.model(_tensors(self.batches[0])[0], training=False)
        doors.build_optimizer(self.model)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever runs inside is taken back."""
        state = _State(self.model)
        with _random_states():
            try:
                yield
            finally:
                state.restore(self.model)

    def stepper(self):
        """batch -> logs: one training step, compiled as the model stands now. Call it inside `undone`."""
        model = self.model

        def one(batch):
            with Observer(doors.optimizers(model), self.clip, False, False).watch(model):
                return model.train_step(batch)

        if model.run_eagerly:
            return lambda batch: one(_tensors(batch))
        compiled = tf.function(one, jit_compile=model.jit_compile, reduce_retracing=True)
        return lambda batch: compiled(_tensors(batch))

    def meter(self):
        """() -> the loss that the model fits, over `measured`: without penalties and dropout, so that it means the same
        under each change. None where the model does not say how its outputs are judged."""
        model = self.model
        if not doors.has_keras_train_step(model):
            return None

        def loss(data):
            x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
            # Training mode, for batch normalisation whose averages lag behind; nothing is dropped meanwhile.
            with doors.without_dropout(model):
                outputs = model(x, training=True)
            value = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weight)
            return value - tf.add_n([tf.cast(term, value.dtype) for term in model.losses]) if model.losses else value

        compiled = loss if model.run_eagerly else tf.function(loss, reduce_retracing=True)
        data = _tensors(self.measured)
        return lambda: float(compiled(data))

    def order(self, replay: int, steps: int) -> list[int]:
        """Which batch each step takes in a replay: the same for every change."""
        generator = np.random.RandomState(replay)
        rounds = -(-steps // len(self.batches))
        return [int(i) for _ in range(rounds) for i in generator.permutation(len(self.batches))][:steps]

    def draw(self, replay: int) -> None:
        """Moves the seeds of dropout and its kin to those of a replay."""
        for variable in _variables(self.model):
            if variable.dtype.name == "uint32" and variable.shape == (2,):
                variable.assign(variable + tf.constant([0, 7919 * replay], "uint32"))


def _assert_ready(model: Any) -> None:
    if not doors.is_trainer(model):
        raise TypeError(
            "An experiment trains a Keras 3 model on its data: trainrt.explain(model, x, y, ...). "
            f"Received: model of type {type(model).__name__}."
        )
    if not model.compiled:
        raise ValueError(
            "An experiment trains with the optimizer and the loss that the model is compiled with. "
            f"Received: {model.name!r}, which is not compiled. Call model.compile(optimizer, loss) first."
        )


def assert_counts(**numbers: Any) -> None:
    """Raises for a number of an experiment's argument that is no int, or under 1."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"`{name}` must be an int. Received: {name}={value!r}.")
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")


def loss_of(logs: Any) -> float:
    """Of a train step of the user's own: its `loss`, or the first number that it returns."""
    values = logs if isinstance(logs, dict) else {"loss": logs}
    return float(values["loss"] if "loss" in values else next(iter(values.values())))


class _State:
    """The values of all variables of a model and its optimizers."""

    def __init__(self, model: keras.Model):
        self._values = {id(v): (v, tf.identity(v)) for v in _variables(model)}
        self._stop = model.stop_training

    def restore(self, model: keras.Model) -> None:
        for variable, value in self._values.values():
            variable.assign(value)
        for metric in model.metrics:
            if any(id(doors.raw(v)) not in self._values for v in metric.variables):  # the first step made it
                metric.reset_state()
        model.stop_training = self._stop


def _variables(model: keras.Model) -> list[tf.Variable]:
    """Weights, seeds, metrics, optimizers, each once, and the seed that Keras draws from by itself."""
    shared = doors.global_seed_state()
    found = [
        *model.variables,
        *(v for metric in model.metrics for v in metric.variables),
        *(v for optimizer in doors.optimizers(model) for v in optimizer.variables),
        *([] if shared is None else [shared]),
    ]
    return list({id(raw): raw for raw in map(doors.raw, found)}.values())


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Python's, NumPy's and TensorFlow's generators go on afterwards as if nothing had been drawn."""
    python, numpy, eager = random.getstate(), np.random.get_state(), doors.eager_random_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        doors.set_eager_random_state(eager)


# ------------------------------------------------------------------------------------------------------------- batches


def _taken(x, y, sample_weight, batch_size: int, count: int, shuffle: bool) -> tuple[list, Any]:
    """(batches, rows to measure on)"""
    if isinstance(x, tf.data.Dataset):
        return _read(x.take(count), count)
    if isinstance(x, keras.utils.PyDataset):
        return _read((x[i] for i in range(min(count, x.num_batches or count))), count)
    arrays = (x,) if y is None and sample_weight is None else (x, y) if sample_weight is None else (x, y, sample_weight)
    leaves = keras.tree.flatten(arrays)
    if not leaves or not all(hasattr(leaf, "shape") or leaf is None for leaf in leaves):
        raise TypeError(
            "An experiment reads the same batches again and again: arrays, a tf.data.Dataset or a PyDataset. "
            f"Received: x of type {type(x).__name__}. Take a few batches of it first: x, y = next(generator)."
        )
    arrays = keras.tree.map_structure(_array, arrays)
    sizes = {len(leaf) for leaf in keras.tree.flatten(arrays) if leaf is not None}
    if len(sizes) > 1:
        raise ValueError(f"x, y and sample_weight must have a row each for each other. Received: {sorted(sizes)} rows.")
    (rows,) = sizes
    order = np.random.RandomState(0).permutation(rows) if shuffle else np.arange(rows)
    batches = [_rows(arrays, order[i : i + batch_size]) for i in range(0, min(rows, count * batch_size), batch_size)]
    evenly = np.unique(np.linspace(0, rows - 1, min(rows, MEASURED_ROWS)).astype(int)) if rows else order
    return batches, _rows(arrays, evenly)


def _read(source, count: int) -> tuple[list, Any]:
    """Batches of a data set; it is measured on their rows, the only ones that are known."""
    batches = []
    for batch in source:
        batches.append(keras.tree.map_structure(_array, batch))
        if len(batches) == count:
            break
    return batches, _rows(pooled(batches), slice(MEASURED_ROWS)) if batches else None


def pooled(batches: Sequence[Any]) -> Any:
    """All rows of the batches as one batch."""
    return keras.tree.map_structure(lambda *leaves: None if leaves[0] is None else np.concatenate(leaves), *batches)


def dealt(arrays: Any, sizes: Sequence[int], order: np.ndarray) -> list:
    """Rows in an order, dealt to batches of these sizes."""
    ends = np.cumsum([0, *sizes])
    return [_rows(arrays, order[a:b]) for a, b in itertools.pairwise(ends)]


def rows_of(batch: Any) -> int:
    return len(next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None))


def _rows(arrays: Any, index: Any) -> Any:
    return keras.tree.map_structure(lambda a: None if a is None else a[index], arrays)


def _array(leaf: Any) -> np.ndarray | None:
    if leaf is None:
        return None
    array = np.asarray(leaf)
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array  # as Keras feeds arrays


def _tensors(batch: Any) -> Any:
    return keras.tree.map_structure(lambda a: None if a is None else tf.convert_to_tensor(a), batch)
