"""measure: tensors to moments, in plain TensorFlow ops.

This is the reference: it runs on every device and under XLA, and it is the twin of the native kernels. Tensors are laid
side by side in rows of `ROW` elements, so that a model of a hundred weights costs a handful of ops and not a thousand.
Rows are reduced in float32 relative to their own largest magnitude (so neither 1e-30 nor 1e30 is lost) and folded in
float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainrt.record import DEVICE_MOMENTS

ROW = 256
"""Elements a row. Short enough for float32 sums to keep 1e-7, long enough for the fold to be cheap."""


def measure(tensors: Sequence[tf.Tensor | tf.IndexedSlices | None]) -> tf.Tensor:
    """Reduces each tensor to its moments.

    Args:
      tensors: P floating-point tensors of any static shape. `None` is not measured. `tf.IndexedSlices` are measured as
        the dense gradient that they stand for: rows with the same index are summed.

    Returns:
      [P, 6] float64, columns as in `record.DEVICE_MOMENTS`. The row of a `None`, or of a tensor that is not floating
      point, is NaN: not measured is not zero.
    """
    rows = _Rows.of(tensors)
    return rows.moments() if rows else tf.fill([len(tensors), len(DEVICE_MOMENTS)], tf.constant(np.nan, tf.float64))


def measure_update(
    before: Sequence[tf.Tensor], after: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor | tf.IndexedSlices | None]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moments of `after - before`, and what it has to do with the gradient.

    Returns:
      [P, 6] float64 moments of the update, and [P, 2] float64: the inner product of gradient and update, and the number
      of elements whose gradient is not zero and that did not change all the same. NaN where there is no gradient.
    """
    updates = [a - b if a.dtype.is_floating else None for a, b in zip(after, before, strict=True)]
    gradients = [
        None if g is None or u is None else tf.cast(_dense(g), u.dtype)
        for g, u in zip(gradients, updates, strict=True)
    ]
    update = _Rows.of(updates)
    shared = _Rows.of([u if g is not None else None for g, u in zip(gradients, updates, strict=True)])
    gradient = _Rows.of(gradients)
    count = len(updates)
    moments = update.moments() if update else tf.fill([count, len(DEVICE_MOMENTS)], tf.constant(np.nan, tf.float64))
    joint = gradient.with_update(shared) if gradient and shared else tf.fill([count, 2], tf.constant(np.nan, tf.float64))
    return moments, joint


def _dense(tensor: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    return tf.convert_to_tensor(tensor) if isinstance(tensor, tf.IndexedSlices) else tensor


@dataclasses.dataclass
class _Rows:
    """Tensors side by side in rows of `ROW`, padded with zeros.

    Attributes:
      rows: [R, ROW] float32, or float64 when a tensor is.
      owner: [R] index of the tensor of each row.
      sizes: P element counts; None for what is not measured.
    """

    rows: tf.Tensor
    owner: np.ndarray
    sizes: list[int | None]

    @classmethod
    def of(cls, tensors: Sequence[tf.Tensor | tf.IndexedSlices | None]) -> _Rows | None:
        kept = [(i, _dense(t)) for i, t in enumerate(tensors) if t is not None and t.dtype.is_floating]
        sizes: list[int | None] = [None] * len(tensors)
        if not kept:
            return None
        dtype = tf.float64 if any(t.dtype == tf.float64 for _, t in kept) else tf.float32
        parts, owner = [], []
        for i, tensor in kept:
            size = tensor.shape.num_elements()
            if size is None:
                raise ValueError(f"Moments need tensors of static shape. Received: shape={tensor.shape}.")
            sizes[i] = size
            parts.append(tf.reshape(tf.cast(tensor, dtype), [size]))
            if size % ROW:
                parts.append(tf.zeros([-size % ROW], dtype))
            owner += [i] * -(-size // ROW)
        return cls(tf.reshape(tf.concat(parts, 0), [-1, ROW]), np.array(owner, np.int32), sizes)

    def _fold(self, columns: list[tf.Tensor]) -> tf.Tensor:
        """[R] columns summed over the rows of each tensor: [P, columns]."""
        stacked = tf.stack([tf.cast(c, tf.float64) for c in columns], axis=1)
        return tf.math.unsorted_segment_sum(stacked, self.owner, len(self.sizes))

    def _measured(self, result: tf.Tensor) -> tf.Tensor:
        if all(size is not None for size in self.sizes):
            return result
        mask = np.array([size is not None for size in self.sizes])[:, None]
        return tf.where(mask, result, tf.constant(np.nan, tf.float64))

    def moments(self) -> tf.Tensor:
        finite = tf.math.is_finite(self.rows)
        clean = tf.where(finite, self.rows, tf.zeros_like(self.rows))
        absmax = tf.reduce_max(tf.abs(clean), axis=1)
        unit = tf.where(absmax > 0, absmax, tf.ones_like(absmax))
        scaled = clean / unit[:, None]
        unit64 = tf.cast(unit, tf.float64)
        folded = self._fold(
            [
                tf.cast(tf.reduce_sum(scaled, axis=1), tf.float64) * unit64,
                tf.cast(tf.reduce_sum(scaled * scaled, axis=1), tf.float64) * unit64 * unit64,
                tf.reduce_sum(tf.cast(tf.equal(self.rows, 0), self.rows.dtype), axis=1),
                tf.reduce_sum(tf.cast(finite, self.rows.dtype), axis=1),
            ]
        )
        largest = tf.math.unsorted_segment_max(tf.cast(absmax, tf.float64), self.owner, len(self.sizes))
        size = np.array([s or 0 for s in self.sizes], np.float64)
        padding = -size % ROW
        return self._measured(
            tf.stack(
                [
                    tf.constant(size),
                    folded[:, 0],
                    folded[:, 1],
                    tf.where(size > 0, largest, tf.zeros_like(largest)),
                    folded[:, 2] - padding,
                    size + padding - folded[:, 3],
                ],
                axis=1,
            )
        )

    def with_update(self, update: _Rows) -> tf.Tensor:
        gradient = tf.cast(self.rows, tf.float64)
        return self._measured(
            self._fold(
                [
                    tf.reduce_sum(gradient * tf.cast(update.rows, tf.float64), axis=1),
                    tf.reduce_sum(
                        tf.cast(
                            tf.logical_and(tf.not_equal(self.rows, 0), tf.equal(update.rows, 0)), self.rows.dtype
                        ),
                        axis=1,
                    ),
                ]
            )
        )
