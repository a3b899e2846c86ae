"""What digests cost: a fit with them against the same fit without, on a workload of benchmarks/step.py.

    python benchmarks/digests.py [--workloads cnn ...] [--rounds 9] [--steps 400]

Each round trains every mode once, in an order that is shuffled anew; printed is the median over rounds of that round's
ratio to `digests=False`, with the smallest and largest: of the wall time, and of the processor time of all threads,
which other work on the machine disturbs less. `default` digests all variables after 1, 2, 4, ..., 1024 steps,
then after every 1024th, and at the end of each epoch; the numbers digest all stages inside every n-th step.

The last line is steadier than a difference of two large times: the processor time of one digest of all variables beside
that of a step, and what the default places of the first 1,024 steps make of it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from step import WORKLOADS  # the file beside this one

import trainrt
from trainrt.determinism.digests import LAST_DOUBLING, Digests, Ledger

MODES: dict[str, bool | int] = {"off": False, "default": True, "100": 100, "10": 10, "1": 1}


def measure(name: str, rounds: int, steps: int, modes: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Mode -> a ratio to `off` for each round, of wall and of processor time."""
    workload = WORKLOADS[name]
    x, y = workload.data(np.random.default_rng(0), workload.batch * steps)
    few = workload.batch * 4
    models = {}
    for mode in modes:
        keras.utils.set_random_seed(0)
        models[mode] = workload.build()
        models[mode].compile("adam", "sparse_categorical_crossentropy")
        trainrt.fit(models[mode], x[:few], y[:few], batch_size=workload.batch, verbose=0, clip=1.0, digests=MODES[mode])
    ratios: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        took = {}
        for mode in random.sample(modes, len(modes)):
            begun = time.perf_counter(), time.process_time()
            trainrt.fit(models[mode], x, y, batch_size=workload.batch, verbose=0, clip=1.0, digests=MODES[mode])
            took[mode] = time.perf_counter() - begun[0], time.process_time() - begun[1]
        for mode in modes:
            ratios[mode].append((took[mode][0] / took["off"][0], took[mode][1] / took["off"][1]))
    return ratios


def alone(name: str, steps: int) -> str:
    """The processor time of a step and of a digest of all variables, and the share of the default in 1,024 steps."""
    workload = WORKLOADS[name]
    keras.utils.set_random_seed(0)
    x, y = workload.data(np.random.default_rng(0), workload.batch * steps)
    model = workload.build()
    model.compile("adam", "sparse_categorical_crossentropy")
    step_s, digest_s = [], []
    for _ in range(4):
        begun = time.process_time()
        trainrt.fit(model, x, y, batch_size=workload.batch, verbose=0)
        step_s.append((time.process_time() - begun) / steps)
    for number in range(30):
        ledger = Ledger(Digests(), model, lambda describe: describe())
        begun = time.thread_time()
        ledger.variables(number)
        digest_s.append(time.thread_time() - begun)
    step, digest = min(step_s[1:]), statistics.median(digest_s)
    plan, places, at = Digests(), 0, 0
    while at < LAST_DOUBLING:
        at += plan.left(at)
        places += 1
    share = places * digest / (LAST_DOUBLING * step)
    return f"{name:12} step {1e3 * step:.2f} ms, digest {1e3 * digest:.2f} ms, {places} in 1,024 steps: {share:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["cnn"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    modes = list(dict.fromkeys(["off", *options.modes]))
    for name in options.workloads:
        for mode, ratios in measure(name, options.rounds, options.steps, modes).items():
            wall, processor = (
                f"{statistics.median(column):6.3f}  ({min(column):.3f} to {max(column):.3f})"
                for column in zip(*ratios, strict=True)
            )
            print(f"{name:12} {mode:8} wall {wall}   processor {processor}", flush=True)
        print(alone(name, min(options.steps, 120)), flush=True)


if __name__ == "__main__":
    main()
