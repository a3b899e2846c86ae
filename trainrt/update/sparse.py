"""Weights whose gradient is an `IndexedSlices`, in a fused update or beside that of the others.

What Keras does with the rows of such a gradient is up to each optimizer's source, and duplicates make it another
thing each time: SGD subtracts row by row; RMSprop, Adagrad and Adadelta fold the rows' squares into a dense
accumulator and then step row by row; Adamax, Nadam, Lion and SGD with momentum do some of their arithmetic on the rows
before they make them dense. So these weights are left to Keras's own `update_step`, rows and all, and only looked at
from outside: nothing is made dense for the update that Keras does not make dense. Only the statistics take the
gradient as the dense tensor that it stands for.

Adam and AdamW add up the rows of the same index, and apart from that their squares, and go on with these two dense
tensors. So does the fused pass, block by block, without holding either (`kernels/rows.h`), unless they clip by
themselves."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from trainrt import clip, doors
from trainrt.update import adaptive, native_ops


def refusal(optimizer, gradient, variable) -> str | None:
    """Why a fused update cannot go beside this gradient; None if it can."""
    path = getattr(variable, "path", variable.name)
    if optimizer.global_clipnorm:
        return f"{path} has a sparse gradient, and global_clipnorm"
    if optimizer.loss_scale_factor is not None:
        return f"{path} has a sparse gradient, and loss_scale_factor"
    if gradient.dtype != doors.raw(variable).dtype:
        return f"{path} is {doors.raw(variable).dtype.name} and its gradient {gradient.dtype.name}"
    return None


def dense(gradient: tf.IndexedSlices, variable) -> tf.Tensor:
    """The gradient as the tensor that it stands for: rows of the same index are added up."""
    raw = doors.raw(variable)
    return tf.reshape(tf.math.unsorted_segment_sum(gradient.values, gradient.indices, raw.shape[0]), raw.shape)


@tf.autograph.experimental.do_not_convert
def apply(
    optimizer,
    gradients: Sequence[tf.IndexedSlices],
    variables: Sequence,
    rate: tf.Tensor,
    scale: tf.Tensor | None,
    measured: tf.Tensor | None,
    step: tuple[tf.Tensor, tf.Tensor, int] | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None] | None:
    """Updates P weights as the optimizer would, its counter of steps aside.

    Args:
      optimizer: One that `fused.plan` takes.
      gradients: As they are.
      variables: P weights.
      rate: The learning rate.
      scale: [P] float64: each gradient is multiplied by its own, before Keras's clip; None does not multiply.
      measured: [P, 6] moments of the gradients, if they are known.
      step: Iterations, int64; the rate, float64; and how many steps there are to one observed. None does not observe.

    Returns:
      [P, S, 6], [P, J], and the correction of the second moment's bias or None; None unless observed.
    """
    gradients = list(gradients)
    scaled = gradients if scale is None else [_times(g, scale[i]) for i, g in enumerate(gradients)]
    if step is None:
        doors.update_rows(optimizer, scaled, variables, rate)
        return None
    iterations, rate64, every = step
    parts = adaptive.coming(optimizer, rate64)
    table = adaptive.Table.of(parts, optimizer, variables, gradients)
    before = [tf.identity(doors.raw(v)) for v in variables]
    full = [dense(g, v) for g, v in zip(gradients, variables, strict=True)]
    doors.update_rows(optimizer, scaled, variables, rate)
    after = [tf.identity(doors.raw(v)) for v in variables]
    slots = [[None if s is None else tf.identity(doors.raw(s)) for s in row] for row in table.slots.values()]
    own = clip.own(optimizer)
    if scale is None and own is not None:
        measured = native_ops.measure(full) if measured is None else measured
        scale = own(measured)
    cube, joint = native_ops.observe(
        before, after, full, slots, measured=measured, scale=scale, table=table.rows, iterations=iterations,
        momentum=table.momentum, second=table.second, every=every,
    )  # fmt: skip
    corrections = [part.division.correction for part in parts if part.division is not None]
    return cube, joint, corrections[0] if corrections else None


def _times(gradient: tf.IndexedSlices, scale: tf.Tensor) -> tf.IndexedSlices:
    values = gradient.values * tf.cast(scale, gradient.dtype)
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
