"""One look into a model: its layers' outputs on a few rows, without leaving a trace in it.

Keras's `StatelessScope` takes every assignment to a Keras variable: batch-norm statistics, seeds, metrics and recurrent
states stay what they are, and two passes from the same state draw the same dropout masks. What a layer that is not
Keras's own may touch besides is put back: raw `tf.Variable`s, plain attributes, Python's and NumPy's random states and
TensorFlow's eager one. The layers' `call` is watched on the instance and in this thread alone, for the time of a pass.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors

_PLAIN = (int, float, str, bytes, bool, tuple, frozenset, type(None))


class Call(NamedTuple):
    """One call of a layer, in the order in which calls ended.

    Attributes:
      layer: The layer.
      inputs: The tensors among its arguments.
      outputs: The tensors that it returned.
    """

    layer: keras.layers.Layer
    inputs: list[tf.Tensor]
    outputs: list[tf.Tensor]


class Pass(NamedTuple):
    """What a forward pass gave.

    Attributes:
      outputs: What the model returned.
      calls: The first call of each layer inside it.
    """

    outputs: Any
    calls: list[Call]


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers inside a model, nested ones too, but for the cells of recurrent layers, which run once a time step."""
    inside_cells: set[int] = set()
    layers = doors.layers_inside(model)
    for layer in layers:
        cell = getattr(layer, "cell", None)
        if isinstance(layer, keras.layers.RNN) and isinstance(cell, keras.layers.Layer):
            inside_cells.update(map(id, (cell, *doors.layers_inside(cell))))
    return [layer for layer in layers if id(layer) not in inside_cells]


def own(layer: Any) -> bool:
    """Whether the class is Keras's: what it does in a pass is known. A `Lambda` holds somebody's function."""
    return type(layer).__module__.partition(".")[0] == "keras" and not isinstance(layer, keras.layers.Lambda)


@contextlib.contextmanager
def untouched(model: keras.Model, state: Sequence[tuple] = ()) -> Iterator[keras.StatelessScope]:
    """Whatever runs inside, the state of the model and of every random generator is afterwards what it was.

    Args:
      model: The model.
      state: Pairs of a Keras variable and the value that it has inside.

    Yields:
      The scope; its `losses` are those that layers add, pass by pass.
    """
    foreign = [layer for layer in (model, *doors.layers_inside(model)) if not own(layer)]
    plain = [{k: v for k, v in vars(layer).items() if isinstance(v, _PLAIN)} for layer in foreign]
    raw = [(v, tf.identity(v)) for layer in foreign for v in _raw_variables(layer)]
    states = random.getstate(), np.random.get_state()
    try:
        with (
            doors.eager_seeds_of_its_own(),
            keras.StatelessScope(state_mapping=list(state), collect_losses=True) as scope,
        ):
            yield scope
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for variable, value in raw:
            variable.assign(value)
        for layer, attributes in zip(foreign, plain, strict=True):
            for name, value in attributes.items():
                if vars(layer).get(name, layer) is not value:
                    layer.__dict__[name] = value


def _raw_variables(layer: Any) -> list[tf.Variable]:
    found = []
    for value in vars(layer).values():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        found += [item for item in items if isinstance(item, tf.Variable)]
    return found


def run(model: keras.Model, x: Any, training: bool, batch_statistics: bool = False) -> Pass:
    """The model on some rows. To be called inside `untouched`.

    Args:
      model: A built model.
      x: What its `call` takes.
      training: As Keras's `training`.
      batch_statistics: Batch normalization uses the statistics of these rows all the same.
    """
    calls: dict[int, Call] = {}
    with _watched(layers_of(model), calls, batch_statistics):
        outputs = model(x, training=training) if doors.knows_training(model) else model(x)
    return Pass(outputs, list(calls.values()))


@contextlib.contextmanager
def _watched(layers: Sequence[keras.layers.Layer], calls: dict[int, Call], batch_statistics: bool) -> Iterator[None]:
    thread = threading.get_ident()

    def watch(layer, call):
        forced = batch_statistics and isinstance(layer, keras.layers.BatchNormalization) and layer.trainable

        def watched(*args, **kwargs):
            if threading.get_ident() != thread:
                return call(*args, **kwargs)
            if forced:
                kwargs["training"] = True
            outputs = call(*args, **kwargs)
            if id(layer) not in calls:
                calls[id(layer)] = Call(layer, _tensors((args, kwargs)), _tensors(outputs))
            return outputs

        return watched

    replaced = []
    try:
        for layer in layers:
            if "call" not in vars(layer):
                layer.__dict__["call"] = watch(layer, layer.call)
                replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            layer.__dict__.pop("call", None)


