"""What watching the time costs: the clock in the loop, telemetry, and a traced step.

    python benchmarks/trace.py [--rounds 12] [--seconds 0.6] [--only tiny]

Each mode has a model of its own, compiled once. A round trains each for a moment, in an order shuffled anew, and reads
the processor time of every epoch: windows so short that what else runs falls on few of them. A mode's figure
for a round is the median of its windows; printed is the median over rounds of the ratio to the same round's `bare`,
with its quartiles, and what that is in microseconds a step. Processor time, not the clock on the wall, which other
processes disturb more.

  bare       everything observed, but no clock, no telemetry, no notes of traces
  clock      the clock: two timestamps a step where batches are waited for, one where the loop gathers them
  later      the same in a training of more than 20 s: steps that are short are clocked in one call of many
  telemetry  a sample a second, and a look at the main thread 20 times a second
  all        all of it, as `fit` does it in its first 20 s; `all later`: then

`tiny` steps take a tenth of a millisecond, the dearest case; `small` ones about one; `listening` has a callback of the
user's at every batch, so that each step is a call. `single` runs one step a call, `traced` does so under the profiler,
as the steps of a window do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import trainrt
from trainrt.device import retracing, telemetry, timing, trace
from trainrt.loop import step, training
from trainrt.update import native_ops

BATCH = 32
MODES = ("bare", "clock", "later", "telemetry", "all", "all later")
CASES = {"tiny arrays": (128, 0), "tiny tf.data": (128, 0), "small tf.data": (640, 0), "listening": (128, 1)}
"""Width of the model, and whether somebody listens to every batch."""


class NoTiming(timing.Timing):
    """Takes no time."""

    def of(self, part):
        return contextlib.nullcontext()

    def call(self, first, steps, begun, ended, clock, traced=False):
        return None


class NoTelemetry(contextlib.AbstractContextManager):
    def __init__(self, *arguments):
        pass

    def __exit__(self, *error):
        pass


class NoRetracing(retracing.Retracing):
    def watch(self):
        return contextlib.nullcontext()


def choose(mode: str) -> None:
    """Puts what a mode leaves out away; a model compiles its loop in the mode of its first fit."""
    clock, watch = mode not in ("bare", "telemetry"), mode in ("telemetry", "all", "all later")
    timing.SPARED_AFTER_S = 0.0 if mode.endswith("later") else AFTER_S
    step.CLOCK = clock
    training.timing.Timing = REAL[0] if clock else NoTiming
    training.Retracing = REAL[1] if clock else NoRetracing
    training.Telemetry = REAL[2] if watch else NoTelemetry


AFTER_S = timing.SPARED_AFTER_S
REAL = (timing.Timing, retracing.Retracing, telemetry.Telemetry)


def model_of(width: int = 128) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), *[keras.layers.Dense(width, "relu") for _ in range(2)]])
    model.add(keras.layers.Dense(10))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class Windows(keras.callbacks.Callback):
    """Processor time of each epoch but the first."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._begun = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        if epoch:
            self.seconds.append(time.process_time() - self._begun)


class Listening(Windows):
    def on_train_batch_end(self, batch, logs=None):
        pass


def always_on(case: str, rounds: int, seconds: float) -> tuple[dict[str, list[float]], float]:
    """Mode -> [rounds] of its ratio to bare, and the seconds of a bare step."""
    width, listening = CASES[case]
    steps = 100 if listening else 300
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH * steps, 64)).astype("float32"), rng.integers(0, 10, BATCH * steps)
    as_dataset = case.endswith("tf.data")
    data = (tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache().prefetch(4),) if as_dataset else (x, y)
    keywords = {"shuffle": False} if as_dataset else {"batch_size": BATCH}

    def windows(mode: str, epochs: int) -> list[float]:
        choose(mode)
        seen = Listening() if listening else Windows()
        trainrt.fit(models[mode], *data, epochs=epochs, verbose=0, callbacks=[seen], **keywords)
        return seen.seconds

    models = {mode: model_of(width) for mode in MODES}
    for mode in MODES:
        windows(mode, 4)
    epochs = int(np.clip(seconds / statistics.median(windows("all", 4)), 4, 60))
    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    bare = []
    for _ in range(rounds):
        took = {mode: statistics.median(windows(mode, epochs)) for mode in random.sample(MODES, len(MODES))}
        bare.append(took["bare"] / steps)
        for mode in MODES:
            ratios[mode].append(took[mode] / took["bare"])
    return ratios, statistics.median(bare)


