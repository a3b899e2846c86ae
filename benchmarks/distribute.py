"""Time of a step under several replicas: trainrt.fit against model.fit and the loop of TensorFlow's guide.

    python benchmarks/distribute.py                        MirroredStrategy over 2 logical CPUs
    trainrt launch -n 2 benchmarks/distribute.py           MultiWorkerMirroredStrategy, 2 processes on loopback

Contenders take turns in one process, round by round, each on a model of its own; ratios are medians over rounds, of
wall time and of this process's CPU time, which says more on a machine that others use. Under
MultiWorkerMirroredStrategy there is no model.fit to compare with: it raises (Keras 3.15), so the guide's loop is 1.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import trainrt

WIDTHS = {"MLP, 26,122 weights": (128, 64), "MLP, 1,333,770 weights": (1024, 1024)}


def strategy(devices: int) -> tf.distribute.Strategy:
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    host = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(host, [tf.config.LogicalDeviceConfiguration()] * devices)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])


def model_of(scope, widths):
    keras.utils.set_random_seed(1)
    with scope.scope():
        layers = [keras.layers.Dense(width, "relu") for width in widths]
        model = keras.Sequential([keras.Input((256,)), *layers, keras.layers.Dense(10)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def guide_loop(scope, model, x, y, batch):
    """One `strategy.run` a call, reduced by the optimizer, as in TensorFlow's guide to custom training."""
    dataset = scope.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices((x, y)).batch(batch))

    @tf.function
    def step(data):
        return scope.reduce("SUM", scope.run(one, args=(data,)), axis=None)

    def one(data):
        features, labels = data
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=labels, y_pred=model(features, training=True))
        model.optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)
        return loss

    def epoch():
        for data in dataset:
            loss = step(data)
        float(loss)

    return epoch


def contenders(scope, widths, x, y, batch):
    several_workers = "TF_CONFIG" in os.environ

    def fitted(fit, **arguments):
        model = model_of(scope, widths)
        return lambda: fit(model, x, y, batch_size=batch, shuffle=False, verbose=0, **arguments)

    built = model_of(scope, widths)
    with scope.scope():
        built.optimizer.build(built.trainable_variables)
    found = {"guide's loop": guide_loop(scope, built, x, y, batch)}
    if not several_workers:
        found = {"model.fit": fitted(keras.Model.fit), **found}
    found["trainrt off"] = fitted(trainrt.fit, observe=False)
    found["trainrt on, clip"] = fitted(trainrt.fit, clip=1.0)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", type=int, default=len(WIDTHS), help="only the first of them")
    options = parser.parse_args()
    scope = strategy(options.devices)
    batch = 64
    x = np.random.default_rng(0).normal(size=(options.steps * batch, 256)).astype(np.float32)
    y = x[:, :10].argmax(axis=1)
    print(f"{type(scope).__name__}, {scope.num_replicas_in_sync} replicas, batch {batch}, Adam, {options.steps} steps")
    for name, widths in list(WIDTHS.items())[: options.workloads]:
        runs = contenders(scope, widths, x, y, batch)
        for run in runs.values():
            run()
        times: dict[str, list[np.ndarray]] = {label: [] for label in runs}
        for _ in range(options.rounds):
            for label, run in runs.items():
                begun = np.array([time.perf_counter(), time.process_time()])
                run()
                took = np.array([time.perf_counter(), time.process_time()]) - begun
                times[label].append(1e3 * took / options.steps)
        first = np.array(next(iter(times.values())))
        print(f"{name:22} wall ms a step, ratio    CPU ms a step, ratio")
        for label, values in times.items():
            wall, cpu = np.median(values, axis=0)
            ratio = np.median(np.array(values) / first, axis=0)
            print(f"  {label:20} {wall:14.2f} {ratio[0]:7.2f} {cpu:15.2f} {ratio[1]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
