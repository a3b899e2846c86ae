"""What watching the time costs: the clock in the loop, telemetry, and a traced step.

    python benchmarks/trace.py [--rounds 9] [--seconds 2]

Modes run in an order that is shuffled anew each round, on one model that has been traced before; printed is the median
over rounds of that round's ratio to `bare`: everything observed, but no clock, no telemetry, no notes of traces. `cpu`
is the ratio of the process's processor time, `wall` that of the clock on the wall, which other processes disturb more.
The steps are tiny, a tenth of a millisecond: the dearest case there is. `single` runs one step a call, `traced` does so
under the profiler, as the steps of a window do.
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
from trainrt import loop, retracing, step, telemetry, timing, trace

BATCH = 32
MODES = ("bare", "clock", "telemetry", "all")


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
    clock, watch = mode in ("clock", "all"), mode in ("telemetry", "all")
    step.CLOCK = clock
    loop.timing.Timing = REAL[0] if clock else NoTiming
    loop.Retracing = REAL[1] if clock else NoRetracing
    loop.Telemetry = REAL[2] if watch else NoTelemetry


REAL = (timing.Timing, retracing.Retracing, telemetry.Telemetry)


def model_of() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), *[keras.layers.Dense(128, "relu") for _ in range(2)]])
    model.add(keras.layers.Dense(10))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def always_on(rounds: int, seconds: float, as_dataset: bool) -> dict[str, tuple[float, float]]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH * 500, 64)).astype("float32"), rng.integers(0, 10, BATCH * 500)
    data = (tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).prefetch(4),) if as_dataset else (x, y)
    keywords = {"shuffle": False} if as_dataset else {"batch_size": BATCH}
    models = {}
    for mode in MODES:
        choose(mode)
        models[mode] = model_of()
        trainrt.fit(models[mode], *data, epochs=2, verbose=0, **keywords)
    begun = time.perf_counter()
    trainrt.fit(models["all"], *data, epochs=2, verbose=0, **keywords)
    epochs = max(2, int(2 * seconds / (time.perf_counter() - begun)))
    ratios: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        took = {}
        for mode in random.sample(MODES, len(MODES)):
            choose(mode)
            wall, cpu = time.perf_counter(), time.process_time()
            trainrt.fit(models[mode], *data, epochs=epochs, verbose=0, **keywords)
            took[mode] = time.perf_counter() - wall, time.process_time() - cpu
        for mode in MODES:
            ratios[mode].append((took[mode][0] / took["bare"][0], took[mode][1] / took["bare"][1]))
    return {m: tuple(statistics.median(column) for column in zip(*r, strict=True)) for m, r in ratios.items()}


def traced(rounds: int) -> dict[str, float]:
    """Median seconds a step: many a call, one a call, and one a call under the profiler."""
    choose("all")
    model = model_of()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH * 600, 64)).astype("float32"), rng.integers(0, 10, BATCH * 600)
    found: dict[str, list[float]] = {"many": [], "single": [], "traced": [], "bytes": [], "stop_s": [], "reading_s": []}
    began = trace.Tracing.begin
    trainrt.fit(model, x, y, batch_size=BATCH, verbose=0, trace=(300, 320))
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as logdir:
            for mode in ("single", "traced"):
                if mode == "single":
                    trace.Tracing.begin = lambda self, number: False
                history = trainrt.fit(
                    model, x, y, batch_size=BATCH, verbose=0, trace=(300, 320), logdir=logdir, clip=None
                )
                trace.Tracing.begin = began
                step_s = history.run.scalar("step_s")
                found[mode].append(float(np.median(step_s[300:320])))
                found["many"].append(float(np.median(step_s[340:])))
        told = history.run.document("trace")
        for name in ("bytes", "stop_s", "reading_s"):
            found[name].append(told[name] / (20 if name == "bytes" else 1))
    return {name: statistics.median(values) for name, values in found.items()}


def clock_us(rounds: int = 60, steps: int = 300) -> tuple[float, float]:
    """Processor time that the clock adds to a step, in microseconds: of its end, and of its end and its batch."""

    def compiled(stamps: int):
        @tf.function
        def run():
            def stamped(array, number, after):
                return array.write(number, step._now_after(after))

            def body(number, x, ready, done):
                x = tf.sin(x)
                done = stamped(done, number, x) if stamps else done
                return number + 1, x, stamped(ready, number, number) if stamps > 1 else ready, done

            def array():
                return tf.TensorArray(tf.float64, size=steps, element_shape=[])

            _, x, ready, done = tf.while_loop(lambda i, *_: i < steps, body, (0, tf.zeros([4]), array(), array()))
            return x, ready.stack(), done.stack()

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


def telemetry_share(seconds: float = 5.0) -> float:
    """Share of a core that the telemetry's thread takes while nothing else runs in the process."""
    with telemetry.Telemetry(lambda *_: None, lambda: 0):
        time.sleep(0.5)
        begun, cpu = time.perf_counter(), time.process_time()
        time.sleep(seconds)
        return (time.process_time() - cpu) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} cores; bare = 1")
    end, both = clock_us()
    print(f"the clock: {end:.1f} us a step, {both:.1f} where batches are waited for; telemetry: ", end="")
    print(f"{telemetry_share():.2%} of a core")
    print(f"{'data':10} {'mode':10} {'cpu':>7} {'wall':>7}")
    for name in ("arrays", "tf.data"):
        for mode, (wall, cpu) in always_on(arguments.rounds, arguments.seconds, name == "tf.data").items():
            print(f"{name:10} {mode:10} {cpu:7.3f} {wall:7.3f}", flush=True)
    cost = traced(arguments.rounds)
    print(
        f"a traced step / the same, one a call: {cost['traced'] / cost['single']:.2f}; / many a call: "
        f"{cost['traced'] / cost['many']:.2f}; {cost['bytes'] / 1e3:.0f} kB a step; stopping "
        f"{cost['stop_s'] * 1e3:.0f} ms, reading {cost['reading_s'] * 1e3:.0f} ms on another thread"
    )


if __name__ == "__main__":
    sys.exit(main())
