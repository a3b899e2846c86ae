"""It worked last week: somebody sorted the data since, and the seed is another one too. Which of them is it?"""

import tempfile

import keras
import numpy as np

import trainrt

(x, y), test = trainrt.digits.load()


def train(logdir, seed, x, y, shuffle):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    )
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    trainrt.fit(model, x, y, epochs=3, validation_data=test, logdir=logdir, shuffle=shuffle, verbose=0)


with tempfile.TemporaryDirectory() as logdir:
    order = np.argsort(y, kind="stable")
    train(f"{logdir}/last-week", 1, x, y, shuffle=True)
    train(f"{logdir}/today", 2, x[order], y[order], shuffle=False)
    comparison = trainrt.compare(f"{logdir}/last-week", f"{logdir}/today")
    print(comparison)
    print(comparison.cause.name)
