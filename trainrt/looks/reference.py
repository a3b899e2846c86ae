"""What made-up predictions would cost: the compiled loss of a constant, of the truth, and of its opposite.

A loss is a function like any other: what it says about predictions that no model made tells whether its sign, its scale
and its idea of the targets are right.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.looks import anatomy

SMOOTHING = 0.02
"""How far predictions of classes stay away from 0 and 1."""

Reference = dict[str, float | None]


def losses(model: keras.Model, y: Any, sample_weight: Any, outputs: Any) -> Reference | None:
    """Data loss of `constant`, `perfect`, `opposite` and `exact` predictions in the place of `outputs`, see `probe`."""
    made = predictions(y, outputs, [entry["from_logits"] for entry in anatomy.losses_of(model)])
    if made is None:
        return None

    def loss(structure) -> float:
        return float(doors.data_loss(model, y, structure, sample_weight))

    values = {name: loss(made[name]) for name in ("mean", "median", "perfect", "opposite", "exact") if name in made}
    constants = [values[name] for name in ("mean", "median") if math.isfinite(values.get(name, math.nan))]
    return {
        "constant": min(constants) if constants else None,
        "perfect": values["perfect"],
        "opposite": values["opposite"],
        "exact": values["exact"],
    }


def predictions(y: Any, outputs: Any, from_logits: list[bool | None]) -> dict[str, Any] | None:
    """Structures like `outputs`: "mean", "median" (numbers only), "perfect", "opposite" and "exact" predictions."""
    targets, predicted = keras.tree.flatten(y), keras.tree.flatten(outputs)
    if len(targets) != len(predicted):
        return None
    made: dict[str, list] = {}
    for i, (target, output) in enumerate(zip(targets, predicted, strict=True)):
        logits = bool(from_logits[i]) if i < len(from_logits) else False
        one = _predictions_of(np.asarray(target), tuple(output.shape), logits)
        if one is None:
            return None
        for name, value in one.items():
            made.setdefault(name, []).append(tf.cast(tf.convert_to_tensor(value), output.dtype))
    complete = {name: values for name, values in made.items() if len(values) == len(predicted)}
    return {name: keras.tree.pack_sequence_as(outputs, values) for name, values in complete.items()}


def _predictions_of(y: np.ndarray, shape: tuple[int, ...], logits: bool) -> dict[str, np.ndarray] | None:
    if y.dtype.kind not in "fiub" or not len(y) or not np.isfinite(y.astype(np.float64)).all():
        return None
    y = y.astype(np.float64)
    classes = shape[-1] if len(shape) > 1 else 1
    if y.shape != shape and y.size * classes == math.prod(shape) and classes > 1:
        index = y.reshape(shape[:-1])
        if (index != np.floor(index)).any() or index.min() < 0 or index.max() >= classes:
            return None
        y = np.eye(classes)[index.astype(int)]
    elif y.shape != shape:
        if y.size != math.prod(shape):
            return None
        y = y.reshape(shape)
    binary = bool(((y == 0) | (y == 1)).all())
    one_hot = binary and classes > 1 and bool((y.sum(-1) == 1).all())
    mean = np.broadcast_to(y.mean(axis=tuple(range(max(y.ndim - 1, 1)))), shape)
    if one_hot:
        made = {"mean": mean, "perfect": _smooth(y, 1 / classes), "opposite": _smooth(np.roll(y, 1, -1), 1 / classes)}
    elif binary:
        made = {"mean": mean, "perfect": _smooth(y, 0.5), "opposite": _smooth(1 - y, 0.5)}
    else:
        median = np.broadcast_to(np.median(y, axis=tuple(range(max(y.ndim - 1, 1)))), shape)
        made = {"mean": mean, "median": median, "perfect": y, "opposite": 2 * mean - y}
    made["exact"] = y
    if logits and binary:
        made = {name: _logits(np.clip(p, 1e-6, 1 - 1e-6), one_hot) for name, p in made.items()}
    return made


def _smooth(p: np.ndarray, towards: float) -> np.ndarray:
    return (1 - SMOOTHING) * p + SMOOTHING * towards


def _logits(p: np.ndarray, one_hot: bool) -> np.ndarray:
    return np.log(p) if one_hot else np.log(p) - np.log1p(-p)
