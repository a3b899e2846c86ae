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

from trainrt import clip
from trainrt.record.vocabulary import DEVICE_MOMENTS
from trainrt.update import native_ops

NATIVE_DTYPES = (tf.float32, tf.float64, tf.bfloat16, tf.float16)

ROW = 256
"""Elements a row. Short enough for float32 sums to keep 1e-7, long enough for the fold to be cheap."""


def measure(tensors: Sequence[tf.Tensor | None], kernels: bool = False) -> tf.Tensor:
    """Reduces each tensor to its moments.

    Args:
      tensors: P tensors of static shape. `None` is not measured.
      kernels: Whether the native kernels may be used: they are loaded where the tensors are, and XLA does not hold
        them.

    Returns:
      [P, 6] float64, columns as in `record.DEVICE_MOMENTS`. The row of a `None`, or of a tensor that is not floating
      point, is NaN: not measured is not zero.
    """
    present = {i: t for i, t in enumerate(tensors) if t is not None and t.dtype.is_floating}
    if not present:
        return _unmeasured(len(tensors), len(DEVICE_MOMENTS))
    kept, known = list(present), list(present.values())
    native_rows = kernels and all(t.dtype in NATIVE_DTYPES for t in known)
    rows = native_ops.measure(known) if native_rows else _Rows.of(known).moments()
    return _spread(rows, kept, len(tensors))


def measure_and_clip(
    gradients: Sequence[tf.Tensor | None], how: clip.Clip, kernels: bool, loss_scale: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """The moments of gradients with a loss scale divided out, [P, 6], and the clip's scales, [P]; both float64."""
    known = [g for g in gradients if g is not None and g.dtype in NATIVE_DTYPES]
    plain = loss_scale is None and len(known) == len(gradients) > 0
    if kernels and plain and isinstance(how, clip.Known) and type(how) in clip.KNOWN:
        return native_ops.measure_and_clip(known, how.native, how.threshold)
    measured = unscale(measure(gradients, kernels), loss_scale)
    return measured, _scales(how, measured, len(gradients))


def _scales(how: clip.Clip, measured: tf.Tensor, count: int) -> tf.Tensor:
    """What a clip, maybe the user's own, makes of the moments.

    Raises:
      ValueError: Not a scale for each weight.
    """
    scales = how(measured)
    try:
        return tf.ensure_shape(tf.cast(scales, tf.float64), [count])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"A clip makes of the moments of the gradients, [{count}, {len(DEVICE_MOMENTS)}], a scale for each of "
            f"them, a tensor of shape [{count}]. Received: {scales!r} from {how!r}. One scale for all is "
            f"tf.fill([{count}], scale)."
        ) from error


def unscale(measured: tf.Tensor, scale: tf.Tensor | None) -> tf.Tensor:
    """Moments of `tensor / scale` from those of `tensor`."""
    if scale is None:
        return measured
    s = tf.cast(scale, tf.float64)
    return measured / tf.stack([1.0, s, s * s, s, 1.0, 1.0])