def _tensors(structure: Any) -> list[tf.Tensor]:
    return [item for item in keras.tree.flatten(structure) if isinstance(item, tf.Tensor)]


# ------------------------------------------------------------------------------------------------------- activations

UNITS_MOST = 1 << 20
"""Most elements of an output that are described; of a larger one the first rows."""

FLAT = 0.01
"""A unit whose derivative is below this share of the activation's steepest slope is saturated."""


def describe(output: np.ndarray, activation: str | None, channels_first: bool = False) -> dict[str, Any]:
    """Numbers about the output [rows, ..., units] of a layer.

    Returns:
      `shape`; `mean`, `std`, `min`, `max` of the finite elements; `nonfinite_share`; `zero_share` of the elements;
      `units`, and of them the shares `zero_units` (exactly 0 in every row and place), `constant_units` (one value in
      every row and place), `equal_units` (the same numbers as the first unit, itself not counted); `spread`, the
      deviation from row to row over the root mean square: 0 says that the output does not depend on the input;
      `saturated_share` of the elements where the activation is flat, and `saturated_units`, the share of units flat in
      95 % of the rows and places (None where the activation has no flat end).
    """
    shape = list(output.shape)
    a = np.asarray(output, np.float32)
    if a.ndim < 2:
        a = a.reshape(len(a) if a.ndim else 1, 1)
    if channels_first and a.ndim > 2:
        a = np.moveaxis(a, 1, -1)
    if a.size > UNITS_MOST:
        a = a[: max(2, UNITS_MOST // max(a[0].size, 1))]
    finite = np.isfinite(a)
    share = float(1 - finite.mean()) if a.size else 0.0
    if share:
        a = np.where(finite, a, 0.0)
    if not a.size:
        return {"shape": shape, "units": shape[-1] if shape else 0}
    flat = a.reshape(-1, a.shape[-1])
    lowest, highest = flat.min(0), flat.max(0)
    mean = float(flat.mean(dtype=np.float64))
    square = float(np.square(flat, dtype=np.float64).mean())
    over_rows = float(a.var(axis=0, dtype=np.float64).mean()) if len(a) > 1 else float("nan")
    saturated = _saturated(flat, activation)
    return {
        "shape": shape,
        "mean": mean,
        "std": float(np.sqrt(max(square - mean**2, 0.0))),
        "min": float(lowest.min()),
        "max": float(highest.max()),
        "nonfinite_share": share,
        "zero_share": float((flat == 0).mean()),
        "units": int(flat.shape[1]),
        "zero_units": float(((lowest == 0) & (highest == 0)).mean()),
        "constant_units": float((highest - lowest <= 1e-6 * np.maximum(abs(highest), abs(lowest))).mean()),
        "equal_units": float(_equal(flat).mean()) if flat.shape[1] > 1 else 0.0,
        "spread": float(np.sqrt(over_rows / square)) if square else 0.0,
        "saturated_share": None if saturated is None else float(saturated.mean()),
        "saturated_units": None if saturated is None else float((saturated.mean(0) > 0.95).mean()),
    }


def _equal(flat: np.ndarray) -> np.ndarray:
    """[units - 1] bool: which units put out what the first does, in a few hundred rows and places."""
    few = flat[:: max(1, len(flat) // 256)]
    size = np.abs(few).max() + 1e-30
    return np.abs(few[:, 1:] - few[:, :1]).max(0) <= 1e-5 * size


def _saturated(flat: np.ndarray, activation: str | None) -> np.ndarray | None:
    """[n, units] bool: where the activation's derivative is under `FLAT` of its steepest; softmax: of the row."""
    if activation == "sigmoid":
        return flat * (1 - flat) < FLAT / 4
    if activation == "tanh":
        return 1 - np.square(flat) < FLAT
    if activation == "softmax":
        return np.broadcast_to((flat.max(1) > 1 - FLAT / 4)[:, None], flat.shape)
    if activation in ("hard_sigmoid", "hard_tanh", "relu6"):
        ends = {"hard_sigmoid": (0, 1), "hard_tanh": (-1, 1), "relu6": (0, 6)}[activation]
        return (flat <= ends[0]) | (flat >= ends[1])
    return None
