"""What the program asked for, as rules read it from a run's passport: layers, optimizer, loss, arguments of fit.

Everything here answers with an empty value where the passport does not tell: a run made by hand has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainrt.record.run import Run

NORMALISERS = frozenset(
    {
        "BatchNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "Normalization",
        "Rescaling",
        "UnitNormalization",
    }
    | {"RMSNormalization", "SpectralNormalization"}
)
LOOKUPS = frozenset({"Embedding", "IntegerLookup", "StringLookup", "CategoryEncoding", "Hashing", "Discretization"})
"""Layers whose inputs are names of things, not amounts."""
PASSIVE = frozenset(
    {"InputLayer", "Flatten", "Reshape", "Permute", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "Masking"}
    | {
        "GaussianNoise",
        "GaussianDropout",
        "ZeroPadding1D",
        "ZeroPadding2D",
        "ZeroPadding3D",
        "RepeatVector",
        "Resizing",
    }
    | {"RandomFlip", "RandomRotation", "RandomZoom", "RandomCrop", "CenterCrop", "RandomTranslation", "Identity"}
    | {"Functional", "Sequential", "Model"}
)
"""Layers that leave the scale of what comes in as it is, and models, whose layers follow them."""
DEFAULT_RATE = {"Adadelta": 1.0, "Adagrad": 0.01, "Ftrl": 0.1}
"""Optimizers that need a far larger rate than Keras's default of 0.001, and the rate of their papers (Zeiler, 2012;
Duchi et al., 2011; McMahan et al., 2013)."""


def layers(run: Run) -> list[dict[str, Any]]:
    """The layers in their order, each with `name`, `class` (without a module), `parameters`, `trainable`, `config`."""
    model = (run.environment or {}).get("model")
    known = model.get("layers") if isinstance(model, Mapping) else None
    result = []
    for layer in known or []:
        if isinstance(layer, Mapping):
            config = layer.get("config")
            kind = str(layer.get("class", "")).rpartition(".")[2]
            result.append({**layer, "class": kind, "config": config if isinstance(config, Mapping) else {}})
    return result


def configuration(run: Run, path: str) -> dict[str, Any]:
    """Configuration of the layer that owns weights, by its path; {} where it is not known.

    A `Sequential` puts its own name before its layers' in the paths of weights, and not in their names.

    >>> layers = [{"name": "dense", "config": {"units": 3}}]
    >>> run = Run.synthetic(environment={"model": {"layers": layers}})
    >>> configuration(run, "sequential/dense"), configuration(run, "other")
    ({'units': 3}, {})
    """
    known = run.memo("configurations", lambda: {layer["name"]: layer["config"] for layer in layers(run)})
    parts = path.split("/")
    return next((known[name] for i in range(len(parts)) if (name := "/".join(parts[i:])) in known), {})


def hidden(run: Run) -> list[dict[str, Any]]:
    """The layers that put out nothing of the model's, where it is known which do; else all but the last."""
    known = layers(run)
    outputs = run.document("model").get("outputs") or []
    ends = {str(one.get("layer") or "").rpartition("/")[2] for one in outputs if isinstance(one, Mapping)} - {""}
    body = [layer for layer in known if layer["name"].rpartition("/")[2] not in ends]
    return body if len(ends) > 1 else known[:-1]


def first_layer(run: Run) -> str:
    """Class of the first layer that does something to the scale of its inputs; "" where the layers are not known."""
    return next((layer["class"] for layer in layers(run) if layer["class"] not in PASSIVE), "")


def optimizer(run: Run) -> dict[str, Any]:
    """The optimizer's configuration, its class under `"class"`; of a loss-scaling one that of the inner optimizer."""
    known = (run.environment or {}).get("optimizer")
    if not isinstance(known, Mapping):
        return {}
    config = known.get("config")
    config = dict(config) if isinstance(config, Mapping) else {}
    inner = config.get("inner_optimizer")
    if isinstance(inner, Mapping):
        config = {**config, **dict(inner.get("config") or {})}
    return {**config, "class": str(known.get("class", ""))}


