"""Walks the graph of a step, on any machine, and lists what determinism would do to it on a GPU, with XLA, or here.

It looks at types of ops, their attributes and the shapes that are known. Where an op will be placed and what depends on
the data is not proven: what it lists may happen, what it does not list was not found in TensorFlow's kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.determinism.hazards import HAZARDS, HOST, RAISES, VARIES, Hazard, Node, hazards_of

_CALLS = ("f", "body", "cond", "then_branch", "else_branch")


@dataclasses.dataclass(frozen=True)
class Issue:
    """One op of the step that determinism changes for the worse.

    Attributes:
      op: Its type.
      effect, where, why, remedy: As in `hazards.Hazard`.
      layer: The layer or the weight that it belongs to; None for none.
      node: Its name in the graph.
      bytes: What goes between device and host a step, down and up again; None where it does not, or is not known.
      count: How many such ops the layer has.
      phase: "training" or "validation".
    """

    op: str
    effect: str
    where: str
    why: str
    remedy: str
    layer: str | None
    node: str
    bytes: int | None = None
    count: int = 1
    phase: str = "training"

    def __str__(self) -> str:
        where = {"GPU": "on a GPU", "XLA": "with XLA on a GPU", "CPU": "on the CPU", "all": "everywhere"}[self.where]
        size = "" if self.bytes is None else f", {self.bytes:,} bytes a step"
        times = f" ({self.count} times)" if self.count > 1 else ""
        phase = "" if self.phase == "training" else f" in {self.phase}"
        return (
            f"{self.effect} {where}{size}: {self.op}{times} of {self.layer or self.node}{phase}\n"
            f"  why  {self.why}\n  try  {self.remedy}"
        )


def trace(model: keras.Model, spec: Any, phase: str = "training") -> tf.Graph:
    """The graph of one step on a batch of that spec; it runs nothing."""
    python_function = model.train_step if phase == "training" else model.test_step

    @tf.autograph.experimental.do_not_convert
    def step(data):
        return python_function(data)

    return tf.function(step, reduce_retracing=True).get_concrete_function(spec).graph


def inspect(graph: tf.Graph, model: keras.Model, phase: str = "training") -> list[Issue]:
    """What determinism does to the ops of a graph, the worst first.

    Args:
      graph: A `FuncGraph`, as `trace` makes it.
      model: The model whose step it is; names layers and weights.
    """
    found: dict[tuple, Issue] = {}
    names = _Names(model)
    for name, node, bound in _nodes(graph, _variables(graph, model)):
        for hazard in hazards_of(node):
            owner = names.weight(bound) or names.layer(name)
            key = (node.op, hazard.effect, hazard.where, owner)
            size = _copied(node, bound) if hazard.effect == HOST else None
            if key in found:
                before = found[key]
                both = None if size is None or before.bytes is None else size + before.bytes
                found[key] = dataclasses.replace(before, count=before.count + 1, bytes=both)
            else:
                found[key] = _issue(hazard, node.op, owner, name, size, phase)
    order = (RAISES, VARIES, HOST)
    return sorted(found.values(), key=lambda issue: (order.index(issue.effect), issue.where == "XLA"))


def check(model: keras.Model, spec: Any, validation_spec: Any = None) -> list[Issue]:
    """Traces the step, and that of the validation where there is one, and inspects both."""
    issues = inspect(trace(model, spec), model)
    if validation_spec is not None:
        issues += inspect(trace(model, validation_spec, "validation"), model, "validation")
    return issues


def before_training(model: keras.Model, graph: tf.Graph | None, spec: Any, xla: bool) -> dict[str, Any]:
    """What `fit` asks for in deterministic mode, so that nobody waits an hour for the first validation to fail.

    Args:
      graph: Of the training step, traced already; None: nothing is known.
      spec: Of a batch.
      xla: Whether XLA compiles the step.

    Returns:
      The issues, for the record.

    Raises:
      RuntimeError: An op of the step, or of a validation on such batches, would raise here.
    """
    gpu = bool(tf.config.list_physical_devices("GPU"))
    issues = [] if graph is None else inspect(graph, model)
    if gpu and graph is not None:
        with contextlib.suppress(Exception):  # other data for the validation than such batches
            issues += inspect(trace(model, spec, "validation"), model, "validation")
    here = [issue for issue in issues if applies(issue, gpu, xla)]
    fatal = [issue for issue in here if issue.effect == RAISES]
    if fatal:
        raise RuntimeError(
            f"Deterministic training needs ops that have a deterministic kernel. Received: {model.name!r}, in which\n"
            + "\n".join(map(str, fatal))
        )
    for issue in here:
        if issue.effect == VARIES:
            warnings.warn(f"trainrt: {model.name!r} will not be reproducible: {issue}", stacklevel=2)
    return {"gpu": gpu, "xla": xla, "traced": graph is not None, "issues": [dataclasses.asdict(i) for i in issues]}


def applies(issue: Issue, gpu: bool, xla: bool) -> bool:
    """Whether it concerns a process with or without a GPU, with or without XLA."""
    return issue.where == "all" or (issue.where == "CPU" and not gpu) or (gpu and (issue.where == "GPU" or xla))


def _issue(hazard: Hazard, op: str, owner: str | None, name: str, size: int | None, phase: str) -> Issue:
    return Issue(op, hazard.effect, hazard.where, hazard.why, hazard.remedy, owner, name, size, 1, phase)


# ---------------------------------------------------------------------------------------------------- walk of a graph


def _variables(graph: Any, model: keras.Model) -> dict[str, Any]:
    """Name of a captured input of the graph -> the variable that it is."""
    optimizers = [v for optimizer in doors.optimizers(model) for v in optimizer.variables]
    known = {id(doors.raw(v).handle): v for v in (*model.variables, *optimizers) if hasattr(doors.raw(v), "handle")}
    return {inner.op.name: known[id(outer)] for outer, inner in graph.captures if id(outer) in known}


def _nodes(graph: tf.Graph, variables: Mapping[str, Any]) -> Iterator[tuple[str, Node, Any]]:
    """(name, node, the variable that is its first input) of every hazardous op, in functions too."""
    definition = graph.as_graph_def(add_shapes=True)
    library = {function.signature.name: function for function in definition.library.function}
    seen: set[tuple] = set()

    def walk(nodes: Sequence, bound: dict[str, Any], shapes: dict[str, list], depth: int):
        shapes = {**shapes, **{node.name: _shapes(node.attr) for node in nodes}}
        for node in nodes:
            inputs = [each.split(":")[0] for each in node.input if not each.startswith("^")]
            if node.op in HAZARDS and "CPU" not in node.device:
                given = [_shape_of(each, shapes) for each in node.input if not each.startswith("^")]
                output = _shape_of(node.name, shapes)
                yield node.name, Node(node.op, node.attr, given, output), bound.get(inputs[0]) if inputs else None
            if node.op == "Identity" and inputs and inputs[0] in bound:
                bound = {**bound, node.name: bound[inputs[0]]}
            called = [node.attr[a].func.name for a in _CALLS if a in node.attr and node.attr[a].func.name]
            called += [each.name for each in node.attr["branches"].list.func] if "branches" in node.attr else []
            given_inputs = inputs[1:] if node.op in ("If", "StatelessIf", "Case", "StatelessCase") else inputs
            for name in called if depth < 16 else ():
                if name in library and (name, tuple(given_inputs)) not in seen:
                    seen.add((name, tuple(given_inputs)))
                    function = library[name]
                    arguments = [argument.name for argument in function.signature.input_arg]
                    pairs = list(zip(arguments, given_inputs, strict=False))
                    inner = {a: bound[i] for a, i in pairs if i in bound}
                    known = {a: _shapes(function.arg_attr[i].attr) for i, a in enumerate(arguments)}
                    yield from walk(function.node_def, inner, known, depth + 1)

    yield from walk(definition.node, dict(variables), {}, 0)


def _shapes(attributes: Any) -> list:
    if "_output_shapes" not in attributes:
        return []
    return [
        None if shape.unknown_rank else tuple(None if dim.size < 0 else dim.size for dim in shape.dim)
        for shape in attributes["_output_shapes"].list.shape
    ]


def _shape_of(name: str, shapes: Mapping[str, list]) -> tuple | None:
    """The shape of an input, written `node`, `node:1` or, in a function, `node:output:1`."""
    node, _, output = name.partition(":")
    number = output.rpartition(":")[2]
    index = int(number) if number.isdigit() else 0
    known = shapes.get(node, [])
    return known[index] if index < len(known) else None


def _copied(node: Node, variable: Any) -> int | None:
    """Bytes of the tensor that goes to the host and back, both ways; None where its shape is not known."""
    if variable is not None:
        return 2 * math.prod(variable.shape) * tf.as_dtype(variable.dtype).size
    dtype = tf.as_dtype(node.attributes["T"].type) if "T" in node.attributes else tf.float32
    sizes = [size for size in node.output or (None,) if size is not None]
    known = node.output is not None and len(sizes) == len(node.output)
    return 2 * math.prod(sizes) * dtype.size if known else None


class _Names:
    """Which layer an op belongs to, by the scopes in its name: Keras opens one for each layer, `name` or `name_1`."""

    def __init__(self, model: keras.Model):
        self._model = model
        layers = [layer for layer in doors.layers_of(model) if layer is not model]
        self._paths = {layer.name: getattr(layer, "path", None) or layer.name for layer in layers}

    def weight(self, variable: Any) -> str | None:
        return None if variable is None else str(variable.path)

    def layer(self, name: str) -> str | None:
        parts = name.split("/")[:-1]
        suffix = next((p[len(self._model.name) :] for p in parts if self._is(p, self._model.name)), "")
        for part in reversed(parts):
            stripped = part.removesuffix(suffix) if suffix else part
            for candidate in (stripped, part, re.sub(r"_\d+$", "", part)):
                if candidate in self._paths:
                    return self._paths[candidate]
        return next((part for part in parts if part not in ("gradient_tape", self._model.name + suffix)), None)

    @staticmethod
    def _is(part: str, name: str) -> bool:
        return part == name or re.fullmatch(re.escape(name) + r"_\d+", part) is not None
