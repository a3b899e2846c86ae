"""One look into a model: what it does with a few rows, held on the device, then told as numbers.

`take` and `advance` cost training time; `content` runs on the recorder's thread. The content is described in `probe`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.looks import anatomy, forward, reference
from trainrt.looks.reference import Reference

WEIGHTS_MOST = 1 << 23
"""Largest number of trainable elements of which a gradient is taken: it, and what the weights were before and after the
step, are held beside the weights until they are described."""


class Sample(NamedTuple):
    """The kept batch.

    Attributes:
      x, y, sample_weight: As a train step takes them.
      rows: How many.
      source: "arrays" or "first rows".
    """

    x: Any
    y: Any
    sample_weight: Any
    rows: int
    source: str


class Look(NamedTuple):
    """What one probe holds on the device until the recorder's thread describes it."""

    step: int
    when: str
    errors: dict[str, str]
    training: forward.Pass
    inference: forward.Pass | None
    batch: forward.Pass | None
    loss: dict[str, tf.Tensor | None]
    gradients: list | None
    regularizers: list | None
    weights: list[tf.Tensor]
    seeds: list[tuple]
    reference: Reference | None


class Advance(NamedTuple):
    """What is held of the steps after a look: how many, the loss and the weights after them."""

    steps: int
    loss: tf.Tensor
    weights: list[tf.Tensor]


def take(model: keras.Model, sample: Sample, step: int, when: str, known: Reference | None) -> Look:
    """Looks at a model that is built. `known` is the reference of an earlier look."""
    errors: dict[str, str] = {}
    layers = forward.layers_of(model)
    moody = any(_behaves_otherwise(layer) for layer in layers)
    norms = any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    drops = any(getattr(layer, "rate", 0) or not forward.own(layer) for layer in layers)
    variables = list(model.trainable_variables)
    size = sum(math.prod(v.shape) for v in variables)
    tape = tf.GradientTape() if size <= WEIGHTS_MOST and _standard_loss(model) and when != "end" else None
    loss: dict[str, tf.Tensor | None] = {"data": None, "total": None, "inference": None, "batchnorm": None}
    gradients = regularizers = inference = batch = None
    seeds = [(v, tf.identity(doors.raw(v))) for v in model.variables if v.name == "seed_generator_state"]
    with forward.untouched(model) as scope:
        with tape or contextlib.nullcontext():
            training = forward.run(model, sample.x, training=True)
            with _noting(errors, "loss"):
                if _standard_loss(model):
                    loss["data"] = doors.data_loss(model, sample.y, training.outputs, sample.sample_weight)
                    loss["total"] = _total(loss["data"], model, scope)
        if tape is not None and loss["total"] is not None:
            with _noting(errors, "gradient"):
                gradients = tape.gradient(loss["total"], [doors.raw(v) for v in variables])
                regularizers = [_regularizer_gradient(v) for v in variables]
    if moody:
        with _noting(errors, "inference"):
            inference, loss["inference"] = _pass(model, sample, batch_statistics=False)
            if norms and drops:
                batch, loss["batchnorm"] = _pass(model, sample, batch_statistics=True)
    if known is None and loss["data"] is not None:
        with _noting(errors, "reference"), forward.untouched(model):
            known = reference.losses(model, sample.y, sample.sample_weight, training.outputs)
    batch = batch or (training if norms else None)
    loss["batchnorm"] = loss["batchnorm"] if loss["batchnorm"] is not None else loss["data"] if norms else None
    weights = [tf.identity(doors.raw(v)) for v in variables] if gradients is not None else []
    return Look(step, when, errors, training, inference, batch, loss, gradients, regularizers, weights, seeds, known)


def advance(model: keras.Model, sample: Sample, look: Look, steps: int) -> Advance | None:
    """What a training step did to the loss of the kept batch."""
    if not look.weights or look.gradients is None:
        return None
    after = [tf.identity(doors.raw(v)) for v in model.trainable_variables]
    with forward.untouched(model, look.seeds) as scope:
        outputs = model(sample.x, training=True) if doors.knows_training(model) else model(sample.x)
        loss = _total(doors.data_loss(model, sample.y, outputs, sample.sample_weight), model, scope)
    return Advance(steps, loss, after)


def _pass(model: keras.Model, sample: Sample, batch_statistics: bool) -> tuple[forward.Pass, tf.Tensor | None]:
    """A pass in inference mode from the state of the model, which an earlier one in the same scope would have moved."""
    with forward.untouched(model):
        seen = forward.run(model, sample.x, training=False, batch_statistics=batch_statistics)
        standard = _standard_loss(model)
        return seen, doors.data_loss(model, sample.y, seen.outputs, sample.sample_weight) if standard else None


