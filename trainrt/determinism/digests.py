"""Exact digests of what a step reads and writes, computed in the step itself: `record.digest` in TensorFlow's ops.

Order of stages in a step: batch, random state, layer output, loss, gradient, slot, variable. The first of them that
differs between two runs is where they part; `trainrt.record.bits` finds it.

Sums are of int64 modulo 2^64, exact in any order, so no switch has to be on for them. No tensor of int32 is touched:
TensorFlow's kernels for these live in host memory, and a GPU would copy the whole tensor to the host.

By default variables are digested between steps, and that is not folded into the fused update: a digest of the CNN of
`benchmarks/step.py`, 79,530 weights with Adam's slots, takes 0.9 ms of one core, a step of it 4.4 ms. That is 0.2 % of
the first 1,024 steps and 0.02 % of later ones (`python benchmarks/digests.py`). To save these, a second set of kernels
would serve one step in a thousand, and what they do not update, such as statistics and seeds, would go this way still.
Digests inside every 100th, 10th and single step take 1.08, 1.12 and 2.2 times the processor time without: most of what
they read, batches and layer outputs, the update never sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.doors import replaced
from trainrt.record.bits import STAGES
from trainrt.record.digest import FIRST, GOLDEN, SECOND, digest
from trainrt.record.vocabulary import unique
from trainrt.update import taps

LAST_DOUBLING = 1024
"""Variables are digested after steps 1, 2, 4, ... up to this many, and then each time as many have run."""

_WORD = 8


@dataclasses.dataclass(frozen=True)
class Digests:
    """What `fit` digests.

    Attributes:
      every: Inside every n-th step, the stages below; 0: in none.
      stages: Which of `bits.STAGES`; by default all.
      variables: Whether all variables are digested between steps as well: after 1, 2, 4, ..., 1024 steps, then after
        every 1024th, and at the end of each epoch.
    """

    every: int = 0
    stages: tuple[str, ...] = STAGES
    variables: bool = True

    def __post_init__(self):
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 0:
            raise ValueError(f"`every` is a number of steps, 0 for none. Received: every={self.every!r}.")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"The stages of a step are {', '.join(STAGES)}. Received: {', '.join(map(str, unknown))}.")

    def left(self, step: int) -> int:
        """How many steps may run after `step` of them before variables are digested again."""
        if step >= LAST_DOUBLING:
            return LAST_DOUBLING - step % LAST_DOUBLING
        return (1 << step.bit_length()) - step


def asked(digests: Any, deterministic: bool) -> Digests | None:
    """What the argument `digests` of `fit` means.

    Raises:
      TypeError: It means nothing.
    """
    if isinstance(digests, Digests):
        return digests
    if digests is None:
        return Digests() if deterministic else None
    if isinstance(digests, bool):
        return Digests() if digests else None
    if isinstance(digests, int) and digests > 0:
        return Digests(every=digests)
    raise TypeError(
        "`digests` is True (variables between steps), an int n (all stages of every n-th step), False, or a "
        f"trainrt.determinism.Digests. Received: digests={digests!r}."
    )


# ------------------------------------------------------------------------------------------------------- one tensor

_GOLDEN, _FIRST, _SECOND = (int(np.int64(np.uint64(c).astype(np.int64))) for c in (GOLDEN, FIRST, SECOND))


def tensor_digest(tensor: tf.Tensor) -> tf.Tensor:
    """[] int64: the bits of `trainrt.record.digest.digest` of a tensor, in any order of summing, on any device."""
    words = _words(tensor)
    places = tf.range(tf.size(words, tf.int64), dtype=tf.int64)
    h = words + places * _GOLDEN
    return tf.reduce_sum(_shifted(_shifted(_shifted(h, 33) * _FIRST, 29) * _SECOND, 32))


def can_digest(tensor: Any) -> bool:
    """Whether it is a dense tensor of numbers or truth values."""
    dtype = getattr(tensor, "dtype", None)
    dense = isinstance(tensor, (tf.Tensor, tf.Variable, keras.Variable))
    return dense and tf.as_dtype(dtype) in _NUMBERS


_NUMBERS = frozenset(
    (
        *(tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool),
        *(tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64),
    )
)


def _words(tensor: tf.Tensor) -> tf.Tensor:
    """The bytes as 64-bit words, the last filled up with zeros."""
    x = tensor
    if x.dtype == tf.bool:
        x = tf.cast(x, tf.uint8)
    elif x.dtype in (tf.int32, tf.uint32):
        x = tf.bitcast(x, tf.float32)  # before anything else: see the module's docstring
    elif x.dtype.is_complex:
        x = tf.stack([tf.math.real(x), tf.math.imag(x)], axis=-1)  # XLA does not bitcast complex numbers
    elif x.dtype in (tf.int16, tf.uint16):
        x = tf.bitcast(x, tf.float16)
    elif x.dtype == tf.int8:
        x = tf.bitcast(x, tf.uint8)
    x = tf.reshape(x, [-1])
    per = _WORD // x.dtype.size
    if per > 1:
        missing = (-tf.size(x, tf.int64)) % per if x.shape[0] is None else -x.shape[0] % per
        if not isinstance(missing, int) or missing:
            x = tf.pad(x, [[0, missing]])
        x = tf.reshape(x, [-1, per])
    return x if x.dtype == tf.int64 else tf.bitcast(x, tf.int64)


def _shifted(h: tf.Tensor, by: int) -> tf.Tensor:
    """h ^ (h >>> by)."""
    u = tf.bitcast(h, tf.uint64)
    return tf.bitcast(tf.bitwise.bitwise_xor(u, tf.bitwise.right_shift(u, tf.constant(by, tf.uint64))), tf.int64)


def as_doubles(digests: Sequence[tf.Tensor]) -> tf.Tensor:
    """[2N] float64, the upper and the lower 32 bits of each digest: exact, and it rides with the moments."""
    if not digests:
        return tf.zeros([0], tf.float64)
    whole = tf.stack(list(digests))
    unsigned = tf.bitcast(whole, tf.uint64)
    upper = tf.bitcast(tf.bitwise.right_shift(unsigned, tf.constant(32, tf.uint64)), tf.int64)
    lower = tf.bitwise.bitwise_and(whole, tf.constant(0xFFFFFFFF, tf.int64))
    return tf.reshape(tf.cast(tf.stack([upper, lower], axis=1), tf.float64), [-1])


def as_text(doubles: np.ndarray) -> str:
    """16 hexadecimal digits for each digest of a row that `as_doubles` made."""
    pairs = np.asarray(doubles).reshape(-1, 2).astype(np.uint64)
    return "".join(f"{int(upper) << 32 | int(lower):016x}" for upper, lower in pairs)


# -------------------------------------------------------------------------------------------------- one step's stages


class Collector:
    """Digests the stages of one step while it is traced, or while it runs eagerly.

    Args:
      model: The model whose `train_step` runs.
      optimizers: Its optimizers.
      stages: Which stages.

    Attributes:
      names: (stage, name) of each digest, in the order in which the step makes them.
    """

    def __init__(self, model: keras.Model, optimizers: Sequence, stages: Sequence[str]):
        self._model = model
        self._optimizers = optimizers
        self._stages = stages
        self._found: list[tuple[str, str, tf.Tensor]] = []
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self.names: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def watch(self, data: Any) -> Iterator[None]:
        """Stands at every place where a stage passes, for as long as the context lasts."""
        model = self._model
        for path, leaf in keras.tree.flatten_with_path(data):
            parts = tf.nest.flatten(leaf, expand_composites=True)
            for i, part in enumerate(parts):
                self._add("batch", _place(data, path) + (f".{i}" if len(parts) > 1 else ""), part)
        for name, state in random_states(model):
            self._add("random state", name, doors.raw(state))
        with contextlib.ExitStack() as stack:
            if "layer output" in self._stages:
                for layer in doors.layers_of(model):
                    if layer is not model:
                        stack.enter_context(replaced(layer, "call", self._called(layer)))
            if "loss" in self._stages:
                stack.enter_context(replaced(model, "compute_loss", self._lost(model.compute_loss)))
            if "gradient" in self._stages:
                for optimizer in self._optimizers:
                    stack.enter_context(replaced(optimizer, "apply", self._applied(optimizer.apply, optimizer)))
            yield

    def row(self) -> tf.Tensor:
        """[2N] float64: the digests of this step, variables as they are now; after it `names` are known."""
        for kind, name, variable in variables_of(self._model, self._optimizers):
            self._add(kind, name, doors.raw(variable))
        labels = [f"{stage}\n{name}" for stage, name, _ in self._found]
        self.names = [tuple(label.split("\n", 1)) for label in unique(labels)]  # type: ignore[misc]
        return as_doubles([value for _, _, value in self._found])

    def _add(self, stage: str, name: str, tensor: Any) -> None:
        if stage not in self._stages or tensor is None:
            return
        if isinstance(tensor, tf.IndexedSlices):
            self._add(stage, f"{name}.values", tensor.values)
            self._add(stage, f"{name}.indices", tensor.indices)
            return
        if not can_digest(tensor) or (self._graph is not None and tf.compat.v1.get_default_graph() is not self._graph):
            return
        if isinstance(tensor, tf.Variable):
            tensor = tf.identity(tensor)
        elif getattr(tensor, "graph", self._graph) is not self._graph and self._graph is not None:
            return
        self._found.append((stage, name, tensor_digest(taps.tap(tensor))))

    def _called(self, layer: keras.Layer) -> Callable:
        call = layer.call

        @functools.wraps(call)
        def watched(*args, **kwargs):
            outputs = call(*args, **kwargs)
            leaves = keras.tree.flatten_with_path(outputs)
            for path, leaf in leaves:
                where = "." + "/".join(map(str, path)) if len(leaves) > 1 else ""
                self._add("layer output", f"{getattr(layer, 'path', None) or layer.name}{where}", leaf)
            return outputs

        return watched

    def _lost(self, compute_loss: Callable) -> Callable:
        def watched(*args, **kwargs):
            loss = compute_loss(*args, **kwargs)
            self._add("loss", "loss", loss)
            return loss

        return watched

    def _applied(self, apply: Callable, optimizer: Any) -> Callable:
        def watched(grads, trainable_variables=None):
            grads = list(grads)
            variables = trainable_variables
            if variables is None:
                variables = doors.trained_variables(optimizer)
            for gradient, variable in zip(grads, list(variables) or [None] * len(grads), strict=False):
                self._add("gradient", getattr(variable, "path", None) or "?", gradient)
            return apply(grads, trainable_variables)

        return watched


def _place(data: Any, path: tuple) -> str:
    """Where in a batch a tensor is: "x", "y", "x/tokens", "sample_weight"."""
    if not isinstance(data, (tuple, list)) or len(data) > 3:
        return "/".join(map(str, path)) or "x"
    return "/".join([("x", "y", "sample_weight")[int(path[0])], *map(str, path[1:])])


def random_states(model: keras.Model) -> list[tuple[str, Any]]:
    """The states of all seed generators: those of the model's layers, and Keras's own where there is one."""
    states = [(v.path, v) for v in model.variables if v.path.endswith(_STATE)]
    shared = doors.global_seed_state()
    return states if shared is None else [*states, ("keras.random", shared)]


_STATE = "seed_generator_state"


def variables_of(model: keras.Model, optimizers: Sequence) -> list[tuple[str, str, Any]]:
    """(stage, name, variable) of all slots, then of all other variables; each once."""
    slots = [("slot", v.path, v) for optimizer in optimizers for v in optimizer.variables]
    others = [("variable", v.path, v) for v in model.variables if not v.path.endswith(_STATE)]
    found: dict[int, tuple[str, str, Any]] = {}
    for stage, name, variable in (*slots, *others):
        found.setdefault(doors.variable_key(variable), (stage, name, variable))
    return list(found.values())


# --------------------------------------------------------------------------------------------------- a whole training


class Ledger:
    """The digests of one `fit`, as documents of its record.

    Args:
      plan: What is digested; None: nothing.
      model: The model that trains.
      write: Takes the content of a document, as a callable that is called later.
    """

    def __init__(self, plan: Digests | None, model: keras.Model, write: Callable[[Callable[[], Mapping]], None]):
        self._plan = plan
        self._model = model
        self._write = write
        self._named: set[str] = set()
        self._last = -1

    def most(self, step: int, steps: int) -> int:
        """How many of `steps` steps may run after `step` of them without missing a place."""
        if self._plan is None or not self._plan.variables:
            return steps
        return min(steps, self._plan.left(step))

    def took(self, before: int, step: int) -> None:
        """Digests the variables if a place lies after `before` steps and at most after `step` of them."""
        if self._plan is not None and self._plan.variables and before + self._plan.left(before) <= step:
            self.variables(step)

    def variables(self, step: int) -> None:
        """Digests all variables as they are after `step` steps."""
        if self._plan is None or not self._plan.variables or step == self._last:
            return
        self._last = step
        listed = variables_of(self._model, doors.optimizers(self._model))
        listed = [each for each in listed if can_digest(each[2])]
        listed += [("random state", name, state) for name, state in random_states(self._model)]
        values = [value_digest(doors.raw(variable)) for _, _, variable in listed]
        names = [(stage, name) for stage, name, _ in listed]
        self._put("variables", names, [step - 1], lambda: ["".join(f"{int(v) & _ALL:016x}" for v in values)])

    def rows(self, names: Sequence[tuple[str, str]], first: int, rows: tf.Tensor) -> None:
        """Writes the rows that `Collector` made in the steps from number `first` on."""
        if self._plan is None or not self._plan.every:
            return
        places = [i for i in range(int(rows.shape[0])) if (first + i) % self._plan.every == 0]
        if places:
            steps = [first + i for i in places]
            self._put("steps", names, steps, lambda: [as_text(row) for row in np.asarray(rows)[places]])

    def _put(
        self, of: str, names: Sequence[tuple[str, str]], steps: list[int], values: Callable[[], list[str]]
    ) -> None:
        tell = [] if of in self._named else [list(name) for name in names]
        self._named.add(of)
        self._write(lambda: {"of": of, "steps": steps, "values": values(), **({"names": tell} if tell else {})})


_ALL = (1 << 64) - 1


def value_digest(variable: tf.Variable) -> Any:
    """The digest of a variable's value now: on the host where it lies there already, else on its device."""
    if "GPU" in variable.device:
        return tensor_digest(variable.read_value())
    return digest(np.asarray(tf.convert_to_tensor(variable)))
