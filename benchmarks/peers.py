"""What others charge for a look at the training, and what they show. One command, side by side:

    python benchmarks/peers.py [--rounds 5] [--epochs 2] [--only NAME ...] [--workload NAME ...] [--torch PYTHON]

Every way runs in a process of its own, which first trains bare and then alternates bare and watched rounds: `time` is
the median of the watched rounds over that of the bare ones, the first, which traces, left out. `memory` is the peak of
the process over that of one that trains bare. `bytes/step` is what lies in the log directory per step of training.

trainrt's `time` may be under 1: its loop saves more than its looking costs. PyTorch's monitors, each over a bare loop
of its own framework (`peers_torch.py`), run in the interpreter that `--torch` names, where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SHOWS = {
    "bare": "epoch averages of loss and metrics",
    "keras": "batch loss; histograms of weights once an epoch; no gradients, no updates",
    "by_hand": "norm and histogram of each gradient in each step; no updates, no slots, no causes",
    "debugger": "NaN and infinity counts of every tensor of every op; no updates, no ratios",
    "trainrt": "gradient before and after the clip, weight, true update and slots of each weight in each step; causes",
    "torch": "nothing",
    "composer": "norms of each gradient after the clip, moment and weight, and of a step made up from the moments",
    "cockpit": "gradient norms and histogram, tests of noise over the single rows' gradients, distance, step size",
}
TORCH = ("torch", "composer", "cockpit")
WORKLOADS = ("mlp", "cnn")


def model_of(workload: str):
    import keras

    layers = {
        "mlp": [keras.layers.Flatten(), keras.layers.Dense(512, "relu"), keras.layers.Dense(512, "relu")],
        "cnn": [keras.layers.Conv2D(32, 3, activation="relu"), keras.layers.Conv2D(32, 3, activation="relu"),
                keras.layers.Flatten(), keras.layers.Dense(64, "relu")],
    }[workload]  # fmt: skip
    return keras.Sequential([keras.Input((8, 8, 1)), *layers, keras.layers.Dense(10)])


def compiled(model):
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"])
    return model


def bare(workload: str, data, epochs: int, logdir: str) -> Callable[[], None]:
    model = compiled(model_of(workload))
    return lambda: model.fit(*data, batch_size=32, epochs=epochs, verbose=0)


def keras_(workload: str, data, epochs: int, logdir: str) -> Callable[[], None]:
    import keras

    model = compiled(model_of(workload))

    def run():
        board = keras.callbacks.TensorBoard(logdir, histogram_freq=1, update_freq=1)
        model.fit(*data, batch_size=32, epochs=epochs, verbose=0, callbacks=[board])

    return run


def by_hand(workload: str, data, epochs: int, logdir: str) -> Callable[[], None]:
    """The train step that people write: gradients by hand, one summary a weight."""
    import keras
    import tensorflow as tf

    writer = tf.summary.create_file_writer(logdir)

    class Watched(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred)
            gradients = tape.gradient(loss, self.trainable_variables)
            with writer.as_default(step=tf.cast(self.optimizer.iterations, tf.int64)):
                for variable, gradient in zip(self.trainable_variables, gradients, strict=True):
                    tf.summary.scalar(f"gradient_norm/{variable.path}", tf.norm(gradient))
                    tf.summary.histogram(f"gradient/{variable.path}", gradient)
            self.optimizer.apply(gradients, self.trainable_variables)
            for metric in self.metrics:
                metric.update_state(loss) if metric.name == "loss" else metric.update_state(y, y_pred)
            return {metric.name: metric.result() for metric in self.metrics}

    inner = model_of(workload)
    model = compiled(Watched(inner.inputs, inner.outputs))
    return lambda: (model.fit(*data, batch_size=32, epochs=epochs, verbose=0), writer.flush())


def debugger(workload: str, data, epochs: int, logdir: str) -> Callable[[], None]:
    """TF Debugger V2: it instruments what is traced from the point on at which it is switched on."""
    import tensorflow as tf

    model = compiled(model_of(workload))
    writers = []

    def run():
        if not writers:
            dump = tf.debugging.experimental.enable_dump_debug_info
            writers.append(dump(logdir, tensor_debug_mode="CONCISE_HEALTH", circular_buffer_size=-1))
        model.fit(*data, batch_size=32, epochs=epochs, verbose=0)
        writers[0].FlushNonExecutionFiles()
        writers[0].FlushExecutionFiles()

    return run


def trainrt_(workload: str, data, epochs: int, logdir: str) -> Callable[[], None]:
    import trainrt

    model = compiled(model_of(workload))
    return lambda: trainrt.fit(model, *data, batch_size=32, epochs=epochs, verbose=0, logdir=logdir, clip=1.0)


WAYS = {"bare": bare, "keras": keras_, "by_hand": by_hand, "debugger": debugger, "trainrt": trainrt_}


def measure(way: str, workload: str, rounds: int, epochs: int) -> dict:
    """Times one way in this process."""
    import keras

    from trainrt import digits

    data, _ = digits.load()
    steps = -(-len(data[1]) // 32) * epochs
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as logdir:
        plain = bare(workload, data, epochs, "")
        watched = WAYS[way](workload, data, epochs, logdir)
        times: dict[str, list[float]] = {"plain": [], "watched": []}

        def timed(name: str, run: Callable[[], None]) -> None:
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)

        plain()
        if way == "debugger":  # once it is on it watches the whole process
            for _ in range(rounds):
                timed("plain", plain)
        watched()
        before = _bytes(logdir)
        for _ in range(rounds):
            if way != "debugger":
                timed("plain", plain)
            timed("watched", watched)
        logged = (_bytes(logdir) - before) / (steps * rounds)
    ratio = statistics.median(times["watched"]) / statistics.median(times["plain"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "time": ratio,
        "bare_ms": 1e3 * statistics.median(times["plain"]) / steps,
        "peak_kib": peak,
        "bytes": logged,
    }


def _bytes(directory: str) -> int:
    return sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())


def _in_its_own_process(way: str, workload: str, rounds: int, epochs: int, torch: str) -> dict:
    if way in TORCH:
        command = [torch, str(Path(__file__).with_name("peers_torch.py")), way, workload, str(rounds), str(epochs)]
    else:
        command = [sys.executable, __file__, "--measure", way, workload, str(rounds), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"error": told[-1] if told else f"the process ended with {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=(*WAYS, *TORCH))
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has torch, mosaicml and cockpit")
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, workload, rounds, epochs = options.measure
        print(json.dumps(measure(way, workload, int(rounds), int(epochs))))
        return
    ways = options.only or [*WAYS, *(TORCH if options.torch else ())]
    print(f"{os.cpu_count()} cores; batches of 32, Adam; medians of {options.rounds} alternating rounds\n")
    print(f"{'workload':9} {'way':9} {'time':>7} {'memory':>7} {'bytes/step':>11}  shows")
    for workload in options.workload:
        peaks: dict[bool, float] = {}  # of the first way of each framework, the bare one
        for way in ways:
            found = _in_its_own_process(way, workload, options.rounds, options.epochs, options.torch or sys.executable)
            if "error" in found:
                print(f"{workload:9} {way:9} could not be measured: {found['error'][:100]}", flush=True)
                continue
            bare_peak = peaks.setdefault(way in TORCH, found["peak_kib"] if way in ("bare", "torch") else float("nan"))
            memory = found["peak_kib"] / bare_peak
            print(
                f"{workload:9} {way:9} {found['time']:7.2f} {memory:7.2f} {found['bytes']:11,.0f}  {SHOWS[way]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
