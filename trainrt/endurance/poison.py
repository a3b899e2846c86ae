"""Takes a step back that would poison the training: afterwards it is as if its batch had not been in the data.

The step itself decides and selects, inside the compiled loop: weights, slots, `iterations`, batch statistics, seeds and
metrics are what they were before it. That costs a copy of all of these for the length of a step, and only a training
that asked for it pays.

Poison is a loss, a gradient, an update, a slot or a weight that is not finite. Under loss scaling gradients overflow on
purpose, and the loss scale's own skip answers that; there the loss alone counts. A spike is a loss or a gradient norm
`SIGMAS` standard deviations above the mean of its last `WINDOW`; spikes do not enter that history.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.record.vocabulary import DEVICE_MOMENTS, GRADIENT, JOINT
from trainrt.update.observer import Observer

WINDOW, SAMPLES, SIGMAS = 128, 64, 6.0
CONSECUTIVE = 10
"""So many steps in a row are taken back; one more ends the training."""

KEPT = 256
"""Steps taken back that are remembered until the loop asks."""

SPIKES = ("loss", "gradient norm")
_NONFINITE, _SUMSQ = DEVICE_MOMENTS.index("nonfinite"), DEVICE_MOMENTS.index("sumsq")


class Taken(NamedTuple):
    """A step that was taken back.

    Attributes:
      step: Its number.
      why: "nonfinite", or what spiked: "loss" or "gradient norm".
    """

    step: int
    why: str


class Guard:
    """Stands around the model's `train_step` and takes back what it did, where that is poison.

    Args:
      model: A compiled model.
      on_nonfinite: "skip", "stop", or "report" to let it be.
      on_spike: "skip", "stop", or None.

    Attributes:
      number: Number of the next step; whoever runs steps sets it.
      halted: Whether the training must not go on; a loop over steps asks after each.
    """

    def __init__(self, model: keras.Model, on_nonfinite: str, on_spike: str | None):
        self._model = model
        self._on_nonfinite = on_nonfinite
        self._on_spike = on_spike
        self._optimizers = doors.optimizers(model)
        self.number = _variable("number", 0)
        self.halted = _variable("halted", False)
        self._count = _variable("count", 0)
        self._in_a_row = _variable("in_a_row", 0)
        self._kept = _variable("kept", np.zeros([KEPT, 2], np.int64))
        self._history = _variable("history", np.zeros([len(SPIKES), WINDOW]))
        self._samples = _variable("samples", np.zeros([len(SPIKES)], np.int64))
        self._told = 0

    @property
    def asked(self) -> tuple[str, str | None]:
        """What it was made for."""
        return self._on_nonfinite, self._on_spike

    def described(self) -> str:
        """Why the training ends, when it has been halted."""
        many = int(self._in_a_row)
        if many > CONSECUTIVE:
            return f"It is step {many} in a row: the cause is not a bad batch."
        return 'It was asked to "stop".'

    def reset(self) -> None:
        """Begins anew, for another fit."""
        for variable in (self.number, self.halted, self._count, self._in_a_row, self._samples):
            variable.assign(tf.zeros_like(variable))
        self._told = 0

    @property
    def variables(self) -> list[tf.Variable]:
        """Its own: what spiked and what was taken back so far. A checkpoint keeps them."""
        return [self.number, self.halted, self._count, self._in_a_row, self._kept, self._history, self._samples]

    def go_on(self) -> None:
        """Goes on from variables that were put back: what was taken back before is told already."""
        self._told = int(self._count)

    def step(self, observer: Observer, train: Callable[[], Any], results: Callable[[], Any]) -> Any:
        """Runs a step, and takes it back if need be; returns its logs.

        Args:
          observer: Sees what the step does; of all replicas, where there are several: they decide as one.
          train: Runs `train_step`; returns its logs.
          results: Returns what the metrics say, after a step of Keras's own was taken back.

        Raises:
          ValueError: Nobody sees the gradients of this model.
        """
        before = [(variable, _value(variable)) for variable in self._variables()]
        with _made_meanwhile(before):
            logs = train()
        if observer.hides():
            raise ValueError(
                f"`on_nonfinite` and `on_spike` look at the gradients. Received: a model where {observer.unseen}. "
                "Leave them out, or call the optimizer's `apply` in the model's own train_step."
            )
        loss = observer.loss(logs)
        nonfinite = self._nonfinite(observer, loss)
        spikes = self._spikes(observer, loss)
        spiked = tf.logical_and(tf.reduce_any(spikes), tf.logical_not(nonfinite))
        poison = nonfinite if self._on_nonfinite != "report" else tf.constant(False)
        taken = tf.logical_or(poison, spiked) if self._on_spike else poison
        self._take_back(taken, before)
        self._remember(taken, nonfinite, spikes)
        observer.taken_back = taken
        if doors.has_keras_train_step(self._model):
            logs = results()
        return logs

    def mask(self, observer: Observer, vector: tf.Tensor) -> tf.Tensor:
        """The step's vector, where of a step taken back only the gradient, the loss and the rates are told."""
        roster = observer.roster()
        cube = np.ones([len(roster.parameters), len(roster.subjects), len(DEVICE_MOMENTS)], bool)
        cube[:, roster.subjects.index(GRADIENT)] = False
        joint = np.zeros([len(roster.parameters), len(JOINT)], bool)
        joint[:, JOINT.index("gradient_update") :] = True
        void = np.concatenate([cube.reshape(-1), joint.reshape(-1), np.zeros(len(roster.scalars), bool)])
        hidden = tf.logical_and(observer.taken_back, void)
        return tf.where(hidden, tf.constant(float("nan"), tf.float64), vector)

    def news(self) -> list[Taken]:
        """The steps that were taken back since the last call; the last `KEPT` at most."""
        count = int(self._count)
        new, self._told = count - self._told, count
        if not new:
            return []
        kept = self._kept.numpy()
        rows = [kept[i % KEPT] for i in range(count - min(new, KEPT), count)]
        return [Taken(int(step), ("nonfinite", *SPIKES)[int(why)]) for step, why in rows]

    def _variables(self) -> list[tf.Variable]:
        """All that a step may change, as far as it is there by now: of replicas, the copy of each in this process."""
        generator = doors.global_seed_generator()
        owned = [
            *self._model.variables,
            *self._model.metrics_variables,
            *(v for optimizer in self._optimizers for v in optimizer.variables),
            *([] if generator is None else [generator.state]),
        ]
        found = {id(doors.raw(v)): doors.raw(v) for v in owned}.values()
        return [copy for variable in found for copy in getattr(variable, "values", (variable,))]

    def _nonfinite(self, observer: Observer, loss: tf.Tensor | None) -> tf.Tensor:
        bad = [] if loss is None else [tf.logical_not(tf.math.is_finite(loss))]
        for optimizer, subjects in observer.moments():
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                continue
            bad += [_total(rows, _NONFINITE) > 0 for rows in subjects.values()]
        return tf.reduce_any(tf.stack(bad)) if bad else tf.constant(False)

    def _spikes(self, observer: Observer, loss: tf.Tensor | None) -> tf.Tensor:
        """[2] whether the loss and the gradient norm stand out; enters them into their history otherwise."""
        if self._on_spike is None:
            return tf.zeros([len(SPIKES)], tf.bool)
        squares = tf.add_n([_total(subjects[GRADIENT], _SUMSQ) for _, subjects in observer.moments()])
        nan = tf.constant(float("nan"), tf.float64)
        values = tf.stack([nan if loss is None else loss, tf.sqrt(squares)])
        samples, history = tf.identity(self._samples), tf.identity(self._history)
        filled = tf.cast(tf.range(WINDOW, dtype=tf.int64)[None] < samples[:, None], tf.float64)
        count = tf.maximum(tf.reduce_sum(filled, 1), 1.0)
        mean = tf.reduce_sum(history * filled, 1) / count
        spread = tf.sqrt(tf.reduce_sum(tf.square(history - mean[:, None]) * filled, 1) / count)
        above = values > mean + SIGMAS * tf.maximum(spread, 1e-6 * tf.abs(mean))
        spikes = tf.logical_and(samples >= SAMPLES, above)
        enters = tf.logical_and(tf.math.is_finite(values), tf.logical_not(tf.reduce_any(spikes)))
        here = tf.equal(tf.range(WINDOW, dtype=tf.int64)[None], (samples % WINDOW)[:, None])
        self._history.assign(tf.where(tf.logical_and(here, enters[:, None]), values[:, None], history))
        self._samples.assign(samples + tf.cast(enters, tf.int64))
        return spikes

    def _take_back(self, taken: tf.Tensor, before: list[tuple[tf.Variable, tf.Tensor]]) -> None:
        def put_back():
            for variable, value in before:
                variable.assign(value)
            return tf.constant(0)

        tf.cond(taken, put_back, lambda: tf.constant(0))

    def _remember(self, taken: tf.Tensor, nonfinite: tf.Tensor, spikes: tf.Tensor) -> None:
        one = tf.cast(taken, tf.int64)
        why = tf.where(nonfinite, 0, tf.where(spikes[0], 1, 2))
        row = tf.stack([tf.identity(self.number), tf.cast(why, tf.int64)])
        here = tf.logical_and(tf.equal(tf.range(KEPT, dtype=tf.int64), self._count % KEPT), taken)
        self._kept.assign(tf.where(here[:, None], row[None], self._kept))
        self._count.assign_add(one)
        self._in_a_row.assign((self._in_a_row + 1) * one)
        self.number.assign_add(1)
        stops = tf.where(nonfinite, self._on_nonfinite == "stop", self._on_spike == "stop")
        ends = tf.logical_and(taken, tf.logical_or(stops, self._in_a_row > CONSECUTIVE))
        self.halted.assign(tf.logical_or(self.halted, ends))


@contextlib.contextmanager
def _made_meanwhile(before: list[tuple[tf.Variable, tf.Tensor]]) -> Iterator[None]:
    """Adds variables that are made while the context lasts, with their first values: those of the first eager step.

    TensorFlow traces a step that makes variables once more, and then they are there.
    """
    if not tf.executing_eagerly():
        yield
        return

    def creator(make, **keywords):
        variable = make(**keywords)
        before.extend((copy, _value(copy)) for copy in getattr(variable, "values", (variable,)))
        return variable

    with tf.variable_creator_scope(creator):
        yield


def _value(variable: tf.Variable) -> tf.Tensor:
    """The value as it is now, on the device of the variable."""
    with tf.device(variable.device):
        return tf.identity(variable)


def _variable(name: str, value: Any) -> tf.Variable:
    dtype = tf.int64 if isinstance(value, int) and not isinstance(value, bool) else None
    return tf.Variable(value, trainable=False, dtype=dtype, name=f"guard_{name}")


def _total(rows: tf.Tensor, column: int) -> tf.Tensor:
    """The sum of a moment over the weights that were measured."""
    values = rows[:, column]
    return tf.reduce_sum(tf.where(tf.math.is_nan(values), tf.zeros_like(values), values))
