"""What a model is made of, as far as can be told before it trains: the document "model".

None is "not known", which for subclassed models is often the honest answer. Its content:

`kind`      "sequential", "functional" or "subclassed"; `class` and `name` of the model.
`complete`  False: a subclassed model that was not seen running, so that nobody knows its outputs.
`parameters`, `trainable_parameters`  Elements.
`layers`    Every layer inside, nested ones too but for recurrent cells, see below.
`outputs`   For each output: `layer` (path of the layer that makes it), `class`; `activation`, the effective one, looked
            for behind Flatten, Reshape, Dropout and linear layers: "linear" where there is none, None where it is not
            known, as behind a Lambda; `activations`: all that are applied since the last kernel, in order, as
            ["softmax", "softmax"]; `softmax_axis`; `units` (size of the last axis); `shape` (the batch is None);
            `kernel`: path of the kernel before them.
`losses`    For each output that has one: `output` (index), `name` ("categorical_crossentropy", a function's own name),
            `custom` (not Keras's), `from_logits` (None: not known, or it has no such thing), `config`.
`metrics`   Names as given.
`targets`   For each target, of the rows that `probe` keeps: `shape` (batch first), `dtype`, `rows`, `min`, `max`,
            `mean`, `std`, `integers` (all are whole), `distinct` (None above 1000), `one_hot`, `negative_share`.
`unreached` Paths of trainable weights that get no gradient at all: the graph is cut. None: not tried.
`why`       Why something of these is None.

A layer: `path`, `class`, `own` (its class is Keras's), `inside` (path of the layer that holds it), `order` (in which it
ended first, None: it was not seen), `activation`, `shape` (of its output), `dtype`, `trainable`, and where it has them
`units`, `rate`, `momentum`, `epsilon`, `return_sequences`, `input_dim`, `output_dim`, `softmax_axis`,
`recurrent_activation`, `activity_regularizer`, `function` (name, of a Lambda); `weights`: `path`, `shape`, `trainable`,
and `initializer`, `regularizer`, `constraint`, each `{"class": ..., **config}` or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.looks import forward

TRANSPARENT = ("Flatten", "Reshape", "Permute", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "Identity")
"""Layers that leave every value as it is, or scale it: behind them the activation is the one before."""

_PLAIN_ATTRIBUTES = ("units", "rate", "momentum", "epsilon", "return_sequences", "input_dim", "output_dim")


def describe(
    model: keras.Model,
    targets: Any = None,
    seen: forward.Pass | None = None,
    unreached: Sequence[str] | None = None,
    why: str | None = None,
) -> dict[str, Any]:
    """The content of the document "model".

    Args:
      model: A compiled model, built as far as it is.
      targets: The targets of the rows that are kept.
      seen: A pass over those rows.
      unreached: Trainable weights without a gradient.
      why: Why something of these is None.
    """
    layers = forward.layers_of(model)
    holders = _holders(layers)
    calls = {id(call.layer): (i, call) for i, call in enumerate(seen.calls)} if seen else {}
    kind = kind_of(model)
    return {
        "kind": kind,
        "class": type(model).__name__,
        "name": model.name,
        "complete": kind != "subclassed" or seen is not None,
        "parameters": int(sum(math.prod(v.shape) for v in model.weights)),
        "trainable_parameters": int(sum(math.prod(v.shape) for v in model.trainable_weights)),
        "layers": [_layer(layer, holders.get(id(layer)), calls.get(id(layer))) for layer in layers],
        "outputs": _outputs(model, seen),
        "losses": losses_of(model),
        "metrics": _names(doors.compiled_metrics(model)),
        "targets": None if targets is None else [_target(np.asarray(t)) for t in keras.tree.flatten(targets)],
        "unreached": None if unreached is None else list(unreached),
        "why": why,
    }


def kind_of(model: keras.Model) -> str:
    """The way a model was made: "sequential", "functional" or "subclassed"."""
    if isinstance(model, keras.Sequential):
        return "sequential"
    symbolic = getattr(model, "inputs", None) and getattr(model, "outputs", None)
    return "functional" if symbolic else "subclassed"


def path_of(layer: Any) -> str:
    """Its Keras path; its name before it is built."""
    return str(getattr(layer, "path", None) or getattr(layer, "name", "?"))


def activation_of(layer: Any) -> str | None:
    """Name of the activation that a layer applies last: "linear" when it has none, None when nobody knows."""
    kind = type(layer).__name__
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    if kind in ("ReLU", "LeakyReLU", "PReLU", "ELU") and forward.own(layer):
        if kind == "ReLU" and layer.max_value is not None:
            return "relu6"
        return {"ReLU": "relu", "LeakyReLU": "leaky_relu", "PReLU": "prelu", "ELU": "elu"}[kind]
    if isinstance(layer, keras.layers.Wrapper):
        return activation_of(layer.layer)
    activation = getattr(layer, "activation", None)
    if activation is None:
        return "linear" if forward.own(layer) and not isinstance(layer, keras.Model) else None
    if isinstance(activation, keras.layers.Layer):
        return activation_of(activation)
    name = getattr(activation, "__name__", None)
    known = name is not None and getattr(keras.activations, name, None) is activation
    return name if known else None


def losses_of(model: keras.Model) -> list[dict[str, Any]]:
    """One entry for each output that has a loss."""
    given = doors.compiled_loss(model)
    if given is None:
        return []
    names = list(getattr(model, "output_names", None) or ())
    if isinstance(given, Mapping):
        items = [(names.index(k) if k in names else i, loss) for i, (k, loss) in enumerate(given.items())]
    elif isinstance(given, (list, tuple)):
        items = list(enumerate(given))
    else:
        items = [(i, given) for i in range(max(len(names), 1))]
    return [{"output": i, **_loss(loss)} for i, loss in items if loss is not None]


def _loss(given: Any) -> dict[str, Any]:
    loss = given
    if isinstance(given, str):
        try:
            loss = keras.losses.get(given)
        except ValueError:
            return {"name": given, "custom": True, "from_logits": None, "config": {}}
    if isinstance(loss, keras.losses.Loss):
        kind = type(loss)
        custom = kind.__module__.partition(".")[0] != "keras" or kind.__name__ == "LossFunctionWrapper"
        try:
            config = _plain(loss.get_config())
        except Exception:
            config = {}
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()
        return {"name": name, "custom": custom, "from_logits": config.get("from_logits"), "config": config}
    name = getattr(loss, "__name__", type(loss).__name__)
    custom = getattr(loss, "__module__", "").partition(".")[0] != "keras"
    logits = False if not custom and "crossentropy" in name else None
    return {"name": name, "custom": custom, "from_logits": logits, "config": {}}


def _outputs(model: keras.Model, seen: forward.Pass | None) -> list[dict[str, Any]]:
    made: dict[int, forward.Call] = {}
    for call in seen.calls if seen else ():
        if not isinstance(call.layer, keras.Model):
            made |= {id(tensor): call for tensor in call.outputs if id(tensor) not in made}
    symbolic = list(getattr(model, "outputs", None) or ()) if kind_of(model) != "subclassed" else []
    actual = [t for t in keras.tree.flatten(seen.outputs) if isinstance(t, tf.Tensor)] if seen else []
    count = max(len(symbolic), len(actual))
    results = []
    for i in range(count):
        chain = _chain_seen(actual[i], made) if i < len(actual) else []
        if not chain and i < len(symbolic):
            chain = _chain_symbolic(symbolic[i])
        shape = list(actual[i].shape) if i < len(actual) else list(symbolic[i].shape)
        results.append(_output(chain, [None, *shape[1:]]))
    return results


def _output(chain: Sequence[Any], shape: list) -> dict[str, Any]:
    """Of the layers from the output backwards to the first with a kernel."""
    activations: list[str | None] = []
    kernel = axis = None
    for layer in chain:
        if type(layer).__name__ not in TRANSPARENT:
            name = activation_of(layer)
            if name != "linear" or not activations:
                activations.insert(0, name)
            if name == "softmax" and axis is None:
                axis = getattr(layer, "axis", -1)
        weights = [v for v in getattr(layer, "weights", ()) if len(v.shape) >= 2]
        if weights:
            kernel = getattr(weights[0], "path", None)
            break
    effective = [name for name in activations if name != "linear"] or activations[:1]
    return {
        "layer": path_of(chain[0]) if chain else None,
        "class": type(chain[0]).__name__ if chain else None,
        "activation": effective[-1] if effective else None,
        "activations": effective,
        "softmax_axis": axis,
        "units": shape[-1] if len(shape) > 1 else 1,
        "shape": shape,
        "kernel": kernel,
    }


def _chain_seen(tensor: Any, made: Mapping[int, forward.Call]) -> list[Any]:
    chain: list[Any] = []
    while id(tensor) in made and len(chain) < 16:
        call = made[id(tensor)]
        chain.append(call.layer)
        if len(call.inputs) != 1 or call.inputs[0] is tensor:
            break
        tensor = call.inputs[0]
    return chain


def _chain_symbolic(tensor: Any) -> list[Any]:
    chain: list[Any] = []
    while tensor is not None and len(chain) < 16:
        layer = doors.producer(tensor)
        if layer is None or isinstance(layer, keras.layers.InputLayer):
            break
        if isinstance(layer, keras.Model) and getattr(layer, "outputs", None):
            tensor = layer.outputs[0]
            continue
        chain.append(layer)
        try:
            tensor = layer.input
        except (AttributeError, ValueError):  # called more than once, or not a layer
            break
        if isinstance(tensor, (list, tuple, dict)):
            break
    return chain


def _layer(layer: Any, holder: Any, seen: tuple[int, forward.Call] | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "path": path_of(layer),
        "class": type(layer).__name__,
        "own": forward.own(layer),
        "inside": None if holder is None else path_of(holder),
        "order": None if seen is None else seen[0],
        "activation": activation_of(layer),
        "shape": _shape(layer, seen),
        "dtype": getattr(layer, "compute_dtype", None),
        "trainable": bool(getattr(layer, "trainable", False)),
    }
    for name in _PLAIN_ATTRIBUTES:
        value = getattr(layer, name, None)
        if isinstance(value, (bool, int, float)):
            result[name] = value
    if result["activation"] == "softmax":
        axis = getattr(layer, "axis", -1)
        result["softmax_axis"] = list(axis) if isinstance(axis, (list, tuple)) else axis
    recurrent = getattr(layer, "recurrent_activation", None)
    if callable(recurrent):
        result["recurrent_activation"] = getattr(recurrent, "__name__", None)
    if getattr(layer, "activity_regularizer", None) is not None:
        result["activity_regularizer"] = _part(layer.activity_regularizer)
    if isinstance(layer, keras.layers.Lambda):
        result["function"] = getattr(layer.function, "__name__", None)
    result["weights"] = [_weight(layer, v) for v in _own_weights(layer)]
    return result


def _holders(layers: Sequence[Any]) -> dict[int, Any]:
    """Layer, by identity -> the layer that holds it directly."""
    inside = sorted(((layer, doors.layers_inside(layer)) for layer in layers), key=lambda item: -len(item[1]))
    return {id(child): layer for layer, children in inside for child in children}


def _own_weights(layer: Any) -> list[Any]:
    held = {id(v) for child in doors.layers_inside(layer) for v in child.weights}
    cell = getattr(layer, "cell", None)
    if isinstance(layer, keras.layers.RNN) and isinstance(cell, keras.layers.Layer):
        return list(layer.weights)
    return [v for v in getattr(layer, "weights", ()) if id(v) not in held]


def _weight(layer: Any, variable: Any) -> dict[str, Any]:
    path = getattr(variable, "path", variable.name)
    owner = getattr(layer, "cell", layer) if isinstance(layer, keras.layers.RNN) else layer
    name = path.rpartition("/")[2]
    return {
        "path": path,
        "shape": list(variable.shape),
        "trainable": bool(variable.trainable and layer.trainable),
        "initializer": _part(getattr(owner, f"{name}_initializer", None)),
        "regularizer": _part(getattr(variable, "regularizer", None)),
        "constraint": _part(getattr(variable, "constraint", None)),
    }


def _part(thing: Any) -> dict[str, Any] | None:
    if thing is None:
        return None
    try:
        config = _plain(thing.get_config())
    except Exception:
        config = {}
    return {"class": getattr(thing, "__name__", type(thing).__name__), **config}


def _shape(layer: Any, seen: tuple[int, forward.Call] | None) -> list | None:
    if seen is not None and seen[1].outputs:
        return [None, *seen[1].outputs[0].shape[1:]]
    try:
        output = layer.output
        return list(output.shape) if hasattr(output, "shape") else None
    except Exception:
        return None


def _target(values: np.ndarray) -> dict[str, Any]:
    result: dict[str, Any] = {"shape": list(values.shape), "dtype": str(values.dtype), "rows": len(values)}
    if values.dtype.kind not in "fiub" or not values.size:
        return result
    a = values.astype(np.float64)
    a = a[np.isfinite(a)]
    if not a.size:
        return result
    distinct = np.unique(a[: 1 << 20])
    one_hot = values.ndim > 1 and values.shape[-1] > 1 and bool(((values == 0) | (values == 1)).all())
    return result | {
        "min": float(a.min()),
        "max": float(a.max()),
        "mean": float(a.mean()),
        "std": float(a.std()),
        "integers": bool((distinct == np.floor(distinct)).all()),
        "distinct": len(distinct) if len(distinct) <= 1000 else None,
        "one_hot": one_hot and bool((values.sum(-1) == 1).all()),
        "negative_share": float((a < 0).mean()),
    }


def _names(metrics: Any) -> list[str]:
    if metrics is None:
        return []
    flat = [metric for metric in keras.tree.flatten(metrics) if metric is not None]
    return [str(m if isinstance(m, str) else getattr(m, "name", getattr(m, "__name__", m))) for m in flat]


def _plain(value: Any, depth: int = 3) -> Any:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, np.integer):
        return int(value)
    if depth and isinstance(value, Mapping):
        return {str(k): _plain(v, depth - 1) for k, v in value.items()}
    if depth and isinstance(value, (list, tuple)) and len(value) <= 64:
        return [_plain(v, depth - 1) for v in value]
    return type(value).__name__
