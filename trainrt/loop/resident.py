"""Arrays that stay on the device, read by the compiled loop itself in the order in which Keras would read them.

For a tiny model the input pipeline costs more than the step. Keras makes one permutation an epoch and batches it; here
the loop takes slices of that very permutation (the same op from the same seeds) and gathers the rows, so the batches
are Keras's to the last bit. Large batches stay in Keras's pipeline, which gathers them on another core meanwhile: that
pays where a core is idle, and most steps on batches of a few hundred kilobytes leave none.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from trainrt.device import phases

BATCH_BYTES = 1 << 20
"""Largest batch that the loop gathers by itself; gathering as much takes about 80 microseconds."""

TOTAL_BYTES = 1 << 29
"""Largest data set that is kept on the device."""


class Resident:
    """The data of a fit, one epoch after the other.

    Args:
      arrays: A structure of dense tensors with `samples` rows, and of None.
      samples: Rows.
      batch_size: Rows a batch; the last one may be smaller.
      shuffle: Whether each epoch has an order of its own.

    Attributes:
      arrays, samples: As given.
      element_spec: Of a batch, as Keras's dataset has it.
    """

    def __init__(self, arrays: Any, samples: int, batch_size: int, shuffle: bool):
        self.arrays = arrays
        self.samples = samples
        self._batch_size = batch_size
        rows = None if samples % batch_size else batch_size
        self.element_spec = keras.tree.map_structure(
            lambda a: None if a is None else tf.TensorSpec([rows, *a.shape[1:]], a.dtype), arrays
        )

        def permutation(_):
            indices = tf.range(samples, dtype=tf.int64)
            return tf.random.shuffle(indices) if shuffle else indices

        self._orders = tf.data.Dataset.range(1).map(permutation)

    def epoch(self) -> Epoch:
        """The data in an order of its own, from the first batch on."""
        return Epoch(self.arrays, next(iter(self._orders)), self._batch_size, self.element_spec)


class Epoch:
    """One pass over the data.

    Attributes:
      arrays: As in `Resident`.
      order: [samples] int64: the rows in the order of this epoch.
      batch: Number of the next batch.
      batch_size: Rows a batch.
      element_spec: Of a batch.
    """

    def __init__(self, arrays: Any, order: tf.Tensor, batch_size: int, element_spec: Any):
        self.arrays = arrays
        self.order = order
        self.batch = 0
        self.batch_size = batch_size
        self.element_spec = element_spec

    @property
    def left(self) -> int:
        """Batches that are left."""
        return -(-int(self.order.shape[0]) // self.batch_size) - self.batch


def gather(arrays: Any, order: tf.Tensor, batch: tf.Tensor, batch_size: int, element_spec: Any) -> Any:
    """Batch number `batch` of an epoch, inside the compiled loop."""
    with tf.name_scope(phases.INPUT):
        begin = batch * batch_size
        index = order[begin : begin + batch_size]

        def rows(array, spec):
            return None if array is None else tf.ensure_shape(tf.gather(array, index), spec.shape)

        return keras.tree.map_structure(rows, arrays, element_spec)
