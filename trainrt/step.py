"""The compiled training step: the model's own `train_step`, many times in one graph call, observed on the way.

Keras pays 0.8 to 1.0 ms of call overhead for every step; inside one `tf.while_loop` the same step costs a seventh of
that for a tiny model (`benchmarks/step.py`). The step is compiled as Keras compiles it, one nested `tf.function` with
the model's `jit_compile`, so that it computes the same bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import keras
import tensorflow as tf

from trainrt import doors, native
from trainrt.clip import Clip
from trainrt.record import Roster
from trainrt.update import Observer

CHUNK_BYTES = 32 << 20
"""Most bytes of statistics that wait on the device for the end of a chunk."""


class Outcome(NamedTuple):
    """What a call of `Step.run` did.

    Attributes:
      count: Steps that ran; fewer than asked for when the data ended.
      logs: What the last step returned, as tensors; None when no step ran.
      vectors: [count, D] float64, a row a step as `Observer.pack` made it; a row of zeros for a step not observed.
    """

    count: int
    logs: dict | None
    vectors: tf.Tensor | None


class Step:
    """Runs `model.train_step` on an iterator.

    Args:
      model: A compiled model.
      clip: Scales for the gradients before they reach the optimizer, or None.
      every: Observe every n-th step; 0 observes none.

    Attributes:
      roster: The names along the axes of the vectors; None when nothing is observed.
      unseen: Why nothing is observed, though it was asked for.
      paths: The optimizer's name -> "fused", or why the optimizer's own `apply` runs.
    """

    def __init__(self, model: keras.Model, clip: Clip | None, every: int):
        self._model = model
        self._clip = clip
        self._strategy = model.distribute_strategy
        self._optimizers = doors.optimizers(model)
        self.every = every
        self.unseen: str | None = None
        self.roster: Roster | None = None
        if every and self._strategy.num_replicas_in_sync > 1:
            self._blind("several replicas are not observed yet")
        self._kernels = not model.jit_compile and self._strategy.num_replicas_in_sync == 1 and native.load() is not None
        self.paths: dict[str, str] = {}
        self._width = 0
        self._chunk = None
        self._plain = self._compiled(measuring=False)
        self._observed = self._compiled(measuring=True) if self.every else None

    def _blind(self, reason: str) -> None:
        self.unseen, self.every, self.roster = reason, 0, None

    def _compiled(self, measuring: bool):
        """One step on a batch -> (logs, vector), as Keras wraps it."""
        model, strategy = self._model, self._strategy

        def replica_step(data):
            observer = Observer(self._optimizers, self._clip, measuring, self._kernels)
            with observer.watch(model):
                logs = model.train_step(data)
            self.paths = observer.paths
            if not measuring:
                return logs, tf.zeros([0], tf.float64)
            vector = observer.pack(logs)
            if observer.unseen:
                self.unseen = observer.unseen
            else:
                self.roster = observer.roster()
            return logs, vector

        @tf.autograph.experimental.do_not_convert
        def one_step(data):
            outputs = strategy.run(replica_step, args=(data,))
            return doors.reduce_logs(outputs, strategy)

        if not model.run_eagerly:
            one_step = _function(one_step, jit_compile=model.jit_compile)

        @tf.autograph.experimental.do_not_convert
        def without_optionals(data):
            return one_step(keras.tree.map_structure(_none_for_optional, data))

        without_optionals.function = one_step
        return without_optionals

    def prepare(self, element_spec) -> None:
        """Traces the step, which builds what is not built yet; after it `roster` or `unseen` is known.

        Under `run_eagerly` there is nothing to trace: the roster is known after the first step.
        """
        if self._model.run_eagerly:
            return
        spec = keras.tree.map_structure(_none_for_optional, element_spec)
        if self.every:
            _, vector = self._observed.function.get_concrete_function(spec).structured_outputs
            self._width = vector.shape[0]
            if self.unseen:
                self._blind(self.unseen)
        if self.every != 1:
            self._plain.function.get_concrete_function(spec)
        if self._chunk is None:
            loop = self._loop if self._strategy.num_replicas_in_sync == 1 else self._single
            self._chunk = _function(loop)

    @property
    def most(self) -> int:
        """Most steps of one call, so that what waits on the device stays bounded."""
        return max(1, CHUNK_BYTES // max(8 * self._width, 1))

    def run(self, iterator, first: int, count: int) -> Outcome:
        """Runs up to `count` steps.

        Args:
          iterator: A `tf.data` or distributed iterator.
          first: Number of the first of them in the run; says which ones `every` observes.
          count: How many steps; at most `most`.
        """
        if self._model.run_eagerly:
            return self._run_eagerly(iterator, first, count)
        if self._strategy.num_replicas_in_sync > 1:
            return self._run_replicas(iterator, count)
        ran, logs, vectors = self._chunk(iterator, tf.constant(first, tf.int64), tf.constant(count))
        ran = int(ran)
        return Outcome(ran, logs if ran else None, vectors[:ran] if self.every and ran < count else vectors)

    @tf.autograph.experimental.do_not_convert
    def _loop(self, iterator, first, count):
        spec = iterator.element_spec
        step = self._observed if self.every else self._plain
        concrete = step.function.get_concrete_function(keras.tree.map_structure(_none_for_optional, spec))
        empty = keras.tree.map_structure(_empty, concrete.structured_outputs[0])
        vectors = tf.TensorArray(tf.float64, size=count, element_shape=[self._width]) if self.every else ()

        def one(data, ran):
            if self.every <= 1:
                return step(data)

            def unobserved():
                return self._plain(data)[0], tf.zeros([self._width], tf.float64)

            observed = tf.equal((first + tf.cast(ran, tf.int64)) % self.every, 0)
            return tf.cond(observed, lambda: step(data), unobserved)

        def body(ran, more, logs, vectors):
            batch = iterator.get_next_as_optional()
            more = batch.has_value()

            def train():
                return one(batch.get_value(), ran)

            def keep():
                return logs, tf.zeros([self._width], tf.float64)

            logs, vector = tf.cond(more, train, keep)
            if self.every:
                vectors = vectors.write(ran, vector)
            return ran + tf.cast(more, tf.int32), more, logs, vectors

        ran, _, logs, vectors = tf.while_loop(
            lambda ran, more, *_: tf.logical_and(ran < count, more),
            body,
            (tf.constant(0), tf.constant(True), empty, vectors),
            shape_invariants=(
                tf.TensorShape([]),
                tf.TensorShape([]),
                keras.tree.map_structure(lambda t: t.shape, concrete.structured_outputs[0]),
                tf.TensorShape(None) if self.every else (),
            ),
        )
        return ran, logs, vectors.stack() if self.every else tf.zeros([0, 0], tf.float64)

    @tf.autograph.experimental.do_not_convert
    def _single(self, iterator):
        return self._plain(iterator.get_next())[0]

    def _run_replicas(self, iterator, count: int) -> Outcome:
        """One call a step: TensorFlow's collectives take their keys at the call, and a `tf.cond` or `tf.while_loop` around
        them loses these (a placeholder that is never fed, TF 2.21)."""
        logs, ran = None, 0
        while ran < count:
            try:
                logs = self._chunk(iterator)
            except tf.errors.OutOfRangeError:
                break
            ran += 1
        return Outcome(ran, logs, None)

    def _run_eagerly(self, iterator, first: int, count: int) -> Outcome:
        logs, vectors, ran = None, [], 0
        for ran, data in enumerate(_upto(iterator, count), start=1):
            observed = self.every and (first + ran - 1) % self.every == 0
            logs, vector = (self._observed if observed else self._plain)(data)
            if self.unseen and self.every:
                self._blind(self.unseen)
            vectors.append(vector)
        if not self.every or not ran:
            return Outcome(ran, logs, None)
        self._width = max(v.shape[0] for v in vectors)
        zeros = tf.zeros([self._width], tf.float64)
        return Outcome(ran, logs, tf.stack([v if v.shape[0] else zeros for v in vectors]))


def _function(python_function, **options):
    """A `tf.function` that counts its own traces only. TensorFlow counts by code object, and warns of the fifth model."""
    return tf.function(functools.partial(python_function), reduce_retracing=True, **options)


def _upto(iterator, count: int):
    for _ in range(count):
        batch = iterator.get_next_as_optional()
        if not batch.has_value():
            return
        yield batch.get_value()


def _none_for_optional(item):
    """Keras's generator adapter stands an Optional where the user's batch has None."""
    return None if isinstance(item, (tf.experimental.Optional, tf.OptionalSpec)) else item


def _empty(tensor):
    return tf.zeros([d or 0 for d in tensor.shape], tensor.dtype) if tensor.shape.rank is not None else tf.zeros([], tensor.dtype)