def _standard_loss(model: keras.Model) -> bool:
    return type(model).compute_loss is keras.Model.compute_loss and doors.compiled_loss(model) is not None


def _total(data: tf.Tensor, model: keras.Model, scope: keras.StatelessScope) -> tf.Tensor:
    """The data loss and what Keras adds to it: what layers added in this scope's only pass, and regularisers."""
    regularisers = [v.regularizer(v) for v in model.trainable_variables if getattr(v, "regularizer", None) is not None]
    return tf.add_n([data, *(tf.cast(term, data.dtype) for term in (*scope.losses, *regularisers))])


def _behaves_otherwise(layer: Any) -> bool:
    """Whether a layer does something else in training than in inference."""
    if not forward.own(layer):
        return not doors.layers_inside(layer) and doors.knows_training(layer)
    if isinstance(layer, keras.layers.BatchNormalization):
        return True
    return bool(getattr(layer, "rate", 0) or getattr(layer, "dropout", 0) or getattr(layer, "recurrent_dropout", 0))


@contextlib.contextmanager
def _noting(errors: dict[str, str], part: str):
    try:
        yield
    except Exception as error:
        errors[part] = f"{type(error).__name__}: {error}"[:500]


def _regularizer_gradient(variable: Any):
    if getattr(variable, "regularizer", None) is None:
        return None
    raw = doors.raw(variable)
    with tf.GradientTape() as tape:
        penalty = variable.regularizer(variable)
    return tape.gradient(penalty, raw)


def _square(gradient: Any) -> tf.Tensor:
    """Sum of the squares of a gradient's elements."""
    if isinstance(gradient, tf.IndexedSlices):
        _, place = tf.unique(tf.reshape(gradient.indices, [-1]))
        rows = tf.reshape(gradient.values, [tf.size(place), -1])
        gradient = tf.math.unsorted_segment_sum(rows, place, tf.reduce_max(place) + 1)
    return tf.reduce_sum(tf.square(tf.cast(gradient, tf.float32)))