def measure_update(
    before: Sequence[tf.Tensor], after: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor | None]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moments of `after - before`, and what it has to do with the gradient, in TensorFlow's own ops.

    Returns:
      [P, 6] float64 moments of the update, and [P, 2] float64: the inner product of gradient and update, and the number
      of elements whose gradient is not zero and that did not change all the same. NaN where there is no gradient.
    """
    updates = {i: after[i] - before[i] for i, t in enumerate(after) if t.dtype.is_floating}
    paired = {i: tf.cast(g, after[i].dtype) for i, g in enumerate(gradients) if g is not None and i in updates}
    joint = _unmeasured(len(after), 2)
    if paired:
        rows = _Rows.of(list(paired.values())).with_update(_Rows.of([updates[i] for i in paired]))
        joint = _spread(rows, list(paired), len(after))
    return measure([updates.get(i) for i in range(len(after))]), joint


def measure_adaptive(
    gradients: Sequence[tf.Tensor | None],
    momentums: Sequence[tf.Tensor | None],
    seconds: Sequence[tf.Tensor | None],
    divisors: tf.Tensor,
) -> tf.Tensor:
    """What gradients share with the slots of their weights, in TensorFlow's own ops.

    Args:
      gradients, momentums, seconds: P tensors each, of static shape; None where there is none.
      divisors: [P, 3] float64: inside, outside and floor, with which an optimizer divides by
        sqrt(second + inside) + outside.

    Returns:
      [P, 5] float64: the inner product of gradient and momentum, the sum of (gradient / divisor)^2, the sum of
      1 / divisor, the smallest second moment, and the number of second moments under the floor. NaN where one of those
      that it takes is missing.
    """
    floating = [
        [t if t is not None and t.dtype.is_floating else None for t in row] for row in (gradients, momentums, seconds)
    ]
    gradients, momentums, seconds = floating
    count = len(gradients)
    columns = [_unmeasured(count, 1), *[_unmeasured(count, 1)] * 4]
    pairs = [i for i in range(count) if gradients[i] is not None and momentums[i] is not None]
    if pairs:
        g, m = (_Rows.of([row[i] for i in pairs]) for row in (gradients, momentums))
        columns[0] = _spread(g.with_slot(m), pairs, count)
    divided = [i for i in range(count) if seconds[i] is not None]
    if divided:
        v = _Rows.of([seconds[i] for i in divided])
        rows = v.divisors(tf.gather(divisors, divided))
        columns[2:] = [_spread(rows, divided, count)]
    both = [i for i in divided if gradients[i] is not None]
    if both:
        g, v = (_Rows.of([row[i] for i in both]) for row in (gradients, seconds))
        columns[1] = _spread(g.over(v, tf.gather(divisors, both)), both, count)
    return tf.concat(columns, 1)


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

    def with_slot(self, slot: _Rows) -> tf.Tensor:
        """[P, 1]: the inner product of these gradients and a slot."""
        product = tf.cast(self.rows, tf.float64) * tf.cast(slot.rows, tf.float64)
        return self._fold([tf.reduce_sum(product, axis=1)])

    def _inverse(self, divisors: tf.Tensor) -> tf.Tensor:
        """[R, ROW]: one over what an optimizer divides by, these rows being second moments."""
        inside, outside = (tf.cast(tf.gather(divisors[:, i], self.owner), self.rows.dtype)[:, None] for i in (0, 1))
        return 1 / (tf.sqrt(self.rows + inside) + outside)

    def over(self, seconds: _Rows, divisors: tf.Tensor) -> tf.Tensor:
        """[P, 1]: the sum of the squares of these gradients, each over its divisor. Padding has gradient zero."""
        inverse = tf.where(tf.equal(self.rows, 0), tf.zeros_like(self.rows), self.rows * seconds._inverse(divisors))
        return self._fold([tf.reduce_sum(tf.square(tf.cast(inverse, tf.float64)), axis=1)])

    def divisors(self, divisors: tf.Tensor) -> tf.Tensor:
        """[P, 3] of second moments: sum of one over the divisors, the smallest, how many are under the floor."""
        filled = self.sizes[self.owner] - ROW * (np.arange(len(self.owner)) - np.searchsorted(self.owner, self.owner))
        real = tf.range(ROW, dtype=tf.float32) < tf.constant(filled[:, None], tf.float32)
        inverse = tf.where(real, self._inverse(divisors), tf.zeros_like(self.rows))
        floor = tf.cast(tf.gather(divisors[:, 2], self.owner), self.rows.dtype)[:, None]
        under = tf.logical_and(real, self.rows < floor)
        top = tf.constant(np.inf, self.rows.dtype)
        lowest = tf.reduce_min(tf.where(tf.logical_and(real, self.rows < top), self.rows, top), axis=1)
        lowest = tf.math.unsorted_segment_min(tf.cast(lowest, tf.float64), self.owner, len(self.sizes))
        lowest = tf.where(self.sizes > 0, lowest, tf.constant(np.inf, tf.float64))
        sums = self._fold(
            [tf.reduce_sum(tf.cast(inverse, tf.float64), axis=1), tf.reduce_sum(tf.cast(under, tf.float32), axis=1)]
        )
        return tf.stack([sums[:, 0], lowest, sums[:, 1]], axis=1)
