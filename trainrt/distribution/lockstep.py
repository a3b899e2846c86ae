"""What replicas and workers have to have in common while they train, and the proof that they do.

Replicas hold copies of the weights, the optimizer's state and the seeds. The same sums and the same arithmetic on each
keep them equal; nothing in TensorFlow looks. Here every copy is digested (`digest.py`) at chunk ends, and one that has
drifted is told by name. Workers, which are processes, also have to make the same calls in the same order, or they wait
for each other for ever: how many steps a call takes and when to stop are settled together.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.distribution import replicas
from trainrt.endurance.checkpoint import Checkpoint
from trainrt.endurance.resume import Keeper
from trainrt.loop.batches import Batches
from trainrt.record.digest import digest

COMPARE_SHARE = 0.02
"""Most of the training's time that digests may take; the end of an epoch is compared all the same."""

LISTED = 20
"""Most variables that a document names."""

OWN = ("steps", "wall_s", "waited_s", "input_wait_s")
"""What each worker knows of itself: its steps after the first call, the seconds that they took with what was between
them, and the seconds of those that it waited for the other workers, and for its batches."""


class Seat(NamedTuple):
    """A worker's place among all: `worker` of `workers`; the one numbered 0 writes the record."""

    worker: int
    workers: int


def seat(strategy: tf.distribute.Strategy) -> Seat:
    """Where this process sits in the strategy's cluster."""
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return Seat(0, 1)
    cluster = resolver.cluster_spec().as_dict()
    chiefs, workers = len(cluster.get("chief", ())), len(cluster.get("worker", ()))
    if chiefs + workers < 2:
        return Seat(0, 1)
    return Seat(int(resolver.task_id or 0) + (chiefs if resolver.task_type == "worker" else 0), chiefs + workers)


def meet(model: keras.Model, shuffled: bool, keeping: bool) -> None:
    """Prepares this process, as one of several replicas' hosts, before any data are read.

    Args:
      shuffled: Whether Keras shuffles arrays: every worker holds all of them and takes its share of each batch, so all
        have to shuffle alike.
      keeping: Whether checkpoints are written: a run that goes on from one has to shuffle as the run before did.

    Raises:
      ValueError: They would not.
    """
    strategy = model.distribute_strategy
    if not replicas.several(strategy):
        return
    own = doors.global_seed()
    if shuffled and keeping and own is None:
        raise ValueError(
            "A resumed run of several replicas reads the arrays again in the same order, which takes a seed. Received: "
            "checkpoint=, shuffle=True and none. Call keras.utils.set_random_seed first."
        )
    if seat(strategy).workers == 1:
        return
    doors.repair_workers()
    seeds = Lockstep(model).exchange([0, secrets.randbits(31)] if own is None else [1, own])
    if not seeds[:, 0].any():
        tf.random.set_seed(int(seeds[0, 1]))
    elif shuffled and (seeds != seeds[:1]).any():
        told = ", ".join(str(seed) if given else "none" for given, seed in seeds.tolist())
        raise ValueError(
            "Workers that shuffle arrays have to shuffle alike, or they train on some samples twice and on others "
            f"never. Received: the seeds {told}. Call keras.utils.set_random_seed with the same seed on every worker, "
            "or on none, or pass shuffle=False."
        )


def keeper(model: keras.Model, settings: Checkpoint | None, batches: Batches) -> Keeper | None:
    """What saves the training: each of several workers for itself, below the directory, all at the same steps.

    Raises:
      ValueError: Workers cannot save at the same steps.
    """
    if settings is None:
        return None
    if replicas.several(model.distribute_strategy) and settings.source is None and batches.over_arrays:
        settings = dataclasses.replace(settings, source="skip")  # the iterators of replicas have no state to save
    place = seat(model.distribute_strategy)
    if place.workers == 1:
        return Keeper(settings, model, batches)
    if isinstance(settings.every, datetime.timedelta):
        raise ValueError(
            "Workers save at the same step, and no two clocks agree on one. Received: "
            f'checkpoint with every={settings.every!r}. Pass every="epoch" or a number of steps.'
        )
    own = dataclasses.replace(settings, directory=Path(settings.directory) / f"worker-{place.worker}")
    kept = Keeper(own, model, batches)
    kept.agree(Lockstep(model).exchange)
    return kept


