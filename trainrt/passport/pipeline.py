"""How a `tf.data` pipeline orders its elements, as its graph tells. What TensorFlow has no public name for is in
`inputs_of` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_MOST_ARGUMENTS = ("_buffer_size", "_batch_size", "_count", "_num_parallel_calls")


def inputs_of(dataset: tf.data.Dataset) -> list[tf.data.Dataset] | None:
    """The datasets that a dataset is made from; None where TensorFlow does not tell.

    `_inputs` is private; the public `DatasetToGraphV2` would copy the data that lies in the graph.
    """
    inputs = getattr(dataset, "_inputs", None)
    try:
        return [d for d in inputs() if isinstance(d, tf.data.Dataset)] if callable(inputs) else None
    except Exception:
        return None


def pipeline(dataset: tf.data.Dataset) -> dict[str, Any]:
    """How a `tf.data` pipeline orders its elements, as far as its graph tells.

    Returns:
      `stages`: names and arguments, from the source to the end, the longest branch.
      `shuffles`: for each shuffle its `buffer`, the `cardinality` of what it shuffles (None: unknown or infinite),
        whether it comes `before_batch` (None: nothing is batched here), before a `cache`, or after a `repeat`.
      `complete`: False where TensorFlow does not tell what lies before; what happens inside `interleave` and `flat_map`
        is not looked at.
    """
    found: dict[str, Any] = {"stages": [], "shuffles": [], "complete": True}
    stages = _walk(dataset, (), found, depth=0)
    found["stages"] = stages
    return found


def _walk(dataset, later: tuple[str, ...], found: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    inputs = inputs_of(dataset)
    if inputs is None or depth > 200:
        found["complete"] = False
        inputs = []
    name = type(dataset).__name__.strip("_").removesuffix("Dataset").removesuffix("V2") or "Dataset"
    stage: dict[str, Any] = {"name": name}
    for attribute in _MOST_ARGUMENTS:
        value = _plain(getattr(dataset, attribute, None))
        if value is not None:
            stage[attribute.strip("_")] = value
    before = [_walk(d, (name, *later), found, depth + 1) for d in inputs]
    stages = max(before, key=len, default=[])
    if name == "Shuffle":
        earlier = {s["name"] for s in stages}
        batched = any("Batch" in n for n in (*earlier, *later))
        found["shuffles"].append(
            {
                "buffer": stage.get("buffer_size"),
                "cardinality": _cardinality(inputs[0]) if inputs else None,
                "before_batch": not any("Batch" in n for n in earlier) if batched else None,
                "before_cache": any(n.startswith("Cache") for n in later),
                "after_repeat": any(n.startswith("Repeat") for n in earlier),
                "reshuffles": _plain(getattr(dataset, "_reshuffle_each_iteration", None)),
            }
        )
    return [*stages, stage]


def _plain(value: Any) -> int | bool | None:
    if isinstance(value, tf.Tensor):
        try:
            value = tf.get_static_value(value)
        except Exception:
            return None
    if isinstance(value, (np.ndarray, np.generic)) and np.ndim(value) == 0:
        value = value.item()
    return value if isinstance(value, (int, bool)) else None


def _cardinality(dataset: tf.data.Dataset) -> int | None:
    size = int(dataset.cardinality())
    return size if size >= 0 else None


def graph_of(data: Any) -> dict[str, Any] | None:
    """`pipeline` of a `tf.data` pipeline, or why that is not known; None of anything else."""
    if not isinstance(data, tf.data.Dataset):
        return None
    try:
        return pipeline(data)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def kind_of(data: Any) -> str:
    """What the data comes from: "arrays", "dataset", or the name of a type."""
    if data is None:
        return "none"
    if isinstance(data, tf.data.Dataset):
        return "dataset"
    leaves = keras.tree.flatten(data) if isinstance(data, (Mapping, list, tuple)) else [data]
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        return "arrays"
    return type(data).__name__
