"""How much memory a fit takes at most: trainrt with everything on and off, and Keras.

    python -m benchmarks.memory [--workloads mlp20m cnn] [--rounds 3] [--steps 60]

Each fit has a process of its own, whose largest resident memory is read before its first step, when model, data and
TensorFlow are there, and at its end; printed is the median over rounds of what came on top, in MB, and in copies of the
weights. `generic` observes an Adam that trainrt does not know, and so has to keep the weights of before each update.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

MODES = ("keras", "off", "on", "generic")


def child(name: str, mode: str, steps: int) -> None:
    """Trains, and prints the kB that this took, and those of the weights."""
    import keras
    import numpy as np

    import trainrt
    from benchmarks.step import WORKLOADS

    class Unknown(keras.optimizers.Adam):
        pass

    workload = WORKLOADS[name]
    x, y = workload.data(np.random.default_rng(0), workload.batch * steps)
    keras.utils.set_random_seed(0)
    model = workload.build()
    model.compile(Unknown() if mode == "generic" else "adam", "sparse_categorical_crossentropy")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keywords = {"batch_size": workload.batch, "epochs": 2, "verbose": 0}
    with tempfile.TemporaryDirectory() as logdir:
        if mode == "keras":
            model.fit(x, y, **keywords)
        elif mode == "off":
            trainrt.fit(model, x, y, observe=False, **keywords)
        else:
            trainrt.fit(model, x, y, clip=1.0, logdir=logdir, **keywords)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 4 * model.count_params() >> 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", default=["mlp20m", "cnn"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child, options.steps)
    print(f"{'workload':10} {'weights':>9}  " + "  ".join(f"{mode:>17}" for mode in MODES))
    for name in options.workloads:
        cells = []
        for mode in MODES:
            command = [sys.executable, "-m", "benchmarks.memory", "--child", name, mode, "--steps", str(options.steps)]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(options.rounds)]
            took, weights = zip(*(map(int, run.stdout.split()[-2:]) for run in runs), strict=True)
            median = statistics.median(took)
            cells.append(f"{median / 1024:6.0f} MB = {median / weights[0]:5.1f}")
        print(f"{name:10} {weights[0] / 1024:6.1f} MB  " + "  ".join(f"{cell:>17}" for cell in cells), flush=True)
    return None


if __name__ == "__main__":
    main()