def _aligned(gradient: Any, update: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Gradient and update, of a sparse gradient the rows that it has."""
    if isinstance(gradient, tf.IndexedSlices):
        index = tf.reshape(gradient.indices, [-1])
        moved = tf.gather(update, index)
        return tf.reshape(tf.cast(gradient.values, tf.float32), moved.shape), moved
    return tf.reshape(tf.cast(gradient, tf.float32), update.shape), update


def content(look: Look, sample: Sample, paths: list[str], advanced: Advance | None) -> dict[str, Any]:
    """The content of a probe.

    Args:
      look: What was held.
      sample: The rows.
      paths: Of the trainable weights, in the order of the gradients.
      advanced: What `advance` gave.
    """
    errors = dict(look.errors)
    result: dict[str, Any] = {}
    parts: dict[str, Callable[[], Any]] = {
        "layers": lambda: [_layer(call) for call in look.training.calls],
        "outputs": lambda: [_output(t) for t in keras.tree.flatten(look.training.outputs)],
        "loss": lambda: _losses(look),
        "reference": lambda: look.reference,
        "accuracy": lambda: _accuracies(look, sample),
        "inference": lambda: _modes(look),
        "gradient": lambda: _gradient(look, paths),
        "advance": lambda: _told_advance(look, advanced),
    }
    for name, make in parts.items():
        result[name] = None
        with _noting(errors, name):
            result[name] = _finite(make())
    return result | {"errors": errors}


def _layer(call: forward.Call) -> dict[str, Any]:
    layer = call.layer
    activation = anatomy.activation_of(layer)
    result = {"path": anatomy.path_of(layer), "class": type(layer).__name__, "activation": activation}
    if not call.outputs or not call.outputs[0].dtype.is_floating:
        return result
    first = getattr(layer, "data_format", None) == "channels_first"
    return result | forward.describe(_array(call.outputs[0]), activation, first)


def _output(output: tf.Tensor) -> dict[str, Any]:
    a = _array(output)
    axes = []
    if a.ndim >= 2 and a.size and np.isfinite(a).all() and (a >= 0).all():
        axes = [axis for axis in (0, *range(1, a.ndim)) if np.allclose(a.sum(axis), 1, atol=1e-3)]
    return forward.describe(a, None) | {"sums_to_one": [axis - a.ndim if axis else 0 for axis in axes]}


def _losses(look: Look) -> dict[str, float | None] | None:
    data, total, inference = (_number(look.loss[name]) for name in ("data", "total", "inference"))
    if data is None or total is None:
        return None
    return {"total": total, "data": data, "regularization": total - data, "inference": inference}


def _accuracies(look: Look, sample: Sample) -> dict[str, float | None] | None:
    targets = keras.tree.flatten(sample.y)
    outputs = keras.tree.flatten(look.training.outputs)
    if len(targets) != 1 or len(outputs) != 1:
        return None
    y, p = np.asarray(targets[0]), _array(outputs[0])
    classes = p.shape[-1] if p.ndim > 1 else 1
    if y.shape == p.shape and classes > 1:
        if not (((y == 0) | (y == 1)).all() and (y.sum(-1) == 1).all()):
            return None
        truth = y.argmax(-1)
    elif y.size * classes == p.size and (y == np.floor(y)).all():
        truth = y.reshape(p.shape[:-1] if p.ndim > 1 else p.shape)
        if classes == 1 and not set(np.unique(truth)) <= {0, 1}:
            return None
    else:
        return None

    def right(tensor) -> float:
        a = _array(keras.tree.flatten(tensor)[0])
        guess = a.argmax(-1) if classes > 1 else a.reshape(truth.shape) > (0.5 if (a >= 0).all() else 0.0)
        return float((guess == truth).mean())

    _, counts = np.unique(truth, return_counts=True)
    return {
        "training": right(look.training.outputs),
        "inference": right(look.inference.outputs) if look.inference else None,
        "constant": float(counts.max() / counts.sum()),
    }


def _modes(look: Look) -> dict[str, float | None] | None:
    if look.inference is None:
        return None
    batchnorm = None if look.batch is None else _difference(look.inference.outputs, look.batch.outputs)
    return {
        "difference": _difference(look.inference.outputs, look.training.outputs),
        "batchnorm": batchnorm,
        "batchnorm_loss": _number(look.loss["batchnorm"]),
    }


def _difference(left: Any, right: Any) -> float:
    """Root mean square of the difference over the deviation of the right; the largest of all outputs."""
    worst = 0.0
    for a, b in zip(keras.tree.flatten(left), keras.tree.flatten(right), strict=True):
        a, b = _array(a).astype(np.float64), _array(b).astype(np.float64)
        worst = max(worst, float(np.sqrt(np.square(a - b).mean()) / max(b.std(), 1e-12)))
    return worst


def _gradient(look: Look, paths: list[str]) -> dict[str, Any] | None:
    if look.gradients is None:
        return None
    squares = [None if g is None else float(_square(g)) for g in look.gradients]
    result: dict[str, Any] = {
        "norm": math.sqrt(sum(s for s in squares if s is not None)),
        "unreached": [path for path, s in zip(paths, squares, strict=True) if s is None],
        "zero": [path for path, s in zip(paths, squares, strict=True) if s == 0],
        "nonfinite": [p for p, s in zip(paths, squares, strict=True) if s is not None and not math.isfinite(s)],
        "regularised": {},
    }
    for path, gradient, regular in zip(paths, look.gradients, look.regularizers or [], strict=False):
        if gradient is not None and regular is not None:
            data = tf.convert_to_tensor(gradient) - tf.cast(regular, gradient.dtype)
            result["regularised"][path] = [math.sqrt(float(_square(data))), math.sqrt(float(_square(regular)))]
    return result


def _told_advance(look: Look, advanced: Advance | None) -> dict[str, float] | None:
    if advanced is None:
        return None
    predicted = moved = steepness = 0.0
    for after, before, gradient in zip(advanced.weights, look.weights, look.gradients or (), strict=True):
        update = tf.cast(after, tf.float32) - tf.cast(before, tf.float32)
        moved += float(tf.reduce_sum(tf.square(update)))
        if gradient is not None:
            values, along = _aligned(gradient, update)
            predicted += float(tf.reduce_sum(values * along))
            steepness += float(_square(gradient))
    assert look.loss["total"] is not None, "there is no gradient without a loss"
    was, now = float(look.loss["total"]), float(advanced.loss)
    length = math.sqrt(moved) * math.sqrt(steepness)
    return {
        "steps": advanced.steps,
        "predicted": predicted,
        "actual": now - was,
        "before": was,
        "after": now,
        "update_norm": math.sqrt(moved),
        "cosine": -predicted / length if length > 0 else 0.0,
    }


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tf.cast(tensor, tf.float32) if tensor.dtype.is_floating else tensor)


def _number(tensor: Any) -> float | None:
    return None if tensor is None else float(tensor)


def _finite(value: Any) -> Any:
    """The same with "nan", "inf" or "-inf" for floats that JSON does not know."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
