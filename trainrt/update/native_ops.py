"""The ops of `native.py`'s library, as Python calls them.

Each says which kernel of `kernels/` it is; who asks for one without the library gets a RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from trainrt.record import vocabulary as record
from trainrt.update import native

ROW_DTYPES = (tf.float32, tf.float64, tf.bfloat16, tf.float16)
"""What `row` takes."""


class Rows(NamedTuple):
    """A sparse gradient, as the ops take it.

    Attributes:
      values: [N, ...] rows.
      indices: [N] int64, where each goes; those of the same index are added up, in their order.
      height: How many rows the dense tensor has.
    """

    values: tf.Tensor
    indices: tf.Tensor
    height: int

    @property
    def dtype(self) -> tf.DType:
        return self.values.dtype

    @classmethod
    def of(cls, gradient: tf.IndexedSlices, variable) -> Rows:
        return cls(gradient.values, tf.cast(gradient.indices, tf.int64), int(variable.shape[0]))

    @staticmethod
    def split(tensors: Sequence[tf.Tensor | Rows]) -> tuple[list[tf.Tensor], list[int], list[Rows]]:
        """The tensors, the rows of sparse ones in their places; which ones are sparse; and these."""
        sparse = [i for i, t in enumerate(tensors) if isinstance(t, Rows)]
        return [t.values if isinstance(t, Rows) else t for t in tensors], sparse, [tensors[i] for i in sparse]


@tf.autograph.experimental.do_not_convert
def measure(tensors: Sequence[tf.Tensor | Rows]) -> tf.Tensor:
    """Reduces each tensor to its moments, in one op and a fixed order.

    Args:
      tensors: P tensors of float32, float64, bfloat16 or float16, mixed or not, of any shape. Rows count as the dense
        tensor that they stand for.

    Returns:
      [P, 6] float64, columns as in `record.DEVICE_MOMENTS`; sums and the maximum are over finite elements.
    """
    if not tensors:
        return tf.zeros([0, len(record.DEVICE_MOMENTS)], tf.float64)
    return measure_and_clip(tensors, "", 0.0)[0]


@tf.autograph.experimental.do_not_convert
def measure_and_clip(tensors: Sequence[tf.Tensor | Rows], clip: str, threshold: float) -> tuple[tf.Tensor, tf.Tensor]:
    """The moments of gradients, at least one, and the scale of each that a clip of `trainrt.clip` asks for.

    Args:
      tensors: As for `measure`.
      clip: "global_norm", "weight_norm" or "largest_magnitude".
      threshold: Its threshold.

    Returns:
      [P, 6] and [P] float64.
    """
    dense, sparse, rows = Rows.split(tensors)
    return tuple(
        _ops().trainrt_measure(
            tensors=dense,
            indices=[r.indices for r in rows],
            threshold=tf.constant(threshold, tf.float64),
            sparse=sparse,
            heights=[r.height for r in rows],
            clip=clip,
        )
    )


@tf.autograph.experimental.do_not_convert
def observe(
    before: Sequence[tf.Tensor],
    after: Sequence[tf.Tensor],
    gradients: Sequence[tf.Tensor | None],
    slots: Sequence[Sequence[tf.Tensor | None]] = (),
    *,
    measured: tf.Tensor | None = None,
    scale: tf.Tensor | None = None,
    table: tf.Tensor | None = None,
    loss_scale: tf.Tensor | None = None,
    iterations: tf.Tensor | None = None,
    skipped: tf.Tensor | None = None,
    momentum: Sequence[int] | None = None,
    second: Sequence[int] | None = None,
    every: int = 1,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Measures what an optimizer did, in one op that reads each tensor once and does not store the differences.

    Args:
      before, after: P weights before and after the step, at least one, of any float dtype and shape.
      gradients: P gradients, of any float dtype; None where there is none.
      slots: For each slot P tensors of any float dtype and shape, or None.
      measured: [P, 6] float64 moments of the gradients where they are known; they are measured here if None.
      scale: [P] float64 of the clip; None for no clip.
      table: [P, 6] float64 of `adaptive.Table`; None if nothing is divided and nothing decays.
      loss_scale: [] float64 that is in the gradients and not in `measured`.
      iterations: [] int64 before the step, which says whether the slots are held against the gradient in it.
      skipped: [] bool, whether the optimizer left the step out.
      momentum, second: For each weight which of `slots` is its momentum and its second moment, of the gradient's dtype
        and size; -1 for none.
      every: How many steps there are to one observed.

    Returns:
      [P, 3 + slots, 6] float64 moments of gradient, update (after - before, rounded to the weight's dtype), weight and
      slots, NaN where there is none; and [P, J] float64, columns as in `record.JOINT`.
    """
    none = [-1] * len(after)
    return tuple(
        _ops().trainrt_observe(
            before=list(before),
            after=list(after),
            gradients=[tf.zeros([0]) if g is None else g for g in gradients],
            slots=[tf.zeros([0]) if s is None else s for row in slots for s in row],
            measured=_or_empty(measured, [0, len(record.DEVICE_MOMENTS)]),
            scale=_or_empty(scale, [0]),
            table=tf.constant([[0.0, 0, 0, float("nan"), float("nan"), 0]] * len(after), tf.float64)
            if table is None
            else table,
            loss_scale=tf.constant(1.0, tf.float64) if loss_scale is None else loss_scale,
            iterations=tf.constant(0, tf.int64) if iterations is None else iterations,
            skipped=tf.constant(False) if skipped is None else skipped,
            momentum=none if momentum is None else list(momentum),
            second=none if second is None else list(second),
            every=every,
        )
    )


@tf.autograph.experimental.do_not_convert
def update(
    *, gradients: Sequence[tf.Tensor | Rows], measured: tf.Tensor | None, scale: tf.Tensor | None, **arguments: Any
) -> Any:
    """The op `TrainrtUpdate`, as `fused.py` calls it; `kernels/bind.cc` says what it takes."""
    dense, sparse, rows = Rows.split(gradients)
    return _ops().trainrt_update(
        gradients=dense,
        indices=[r.indices for r in rows],
        sparse=sparse,
        measured=_or_empty(measured, [0, len(record.DEVICE_MOMENTS)]),
        scale=_or_empty(scale, [0]),
        **arguments,
    )


def rows_here() -> bool:
    """Whether `row` and `now` may be used: no tensor is on a GPU, from which either would fetch it."""
    return native.load() is not None and not tf.config.list_logical_devices("GPU")


@tf.autograph.experimental.do_not_convert
def row(parts: Sequence[tf.Tensor], timed: bool = False) -> tf.Tensor:
    """The numbers of several tensors, at least one of any shape, one behind the other.

    Args:
      parts: The tensors, on the host, of `ROW_DTYPES`.
      timed: Whether to add when the row was there, in seconds since 1970.

    Returns:
      [numbers] float64.
    """
    return _ops().trainrt_row(parts=list(parts), timed=timed)


@tf.autograph.experimental.do_not_convert
def now(after: tf.Tensor) -> tf.Tensor:
    """[] float64, seconds since 1970 when a tensor was there."""
    return _ops().trainrt_now(after=after)


def _or_empty(tensor: tf.Tensor | None, shape: list[int]) -> tf.Tensor:
    return tf.zeros(shape, tf.float64) if tensor is None else tensor


def _ops() -> Any:
    ops = native.load()
    if ops is None:
        raise RuntimeError(f"The native ops were asked for and are not there: {native.status().reason}")
    return ops
