"""Time of a step under several replicas: trainrt.fit against model.fit and the loop of TensorFlow's guide.

    python benchmarks/distribute.py                        MirroredStrategy over 2 logical CPUs
    trainrt launch -n 2 benchmarks/distribute.py           MultiWorkerMirroredStrategy, 2 processes on loopback

Contenders take turns in one process, round by round, each on a model of its own; ratios are medians over rounds, of
wall time and of this process's CPU time, which says more on a machine that others use. A step is one of the second and
third epoch of a call; what a call of `fit` costs beside its epochs stands in a column of its own. Under
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

WIDTHS = {"26k": (128, 64), "1.3M": (1024, 1024)}
"""Of the hidden layers of an MLP with about so many weights."""

EPOCHS = 2
"""That are timed in each call."""


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

    def timed():
        begun = now()
        for _ in range(EPOCHS):
            for data in dataset:
                loss = step(data)
            float(loss)
        return (now() - begun) / EPOCHS, np.zeros(2)

    return timed


def now():
    """[2] seconds: of the wall, and of this process's CPU time."""
    return np.array([time.perf_counter(), time.process_time()])


def contenders(scope, widths, x, y, batch):
    several_workers = "TF_CONFIG" in os.environ

    def fitted(fit, **arguments):
        model = model_of(scope, widths)

        def timed():
            marks = [now()]
            clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: marks.append(now()))
            given = {"batch_size": batch, "epochs": EPOCHS + 1, "callbacks": [clock], "shuffle": False, "verbose": 0}
            fit(model, x, y, **given, **arguments)
            epoch = (marks[-1] - marks[1]) / EPOCHS
            return epoch, now() - marks[0] - (EPOCHS + 1) * epoch

        return timed

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
    parser.add_argument("--workloads", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    options = parser.parse_args()
    scope = strategy(options.devices)
    batch = 64
    x = np.random.default_rng(0).normal(size=(options.steps * batch, 256)).astype(np.float32)
    y = x[:, :10].argmax(axis=1)
    print(f"{type(scope).__name__}, {scope.num_replicas_in_sync} replicas, batch {batch}, Adam, {options.steps} steps")
    for name in options.workloads:
        runs = contenders(scope, WIDTHS[name], x, y, batch)
        for run in runs.values():
            run()
        times: dict[str, list[np.ndarray]] = {label: [] for label in runs}
        once: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(options.rounds):
            for label, run in runs.items():
                epoch, beside = run()
                times[label].append(1e3 * epoch / options.steps)
                once[label].append(1e3 * beside[0])
        first = np.array(next(iter(times.values())))
        print(f"{f'MLP, {name} weights':22} wall ms a step, ratio    CPU ms a step, ratio    ms a call")
        for label, values in times.items():
            wall, cpu = np.median(values, axis=0)
            ratio = np.median(np.array(values) / first, axis=0)
            words = f"  {label:20} {wall:14.2f} {ratio[0]:7.2f} {cpu:15.2f} {ratio[1]:7.2f}"
            print(f"{words} {np.median(once[label]):12.0f}", flush=True)


if __name__ == "__main__":
    main()
