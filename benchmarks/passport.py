"""What the data passport costs: `trainrt.fit` with it over the same fit without, and its own processor time.

    python -m benchmarks.passport [--workloads cnn ...] [--rounds 7] [--epochs 1]

Each round trains both ways once, in an order that is shuffled anew, on models that were traced before; `with/without`
is the median over rounds of that round's ratio of the process's processor time, which other processes disturb less
than the clock on the wall. `alone` is steadier than a difference of two large times: the data is read without a model,
with the passport and without, and what reading takes more is given a batch and as a share of the step. That is of the
first pass, the dearest, with all that is done once. `arrays` are given as arrays to `fit`, `dataset` as a
`tf.data.Dataset` of batches.
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
    keras.utils.set_random_seed(0)
    model = workload.build()
    model.compile("adam", "sparse_categorical_crossentropy")
    for passport in (True, False):
        fit(model, passport, data, keywords, 1)
    ratios, steps, alone = [], [], []
    for _ in range(rounds):
        took = {passport: fit(model, passport, data, keywords, epochs) for passport in random.sample([True, False], 2)}
        ratios.append(took[True] / took[False])
        steps.append(took[False] / (epochs * STEPS))
        reading = {passport: read(model, passport, data, keywords) for passport in random.sample([True, False], 2)}
        alone.append((reading[True] - reading[False]) / STEPS)
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "step": statistics.median(steps),
        "alone": statistics.median(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["cnn"])
    parser.add_argument("--forms", nargs="+", choices=("arrays", "dataset"), default=["arrays", "dataset"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    print(f"{'workload':10} {'data':8} {'with/without':>13} {'(range)':>15} {'step':>9} {'alone':>9} {'share':>7}")
    for name in options.workloads:
        for form in options.forms:
            found = measure(WORKLOADS[name], form, options.rounds, options.epochs)
            spread = f"({found['low']:.3f} to {found['high']:.3f})"
            print(
                f"{name:10} {form:8} {found['ratio']:13.3f} {spread:>15} {1e6 * found['step']:6.0f} us "
                f"{1e6 * found['alone']:6.1f} us {found['alone'] / found['step']:7.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
