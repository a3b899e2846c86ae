"""The compiled training step: the model's own `train_step`, many times in one graph call, observed on the way.

Keras pays 0.8 to 1.0 ms of call overhead for every step; inside one `tf.while_loop` the same step costs a seventh of
that for a tiny model (`benchmarks/step.py`). The step is compiled as Keras compiles it, one nested `tf.function` with
the model's `jit_compile`, so that it computes the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.clip import Clip
from trainrt.determinism import modes
from trainrt.determinism.digests import Collector, Digests
from trainrt.device import phases, trace
from trainrt.distribution import replicas
from trainrt.endurance.poison import Guard
from trainrt.loop import resident
from trainrt.record.vocabulary import Roster
from trainrt.update import native, native_ops
from trainrt.update.observer import Observer
from trainrt.update.origin import Origins

CHUNK_BYTES = 32 << 20
"""Most bytes of statistics that wait on the device for the end of a chunk."""

CLOCK = True
"""Whether the loop notes when a batch was there and when a step was done; False only to measure what that costs."""

CLOCKED_S = 4e-4
"""Shortest step that TensorFlow's own ops clock where no batch is waited for: they take some 1.5 microseconds. Where
batches are waited for `timing` clocks one call in many of steps that turn out to be too short."""


class Outcome(NamedTuple):
    """What a call of `Step.run` did.

    Attributes:
      steps: How many ran; fewer than asked for when the data ended.
      logs: What the last step returned, as tensors; None when no step ran.
      vectors: [steps, D] float64, a row a step as `Observer.pack` made it, zeros for a step not observed; None when
        nothing is observed.
      digests: [steps, 2N] float64, a row a step as `Collector.row` made it; None when none are asked for.
      clock: [steps, 2] seconds since 1970: when the batch of a step was there, 0 where the step gathers it by itself;
        and when the step was done. None when nothing is observed. On a GPU "done" is when its kernels were launched.
    """

    steps: int
    logs: dict | None
    vectors: tf.Tensor | None
    digests: tf.Tensor | None = None
    clock: np.ndarray | None = None


class Step:
    """Runs `model.train_step` on the batches of an iterator.

    Args:
      model: A compiled model.
      clip: Scales for the gradients before they reach the optimizer, or None.
      every: Observe every n-th step; 0 observes none.
      digests: Which steps and stages are digested, or None.
      sum_duplicates: Whether the rows of sparse gradients are added up before the optimizer sees them.
      guard: Takes poisoned steps back, or None.
      distance: Whether to measure how far each weight is from where it started.
      uneven: Whether replicas may be given shares of a batch that are not alike.

    Attributes:
      digest_names: (stage, name) of each digest, once the step is traced.
      every: As given; 0 when nothing can be observed.
      roster: The names along the axes of the vectors; None when nothing is observed.
      unseen: Why nothing is observed, though it was asked for.
      paths: The optimizer's name -> "fused", or why the optimizer's own `apply` runs.
    """

    def __init__(
        self,
        model: keras.Model,
        clip: Clip | None,
        every: int,
        digests: Digests | None = None,
        sum_duplicates: bool = False,
        guard: Guard | None = None,
        distance: bool = False,
        uneven: bool = True,
    ):
        self._model = model
        self._uneven = uneven
        self._sum_duplicates = sum_duplicates
        self._clip = clip
        self.guard = guard
        self.origins = Origins(model) if distance else None
        self._strategy = model.distribute_strategy
        self._several = replicas.several(self._strategy)
        self._optimizers = doors.optimizers(model)
        self._kernels = (self._several or not model.jit_compile) and native.load() is not None
        self._width = 0
        self._digest_every = digests.every if digests and not self._several else 0
        self._stages = digests.stages if digests else ()
        self.digest_names: list[tuple[str, str]] = []
        self.every = every
        self.roster: Roster | None = None
        self.unseen: str | None = None
        self.paths: dict[str, str] = {}
        self._traced: list = []
        # Whether each step notes by itself when its batch was there, which it is given, and when it was done.
        own = self._kernels and native_ops.rows_here() and not self._several and not model.run_eagerly
        self._stamps = bool(every) and CLOCK and own
        self._plain = self._compiled(measuring=False)
        self._observed = self._compiled(measuring=True)
        self._digested = self._compiled(measuring=bool(every), digesting=True)
        self._chunk = _function(self._iterated)
        self._chunks: dict[tuple, tf.types.experimental.PolymorphicFunction] = {}
        self._latest: tuple[tuple, Any, Any] | None = None
        self._spec: Any = None

    def _compiled(self, measuring: bool, digesting: bool = False):
        """One step on a batch, and when that was there if it `_stamps` -> (logs, row), wrapped as Keras wraps it."""
        model, strategy = self._model, self._strategy

        def replica_step(data, *ready):
            watching = measuring or self.guard is not None
            observer = Observer(
                self._optimizers,
                self._clip,
                watching,
                self._kernels,
                self._sum_duplicates,
                self._each,
                self.origins if measuring else None,
            )
            collector = Collector(model, self._optimizers, self._stages) if digesting else None
            with observer.watch(model), collector.watch(data) if collector else contextlib.nullcontext():
                if self.guard:
                    logs = self.guard.step(observer, lambda: model.train_step(data), model.get_metrics_result)
                else:
                    logs = model.train_step(data)
            vector = self._noted(observer, logs, measuring, *ready)
            if collector:
                digests = collector.row()
                self.digest_names = collector.names
            else:
                digests = tf.zeros([2 * len(self.digest_names)], tf.float64)
            return logs, tf.concat([vector, digests], 0) if self._digest_every else vector

        @tf.autograph.experimental.do_not_convert
        def one_step(data, *ready):
            outputs = strategy.run(replica_step, args=(data, *ready))
            return doors.reduce_logs(outputs, strategy)

        @tf.autograph.experimental.do_not_convert
        def one_step_together(data):
            watching = measuring or self.guard is not None
            observer = replicas.Replicas(
                self._optimizers,
                self._clip,
                watching,
                self._kernels,
                False,
                self._each,
                uneven=self._uneven,
                clocked=measuring and self._clocked,
            )
            logs = observer.run(model, data, self.guard)
            return logs, self._noted(observer, logs, measuring)

        if self._several:
            return one_step_together if model.run_eagerly else _function(one_step_together)
        return one_step if model.run_eagerly else _function(one_step, jit_compile=model.jit_compile)

    def _noted(self, observer: Observer, logs: Any, measuring: bool, *ready: tf.Tensor) -> tf.Tensor:
        """Keeps what the trace of a step tells; returns the step's vector, zeros where nothing is measured."""
        self.paths = observer.paths
        if not measuring:
            return _stamped(tf.zeros([self._width], tf.float64), *ready)
        if self.guard:
            vector = _stamped(self.guard.mask(observer, observer.pack(logs)), *ready)
        else:
            vector = observer.pack(logs, *ready)
        self.unseen = observer.unseen
        self.roster = None if self.unseen else observer.roster()
        self._width = vector.shape[0] - 2 * len(ready)
        return vector

    def prepare(self, element_spec) -> None:
        """Traces the step, which builds what is not built yet; after it `roster` or `unseen` is known.

        Under `run_eagerly` there is nothing to trace: they are known after the first step.
        """
        if self._model.run_eagerly:
            return
        spec = self._spec = _without_optionals(element_spec)
        traced = []
        if self._digest_every:
            traced.append(self._concrete(self._digested, spec))
            self.every = 0 if self.unseen else self.every
        if self.every and self._digest_every != 1:
            traced.append(self._concrete(self._observed, spec))
            if self.unseen:
                self._see_nothing()
        if self.every != 1 and self._digest_every != 1:
            traced.append(self._concrete(self._plain, spec))
        self._traced = traced

    def _concrete(self, step, spec):
        """The traced step for such a batch."""
        return step.get_concrete_function(spec, *[tf.TensorSpec([], tf.float64)] * self._stamps)

    @property
    def variables(self) -> list[tf.Variable]:
        """Every variable that the traced step reads or writes, random generators and the guard's own among them."""
        traced = [v for function in self._traced for v in function.variables]
        own = self.guard.variables if self.guard else []  # nothing is traced under `run_eagerly`
        return list({id(v): v for v in (*traced, *own)}.values())

    @property
    def operations(self) -> set[str]:
        """The types of the operations of the traced step."""
        graphs = [function.graph.as_graph_def() for function in self._traced]
        nodes = {node.op for graph in graphs for node in graph.node}
        return nodes | {node.op for graph in graphs for f in graph.library.function for node in f.node_def}

    @property
    def _each(self) -> int:
        """How many steps there are to one observed."""
        return max(self.every, 1)

    @property
    def clock_s(self) -> float:
        """What the clock takes of a step whose batch is waited for (`benchmarks/trace.py`)."""
        return 0.55e-6 if self._stamps else 2.1e-6

    @property
    def _clocked(self) -> bool:
        """Whether the loop may take the time of a step: TensorFlow's clock raises when its ops are deterministic."""
        return bool(self.every) and CLOCK and not modes.is_enabled()

    def graph(self, element_spec) -> tf.Graph | None:
        """The graph of one step on such a batch, as it was traced; None under `run_eagerly`."""
        if self._model.run_eagerly:
            return None
        step = self._digested if self._digest_every == 1 else self._observed if self.every else self._plain
        return self._concrete(step, _without_optionals(element_spec)).graph

    def _see_nothing(self) -> None:
        """Goes on with the step that was traced, though it shows nothing: one trace more could draw random numbers."""
        self.every, self._plain = 0, self._observed

    @property
    def most(self) -> int:
        """Most steps of one call, so that what waits on the device stays bounded."""
        return max(1, CHUNK_BYTES // max(8 * self._row, 1))

    @property
    def _row(self) -> int:
        """Numbers that a step leaves behind: its vector, two timestamps if it `_stamps`, its digests."""
        return self._width + 2 * self._stamps + 2 * len(self.digest_names)

    def scopes(self) -> phases.Scopes:
        """What the names of the step's ops are read with, once it has been traced."""
        names = tuple(optimizer.name for optimizer in self._optimizers)
        if self._spec is None or self._several:
            return phases.Scopes(names, eager=self._model.run_eagerly)
        owners = {id(doors.raw(v).handle): doors.layer_of(v) for v in self._model.variables}
        step = self._observed if self.every and self._digest_every != 1 else self._plain
        step = self._digested if self._digest_every == 1 else step
        captures = self._concrete(step, self._spec).graph.captures
        known = [(inside, owners[id(outside)]) for outside, inside in captures if id(outside) in owners]
        reads = [(op.name, layer) for tensor, layer in known for op in tensor.consumers()]
        return phases.Scopes(names, phases.layers_of(reads))

    def run(
        self, iterator, first: int, steps: int, singly: bool = False, marked: bool = False, clocked: bool = True
    ) -> Outcome:
        """Runs up to `steps` steps.

        Args:
          iterator: A `tf.data` or distributed iterator.
          first: Number of the first of them in the run; says which ones `every` observes.
          steps: How many; at most `most`.
          singly: One a call, as a profiler wants them.
          marked: Whether each is put under a marker for the profiler.
          clocked: Whether to take the time of each step whose batch is waited for, see `timing.Timing.clocks`.
        """
        if self.guard:
            self.guard.number.assign(first)
        if self._model.run_eagerly or (singly and not self._several):
            return self._run_singly(iterator, first, steps, marked)
        if singly:
            return self._run_replicas_singly(iterator, first, steps, marked)
        begin, most = tf.constant(first, tf.int64), tf.constant(steps)
        if isinstance(iterator, resident.Epoch):
            most = tf.constant(min(steps, iterator.left))
            batch = tf.constant(iterator.batch, tf.int64)
            chunk = self._gathering(iterator, self._gathered, None)
            count, logs, vectors, clock = chunk(iterator.arrays, iterator.order, batch, begin, most)
            iterator.batch += int(count)
        else:
            count, logs, vectors, clock = self._chunk(iterator, begin, most, clocked or self._several)
        ran = int(count)
        return self._outcome(ran, logs if ran else None, vectors, clock)

    def _outcome(self, ran: int, logs, rows: tf.Tensor, clock) -> Outcome:
        vectors = digests = None
        if self.every or self._digest_every:
            if ran < rows.shape[0]:  # an eager slice costs as much as some steps
                rows = rows[:ran]
            vectors = rows if self.every else None
            if self._digest_every:
                vectors = None if vectors is None else rows[:, : self._width]
                digests = rows[:, self._width :]
        return Outcome(ran, logs, vectors, digests, None if clock is None else np.asarray(clock)[:ran])

    def _gathering(self, epoch: resident.Epoch, method, step):
        """A method compiled for batches of this size and shape."""
        asked = (method.__name__, id(step), epoch.batch_size)
        if self._latest is None or self._latest[0] != asked or self._latest[1] is not epoch.element_spec:
            key = (*asked, *keras.tree.flatten(epoch.element_spec))  # takes as long to hash as a small step
            if key not in self._chunks:
                python_function = functools.partial(method, step, epoch.batch_size, epoch.element_spec)
                self._chunks[key] = _function(python_function)
            self._latest = (asked, epoch.element_spec, self._chunks[key])
        return self._latest[2]

    @tf.autograph.experimental.do_not_convert
    def _iterated(self, iterator, first, steps, clocked=True):
        """Up to `steps` steps on what the iterator gives."""
        clocked = clocked and (self._clocked or self._stamps)

        def one(ran, train, keep):
            batch = iterator.get_next_as_optional()
            more = batch.has_value()
            ready = _now_after(more, self._stamps) if clocked else _never()
            logs, row = tf.cond(more, lambda: train(_without_optionals(batch.get_value()), ready), lambda: keep)
            return more, ready, logs, row

        ran, logs, rows, clock = self._loop(iterator.element_spec, one, first, steps, clocked)
        if self._several:
            logs = replicas.results(self._model, logs)
        return ran, logs, rows, clock

    @tf.autograph.experimental.do_not_convert
    def _gathered(self, _, batch_size, element_spec, arrays, order, batch, first, steps):
        """`steps` steps on batches of resident arrays, from number `batch` of the epoch on."""

        def one(ran, train, keep):
            number = batch + tf.cast(ran, tf.int64)
            batch_of_it = resident.gather(arrays, order, number, batch_size, element_spec)
            return True, _never(), *train(batch_of_it, _never())

        return self._loop(element_spec, one, first, steps)

    @tf.autograph.experimental.do_not_convert
    def _gathered_one(self, step, batch_size, element_spec, arrays, order, batch):
        """One step on a batch of resident arrays."""
        return step(resident.gather(arrays, order, batch, batch_size, element_spec), *[_never()] * self._stamps)

    def _loop(self, element_spec, one, first, steps, clocked=None):
        """Steps until there are `steps` of them or the data ends -> (how many, last logs, [steps, D] vectors, clock).

        Args:
          one: (steps so far, train, keep) -> (whether there was a batch, when, logs, row): `train(batch, when)`, or
            `keep`.
          clocked: Whether it takes the time of each step that does not do so itself; None: where a step is so long that
            two timestamps do not slow it down. What the loop gathers by itself is never waited for.
        """
        spec = _without_optionals(element_spec)
        step = self._observed if self.every else self._plain
        step = self._digested if self._digest_every == 1 else step
        keeping = self.every or self._digest_every
        logs_spec = self._concrete(step, spec).structured_outputs[0]
        if clocked is None:
            clocked = self._clocked and _seconds(self._concrete(step, spec)) > CLOCKED_S
        clocked = clocked and not self._stamps
        step, observed, plain = self._callable(step), self._callable(self._observed), self._callable(self._plain)
        width = self._row + 2 * clocked
        rows = tf.TensorArray(tf.float64, size=steps if keeping else 0, element_shape=[width])

        def due(every, ran):
            return tf.equal((first + tf.cast(ran, tf.int64)) % every, 0)

        def train(given, ran):
            if self._digest_every > 1:
                return tf.cond(due(self._digest_every, ran), lambda: self._digested(*given), lambda: usual(given, ran))
            return usual(given, ran)

        def usual(given, ran):
            if self.every <= 1 or self._digest_every == 1:
                return step(*given)
            return tf.cond(due(self.every, ran), lambda: observed(*given), lambda: plain(*given))

        def body(ran, more, logs, rows):
            keep = (logs, tf.zeros([self._row], tf.float64))
            more, ready, logs, row = one(ran, lambda *given: train(given[: 1 + self._stamps], ran), keep)
            done = row
            if clocked:  # behind the row: an array of their own would cost as much again
                done = tf.concat([row, tf.stack([ready, _now_after(row)])], 0)
            if keeping:
                rows = rows.write(ran, done)
            ran += tf.cast(more, tf.int32)
            if self.guard:
                with tf.control_dependencies([row]):
                    more = tf.logical_and(more, tf.logical_not(self.guard.halted))
            return ran, more, logs, rows

        ran, _, logs, rows = tf.while_loop(
            lambda ran, more, *_: tf.logical_and(ran < steps, more),
            body,
            (
                tf.constant(0),
                tf.constant(True),
                keras.tree.map_structure(_empty, logs_spec),
                rows,
            ),
            shape_invariants=(
                tf.TensorShape([]),
                tf.TensorShape([]),
                keras.tree.map_structure(lambda tensor: tensor.shape, logs_spec),
                tf.TensorShape(None),
            ),
        )
        rows = rows.stack()
        if clocked:
            return ran, logs, rows[:, :-2], rows[:, -2:]
        return ran, logs, *(self._apart(rows) if self._stamps and keeping else (rows, None))

    def _apart(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows of steps that note their times -> [steps, D] without these, and [steps, 2] of them."""
        vectors, clock, digests = tf.split(rows, [self._width, 2, 2 * len(self.digest_names)], axis=1)
        return tf.concat([vectors, digests], 1) if self.digest_names else vectors, clock

    def _callable(self, step):
        """What the loop calls: the compiled step, or its Python function where there are collectives in it.

        These take their keys when the outermost function is called, by a placeholder that TensorFlow 2.21 passes
        through `tf.cond` and `tf.while_loop`, but not through a function called in one: there it is never fed.
        """
        return step.python_function if self._several else step

    def _run_replicas_singly(self, iterator, first: int, steps: int, marked: bool) -> Outcome:
        logs, rows, clocks = None, [], []
        for number in range(first, first + steps):
            with trace.step(number, marked):
                count, last, row, clock = self._chunk(iterator, tf.constant(number, tf.int64), tf.constant(1))
                if not int(count):
                    break
                if marked:
                    _wait_for(last)
            logs = last
            rows.append(row)
            clocks.append(clock)
            if self.guard and self.guard.halted:
                break
        if not rows:
            return Outcome(0, None, None)
        stamps = None if clocks[0] is None else np.concatenate(clocks)
        return self._outcome(len(rows), logs, tf.concat(rows, 0), stamps)

    def _run_singly(self, iterator, first: int, steps: int, marked: bool) -> Outcome:
        logs, vectors, clock = None, [], []
        for number in range(first, first + steps):
            with trace.step(number, marked):
                ready = 0.0
                observed = self.every and number % self.every == 0
                step = self._observed if observed else self._plain
                if self._digest_every and number % self._digest_every == 0:
                    step = self._digested
                if isinstance(iterator, resident.Epoch):
                    if not iterator.left:
                        break
                    batch = tf.constant(iterator.batch, tf.int64)
                    logs, vector = self._gathering(iterator, self._gathered_one, step)(
                        iterator.arrays, iterator.order, batch
                    )
                    iterator.batch += 1
                else:
                    with trace.fetching(marked):
                        batch = iterator.get_next_as_optional()
                        if not batch.has_value():
                            break
                        data = _without_optionals(batch.get_value())
                    ready = time.time()
                    logs, vector = step(data, *[_never()] * self._stamps)
                if marked:
                    _wait_for(logs)
            if observed and self.unseen:
                self._see_nothing()
            vectors.append(vector)
            clock.append((ready, time.time()))
            if self.guard and self.guard.halted:
                break
        if vectors and self._several:
            logs = replicas.results(self._model, logs)
        if not vectors or not (self.every or self._digest_every):
            return Outcome(len(vectors), logs, None)
        rows = tf.stack(vectors)
        return self._outcome(len(vectors), logs, self._apart(rows)[0] if self._stamps else rows, clock)


def _function(python_function, **options):
    """A `tf.function` that counts its own traces only: TensorFlow counts by code object, and warns of a fifth one."""
    return tf.function(functools.partial(python_function), reduce_retracing=True, **options)


def _seconds(function) -> float:
    """About what a step takes at least: half a microsecond an op, and a third of a nanosecond an element it makes."""
    total = 0.0
    for op in function.graph.get_operations():
        total += 5e-7
        for output in op.outputs:
            if output.shape.rank is not None and output.dtype != tf.resource:
                total += 3e-10 * float(np.prod([32 if size is None else size for size in output.shape]))
    return total


def _now_after(tensor, native: bool = False) -> tf.Tensor:
    """Seconds since 1970 once a tensor is there; of a GPU's tensor, once its kernels have been launched."""
    if native:
        return native_ops.now(tensor)
    with tf.control_dependencies([tensor]), tf.device("CPU"):
        return tf.timestamp()


def _never() -> tf.Tensor:
    """When a batch was there that is not waited for."""
    return tf.constant(0.0, tf.float64)


def _stamped(vector: tf.Tensor, *ready: tf.Tensor) -> tf.Tensor:
    """The vector of a step and, of one that notes its times, when its batch was there and when it was done."""
    return native_ops.row([vector, *ready], timed=True) if ready else vector


def _wait_for(logs) -> None:
    """Returns when the device has done the step: what runs after its marker would count for the next one."""
    for value in tf.nest.flatten(logs)[:1]:
        if hasattr(value, "numpy"):
            value.numpy()


def _without_optionals(data):
    """Keras's generator adapter stands an Optional where the user's batch has None."""
    optional = (tf.experimental.Optional, tf.OptionalSpec)
    return keras.tree.map_structure(lambda item: None if isinstance(item, optional) else item, data)


def _empty(tensor: tf.Tensor) -> tf.Tensor:
    """Stands for the logs of a step before there was one."""
    return tf.zeros([size or 0 for size in tensor.shape] if tensor.shape.rank else [], tensor.dtype)
