"""What looking into the model costs: `trainrt.fit` with its looks over the same without, side by side.

    python -m benchmarks.probe [--workloads tiny cnn ...] [--rounds 5] [--seconds 4]

Each round trains both ways once, in an order that is shuffled anew, on models that were traced before; printed are the
median over rounds of that round's ratio in CPU seconds of the process, which other processes disturb least, and the
median share of it that the looks say they took (by the clock); `first` is the very first fit, tracing and all.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import trainrt
from benchmarks.step import WORKLOADS, Workload, steps_of
from trainrt.looks.probe import Prober


def fit(model: keras.Model, looking: bool, x, y, **arguments) -> tuple[float, float, int]:
    """CPU seconds of a fit, seconds that its looks took, and how many they were."""
    begun = time.process_time()
    if looking:
        run = trainrt.fit(model, x, y, verbose=0, **arguments).run
    else:
        with mock.patch.object(Prober, "_unfit", return_value="not asked for"):
            run = trainrt.fit(model, x, y, verbose=0, **arguments).run
    took = time.process_time() - begun
    looks = [document.content for document in run.documents if document.kind == "probe"]
    spent = [look["spent_s"] for look in looks if "spent_s" in look]
    return took, max(spent, default=0.0), len(spent)


def measure(workload: Workload, rounds: int, seconds_each: float) -> dict[str, float]:
    x, y = workload.data(np.random.default_rng(0), workload.batch * steps_of(workload, seconds_each))
    models, first = {}, {}
    for looking in (True, False):
        keras.utils.set_random_seed(0)
        models[looking] = workload.build()
        models[looking].compile("adam", "sparse_categorical_crossentropy")
        first[looking] = fit(models[looking], looking, x, y, batch_size=workload.batch)
        fit(models[looking], looking, x, y, batch_size=workload.batch)
    ratios, shares, counts, seconds = [], [], [], []
    for _ in range(rounds):
        took = {}
        for looking in random.sample([True, False], 2):
            took[looking] = fit(models[looking], looking, x, y, batch_size=workload.batch)
        ratios.append(took[True][0] / took[False][0])
        shares.append(took[True][1] / took[True][0])
        counts.append(took[True][2])
        seconds.append(took[False][0])
    return {
        "ratio": statistics.median(ratios),
        "share": statistics.median(shares),
        "looks": statistics.median(counts),
        "seconds": statistics.median(seconds),
        "first": first[True][1] / first[True][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["tiny", "cnn"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long Keras trains each time")
    arguments = parser.parse_args()
    print(f"{'workload':12} {'looking/not':>12} {'share':>8} {'looks':>6} {'run, s':>8} {'share, first fit':>17}")
    for name in arguments.workloads:
        result = measure(WORKLOADS[name], arguments.rounds, arguments.seconds)
        print(
            f"{name:12} {result['ratio']:12.3f} {result['share']:8.2%} {result['looks']:6.0f} {result['seconds']:8.2f} "
            f"{result['first']:17.2%}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
