"""trainrt.fit trains the same bits as model.fit, and observation never changes them."""

import keras
import numpy as np
import pytest

import trainrt

OPTIMIZERS = {
    "sgd_momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(1e-3),
    "adamw": lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.01),
}


def dense():
    return [keras.layers.Flatten(), keras.layers.Dense(24, "relu"), keras.layers.Dropout(0.2), keras.layers.Dense(10)]


def convolutional():
    return [
        keras.layers.Conv2D(8, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]


def train(layers, optimizer, fit, data, **arguments):
    """Trains from the same seeds: every variable, metrics included, and the history."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers()])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer(), loss, metrics=["accuracy"])
    history = fit(model, *data, epochs=3, batch_size=16, verbose=0, **arguments)
    state = [v.numpy() for v in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
    return state, history.history


def stock(model, *arguments, **keywords):
    return model.fit(*arguments, **keywords)


CASES = [(dense, optimizer) for optimizer in OPTIMIZERS] + [(convolutional, "adam")]
"""`test_identity.py` has every optimizer with every family."""


@pytest.mark.parametrize(("layers", "optimizer"), CASES, ids=lambda each: getattr(each, "__name__", each))
def test_observed_or_not_the_bits_are_those_of_keras(layers, optimizer, digits):
    make = OPTIMIZERS[optimizer]
    want, want_history = train(layers, make, stock, digits)
    for observe in (True, False, 3):
        state, history = train(layers, make, trainrt.fit, digits, observe=observe)
        assert history == want_history, f"observe={observe}"
        for got, expected in zip(state, want, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=f"observe={observe}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_plain_ops_train_the_same_bits_as_the_kernels(optimizer, digits, monkeypatch):
    want, _ = train(dense, OPTIMIZERS[optimizer], stock, digits)
    monkeypatch.setenv("TRAINRT_NATIVE", "0")
    state, _ = train(dense, OPTIMIZERS[optimizer], trainrt.fit, digits)
    for got, expected in zip(state, want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_log_directory_changes_nothing(digits, tmp_path):
    want, want_history = train(convolutional, OPTIMIZERS["adam"], stock, digits)
    state, history = train(convolutional, OPTIMIZERS["adam"], trainrt.fit, digits, logdir=tmp_path)
    assert history == want_history
    for got, expected in zip(state, want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_clip_that_never_bites_changes_nothing(digits):
    want, _ = train(dense, OPTIMIZERS["adam"], stock, digits)
    state, _ = train(dense, OPTIMIZERS["adam"], trainrt.fit, digits, clip=1e6)
    for got, expected in zip(state, want, strict=True):
        np.testing.assert_array_equal(got, expected)
