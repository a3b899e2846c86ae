"""Measures what an optimizer's own `apply` did, from outside: right for any optimizer, and without one second look.

The native kernels read weights before and after, gradients and slots in one op (`native_ops.observe`). Without them,
and for dtypes that they do not know, TensorFlow's own ops come to the same.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.record.vocabulary import GRADIENT, JOINT, UPDATE, WEIGHT
from trainrt.update import adaptive, moments, native_ops
from trainrt.update.fused import Observation
from trainrt.update.moments import NATIVE_DTYPES


class Before:
    """What is read before `optimizer.apply`; `observe` measures after it.

    Args:
      optimizer: The optimizer.
      variables: P weights.
      gradients: P dense gradients as the optimizer gets them, but for a clip of ours; None where there is none.
      measured: [P, 6] their moments, with a loss scale divided out; None to measure them now.
      kernels: Whether the native kernels may be used.
      loss_scale: The factor on the gradients that the optimizer divides out; None for none.
      every: How many steps there are to one observed.
    """

    def __init__(self, optimizer, variables, gradients, measured, kernels: bool, loss_scale, every: int):
        self._optimizer = optimizer
        self._variables = variables
        self._gradients = gradients
        self._loss_scale = loss_scale
        self._every = every
        self._rate = doors.learning_rate(optimizer)
        self._parts = adaptive.coming(optimizer, self._rate)
        self._updates = _updates(optimizer)
        self._iterations = tf.cast(tf.identity(doors.raw(next(doors.parts(optimizer)).iterations)), tf.int64)
        self._values = [value_of(v) for v in variables]
        known = [t for t in (*gradients, *self._values) if t is not None]
        self._kernels = kernels and all(t.dtype in NATIVE_DTYPES for t in known)
        if measured is None and not self._kernels:
            measured = moments.unscale(moments.measure(gradients, kernels), loss_scale)
        self._measured = measured

    @tf.autograph.experimental.do_not_convert
    def observe(self, scale: tf.Tensor | None, own_clip) -> Observation:
        """What `apply` did.

        Args:
          scale: [P] float64 by which a clip of ours scaled the gradients; None for none.
          own_clip: The optimizer's own, of `trainrt.clip`; None for none.
        """
        table = adaptive.Table.of(self._parts, self._optimizer, self._variables, self._gradients)
        after = [value_of(v) for v in self._variables]
        slots = {name: [value_of(slot) for slot in row] for name, row in table.slots.items()}
        skipped = None
        if self._updates is not None:
            skipped = tf.equal(_updates(self._optimizer), self._updates)
        if self._native(table, slots):
            measured = self._measured
            if scale is None and own_clip is not None:
                if measured is None:
                    measured = moments.unscale(moments.measure(self._gradients, True), self._loss_scale)
                scale = own_clip(measured)
            cube, joint = native_ops.observe(
                self._values,
                after,
                self._gradients,
                list(slots.values()),
                measured=measured,
                scale=scale,
                table=table.rows,
                loss_scale=None if self._loss_scale is None else tf.cast(self._loss_scale, tf.float64),
                iterations=self._iterations,
                skipped=skipped,
                momentum=table.momentum,
                second=table.second,
                every=self._every,
            )
        else:
            cube, joint = self._reference(table, after, slots, scale, own_clip, skipped)
        corrections = [part.division.correction for part in self._parts if part.division is not None]
        subjects = (GRADIENT, UPDATE, WEIGHT, *slots)
        return Observation(subjects, cube, joint, self._rate, corrections[0] if corrections else None)

    def _native(self, table: adaptive.Table, slots) -> bool:
        """Whether the kernels can: they know all dtypes, and what meets element by element has one."""
        if not self._kernels or not all(
            s.dtype in NATIVE_DTYPES for row in slots.values() for s in row if s is not None
        ):
            return False
        triples = zip(self._gradients, *table.pick(slots), strict=True)
        return all(len({t.dtype for t in triple if t is not None}) <= 1 for triple in triples)

    def _reference(self, table: adaptive.Table, after, slots, scale, own_clip, skipped) -> tuple[tf.Tensor, tf.Tensor]:
        """In TensorFlow's own ops, [P, S, 6] and [P, J]. The slots are held against the gradient in every step."""
        count, gradients = len(after), self._gradients
        measured = self._measured
        if measured is None:
            measured = moments.unscale(moments.measure(gradients), self._loss_scale)
        if scale is None and own_clip is not None:
            scale = own_clip(measured)
        update, shared = moments.measure_update(self._values, after, gradients)
        rest = moments.measure([*after, *(value for row in slots.values() for value in row)])
        rows = [rest[i * count : (i + 1) * count] for i in range(1 + len(slots))]
        seen = moments.measure_adaptive(gradients, *table.pick(slots), table.rows[:, :3])
        ones, zeros = tf.ones([count], tf.float64), tf.zeros([count], tf.float64)
        skipped = tf.constant(False) if skipped is None else skipped
        decay = table.rows[:, 5]
        columns = {
            "steps": ones,
            "scale": ones if scale is None else scale,
            "clipped": zeros if scale is None else tf.cast(tf.not_equal(scale, 1.0), tf.float64),
            "skipped": ones * tf.cast(skipped, tf.float64),
            "gradient_update": shared[:, 0],
            "rounded": shared[:, 1],
            "decay": tf.where(tf.logical_or(skipped, tf.equal(decay, 0)), zeros, decay**2 * rows[0][:, adaptive.SUMSQ]),
            **table.columns(seen, rows[1:], measured),
        }
        columns["normalized_gradient"] *= columns["scale"] ** 2
        if self._loss_scale is not None:
            for name, power in {"gradient_update": 1, "gradient_momentum": 1, "normalized_gradient": 2}.items():
                columns[name] /= tf.cast(self._loss_scale, tf.float64) ** power
        return tf.stack([measured, update, *rows], axis=1), tf.stack([columns[name] for name in JOINT], axis=1)


def value_of(variable) -> tf.Tensor | None:
    """The value now: a read of its own, so that a later assignment cannot change it."""
    if variable is None:
        return None
    raw = doors.raw(variable)
    if type(raw).__name__ == "ResourceVariable":  # an identity behind the read would stay in the graph, one a tensor
        return tf.raw_ops.ReadVariableOp(resource=raw.handle, dtype=raw.dtype)
    return tf.identity(variable.value if isinstance(variable, keras.Variable) else variable)


def _updates(optimizer) -> tf.Tensor | None:
    """How many updates an optimizer that may skip some has done; None for one that never skips."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return None
    return tf.identity(doors.raw(optimizer.inner_optimizer.iterations))
