"""Several replicas train as one: gradients are reduced first, then measured and clipped once, then applied.

Keras reduces inside of the optimizer, after its clip, so that N replicas clip N gradients and may move N times as far
as the bound allows (Keras 3.15). Here the reduction stands before everything else, as in a step on one device with the
whole batch: the gradient that is recorded is the global one, and what follows happens on every replica alike. Each runs
the whole of `optimizer.apply` on its own copy of the weights, so that gradient accumulation and loss scaling, which
branch, work as on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.update import Observer, scaled

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


class Replicas(Observer):
    """An `Observer` of all replicas at once: what it saw is what they did together.

    It stands at `apply` around `strategy.run`, where the replicas meet.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._of_replica: dict[Any, dict[str, tf.Tensor]] = {}

    def run(self, model: keras.Model, batch) -> tuple[Any, tf.Tensor]:
        """One step on a distributed batch -> (logs, means over the replicas of this worker; vector).

        Called in a graph, or eagerly; in a cross-replica context.
        """
        strategy = model.distribute_strategy
        with self.watch(model), doors.distinct_seeds():
            outputs = strategy.run(model.train_step, args=(batch,))
        logs = keras.tree.map_structure(lambda value: _local_mean(strategy, value), outputs)
        return logs, self.pack(logs) if self._measuring else None

    def _saw_losses(self, losses: dict[str, tf.Tensor]) -> None:
        self._of_replica[number()] = losses

    def _apply(self, optimizer, apply):
        def watched(grads, trainable_variables=None):
            context = tf.distribute.get_replica_context()
            if self._inside or context is None or not len(grads):
                return apply(grads, trainable_variables)
            variables = None if trainable_variables is None else list(trainable_variables)
            losses = self._of_replica.pop(number(), {})
            summed = _sum(context, [*grads, *losses.values()])
            gradients, totals = summed[: len(grads)], summed[len(grads) :]

            def together(strategy, totals, *gradients):
                self._losses = dict(zip(losses, (_first(strategy, total) for total in totals), strict=True))
                self._inside = True
                try:
                    self._everywhere(strategy, optimizer, apply, gradients, variables)
                finally:
                    self._inside = False

            return context.merge_call(together, args=(totals, *gradients))

        return watched

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


def _first(strategy, value):
    return strategy.experimental_local_results(value)[0]


def _local_mean(strategy, value):
    values = strategy.experimental_local_results(value)
    return values[0] if len(values) == 1 else tf.reduce_mean(tf.stack(values), axis=0)
