"""Stand where gradients are handed over, and measure what the optimizer did with them.

`optimizer.apply` is public, and every Keras train step, custom ones too, ends there. `Observer.watch` replaces it on
the instance while the step is traced (or, under `run_eagerly`, while it runs) and takes it away again. What happens
inside is the optimizer's own `apply`, called with the very gradients, or a fused update that computes the same bits, so
nothing of the training changes; the update is the weight after minus the weight before, never a reconstruction from the
slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import clip, doors
from trainrt.clip import Clip
from trainrt.device import phases
from trainrt.record.vocabulary import (
    DEVICE_MOMENTS,
    GRADIENT,
    JOINT,
    JOINT_EXTREMES,
    UPDATE,
    WEIGHT,
    Parameter,
    Roster,
    unique,
)
from trainrt.update import fused, generic, moments, native_ops, parity, taps
from trainrt.update.origin import Origins

LOSS_SCALARS = ("loss", "data_loss", "added_loss", "regularization_loss")
NAN = float("nan")


class _Apply(NamedTuple):
    """One call of `optimizer.apply`: rows by weight, in the order of `keys`."""

    optimizer: keras.optimizers.Optimizer
    keys: list[int]
    seen: fused.Observation
    loss_scale: tf.Tensor | None


class Observer:
    """Collects, while one step is traced, what the step did; then packs it into one vector.

    Args:
      optimizers: The optimizers to watch, the model's own first.
      clips: Scales for the gradients, or None.
      measuring: Whether to measure. False only clips and updates.
      kernels: Whether the native kernels may be used: they are loaded and XLA does not compile the step.
      sum_duplicates: Whether the rows of a sparse gradient are added up before the optimizer sees them.
      every: How many steps there are to one observed.
      origins: Where the weights started, to measure how far they have gone; None does not.

    Attributes:
      unseen: Why nothing was seen; None if something was.
      paths: The optimizer's name -> how it updates: "fused", or why not.
      taken_back: Whether the step was taken back, see `poison.py`; None: nobody watches for that.
    """

    def __init__(
        self,
        optimizers: Sequence[keras.optimizers.Optimizer],
        clips: Clip | None,
        measuring: bool,
        kernels: bool,
        sum_duplicates: bool = False,
        every: int = 1,
        origins: Origins | None = None,
    ):
        self._origins = origins
        self._optimizers = optimizers
        self._clip = clips
        self._measuring = measuring
        self._kernels = kernels
        self._sum_duplicates = sum_duplicates
        self._every = every
        self._applies: list[_Apply] = []
        self._parameters: dict[int, Parameter] = {}
        self._losses: dict[str, tf.Tensor] = {}
        self._scale: tf.Tensor | None = None
        self._inside = False
        self.unseen: str | None = None
        self.paths: dict[str, str] = {}
        self.taken_back: tf.Tensor | None = None

    @contextlib.contextmanager
    def watch(self, model: keras.Model) -> Iterator[None]:
        """Stands at `apply` of each optimizer and at the model's loss, for as long as the context lasts."""
        needed = self._measuring or self._clip or self._kernels or self._sum_duplicates
        watched = self._optimizers if needed else ()
        with contextlib.ExitStack() as stack:
            for optimizer in watched:
                stack.enter_context(doors.replaced(optimizer, "apply", self._apply(optimizer, optimizer.apply)))
            if self._measuring:
                stack.enter_context(self._watched_loss(model))
            yield

    @contextlib.contextmanager
    def _watched_loss(self, model: keras.Model) -> Iterator[None]:
        compute_loss = model.compute_loss
        terms: list[tf.Tensor] = []

        def watched(*args, **kwargs):
            terms.clear()
            loss = compute_loss(*args, **kwargs)
            self._saw_losses(doors.loss_parts(model, taps.tap(loss), [taps.tap(term) for term in terms]))
            return loss

        with doors.replaced(model, "compute_loss", watched), doors.additional_losses(model, terms):
            yield

    def _saw_losses(self, losses: dict[str, tf.Tensor]) -> None:
        self._losses = losses

    def _apply(self, optimizer, apply):
        def watched(grads, trainable_variables=None):
            if self._inside or not len(grads):
                return apply(grads, trainable_variables)
            self._inside = True
            try:
                return self._observe(optimizer, apply, list(grads), trainable_variables)
            finally:
                self._inside = False

        return watched

    def _observe(self, optimizer, apply, gradients, trainable_variables):
        given = trainable_variables is not None
        variables = list(trainable_variables) if given else doors.trained_variables(optimizer)
        if self._sum_duplicates:
            gradients = [_summed(gradient, v) for gradient, v in zip(gradients, variables, strict=True)]
        reason = parity.refusal(variables) if self._kernels else "the native kernels are not used here"
        kernels = reason is None
        way = reason or fused.plan(optimizer, variables, gradients)
        folds = type(optimizer) is keras.optimizers.SGD and any(taps.is_regrouped(g) for g in gradients)
        if folds and not isinstance(way, str):
            way = "TensorFlow folds the learning rate of SGD into a gradient"
        self.paths[optimizer.name] = way if isinstance(way, str) else "fused"
        loss_scale = _loss_scale(optimizer)
        measured = self._scale = scale = None
        dense: list = []
        if self._clip is not None or (self._measuring and isinstance(way, str)):
            rows = not isinstance(way, str) and way.takes_rows
            dense = [_dense(g, v, rows) for g, v in zip(gradients, variables, strict=True)]
        if self._clip is not None:
            with tf.name_scope(phases.CLIP):
                measured, scale = moments.measure_and_clip(dense, self._clip, kernels, loss_scale)
            self._scale = scale

        if isinstance(way, str):
            if scale is not None:
                with tf.name_scope(phases.CLIP):
                    gradients = scaled(gradients, scale)
            if not self._measuring:
                return apply(gradients, variables if given else None)
            with tf.name_scope(phases.STATISTICS):
                before = generic.Before(optimizer, variables, dense, measured, kernels, loss_scale, self._every)
            result = apply(gradients, variables if given else None)
            with tf.name_scope(phases.STATISTICS):
                seen = before.observe(scale, _own_clip(optimizer))
        else:
            result = None
            with tf.name_scope(phases.UPDATE):
                seen = way.apply(gradients, scale, self._measuring, measured, self._every)
            if seen is None:
                return result
        if self._origins is not None:
            with tf.name_scope(phases.STATISTICS):
                seen = self._origins.add(seen, variables, kernels)
        keys = [doors.variable_key(v) for v in variables]
        for key, variable in zip(keys, variables, strict=True):
            self._parameters.setdefault(key, _parameter(variable))
        self._applies.append(_Apply(optimizer, keys, seen, loss_scale))
        return result

    def roster(self) -> Roster:
        """The names along the axes of the vectors of this step."""
        parameters = list(self._parameters.values())
        paths = unique(p.path for p in parameters)
        subjects = dict.fromkeys((GRADIENT, UPDATE, WEIGHT))
        for call in self._applies:
            subjects.update(dict.fromkeys(call.seen.subjects))
        return Roster(
            tuple(dataclasses.replace(p, path=path) for p, path in zip(parameters, paths, strict=True)),
            tuple(subjects),
            tuple(self._scalars()),
        )

    def _scalars(self) -> dict[str, tf.Tensor]:
        values = {name: self._losses[name] for name in LOSS_SCALARS if name in self._losses}
        optimizers = list({id(call.optimizer): call for call in self._applies}.values())
        for name, call in zip(unique(call.optimizer.name for call in optimizers), optimizers, strict=True):
            suffix = "" if call is optimizers[0] else f"/{name}"
            values[f"learning_rate{suffix}"] = call.seen.learning_rate
            if call.loss_scale is not None:
                values[f"loss_scale{suffix}"] = call.loss_scale
            if call.seen.correction is not None:
                values[f"bias_correction{suffix}"] = call.seen.correction
        return values

    def pack(self, logs: dict[str, tf.Tensor], *ready: tf.Tensor) -> tf.Tensor:
        """Everything seen in the step as one vector, laid out as `unpack` reads it.

        Args:
          logs: What the train step returned; its "loss" stands in where the step computes its loss in its own way. The
            record has no loss where neither tells one, as of a GAN.
          ready: When the batch of the step was there, in seconds since 1970: then the vector ends in this, and in when
            it was made. For the native ops only.

        Returns:
          [P * S * 6 + P * J + K] float64; empty when nothing was seen, and then `unseen` says why.
        """
        if not self._seen():
            return native_ops.row(ready, timed=True) if ready else tf.zeros([0], tf.float64)
        with tf.name_scope(phases.STATISTICS):
            return self._packed(logs, ready)

    def _packed(self, logs, ready: Sequence[tf.Tensor]) -> tf.Tensor:
        if "loss" not in self._losses and isinstance(logs, dict) and logs.get("loss") is not None:
            self._losses = {**self._losses, "loss": logs["loss"]}
        roster = self.roster()
        order = {key: i for i, key in enumerate(self._parameters)}
        whole = self._applies[0].seen
        if len(self._applies) == 1 and len(self._applies[0].keys) == len(order) and whole.subjects == roster.subjects:
            cube, joint = whole.cube, whole.joint
        else:
            calls = self._applies
            cubes = [_combine([_placed(call, _rows(call, s), order) for call in calls]) for s in roster.subjects]
            cube, joint = tf.stack(cubes, axis=1), _added([_placed(call, call.seen.joint, order) for call in calls])
        scalars = self._scalars()
        if ready or (self._kernels and native_ops.rows_here()):  # who gives `ready` counts on what stands behind it
            values = [_one(value) for value in scalars.values()]
            return native_ops.row([cube, joint, *values, *ready], timed=bool(ready))
        vector = [
            tf.reshape(cube, [-1]),
            tf.reshape(joint, [-1]),
            tf.stack([_scalar(value) for value in scalars.values()]),
        ]
        return tf.concat(vector, 0)

    def hides(self) -> bool:
        """Whether nothing was seen of the step; then `unseen` says why."""
        return not self._seen()

    def moments(self) -> list[tuple[keras.optimizers.Optimizer, dict[str, tf.Tensor]]]:
        """Of each call of `apply`: the optimizer, and subject -> [P, 6] moments."""
        return [(call.optimizer, {s: call.seen.moments(s) for s in call.seen.subjects}) for call in self._applies]

    def loss(self, logs: Any) -> tf.Tensor | None:
        """The loss of the step, as `pack` tells it."""
        loss = self._losses.get("loss")
        if loss is None and isinstance(logs, dict):
            loss = logs.get("loss")
        return None if loss is None else _scalar(loss)

    def _seen(self) -> bool:
        here = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if not self._applies:
            self.unseen = "the step hands no gradients to an optimizer that is an attribute of the model"
        elif here is not None and any(call.seen.joint.graph is not here for call in self._applies):
            self.unseen = "`optimizer.apply` is called inside a `tf.cond`, `tf.while_loop` or `tf.function` of the step"
        if here is not None:
            self._losses = {k: v for k, v in self._losses.items() if getattr(v, "graph", here) is here}
        return self.unseen is None