class Lockstep:
    """Keeps the replicas of one training together, and proves that they are.

    Attributes:
      seat: Where this worker sits.
      calls: How many executions the next call takes, as the workers agreed; None where a worker decides for itself.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._strategy = model.distribute_strategy
        self.seat = seat(self._strategy)
        self.calls: int | None = 1 if self.seat.workers > 1 else None
        self._sum = tf.function(
            functools.partial(self._summed), input_signature=[tf.TensorSpec([None, None], tf.int64)]
        )
        self._due = True
        self._compared_at = time.monotonic()
        self._next = 0.0
        self._checks = 0
        self._identical_until = -1
        self._drift: dict[str, Any] | None = None
        self._calls = 0
        self._own = np.zeros(len(OWN))

    def check(self, **numbers: int | None) -> None:
        """Checks that all workers were asked for the same.

        Raises:
          ValueError: They were not; they would wait for each other for ever.
        """
        if self.seat.workers == 1:
            return
        given = self.exchange([-1 if number is None else number for number in numbers.values()])
        for i, name in enumerate(numbers):
            if (given[:, i] != given[0, i]).any():
                raise ValueError(
                    f"All workers have to take the same steps. Received: {name}={given[:, i].tolist()}, a number a "
                    "worker. Every worker is given the whole of the data, and the same arguments."
                )

    def settle(self, calls: int, came: int | None) -> int | None:
        """Agrees with the other workers, after a call, on what comes next.

        Args:
          calls: How many executions this worker would run in the next call; the least of all is `self.calls`.
          came: The signal that asked this worker to end, if one did.

        Returns:
          The signal that all end by now; None: they go on.
        """
        self._due = time.monotonic() >= self._next
        if self.seat.workers == 1:
            return came
        begun = time.monotonic()
        rows = self.exchange([bool(self._model.stop_training), calls, self._due, came or 0])
        if self._calls > 1:
            self._own[OWN.index("waited_s")] += time.monotonic() - begun  # the seconds between two calls hold it
        self._model.stop_training = bool(rows[:, 0].any())
        self.calls = int(rows[:, 1].min())
        self._due = bool(rows[0, 2])
        return int(rows[:, 3].max()) or None

    def took(self, times: np.ndarray, reduce_s: np.ndarray) -> None:
        """Takes note of a call's steps; not of the first call, in which each worker traces for itself.

        Args:
          times: [steps, 3] as `Timing.call` returns them.
          reduce_s: [steps] seconds of each that this worker waited for the sum of the gradients.
        """
        self._calls += 1
        if self._calls > 1:
            wall = float(times[:, 0].sum() + times[:, 2].sum())
            self._own += [len(times), wall, np.nansum(reduce_s), np.nansum(times[:, 1])]

    def workers(self, step: int) -> dict[str, Any] | None:
        """Where the time of each worker went so far, for the document "workers"; all have to ask. None: only one."""
        if self.seat.workers == 1:
            return None
        rows = self.exchange([int(1e6 * number) for number in self._own]) / 1e6
        return {"step": step, **{name: rows[:, i].tolist() for i, name in enumerate(OWN)}}

    def compare(self, step: int, at_once: bool = False) -> bool:
        """Compares all replicas after a step, where that is due; returns whether something new is to be told."""
        if not (self._due or at_once) or self._drift is not None:
            return False
        begun = time.monotonic()
        variables = self._variables()
        local = self._strategy.num_replicas_in_sync // self.seat.workers
        digests = np.array([[digest(copies[i].numpy()) for _, copies in variables] for i in range(local)], np.uint64)
        everywhere = self._exchange_rows(digests.view(np.int64))
        first = not self._checks
        self._checks += 1
        drifted = _odd_ones_out(everywhere)
        if drifted:
            self._drift = {
                "step": step,
                "identical_until": self._identical_until,
                "count": len(drifted),
                "variables": [
                    {"path": variables[v][0], "replicas": [int(i) for i in odd]}
                    for v, odd in list(drifted.items())[:LISTED]
                ],
            }
        else:
            self._identical_until = step
        took = time.monotonic() - begun
        self._next = time.monotonic() + took / COMPARE_SHARE
        return first or bool(drifted)

    def content(self) -> dict[str, Any]:
        """What is known of the replicas, for the document "replicas" of the record."""
        return {
            "strategy": "MirroredStrategy" if self.seat.workers == 1 else "MultiWorkerMirroredStrategy",
            "replicas": self._strategy.num_replicas_in_sync,
            "workers": self.seat.workers,
            "comparisons": self._checks,
            "identical_until": self._identical_until,
            "drift": self._drift,
            "batch_statistics": [layer.path for layer in replicas.own_statistics(self._model)],
        }

    def exchange(self, numbers: Sequence[int]) -> np.ndarray:
        """[workers, K] int64: the K numbers of every worker. All have to call it, with as many."""
        local = self._strategy.num_replicas_in_sync // self.seat.workers
        rows = np.zeros([local, len(numbers)], np.int64)
        rows[0] = numbers
        return self._exchange_rows(rows)[::local]

    def _exchange_rows(self, rows: np.ndarray) -> np.ndarray:
        """[replicas, K] int64 of all replicas, from [replicas of this worker, K]."""
        if self.seat.workers == 1:
            return rows
        local = len(rows)
        everybody = np.zeros([self._strategy.num_replicas_in_sync, rows.shape[1]], np.int64)
        everybody[self.seat.worker * local :][:local] = rows
        return self._sum(tf.constant(everybody)).numpy()

    @tf.autograph.experimental.do_not_convert
    def _summed(self, rows: tf.Tensor) -> tf.Tensor:
        """The sum over workers of what each gives."""
        local = self._strategy.num_replicas_in_sync // self.seat.workers

        def on_replica():
            context = tf.distribute.get_replica_context()
            mine = tf.identity(rows) if replicas.number() % local == 0 else tf.zeros_like(rows)
            return context.all_reduce("SUM", mine)

        return self._strategy.experimental_local_results(self._strategy.run(on_replica))[0]

    def _variables(self) -> list[tuple[str, Sequence[tf.Variable]]]:
        """(path, copies) of the variables that have to be the same on every replica.

        Not so are the sums of metrics, and the moving averages of a BatchNormalization that is not synchronised: in
        Keras 3 each replica keeps its own, from its own shares of the batches.
        """
        own = {
            id(doors.raw(v)) for layer in replicas.own_statistics(self._model) for v in layer.non_trainable_variables
        }
        optimizers = doors.optimizers(self._model)
        found: dict[int, Any] = {}
        for variable in (*self._model.variables, *(v for o in optimizers for v in o.variables)):
            raw = doors.raw(variable)
            if (
                id(raw) not in own
                and hasattr(raw, "values")
                and raw.synchronization != tf.VariableSynchronization.ON_READ
            ):
                found.setdefault(id(raw), (getattr(variable, "path", raw.name), raw.values))
        return list(found.values())


def _odd_ones_out(digests: np.ndarray) -> dict[int, np.ndarray]:
    """Variable -> the replicas whose digest is not that of the most (of the first, where two are as many)."""
    odd = {}
    for v in np.flatnonzero((digests != digests[:1]).any(axis=0)):
        values, first, counts = np.unique(digests[:, v], return_index=True, return_counts=True)
        usual = values[max(range(len(values)), key=lambda i: (counts[i], -first[i]))]
        odd[int(v)] = np.flatnonzero(digests[:, v] != usual)
    return odd
