"""A pipeline whose batches are shown as they go by.

A batch that is due goes by reference into a short queue, and a thread shows it from there, so that the pipeline calls
no Python and copies nothing. What is left in the pipeline are a few small operations, which take some microseconds in
an executor of one thread and forty in the one that `tf.data` maps with by default. The former knows no `tf.cond`: what
goes into the queue is the batch, or an empty slice of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from trainrt import doors

WAITING = 4
"""Batches that wait to be shown; the pipeline waits when there are more."""

_SETTLE = -1


class Tap:
    """A dataset, and the same with its batches shown.

    Args:
      source: A dataset of batches.
      indices: Of a batch, what is shown of it: places in `tf.nest.flatten`, of dense tensors.
      due: Whether the batch of a number, an int64 tensor [], is shown in any case; others are where an element is not
        finite.
      show: Called with a batch's number and arrays, on one thread, in the order of the batches.

    Attributes:
      dataset: The same elements in the same order.
      failure: What `show` raised last; None: nothing. The pipeline goes on.
    """

    def __init__(
        self,
        source: tf.data.Dataset,
        indices: Sequence[int],
        due: Callable[[tf.Tensor], tf.Tensor],
        show: Callable[..., None],
    ):
        self.source = source
        self._show = show
        self.failure: str | None = None
        specs = tf.nest.flatten(source.element_spec)
        self._types = [specs[i].dtype for i in indices]
        self._shapes = [specs[i].shape for i in indices]
        with tf.device("CPU"):
            self._queue = tf.queue.FIFOQueue(WAITING, [tf.int64, tf.variant], [[], []])

        @tf.autograph.experimental.do_not_convert
        def shown(number, batch):
            flat = tf.nest.flatten(batch)
            tensors = [flat[i] for i in indices]
            count = tf.cast(due(number) | tf.logical_not(_all_finite(tensors)), tf.int32)
            reference = tf.raw_ops.OptionalFromValue(components=tensors)
            self._queue.enqueue_many([tf.reshape(number, [1])[:count], tf.reshape(reference, [1])[:count]])
            return batch

        self.dataset = doors.mapped_by_one_thread(source.enumerate(), shown)
        self._settling = threading.Lock()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trainrt-tap", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Returns when all batches that went by have been shown."""
        with self._settling:
            self._settled.clear()
            try:
                with tf.device("CPU"):
                    self._queue.enqueue([tf.constant(_SETTLE, tf.int64), tf.raw_ops.OptionalNone()])
            except tf.errors.CancelledError:  # it is closed
                return
            while not self._settled.wait(1.0) and self._thread.is_alive():
                pass

    def close(self) -> None:
        """Shows no more: the dataset cannot be read on."""
        self._queue.close(cancel_pending_enqueues=True)
        self._thread.join()

    def _work(self) -> None:
        with tf.device("CPU"):
            while True:
                try:
                    number, reference = self._queue.dequeue()
                except (tf.errors.OutOfRangeError, tf.errors.CancelledError):
                    return
                number = int(number)
                if number == _SETTLE:
                    self._settled.set()
                    continue
                try:
                    self._show(number, *self._arrays_of(reference))
                except Exception as error:  # without this thread the pipeline would wait for ever
                    self.failure = f"{type(error).__name__}: {error}"[:500]

    def _arrays_of(self, reference: tf.Tensor) -> list[np.ndarray]:
        tensors = tf.raw_ops.OptionalGetValue(optional=reference, output_types=self._types, output_shapes=self._shapes)
        return [tensor.numpy() for tensor in tensors]


def _all_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """[] whether there is no NaN and no infinity in them; a sum that overflows says False too, which costs a look."""
    finite = tf.constant(True)
    for tensor in tensors:
        if tensor.dtype.is_floating:
            wide = tensor if tensor.dtype.size >= 4 else tf.cast(tensor, tf.float32)
            finite = tf.logical_and(finite, tf.math.is_finite(tf.reduce_sum(wide)))
    return finite
