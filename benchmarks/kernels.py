"""The fused update against Keras's own, and both against the machine's memory.

    python -m benchmarks.kernels [--quick] [--cpu]

Each row compares what runs side by side, in turn, and prints medians:

  keras    `optimizer.apply` in a `tf.function`, nothing measured
  fused    the gradient's moments, a global-norm clip from them, then one pass that clips, updates and measures
  plain    the fused update alone
  generic  `optimizer.apply`, and everything measured around it

The gradient of `WORDS` is sparse: a thousand rows, some of them of the same index.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from trainrt.update import fused, generic, native, native_ops

WORDS = (5000, 64)
MODELS = {
    "embedding, 354 k": [WORDS, (64, 256), (64, 256), (256,), (64, 10), (10,)],
    "tiny, 26 k in 6": [(64, 128), (128,), (128, 128), (128,), (128, 10), (10,)],
    "1 M in 64": [(128, 128)] * 64,
    "4 M": [(1024, 1024)] * 4 + [(1024,)] * 4,
    "20 M": [(2048, 2048)] * 4 + [(2048, 1600)] + [(2048,)] * 5,
}

STREAM = """
#include <thread>
#include <vector>
extern "C" void stream(float* a, float* b, float* c, long n, int threads) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back([=] {
    for (long i = n * t / threads; i < n * (t + 1) / threads; ++i) {
      a[i] += 1.0f; b[i] += 1.0f; c[i] += 1.0f;
    }
  });
  for (auto& thread : pool) thread.join();
}
"""


def gradients_of(shapes, seed=0):
    rng = np.random.default_rng(seed)

    def drawn(shape):
        return tf.constant(rng.standard_normal(shape).astype("float32") * 0.01)

    indices = tf.constant(rng.integers(WORDS[0], size=1024))
    return [tf.IndexedSlices(drawn((1024, WORDS[1])), indices, WORDS) if s == WORDS else drawn(s) for s in shapes]


def setup(shapes, make):
    rng = np.random.default_rng(1)
    variables = [keras.Variable(rng.standard_normal(s).astype("float32")) for s in shapes]
    optimizer = make()
    optimizer.build(variables)
    return optimizer, variables


def repeated(body, count):
    """A graph that runs `body` `count` times, one after the other, as a chunk of training steps would."""

    @tf.function
    def run():
        i = tf.constant(0)
        while i < count:
            body()
            i += 1

    return run


def keras_apply(shapes, make):
    optimizer, variables = setup(shapes, make)
    gradients = gradients_of(shapes)
    return lambda: optimizer.apply(gradients, variables)


def plain(shapes, make):
    optimizer, variables = setup(shapes, make)
    gradients = gradients_of(shapes)
    update = fused.plan(optimizer, variables)
    return lambda: update.apply(gradients, observe=False)


def observed(shapes, make, clip=True):
    optimizer, variables = setup(shapes, make)
    gradients = gradients_of(shapes)
    update = fused.plan(optimizer, variables)
    sink = tf.Variable(tf.zeros([], tf.float64))

    def body():
        measured = scale = None
        if clip:
            pairs = zip(gradients, variables, strict=True)
            rows = [native_ops.Rows.of(g, v) if isinstance(g, tf.IndexedSlices) else g for g, v in pairs]
            measured, scale = native_ops.measure_and_clip(rows, "global_norm", 1.0)
        seen = update.apply(gradients, scale, True, measured)
        sink.assign(seen.joint[0, 0] + seen.cube[0, 0, 0])

    return body


def generic_apply(shapes, make):
    optimizer, variables = setup(shapes, make)
    gradients = gradients_of(shapes)
    sink = tf.Variable(tf.zeros([], tf.float64))

    def body():
        dense = [tf.convert_to_tensor(g) for g in gradients]
        before = generic.Before(optimizer, variables, dense, None, True, None, 1)
        optimizer.apply(gradients, variables)
        seen = before.observe(None, None)
        sink.assign(seen.joint[0, 0] + seen.cube[0, 0, 0])

    return body


def medians(bodies, count, rounds, clock):
    """Name -> median seconds of one execution of each body, all measured in turn."""
    runs = {name: repeated(body, count) for name, body in bodies.items()}
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append((clock() - begin) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def stream_bandwidth(size=20_000_000, rounds=9):
    """Bytes a second of three arrays read and written in place, on all cores."""
    compiler = native._compiler()
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch) / "stream.cc", Path(scratch) / "stream.so"
        source.write_text(STREAM)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler.path, *flags, str(source), "-o", str(library)], check=True)
        stream = ctypes.CDLL(str(library)).stream
        arrays = [np.zeros(size, "float32") for _ in range(3)]
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            stream(*pointers, ctypes.c_long(size), tf.config.threading.get_intra_op_parallelism_threads() or _cores())
            times.append(time.perf_counter() - begin)
    return 24 * size / statistics.median(times)


def _cores():
    return len(os.sched_getaffinity(0))


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="fewer rounds, no 20 M")
    arguments.add_argument("--cpu", action="store_true", help="processor time, where others use the machine too")
    given = arguments.parse_args()
    quick, clock = given.quick, time.process_time if given.cpu else time.perf_counter
    if native.load() is None:
        raise SystemExit(native.status().reason)
    make = lambda: keras.optimizers.Adam(1e-3)  # noqa: E731
    stream = stream_bandwidth()
    print(f"stream, 3 reads and 3 writes in place: {stream / 1e9:.1f} GB/s")
    print("Adam                 keras ms   plain   fused fused+clip  generic   GB/s of stream")
    for name, shapes in MODELS.items():
        parameters = sum(int(np.prod(s)) for s in shapes)
        if quick and parameters > 10_000_000:
            continue
        count = max(2, min(200, 20_000_000 // parameters))
        bodies = {
            "keras": keras_apply(shapes, make),
            "plain": plain(shapes, make),
            "fused": observed(shapes, make, clip=False),
            "fused+clip": observed(shapes, make),
            "generic": generic_apply(shapes, make),
        }
        m = medians(bodies, count, 7 if quick else 15, clock)
        rate = 28 * parameters / m["fused"]  # gradient, weight and two slots read; weight and slots written
        alone, fuse, clip, around = (m[key] / m["keras"] for key in ("plain", "fused", "fused+clip", "generic"))
        print(
            f"{name:18} {m['keras'] * 1e3:10.3f} {alone:7.3f} {fuse:7.3f} {clip:10.3f} {around:8.3f} "
            f"{rate / 1e9:6.1f} {rate / stream:9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