def number(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def loss_name(run: Run) -> str:
    """The compiled loss in snake case, e.g. `"categorical_crossentropy"`; "" where there are several or none.

    >>> loss_name(Run.synthetic(environment={"compile": {"loss": "CategoricalCrossentropy"}}))
    'categorical_crossentropy'
    """
    loss = _compiled(run, "loss")
    parts = (
        list(loss.values() if isinstance(loss, Mapping) else loss) if isinstance(loss, (Mapping, list, tuple)) else []
    )
    return _snake(parts[0] if len(parts) == 1 else loss)


def _compiled(run: Run, argument: str) -> Any:
    known = (run.environment or {}).get("compile")
    return known.get(argument) if isinstance(known, Mapping) else None


def _snake(loss: Any) -> str:
    if not isinstance(loss, str):
        return ""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", loss).lower()
    return {"mse": "mean_squared_error", "mae": "mean_absolute_error", "bce": "binary_crossentropy"}.get(name, name)


def asked(run: Run, argument: str, default: Any = None) -> Any:
    """An argument of fit as the passport describes it."""
    known = (run.environment or {}).get("fit")
    value = known.get(argument) if isinstance(known, Mapping) else None
    return default if value is None else value


def side(run: Run, name: str = "train") -> dict[str, Any]:
    """One side of the data passport, `"train"` or `"validation"`."""
    found = run.data.get(name)
    return found if isinstance(found, dict) else {}


def leaves(run: Run, role: str, name: str = "train") -> list[dict[str, Any]]:
    """The tensors of a role, `"inputs"`, `"targets"` or `"weights"`, on one side of the data passport."""
    found = side(run, name).get(role)
    return [leaf for leaf in found or [] if isinstance(leaf, dict)]


class Head(NamedTuple):
    """The end of a model with one output and one loss.

    Attributes:
      layer: Path or name of the output layer.
      activation: `"softmax"`, `"linear"`...; "" where it is not known.
      units: Size of the last axis; 0 where it is not known.
      loss: Name of the loss in snake case.
      logits: Whether the loss expects logits; None: not known, or it has no such choice.
      axis: Axis of its softmax; -1 where nothing else is known.
      activations: All that follow the last kernel, in their order.
      ignored: The class that its loss leaves out; NaN where it leaves out none.
      rank: Number of its axes, that of the rows included; 0 where it is not known.
    """

    layer: str
    activation: str
    units: int
    loss: str
    logits: bool | None
    axis: int
    activations: tuple[str, ...] = ()
    ignored: float = math.nan
    rank: int = 0


class End(NamedTuple):
    """One output of a model, with what it is compared to.

    Attributes:
      name: As the logs have it, `"price"` of `price_loss`; "" where there is one output.
      target: Its tensor of the data passport.
      loss: Name of its loss in snake case.
      head: Its layer; None where it is not known.
      weight: What its loss is multiplied by; 1 where nothing was given.
    """

    name: str
    target: dict[str, Any]
    loss: str
    head: Head | None
    weight: float = 1.0


def ends(run: Run, name: str = "train") -> list[End]:
    """The outputs that have a target, on one side of the data passport; those of the training where it has none."""
    targets = leaves(run, "targets", name) or leaves(run, "targets")
    if len(targets) == 1:
        return [End("", targets[0], loss_name(run), head(run))]
    outputs = [one for one in run.document("model").get("outputs") or [] if isinstance(one, Mapping)]
    names = [str(one.get("layer") or "").rpartition("/")[2] for one in outputs]
    given, weights, found = _compiled(run, "loss"), _compiled(run, "loss_weights"), []
    for i, target in enumerate(targets):
        key = str(target.get("name", ""))
        # Of a list of targets the names are places.
        place = int(key) if key.isdigit() else names.index(key) if key in names else i
        of = names[place] if key.isdigit() and place < len(names) else key
        loss, weight = _snake(_at(given, of, place)), number(_at(weights, of, place))
        found.append(End(of, target, loss, _head(run, place, loss), 1.0 if math.isnan(weight) else weight))
    return found


def _at(given: Any, name: str, place: int) -> Any:
    """What was given for one of several outputs: by name, by place, or one thing for all."""
    if isinstance(given, Mapping):
        return given.get(name)
    if isinstance(given, (list, tuple)):
        return given[place] if place < len(given) else None
    return given


def head(run: Run) -> Head | None:
    """The end of the model, from the document "model" where there is one, else from the layers' configurations."""
    known = run.document("model")
    if len(known.get("outputs") or []) == 1 and len(known.get("losses") or []) == 1:
        one = _head(run, 0, loss_name(run))
        if one is not None:
            return one
    with_units = [layer for layer in layers(run) if layer["class"] not in PASSIVE]
    if not with_units or not loss_name(run):
        return None
    last = with_units[-1]
    config = last["config"]
    activation = config.get("activation", "")
    if last["class"] in ("Softmax", "ReLU"):
        activation = last["class"].lower()
    units = config.get("units") or (with_units[-2]["config"].get("units") if len(with_units) > 1 else 0) or 0
    raw = ((run.environment or {}).get("compile") or {}).get("loss")
    logits = False if isinstance(raw, str) and raw == raw.lower() else None
    name = activation if isinstance(activation, str) else ""
    outputs = ((run.environment or {}).get("model") or {}).get("outputs") or [()]
    rank = len(outputs[0]) if len(outputs) == 1 else 0
    units = int(units) if isinstance(units, int) else 0
    return Head(last["name"], name, units, loss_name(run), logits, -1, rank=rank)


def _head(run: Run, place: int, loss: str) -> Head | None:
    """The output at a place, as the document "model" knows it."""
    known = run.document("model")
    outputs, losses = known.get("outputs") or [], known.get("losses") or []
    one = outputs[place] if place < len(outputs) else None
    about = next((each for each in losses if isinstance(each, Mapping) and each.get("output") == place), None)
    if not isinstance(one, Mapping) or about is None:
        return None
    axis = one.get("softmax_axis")
    rank = len(one.get("shape") or ())
    axis = axis - rank if isinstance(axis, int) and axis >= 0 and rank else axis
    logits = about.get("from_logits")
    return Head(
        str(one.get("layer") or ""),
        str(one.get("activation") or ""),
        int(one.get("units") or 0),
        "" if about.get("custom") else loss,
        bool(logits) if logits is not None else None,
        axis if isinstance(axis, int) else -1,
        tuple(str(name) for name in one.get("activations") or ()),
        number((about.get("config") or {}).get("ignore_class")),
        rank,
    )