def unpack(vectors: np.ndarray, roster: Roster) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[K, D] vectors of `Observer.pack` to moments [K, P, S, 6], joint sums [K, P, J] and scalars [K, scalars]."""
    p, s, m, j = len(roster.parameters), len(roster.subjects), len(DEVICE_MOMENTS), len(JOINT)
    cube, joint = p * s * m, p * j
    return (
        vectors[:, :cube].reshape(-1, p, s, m),
        vectors[:, cube : cube + joint].reshape(-1, p, j),
        vectors[:, cube + joint :],
    )


def _own_clip(optimizer) -> Clip | None:
    """What the one optimizer that updates the weights does to gradients itself; None if it does nothing."""
    parts = list(doors.parts(optimizer))
    return None if len(parts) != 1 or parts[0].gradient_accumulation_steps else clip.own(parts[0])


def _rows(call: _Apply, subject: str) -> tf.Tensor | None:
    return call.seen.moments(subject) if subject in call.seen.subjects else None


def _parameter(variable) -> Parameter:
    path = getattr(variable, "path", None) or variable.name.split(":")[0]
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return Parameter(path, path.rpartition("/")[0] or path, tuple(variable.shape), dtype)


def _summed(gradient, variable):
    """A sparse gradient as the dense tensor that it stands for: rows of the same index are added up."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, variable.shape[0])