def traced(rounds: int) -> dict[str, list[float]]:
    """[rounds] of the ratio of a traced step to the same one a call, and to many a call; and of a trace's figures."""
    choose("all")
    model = model_of()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH * 600, 64)).astype("float32"), rng.integers(0, 10, BATCH * 600)
    found: dict[str, list[float]] = {name: [] for name in ("single", "many", "bytes", "stop_s", "reading_s")}
    began = trace.Tracing.begin
    first, stop = 300, 360
    trainrt.fit(model, x, y, batch_size=BATCH, verbose=0, trace=(first, stop))
    for _ in range(rounds):
        step_s: dict[str, float] = {}
        told: dict = {}
        with tempfile.TemporaryDirectory() as logdir:
            for mode in random.sample(("single", "traced"), 2):
                if mode == "single":
                    trace.Tracing.begin = lambda self, number: False
                history = trainrt.fit(model, x, y, batch_size=BATCH, verbose=0, trace=(first, stop), logdir=logdir)
                trace.Tracing.begin = began
                step_s[mode] = float(np.median(history.run.scalar("step_s")[first:stop]))
                step_s["many"] = float(np.median(history.run.scalar("step_s")[stop + 20 :]))
                told = history.run.document("trace") or told  # "single" tells of none
        for name in ("single", "many"):
            found[name].append(step_s["traced"] / step_s[name])
        for name in ("bytes", "stop_s", "reading_s"):
            found[name].append(told[name] / (stop - first if name == "bytes" else 1))
    return found


def clock_us(native: bool, rounds: int = 60, steps: int = 300) -> tuple[float, float]:
    """Processor time that the clock adds to a step, in microseconds: of its end, and of its end and its batch.

    `native`: in the op that makes the row anyway, as where the kernels are there, or by TensorFlow's ops behind it.
    """

    def compiled(stamps: int):
        row_size = 256

        @tf.function
        def run():
            def body(number, x, rows):
                ready = step._now_after(number, native) if stamps > 1 else tf.constant(0.0, tf.float64)
                x = tf.sin(x)
                if native:
                    row = native_ops.row([x, ready] if stamps else [x], timed=stamps > 0)
                else:
                    row = tf.concat([x, tf.stack([ready, step._now_after(x)])], 0) if stamps else x
                return number + 1, x, rows.write(number, row)

            rows = tf.TensorArray(tf.float64, size=steps, element_shape=[row_size + 2 * bool(stamps)])
            _, x, rows = tf.while_loop(lambda i, *_: i < steps, body, (0, tf.zeros([row_size], tf.float64), rows))
            return x, rows.stack()

        return run

    loops = [compiled(stamps) for stamps in range(3)]
    took: list[list[float]] = [[] for _ in loops]
    for run in loops:
        run()
    for _ in range(rounds):
        for i in random.sample(range(3), 3):
            begun = time.process_time()
            for _ in range(5):
                loops[i]()
            took[i].append((time.process_time() - begun) / (5 * steps) * 1e6)
    least = [min(times) for times in took]  # whatever else runs only adds
    return least[1] - least[0], least[2] - least[0]


def call_us(rounds: int = 60, calls: int = 100) -> float:
    """Processor time that timing takes of a call of one step in Python, in microseconds."""
    parts = ("probe", "trace", "first_call", "writing", "trace", "probe", "callbacks", "callbacks")
    least = float("inf")
    for _ in range(rounds):
        clock = timing.Timing()
        stamps = [np.array([[1e-3 * i + 2e-4, 1e-3 * (i + 1)]]) for i in range(calls)]
        begun = time.process_time()
        for i, row in enumerate(stamps):
            for part in parts:
                with clock.of(part):
                    pass
            clock.call(i, 1, 1e-3 * i, 1e-3 * (i + 1), row)
        least = min(least, (time.process_time() - begun) / calls * 1e6)
    return least


def telemetry_share(seconds: float = 5.0) -> float:
    """Share of a core that the telemetry's thread takes while nothing else runs in the process."""
    with telemetry.Telemetry(lambda *_: None, lambda: 0):
        time.sleep(0.5)
        begun, cpu = time.perf_counter(), time.process_time()
        time.sleep(seconds)
        return (time.process_time() - cpu) / (time.perf_counter() - begun)


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.6, help="of a mode in a round")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    arguments = parser.parse_args()
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} cores; bare = 1")
    for native in (True, False):
        end, both = clock_us(native)
        ops = "own" if native else "TensorFlow's"
        print(f"the clock, {ops} ops: {end:.2f} us a step, {both:.2f} where batches are waited for")
    print(f"the clock: {call_us():.1f} us a call; telemetry: ", end="")
    print(f"{telemetry_share():.2%} of a core")
    print(f"{'case':14} {'mode':10} {'processor time, median (quartiles)':36} {'us a step':>9}")
    for case in (case for case in CASES if case.startswith(arguments.only)):
        ratios, bare_s = always_on(case, arguments.rounds, arguments.seconds)
        for mode, values in ratios.items():
            extra = f"{bare_s * 1e6:9.1f}" if mode == "bare" else f"{(np.median(values) - 1) * bare_s * 1e6:+9.2f}"
            print(f"{case:14} {mode:10} {spread(values):36} {extra}", flush=True)
    cost = traced(arguments.rounds)
    kept = {name: statistics.median(values) for name, values in cost.items()}
    print(f"a traced step / the same, one a call: {spread(cost['single'])}; / many a call: {spread(cost['many'])}")
    print(
        f"a trace: {kept['bytes'] / 1e3:.0f} kB a step; stopping {kept['stop_s'] * 1e3:.0f} ms, "
        f"reading {kept['reading_s'] * 1e3:.0f} ms on another thread"
    )


if __name__ == "__main__":
    sys.exit(main())
