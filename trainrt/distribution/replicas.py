"""Several replicas train as one: gradients are reduced first, then measured and clipped once, then applied.

Keras reduces inside of the optimizer, after its clip, so that N replicas clip N gradients and may move N times as far
as the bound allows (Keras 3.15). Here the reduction stands before everything else, as in a step on one device with the
whole batch: the gradient that is recorded is the global one, and what follows happens on every replica alike. Each runs
the whole of `optimizer.apply` on its own copy of the weights, so that gradient accumulation and loss scaling, which
branch, work as on one device.

A batch that does not divide evenly leaves shares of several sizes, some of them empty. Keras counts each replica alike,
so that a sample of a small share weighs more; here each counts by its samples, as in the mean over the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.endurance.poison import Guard
from trainrt.update.observer import Observer, scaled

MIRRORED = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


def check(model: keras.Model) -> None:
    """Checks that the model's strategy is one that trainrt trains under.

    Raises:
      ValueError: It is not, or the model was made outside of it; the message says why.
    """
    if doors.keras_distribution() is not None:
        raise ValueError(
            "`keras.distribution` does nothing on TensorFlow: variables stay on one device, and training goes on as if "
            f"it were not there. Received: keras.distribution.distribution()={doors.keras_distribution()!r}. Make the "
            "model in the scope of a tf.distribute.MirroredStrategy or MultiWorkerMirroredStrategy instead."
        )
    strategy = model.distribute_strategy
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "ParameterServerStrategy is asynchronous: there is no global step to observe, clip or resume, and Keras 3 "
            "does not support it. Use MultiWorkerMirroredStrategy, which reads the same TF_CONFIG without 'ps' tasks."
        )
    if not several(strategy):
        return
    if not isinstance(strategy, MIRRORED):
        raise ValueError(
            "trainrt trains several replicas under MirroredStrategy and MultiWorkerMirroredStrategy. Received: "
            f"model.distribute_strategy={type(strategy).__name__}. Use one of these; model.fit may know more."
        )
    if not doors.made_under_strategy(model):
        raise ValueError(
            f"The model {model.name!r} was made outside of the strategy that is to train it, so it has no replicas. "
            "Make and compile it in `with strategy.scope():`."
        )


def several(strategy: tf.distribute.Strategy) -> bool:
    """Whether more than one replica trains."""
    return strategy.num_replicas_in_sync > 1


REDUCE = "reduce_s"
"""Scalar of a step: seconds from the gradients of a worker's first replica to the sum of all."""


class Replicas(Observer):
    """An `Observer` of all replicas at once: what it saw is what they did together.

    It stands at `apply` around `strategy.run`, where the replicas meet.

    Args:
      *args: As of an `Observer`.
      uneven: Whether the shares of a batch may be of several sizes; to add them up takes a collective more.
      clocked: Whether to take the time from this worker's gradients to everybody's sum: who waits long is not the one
        that the others wait for.
    """

    def __init__(self, *args, uneven: bool = True, clocked: bool = False):
        super().__init__(*args)
        self._clocked = clocked
        self._uneven = uneven
        self._of_replica: dict[Any, dict[str, tf.Tensor]] = {}
        self._counts: dict[int, tf.Tensor] = {}
        self._reduced: list[tf.Tensor] = []
        self._strategy: tf.distribute.Strategy = tf.distribute.get_strategy()

    def run(self, model: keras.Model, batch, guard: Guard | None = None) -> Any:
        """One step on a distributed batch; returns its logs, the means over the replicas of this worker.

        Called in a graph, or eagerly; in a cross-replica context. `guard` takes the step back on all replicas alike.
        """
        self._strategy = strategy = model.distribute_strategy

        def everywhere(function, *arguments):
            outputs = strategy.run(function, args=arguments)
            return keras.tree.map_structure(lambda value: _local_mean(strategy, value), outputs)

        shares: dict[int, tf.Tensor] = {}

        def train(batch):
            count = _samples(batch) if self._uneven else None
            if count is None:
                return model.train_step(batch)
            total = tf.distribute.get_replica_context().all_reduce("SUM", count)
            shares[number()] = count / total
            self._counts[number()] = count
            with _unless_empty(model, count):
                return model.train_step(batch)

        def share():
            return shares.get(number()) if tf.distribute.get_replica_context() is not None else None

        with self.watch(model), doors.distinct_seeds(), doors.loss_shares(share):
            if guard is None:
                return everywhere(train, batch)
            return guard.step(self, lambda: everywhere(train, batch), lambda: everywhere(model.get_metrics_result))

    def loss(self, logs: Any) -> tf.Tensor | None:
        """The loss of the step, the same for every worker."""
        loss = super().loss(logs)
        of_worker = loss is not None and self._losses.get("loss") is None
        several = isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy)
        return mean_of_workers(self._strategy, loss) if of_worker and several else loss

    def _saw_losses(self, losses: dict[str, tf.Tensor]) -> None:
        self._of_replica[number()] = losses

    def _apply(self, optimizer, apply):
        def watched(grads, trainable_variables=None):
            context = tf.distribute.get_replica_context()
            if self._inside or context is None or not len(grads):
                return apply(grads, trainable_variables)
            variables = None if trainable_variables is None else list(trainable_variables)
            losses = self._of_replica.pop(number(), {})
            summands = [*grads, *losses.values()]
            count = self._counts.get(number())
            summands = summands if count is None else _none_of_nothing(count, summands)
            ready = [_now_after(summands)] if self._clocked else []
            summed = _sum(context, summands)
            times = [_now_after(summed) - ready[0]] if self._clocked else []
            gradients, totals = summed[: len(grads)], summed[len(grads) :]

            def together(strategy, totals, times, *gradients):
                self._losses = dict(zip(losses, (_first(strategy, total) for total in totals), strict=True))
                self._reduced += [_first(strategy, each) for each in times]
                self._inside = True
                try:
                    self._everywhere(strategy, optimizer, apply, gradients, variables)
                finally:
                    self._inside = False

            return context.merge_call(together, args=(totals, times, *gradients))

        return watched

    def _scalars(self) -> dict[str, tf.Tensor]:
        values = super()._scalars()
        return values | {REDUCE: tf.add_n(self._reduced)} if self._reduced else values

    def _everywhere(self, strategy, optimizer, apply, gradients, variables) -> None:
        """Updates each replica of this worker; the first one is measured, and its clip is everybody's."""
        anchor = doors.raw((variables or doors.trained_variables(optimizer))[0])
        scale = None
        turn = iter(range(len(anchor.values)))

        def local(_, *gradients):
            nonlocal scale
            replica = next(turn)
            with doors.on_one_replica(optimizer, replica):
                if replica == 0:
                    self._observe(optimizer, apply, list(gradients), variables)
                    scale = self._scale
                else:
                    apply(list(gradients) if scale is None else scaled(gradients, scale), variables)

        strategy.extended.update(anchor, local, args=tuple(gradients), group=False)


