"""measure: tensors to moments, by the native kernels where they run, else in plain TensorFlow ops.

The plain ops are the reference: they run on every device and under XLA. Tensors are laid side by side in rows of `ROW`
elements, so that a model of a hundred weights costs a handful of ops and not a thousand. Rows are reduced in float32
relative to their own largest magnitude (so neither 1e-30 nor 1e30 is lost) and folded in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainrt import native
from trainrt.record import DEVICE_MOMENTS

NATIVE_DTYPES = (tf.float32, tf.float64, tf.bfloat16, tf.float16)

ROW = 256
"""Elements a row. Short enough for float32 sums to keep 1e-7, long enough for the fold to be cheap."""


def measure(tensors: Sequence[tf.Tensor | None], kernels: bool = False) -> tf.Tensor:
    """Reduces each tensor to its moments.

    Args:
      tensors: P tensors of static shape. `None` is not measured.
      kernels: Whether the native kernels may be used: they are loaded, and neither XLA nor a GPU holds the tensors.

    Returns:
      [P, 6] float64, columns as in `record.DEVICE_MOMENTS`. The row of a `None`, or of a tensor that is not floating
      point, is NaN: not measured is not zero.
    """
    present = {i: t for i, t in enumerate(tensors) if t is not None and t.dtype.is_floating}
    if not present:
        return _unmeasured(len(tensors), len(DEVICE_MOMENTS))
    kept, known = list(present), list(present.values())
    native_rows = kernels and all(t.dtype in NATIVE_DTYPES for t in known)
    rows = native.measure(known) if native_rows else _Rows.of(known).moments()
    return _spread(rows, kept, len(tensors))


def measure_update(
    before: Sequence[tf.Tensor],
    after: Sequence[tf.Tensor],
    gradients: Sequence[tf.Tensor | None],
    kernels: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moments of `after - before`, and what it has to do with the gradient.

    Returns:
      [P, 6] float64 moments of the update, and [P, 2] float64: the inner product of gradient and update, and the number
      of elements whose gradient is not zero and that did not change all the same. NaN where there is no gradient.
    """
    kept = [i for i, t in enumerate(after) if t.dtype.is_floating]
    tensors = [t for i in kept for t in (before[i], after[i], gradients[i]) if t is not None]
    if kernels and kept and all(t.dtype in NATIVE_DTYPES for t in tensors):
        picked = ([part[i] for i in kept] for part in (before, after, gradients))
        update, joint = native.measure_update(*picked)
        return _spread(update, kept, len(after)), _spread(joint, kept, len(after))
    updates = {i: after[i] - before[i] for i in kept}
    paired = {i: tf.cast(g, after[i].dtype) for i, g in enumerate(gradients) if g is not None and i in updates}
    joint = _unmeasured(len(after), 2)
    if paired:
        rows = _Rows.of(list(paired.values())).with_update(_Rows.of([updates[i] for i in paired]))
        joint = _spread(rows, list(paired), len(after))
    return measure([updates.get(i) for i in range(len(after))]), joint


def _unmeasured(count: int, columns: int) -> tf.Tensor:
    return tf.fill([count, columns], tf.constant(np.nan, tf.float64))


def _spread(rows: tf.Tensor, kept: Sequence[int], count: int) -> tf.Tensor:
    """Rows of the kept ones among `count`; NaN for the others."""
    if len(kept) == count:
        return rows
    place = np.full(count, len(kept), np.int32)
    place[list(kept)] = np.arange(len(kept))
    return tf.gather(tf.concat([rows, _unmeasured(1, rows.shape[1])], 0), place)


@dataclasses.dataclass
class _Rows:
    """Tensors side by side in rows of `ROW`, padded with zeros.

    Attributes:
      rows: [R, ROW] float32, or float64 when a tensor is.
      owner: [R] index of the tensor of each row.
      sizes: [P] element counts.
    """

    rows: tf.Tensor
    owner: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, tensors: Sequence[tf.Tensor]) -> _Rows:
        dtype = tf.float64 if any(t.dtype == tf.float64 for t in tensors) else tf.float32
        parts, owner, sizes = [], [], []
        for i, tensor in enumerate(tensors):
            size = tensor.shape.num_elements()
            if size is None:
                raise ValueError(f"Moments need tensors of static shape. Received: shape={tensor.shape}.")
            sizes.append(size)
            parts.append(tf.reshape(tf.cast(tensor, dtype), [size]))
            if size % ROW:
                parts.append(tf.zeros([-size % ROW], dtype))
            owner += [i] * -(-size // ROW)
        rows = tf.reshape(tf.concat(parts, 0), [-1, ROW])
        return cls(rows, np.array(owner, np.int32), np.array(sizes, np.float64))

    def _fold(self, columns: list[tf.Tensor]) -> tf.Tensor:
        """[R] columns summed over the rows of each tensor: [P, columns]."""
        stacked = tf.stack([tf.cast(c, tf.float64) for c in columns], axis=1)
        return tf.math.unsorted_segment_sum(stacked, self.owner, len(self.sizes))

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
        padding = -self.sizes % ROW
        return tf.stack(
            [
                tf.constant(self.sizes),
                folded[:, 0],
                folded[:, 1],
                tf.where(self.sizes > 0, largest, tf.zeros_like(largest)),
                folded[:, 2] - padding,
                self.sizes + padding - folded[:, 3],
            ],
            axis=1,
        )

    def with_update(self, update: _Rows) -> tf.Tensor:
        """[P, 2]: the inner product of these gradients and the update, and how often only the update is zero."""
        product = tf.cast(self.rows, tf.float64) * tf.cast(update.rows, tf.float64)
        rounded = tf.logical_and(tf.not_equal(self.rows, 0), tf.equal(update.rows, 0))
        return self._fold([tf.reduce_sum(product, axis=1), tf.reduce_sum(tf.cast(rounded, tf.float32), axis=1)])
