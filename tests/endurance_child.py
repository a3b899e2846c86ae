"""A training for a process of its own, which others kill and start again; says what came out of it as JSON.

    python endurance_child.py SOURCE CHECKPOINTS LOGDIR RESULT [EVERY] [SECONDS_A_STEP]

SOURCE is a name in `SOURCES`; EVERY as in `trainrt.Checkpoint`; a step may be made to last.
"""

import json
import mmap
import os
import struct
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state

import trainrt
from trainrt.record.digest import digest_all

EPOCHS, ROWS, BATCH = 4, 600, 20


class Remembers(keras.callbacks.Callback):
    """A user's callback with a state of its own, kept through the two methods."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(float(logs["loss"]))

    def get_state(self):
        return {"seen": self.seen}

    def set_state(self, state):
        self.seen = list(state["seen"])


def rows():
    random = np.random.default_rng(7)
    x = random.normal(size=(ROWS, 12)).astype("float32")
    return x, np.tanh(x @ random.normal(size=(12, 1))).astype("float32")


def arrays(x, y):
    return {"x": x, "y": y, "batch_size": BATCH}


def large_arrays(x, y):
    """Batches so large that Keras's own pipeline gathers them."""
    wide = np.repeat(x, 320, axis=1)
    return {"x": wide, "y": y, "batch_size": BATCH}


def dataset(x, y):
    return {"x": tf.data.Dataset.from_tensor_slices((x, y)).shuffle(100, seed=5).batch(BATCH).prefetch(2)}


def repeated(x, y):
    """An epoch that ends where the data does not."""
    return {"x": tf.data.Dataset.from_tensor_slices((x, y)).shuffle(90, seed=5).repeat().batch(BATCH), "steps": 23}


def generator(x, y):
    def batches():
        random = np.random.default_rng(11)
        while True:
            index = random.integers(0, ROWS, BATCH)
            yield x[index], y[index]

    return {"x": batches(), "steps": ROWS // BATCH, "source": "skip"}


SOURCES = {f.__name__: f for f in (arrays, large_arrays, dataset, repeated, generator)}


def build(width):
    model = keras.Sequential(
        [
            keras.layers.Input([width]),
            keras.layers.Dense(16),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
            keras.layers.GaussianNoise(0.1),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras.optimizers.AdamW(1e-2, use_ema=True, ema_overwrite_frequency=37)
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


PROGRESS = struct.Struct("<dd")
"""When the first and the newest step of this process were done, seconds since 1970; outlives the process."""


def pages(path):
    """A file of zeros for `PROGRESS`, in memory that a kill does not take away."""
    with open(path, "wb") as file:
        file.write(bytes(PROGRESS.size))
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), PROGRESS.size)


def train(source, checkpoints, logdir, every="epoch", seconds=0.0, epochs=EPOCHS, progress=None, **keywords):
    """Trains; returns what a run that never stopped has to agree with."""
    global_state.set_global_attribute("global_seed_generator", None)  # Keras 3.12 goes on with the one of before
    keras.utils.set_random_seed(3)
    x, y = rows()
    data = SOURCES[source](x, y)
    steps, reread = data.pop("steps", None), data.pop("source", None)
    width = data["x"].shape[1] if hasattr(data["x"], "shape") else 12
    model = build(width)
    own = Remembers()
    callbacks = [
        own,
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.05),
        keras.callbacks.EarlyStopping("val_loss", patience=50, restore_best_weights=True),
        keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr * 0.9),
    ]
    if seconds:

        class Slow(keras.callbacks.Callback):
            began = None

            def on_train_batch_end(self, batch, logs=None):
                self.began = self.began or time.time()
                if progress is not None:
                    progress[:] = PROGRESS.pack(self.began, time.time())
                time.sleep(seconds)

        callbacks.append(Slow())
    history = trainrt.fit(
        model,
        **data,
        epochs=epochs,
        steps_per_epoch=steps,
        verbose=0,
        callbacks=callbacks,
        validation_data=(np.ones((8, width), "float32"), np.ones((8, 1), "float32")),
        logdir=logdir,
        checkpoint=None if checkpoints is None else trainrt.Checkpoint(checkpoints, every=every, source=reread),
        **keywords,
    )
    values = [*model.variables, *model.optimizer.variables]
    return {
        "variables": {str(i): digest_all([np.asarray(v)]) for i, v in enumerate(values)},
        "history": history.history,
        "epoch": list(history.epoch),
        "own": own.seen,
        "random": [float(np.random.rand()), float(keras.random.uniform([])[()])],
        "steps": history.run.steps[:, 0].tolist() if history.run is not None else None,
        "last": history.run.steps[:, 1].tolist() if history.run is not None else None,
        "epochs": [e.epoch for e in history.run.epochs],
        "loss": history.run.scalar("loss").tolist(),
        "state": history.run.state,
    }


if __name__ == "__main__":
    source, checkpoints, logdir, result, *more = sys.argv[1:]
    every = more[0] if more else "epoch"
    outcome = train(
        source,
        None if checkpoints == "-" else checkpoints,
        None if logdir == "-" else logdir,
        int(every) if every.isdecimal() else every,
        float(more[1]) if len(more) > 1 else 0.0,
        progress=pages(result + ".progress"),
    )
    with open(result + ".new", "w") as file:
        json.dump(outcome, file)
    os.replace(result + ".new", result)
