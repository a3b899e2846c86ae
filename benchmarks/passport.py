"""What the data passport costs: `trainrt.fit` with it over the same fit without, and its own processor time.

    python -m benchmarks.passport [--workloads cnn ...] [--rounds 7] [--epochs 1]

Each round trains both ways once, in an order that is shuffled anew, on models that were traced before; `with/without`
is the median over rounds of that round's ratio of the process's processor time, which other processes disturb less
than the clock on the wall. The rest is steadier than a difference of two large times: the data is read without a model,
with the passport and without, it and twice as much.

  batch    what reading takes more for each batch that there is more, and as a share of the step
  once     what it takes more however long the data is: tracing, the closer look at the first batches, the summary
  all      both together as a share of the first pass; of the passes after, few are watched

`arrays` are given as arrays to `fit`, `dataset` as a `tf.data.Dataset` of batches.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import statistics
import time
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import trainrt
from benchmarks.step import WORKLOADS, Workload
from trainrt.loop import fit as loop
from trainrt.loop.batches import Batches
from trainrt.passport.audit import Audit

STEPS = 300
WITHOUT = functools.partial(Audit, enabled=False)


def data_of(workload: Workload, form: str, x, y) -> tuple[tuple, dict]:
    """What `fit` is given."""
    if form == "arrays":
        return (x, y), {"batch_size": workload.batch}
    return (tf.data.Dataset.from_tensor_slices((x, y)).batch(workload.batch).prefetch(4),), {}


def fit(model: keras.Model, passport: bool, data, keywords, epochs: int) -> float:
    """Seconds of processor time."""
    without = contextlib.nullcontext() if passport else mock.patch.object(loop, "Audit", WITHOUT)
    begun = time.process_time()
    with without:
        trainrt.fit(model, *data, epochs=epochs, verbose=0, **keywords)
    return time.process_time() - begun


def read(model: keras.Model, passport: bool, data, keywords) -> float:
    """Seconds of processor time of a pass without a model, and of the passport where it is asked for."""
    audit = Audit(data[0], shuffle=False, enabled=passport)
    x, y = data if len(data) > 1 else (data[0], None)
    batches = Batches(
        model,
        watched=audit.train,
        steps_per_epoch=None,
        x=x,
        y=y,
        sample_weight=None,
        batch_size=keywords.get("batch_size"),
        shuffle=len(data) > 1,  # of a dataset Keras says that it does not count
        class_weight=None,
    )
    begun = time.process_time()
    with audit:
        epoch = batches.epoch()
        place = next(epoch)
        count = batches.num_batches
        if not hasattr(place.iterator, "order"):
            _drain(place.iterator, tf.constant(count))
        with contextlib.suppress(StopIteration):
            epoch.send((count, False))
        if passport:
            audit.passport()
    return time.process_time() - begun


@tf.function(reduce_retracing=True)
def _drain(iterator, count):
    for _ in tf.range(count):
        iterator.get_next()


def measure(workload: Workload, form: str, rounds: int, epochs: int) -> dict[str, float]:
    x, y = workload.data(np.random.default_rng(0), workload.batch * STEPS)
    data, keywords = data_of(workload, form, x, y)
    twice, _ = data_of(workload, form, np.concatenate([x, x]), np.concatenate([y, y]))
    keras.utils.set_random_seed(0)
    model = workload.build()
    model.compile("adam", "sparse_categorical_crossentropy")
    for passport in (True, False):
        fit(model, passport, data, keywords, 1)
    ratios, steps, reading = [], [], []
    for _ in range(rounds):
        took = {passport: fit(model, passport, data, keywords, epochs) for passport in random.sample([True, False], 2)}
        ratios.append(took[True] / took[False])
        steps.append(took[False] / (epochs * STEPS))
        ways = [(passport, times) for passport in (True, False) for times in (1, 2)]
        reading.append(
            {way: read(model, way[0], (data, twice)[way[1] - 1], keywords) for way in random.sample(ways, 4)}
        )
    whole, double = (statistics.median(r[True, times] - r[False, times] for r in reading) for times in (1, 2))
    batch = (double - whole) / STEPS
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "step": statistics.median(steps),
        "batch": batch,
        "once": whole - batch * STEPS,
        "all": whole / STEPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["cnn"])
    parser.add_argument("--forms", nargs="+", choices=("arrays", "dataset"), default=["arrays", "dataset"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    print(
        f"{'workload':10} {'data':8} {'with/without':>13} {'(range)':>15} {'step':>9} {'batch':>9} {'share':>7} "
        f"{'once':>9} {'all':>7}"
    )
    for name in options.workloads:
        for form in options.forms:
            found = measure(WORKLOADS[name], form, options.rounds, options.epochs)
            spread = f"({found['low']:.3f} to {found['high']:.3f})"
            print(
                f"{name:10} {form:8} {found['ratio']:13.3f} {spread:>15} {1e6 * found['step']:6.0f} us "
                f"{1e6 * found['batch']:6.1f} us {found['batch'] / found['step']:7.2%} {1e3 * found['once']:6.1f} ms "
                f"{found['all'] / found['step']:7.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
