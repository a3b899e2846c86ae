"""Where a run stands in its data, as something that can be written down and gone back to.

Three kinds of source, three ways:

- arrays that the loop reads by itself (`resident.py`): the order of the epoch and the number of the next batch;
- a `tf.data` pipeline, Keras's own for large arrays among them: the state of its iterator, with shuffle buffers;
- anything else (a Python generator, a `PyDataset`, several replicas): nothing can be written down. The user may say
  that the source gives the same batches in every run, and then what was trained on is read again and dropped.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from trainrt.loop import resident

IGNORE, FAIL = 1, 2
"""What TensorFlow does about stateful ops in a pipeline whose iterator is saved."""


class Unpositioned(ValueError):
    """The source of the data cannot be gone back into."""


def state(iterator: Any, own: bool) -> dict[str, Any]:
    """Where an iterator stands: "kind" and arrays.

    Args:
      iterator: What `Batches` reads: None before and after an epoch.
      own: Whether the pipeline is Keras's over arrays. Its only random op makes the permutation, once an epoch, and the
        state holds what that made.

    Raises:
      Unpositioned: This kind of iterator cannot be gone back into, or a random op in it cannot; the message says which.
    """
    if iterator is None:
        return {"kind": "none"}
    if isinstance(iterator, resident.Epoch):
        return {"kind": "order", "order": np.asarray(iterator.order), "batch": iterator.batch}
    handle = getattr(iterator, "_iterator_resource", None)  # TensorFlow's public way writes a file, in the meantime
    if handle is None:
        raise Unpositioned(f"A {type(iterator).__name__} has no position that could be saved.")
    try:
        variant = tf.raw_ops.SerializeIterator(resource_handle=handle, external_state_policy=IGNORE if own else FAIL)
        saved = np.frombuffer(tf.io.serialize_tensor(variant).numpy(), np.uint8)
    except tf.errors.OpError as error:
        raise Unpositioned(f"TensorFlow cannot save where the pipeline stands: {_first_line(error)}") from error
    return {"kind": "iterator", "iterator": saved}


def go_back(saved: dict[str, Any], begin: Callable[[], Any]) -> Any:
    """An iterator that stands where `state` was taken.

    Args:
      begin: Makes an iterator at the start of the source.

    Raises:
      Unpositioned: The source is not of the kind it was.
    """
    if saved["kind"] == "none":
        return None
    iterator = begin()
    resident_now = isinstance(iterator, resident.Epoch)
    if resident_now != (saved["kind"] == "order"):
        raise Unpositioned("The data is read in another way than when the checkpoint was written.")
    if resident_now:
        if len(saved["order"]) != int(iterator.order.shape[0]):
            rows = int(iterator.order.shape[0])
            raise Unpositioned(f"The data had {len(saved['order'])} rows, now it has {rows}.")
        iterator.order, iterator.batch = tf.constant(saved["order"], tf.int64), int(saved["batch"])
        return iterator
    try:
        variant = tf.io.parse_tensor(saved["iterator"].tobytes(), tf.variant)
        tf.raw_ops.DeserializeIterator(resource_handle=iterator._iterator_resource, serialized=variant)
    except (tf.errors.OpError, AttributeError) as error:
        raise Unpositioned(f"The pipeline is another one than when it was saved: {_first_line(error)}") from error
    return iterator


def skip(iterator: Any, batches: int) -> None:
    """Reads batches and drops them.

    Raises:
      Unpositioned: There are fewer.
    """
    if isinstance(iterator, resident.Epoch):
        iterator.batch += batches
        return
    for number in range(batches):
        try:
            with contextlib.suppress(StopIteration):
                next(iterator)
                continue
        except tf.errors.OutOfRangeError:
            pass
        raise Unpositioned(f"The source gave {batches} batches before, and now only {number}.")


def check_repeats(dataset: Any, stages: Callable[[Any], dict[str, Any]]) -> None:
    """Warns of a pipeline whose order in later epochs is not in the state of an iterator that has come to its end."""
    if not isinstance(dataset, tf.data.Dataset) or int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        return
    names = [stage["name"] for stage in stages(dataset)["stages"]]
    if "Shuffle" in names and "Repeat" in names[names.index("Shuffle") :]:
        warnings.warn(
            "trainrt: the pipeline repeats what it shuffles and then ends. A run that is resumed after the end of an "
            "epoch reads the later ones in another order than a run that never stopped. Leave `repeat` out, or pass "
            'trainrt.Checkpoint(..., source="skip").',
            stacklevel=4,
        )


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "message", error)).splitlines()[0]
    return text.partition("}} ")[2] or text
