"""What a step costs: `model.fit`, `model.fit` with its best `steps_per_execution`, and `trainrt.fit`.

    python benchmarks/step.py [--workloads tiny small ...] [--rounds 5] [--seconds 4] [--json FILE]

Every fit is as long as takes Keras `--seconds` on this machine, so that what a fit costs once does not count as steps:
a run of a second is half over before trainrt has looked into the model and described the data. It goes through its data
again and again, which are 64 MB at most: with more of them the time goes to the machine's memory, which hands out new
pages as slowly as it likes. Each round trains every mode once, in an order that is shuffled anew, on a model that has
been traced before; the printed figure is the median over rounds of that round's ratio to bare `model.fit`. `on`
observes every step, clips by the global norm and writes a log directory; `off` is `observe=False`, and `off_clip` clips
as `on` does: `on_to_off` is `on` to this, the same training without an eye on it. `first` is the ratio of the very
first call, tracing and all. Wall times of other machines, and of this one an hour later, differ; ratios of one run may
be compared.

Some of what `trainrt.fit` does it does once a fit, however long: a look into the model, the diagnosis, the passport.
`once_ms` is what a fit of two batches takes more than Keras's, and the columns named `step` are ratios of the time that
is left when each mode's fit of two batches is taken off: nearer to those of a long training, though the description of
the data, once an array, still counts as steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import trainrt

layers = keras.layers


class Workload(NamedTuple):
    """A model, how many rows of its data are made, and the size of its batches."""

    build: Callable[[], keras.Model]
    data: Callable[[np.random.Generator, int], tuple]
    batch: int


def mlp(inputs: int, *widths: int) -> Callable[[], keras.Model]:
    def build():
        hidden = [layers.Dense(width, "relu") for width in widths]
        return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(10, "softmax")])

    return build


def cnn():
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(10, "softmax"),
        ]
    )


def lstm():
    return keras.Sequential(
        [keras.Input((32,), dtype="int32"), layers.Embedding(5000, 64), layers.LSTM(64), layers.Dense(10, "softmax")]
    )


def transformer():
    inputs = keras.Input((32,), dtype="int32")
    x = layers.Embedding(2000, 64)(inputs)
    for _ in range(2):
        attended = layers.MultiHeadAttention(4, 16)(x, x)
        x = layers.LayerNormalization()(x + attended)
        x = layers.LayerNormalization()(x + layers.Dense(64)(layers.Dense(256, "gelu")(x)))
    return keras.Model(inputs, layers.Dense(10, "softmax")(layers.GlobalAveragePooling1D()(x)))


def vectors(size: int):
    return lambda rng, n: (rng.normal(size=(n, size)).astype("float32"), rng.integers(0, 10, n))


def images(rng, n):
    return rng.normal(size=(n, 32, 32, 3)).astype("float32"), rng.integers(0, 10, n)


def tokens(vocabulary: int):
    return lambda rng, n: (rng.integers(0, vocabulary, (n, 32)).astype("int32"), rng.integers(0, 10, n))


WORKLOADS = {
    "tiny": Workload(mlp(64, 128, 128), vectors(64), 32),
    "small": Workload(mlp(256, 512, 256), vectors(256), 32),
    "mlp4m": Workload(mlp(1024, 2048, 1024), vectors(1024), 64),
    "mlp20m": Workload(mlp(2048, 4096, 2816), vectors(2048), 64),
    "cnn": Workload(cnn, images, 32),
    "lstm": Workload(lstm, tokens(5000), 32),
    "transformer": Workload(transformer, tokens(2000), 32),
}
BEST_EXECUTION = 64
DATA_BYTES = 64 << 20
"""Most bytes of data; a fit that is longer is of several epochs."""


def modes(logdir: str) -> dict[str, tuple[dict, Callable]]:
    """Mode -> what it compiles with, and how it fits."""
    return {
        "keras": ({}, lambda model, *a, **k: model.fit(*a, **k)),
        "keras_best": ({"steps_per_execution": BEST_EXECUTION}, lambda model, *a, **k: model.fit(*a, **k)),
        "off": ({}, lambda model, *a, **k: trainrt.fit(model, *a, observe=False, **k)),
        "off_clip": ({}, lambda model, *a, **k: trainrt.fit(model, *a, observe=False, clip=1.0, **k)),
        "on": ({}, lambda model, *a, **k: trainrt.fit(model, *a, clip=1.0, logdir=logdir, **k)),
    }


def steps_of(workload: Workload, seconds: float) -> int:
    """How many steps take Keras so long."""
    model = workload.build()
    model.compile("adam", "sparse_categorical_crossentropy")
    steps = 8
    while True:
        x, y = workload.data(np.random.default_rng(0), workload.batch * steps)
        model.fit(x, y, batch_size=workload.batch, verbose=0)  # traces the step, and fills the caches
        begun = time.perf_counter()
        model.fit(x, y, batch_size=workload.batch, verbose=0)
        took = time.perf_counter() - begun
        if took > seconds / 4 or x.nbytes > DATA_BYTES:
            return max(8, round(steps * seconds / took))
        steps *= 2


def measure(workload: Workload, rounds: int, seconds_each: float, logdir: str) -> dict:
    count = steps_of(workload, seconds_each)
    most = max(1, DATA_BYTES // workload.data(np.random.default_rng(0), workload.batch)[0].nbytes)
    epochs = -(-count // most)
    count = epochs * (count // epochs)
    x, y = workload.data(np.random.default_rng(0), workload.batch * (count // epochs))
    few = workload.batch * 2
    ready = {}
    first = {}
    for name, (compiled, fit) in modes(logdir).items():
        keras.utils.set_random_seed(0)
        model = workload.build()
        model.compile("adam", "sparse_categorical_crossentropy", **compiled)
        begun = time.perf_counter()
        fit(model, x[:few], y[:few], batch_size=workload.batch, verbose=0)
        first[name] = time.perf_counter() - begun
        fit(model, x, y, batch_size=workload.batch, epochs=epochs, verbose=0)
        ready[name] = (model, fit)
    ratios: dict[str, list[float]] = {name: [] for name in ready}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    once: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        took = {}
        for name in random.sample(list(ready), len(ready)):
            model, fit = ready[name]
            begun = time.perf_counter()
            fit(model, x[:few], y[:few], batch_size=workload.batch, verbose=0)
            between = time.perf_counter()
            fit(model, x, y, batch_size=workload.batch, epochs=epochs, verbose=0)
            took[name] = time.perf_counter() - between
            once[name].append(between - begun)
        for name, value in took.items():
            ratios[name].append(value / took["keras"])
            seconds[name].append(value / count)
    best = [on / best for on, best in zip(seconds["on"], seconds["keras_best"], strict=True)]
    usual = {name: statistics.median(values) for name, values in once.items()}
    steps = {n: [s * count - usual[n] for s in values] for n, values in seconds.items()}
    return {
        "parameters": ready["keras"][0].count_params(),
        "steps": count,
        "keras_ms": 1e3 * statistics.median(seconds["keras"]),
        **{name: statistics.median(values) for name, values in ratios.items() if name != "keras"},
        "spread": {name: [min(v), max(v)] for name, v in ratios.items() if name != "keras"},
        "on_to_best": statistics.median(best),
        "on_to_off": statistics.median([a / b for a, b in zip(seconds["on"], seconds["off_clip"], strict=True)]),
        "first": first["on"] / first["keras"],
        "once_ms": 1e3 * (usual["on"] - usual["keras"]),
        "step_to_best": statistics.median([a / b for a, b in zip(steps["on"], steps["keras_best"], strict=True)]),
        "step_to_off": statistics.median([a / b for a, b in zip(steps["on"], steps["off_clip"], strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long Keras trains each time")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} cores; model.fit = 1")
    columns = ("off", "off_clip", "on", "keras_best", "on_to_best", "on_to_off", "first")
    columns += ("once_ms", "step_to_best", "step_to_off")
    print(f"{'workload':12} {'weights':>10} {'keras ms':>9} " + " ".join(f"{c:>12}" for c in columns), flush=True)
    results = {}
    for name in arguments.workloads:
        with tempfile.TemporaryDirectory() as logdir:
            result = results[name] = measure(WORKLOADS[name], arguments.rounds, arguments.seconds, logdir)
        figures = " ".join(f"{result[c]:12.2f}" for c in columns)
        print(f"{name:12} {result['parameters']:10,} {result['keras_ms']:9.2f} {figures}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