def results(model: keras.Model, logs: Any) -> Any:
    """What all replicas of all workers have seen, in the place of the logs of this worker's."""
    if doors.has_keras_train_step(model):
        return model.get_metrics_result()
    strategy = model.distribute_strategy
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return mean_of_workers(strategy, logs) if several else logs


def own_statistics(model: keras.Model) -> list[keras.Layer]:
    """Layers that normalise by the statistics of their replica's share of the batch."""
    return [
        layer
        for layer in doors.layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization) and not layer.synchronized
    ]


def mean_of_workers(strategy: tf.distribute.Strategy, logs: Any) -> Any:
    """The mean over all workers of what each has, a structure of tensors; what is no float stays as it is."""
    leaves = [value for value in keras.tree.flatten(logs) if value.dtype.is_floating]

    def on_replica():
        context = tf.distribute.get_replica_context()
        return [context.all_reduce("MEAN", tf.identity(leaf)) for leaf in leaves]

    means = iter(strategy.run(on_replica) if leaves else ())
    return keras.tree.map_structure(
        lambda value: _first(strategy, next(means)) if value.dtype.is_floating else value, logs
    )


def number() -> int:
    """Which replica, of those of all workers, is being traced or runs now."""
    context = tf.distribute.get_replica_context()
    number = context.replica_id_in_sync_group
    return int(number if isinstance(number, int) else tf.get_static_value(number))


def _sum(context, values: Sequence) -> list:
    """Sums over all replicas; one collective for each dtype, and one for each `tf.IndexedSlices`."""
    result = list(values)
    groups: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        if value is not None:
            groups.setdefault(i if isinstance(value, tf.IndexedSlices) else value.dtype, []).append(i)
    for places in groups.values():
        for i, total in zip(places, context.all_reduce("SUM", [values[i] for i in places]), strict=True):
            result[i] = total
    return result


def _samples(batch) -> tf.Tensor | None:
    """[] float32: samples in a replica's share of a batch; None: all shares have as many."""
    leaf = next((leaf for leaf in keras.tree.flatten(batch) if isinstance(leaf, tf.Tensor)), None)
    if leaf is None or leaf.shape.rank in (None, 0) or leaf.shape[0] is not None:
        return None
    return tf.cast(tf.shape(leaf)[0], tf.float32)


@contextlib.contextmanager
def _unless_empty(model: keras.Model, count: tf.Tensor) -> Iterator[None]:
    """Keeps the moving averages of a replica without a sample: the mean of nothing is NaN."""
    kept = [doors.raw(v) for layer in own_statistics(model) for v in layer.non_trainable_variables]
    before = [tf.identity(variable) for variable in kept]
    yield
    for variable, value in zip(kept, before, strict=True):
        variable.assign(tf.where(count > 0, variable, value))


def _now_after(values: Sequence) -> tf.Tensor:
    """Seconds since 1970 once these are there."""
    leaves = [v.values if isinstance(v, tf.IndexedSlices) else v for v in values if v is not None]
    with tf.control_dependencies(leaves), tf.device("CPU"):
        return tf.timestamp()


def _none_of_nothing(count: tf.Tensor, summands: Sequence) -> list:
    """Zeros for what a replica without a sample adds: layers that divide by their batch make NaN of it."""
    places = [i for i, value in enumerate(summands) if value is not None]
    sparse = {i: summands[i] for i in places if isinstance(summands[i], tf.IndexedSlices)}
    given = [tf.convert_to_tensor(sparse[i].values if i in sparse else summands[i]) for i in places]
    chosen = tf.cond(
        count > 0, lambda: [tf.identity(v) for v in given], lambda: [tf.zeros(tf.shape(v), v.dtype) for v in given]
    )
    result = list(summands)
    for i, value in zip(places, chosen, strict=True):
        value.set_shape((sparse[i].values if i in sparse else summands[i]).shape)
        result[i] = tf.IndexedSlices(value, sparse[i].indices, sparse[i].dense_shape) if i in sparse else value
    return result


def _first(strategy, value):
    return strategy.experimental_local_results(value)[0]


def _local_mean(strategy, value):
    values = strategy.experimental_local_results(value)
    return values[0] if len(values) == 1 else tf.reduce_mean(tf.stack(values), axis=0)
