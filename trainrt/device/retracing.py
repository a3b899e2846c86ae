"""Which functions TensorFlow traces again and again while a training runs, and because of which argument.

A `tf.function` is traced anew for each shape, dtype or Python value that it has not seen: one trace costs what hundreds
of steps cost. TensorFlow warns with the function's name alone. Every trace goes through one function of TensorFlow's,
`tracing_compilation._create_concrete_function` (2.21), which is told the types of the arguments; while a training is
watched a note is taken there, and nothing else is changed. Where TensorFlow has no such function, nothing is noted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

try:
    from tensorflow.python.eager.polymorphic_function import tracing_compilation
except ImportError:
    tracing_compilation = None

_DOOR = "_create_concrete_function"
KEPT = 32
"""Traces of a function of which the arguments are kept."""


@dataclasses.dataclass
class _Function:
    name: str
    where: str
    traces: int = 0
    seconds: float = 0.0
    steps: list[int] = dataclasses.field(default_factory=list)
    types: list[dict[str, str]] = dataclasses.field(default_factory=list)


class Retracing:
    """Notes which functions are traced, when and with what.

    Args:
      step: Returns the number of steps done.
    """

    def __init__(self, step: Callable[[], int]):
        self._step = step
        self._functions: dict[Any, _Function] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Takes notes while the context lasts, of this thread's outermost traces."""
        original = getattr(tracing_compilation, _DOOR, None)
        if original is None:
            yield
            return
        thread = threading.get_ident()

        def noted(function_type, type_context, func_graph, tracing_options):
            if threading.get_ident() != thread or tf.inside_function():
                return original(function_type, type_context, func_graph, tracing_options)
            begun = time.perf_counter()
            try:
                return original(function_type, type_context, func_graph, tracing_options)
            finally:
                with contextlib.suppress(Exception):  # a newer TensorFlow costs the note, never the trace
                    self._note(function_type, tracing_options, time.perf_counter() - begun)

        setattr(tracing_compilation, _DOOR, noted)
        try:
            yield
        finally:
            if getattr(tracing_compilation, _DOOR) is noted:
                setattr(tracing_compilation, _DOOR, original)

    def _note(self, function_type, options, seconds: float) -> None:
        function = tf.__internal__.decorator.unwrap(options.python_function)[1]
        code = getattr(function, "__code__", None)
        own = code and f"{os.sep}tensorflow{os.sep}python{os.sep}" not in code.co_filename
        name = getattr(function, "__qualname__", options.name)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code and own else ""
        # Two functions made from the same lines, as in a loop, are each traced once; their sum is what it costs.
        note = self._functions.setdefault((name, where), _Function(name, where))
        note.traces += 1
        note.seconds += seconds
        if len(note.steps) < KEPT:
            note.steps.append(self._step())
            note.types.append({p.name: str(p.type_constraint) for p in function_type.parameters.values()})

    def told(self) -> list[dict[str, Any]]:
        """The functions that were traced more than once, the most costly first.

        Returns:
          For each: `name`, `where` (file and line), `traces`, `seconds` of all of them, `steps` done at each, and
          `arguments`: name -> the types that it had, of the arguments that had more than one.
        """
        found = []
        for note in sorted(self._functions.values(), key=lambda n: -n.seconds):
            if note.traces < 2 or not note.where:  # TensorFlow's own functions are its affair
                continue
            names = dict.fromkeys(name for types in note.types for name in types)
            seen = {n: list(dict.fromkeys(t[n] for t in note.types if n in t)) for n in names}
            arguments = {n: [v[:200] for v in values[:6]] for n, values in seen.items() if len(values) > 1}
            found.append(
                {
                    "name": note.name,
                    "where": note.where,
                    "traces": note.traces,
                    "seconds": note.seconds,
                    "steps": list(note.steps),
                    "arguments": arguments,
                }
            )
        return found[:8]