def _dense(gradient, variable, rows: bool) -> tf.Tensor | native_ops.Rows | None:
    """The gradient as a dense tensor of the weight's shape, or the `rows` of a sparse one that stand for it."""
    if rows and isinstance(gradient, tf.IndexedSlices):
        return native_ops.Rows.of(gradient, variable)
    gradient = taps.tap(_summed(gradient, variable))
    return gradient if gradient is None or gradient.shape == variable.shape else tf.reshape(gradient, variable.shape)


def scaled(gradients: Sequence, scale: tf.Tensor) -> list:
    """Each gradient times its own scale, [P]; None stays None."""
    return [_scaled(gradient, scale[i]) for i, gradient in enumerate(gradients)]


def _scaled(gradient, scale: tf.Tensor):
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(scale, gradient.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(scale, gradient.dtype)


def _loss_scale(optimizer) -> tf.Tensor | None:
    """The factor on the gradients that the optimizer is about to divide out; None for none."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.identity(optimizer.dynamic_scale.value) if optimizer.built else tf.constant(optimizer.initial_scale)
    factor = optimizer.loss_scale_factor
    return None if factor is None else tf.constant(factor, tf.float32)


def _scalar(value) -> tf.Tensor:
    if value is None:
        return tf.constant(NAN, tf.float64)
    value = tf.cast(value, tf.float64)
    return value if value.shape.rank == 0 else tf.reduce_mean(value)


def _one(value) -> tf.Tensor:
    """A scalar as `native_ops.row` takes it: in its own dtype where it can."""
    here = tf.is_tensor(value) and value.shape.rank == 0 and value.dtype in native_ops.ROW_DTYPES
    return value if here else _scalar(value)


def _placed(call: _Apply, rows: tf.Tensor | None, order: dict[int, int]) -> tf.Tensor | None:
    """The rows of one call in the order of all weights; NaN where the call did not have the weight."""
    if rows is None:
        return None
    if len(call.keys) == len(order) and all(order[key] == i for i, key in enumerate(call.keys)):
        return rows
    index = np.full(len(order), len(call.keys), np.int32)
    for i, key in enumerate(call.keys):
        index[order[key]] = i
    padded = tf.concat([rows, tf.fill([1, rows.shape[1]], tf.constant(NAN, tf.float64))], 0)
    return tf.gather(padded, index)


def _combine(parts: list[tf.Tensor | None]) -> tf.Tensor:
    """Moments of several calls of one step: sums add, maxima take the larger."""
    present = [part for part in parts if part is not None]
    result = present[0]
    for part in present[1:]:
        absmax = np.array([name == "absmax" for name in DEVICE_MOMENTS])
        both = tf.where(absmax, tf.maximum(result, part), result + part)
        result = tf.where(tf.math.is_nan(part), result, tf.where(tf.math.is_nan(result), part, both))
    return result


def _added(parts: list[tf.Tensor]) -> tf.Tensor:
    """Joint sums of several calls of one step."""
    largest, smallest = (np.array([column == name for column in JOINT]) for name in JOINT_EXTREMES)
    result = parts[0]
    for part in parts[1:]:
        both = tf.where(largest, tf.maximum(result, part), result + part)
        both = tf.where(smallest, tf.minimum(result, part), both)
        result = tf.where(tf.math.is_nan(part), result, tf.where(tf.math.is_nan(result), part, both))
    return result
