"""On real data: a faulty run names its cause first, its fixed twin is met with silence.

The three things that people name first when a loss stagnates from the first epoch though earlier runs improved: order
and normalisation of the data; learning rate, optimizer and clip; regularisation.
"""

import json

import numpy as np
import pytest

import trainrt
from trainrt import digits


def data(**change):
    """The digits as vectors, training and validation."""
    (x, y), (x_val, y_val) = digits.load()
    x, x_val = x.reshape(len(x), -1), x_val.reshape(len(x_val), -1)
    if "scale" in change:
        x, x_val = x * change["scale"], x_val * change["scale"]
    if change.get("sort"):
        order = np.argsort(y, kind="stable")
        x, y = x[order], y[order]
    return (x.astype("float32"), y), (x_val.astype("float32"), y_val)


def findings(optimizer, training=None, hidden=None, epochs=8, **options):
    import keras

    keras.utils.set_random_seed(3)
    (x, y), validation = training or data()
    hidden = hidden or [keras.layers.Dense(48, activation="relu"), keras.layers.Dense(24, activation="relu")]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, activation="softmax")])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = trainrt.fit(model, x, y, epochs=epochs, batch_size=32, validation_data=validation, verbose=0, **options)
    json.dumps([finding.to_dict() for finding in history.findings], allow_nan=False)
    return [(finding.causes[0], finding.severity) for finding in history.findings]


def sgd(rate=0.1, **options):
    import keras

    return keras.optimizers.SGD(rate, **options)


def test_order_and_normalisation_of_the_data():
    assert findings(sgd(), data(sort=True), shuffle=False)[0] == ("unshuffled_data", "error")
    assert findings(sgd(), data(scale=255.0))[0] == ("inputs_unnormalised", "error")
    assert findings(sgd(), data(scale=1 / 255))[0] == ("inputs_too_small", "error")
    assert findings(sgd(), data(sort=True), shuffle=True) == []
    assert findings(sgd(), data()) == []


def test_learning_rate_optimizer_and_clip():
    import keras

    assert findings(sgd(20.0))[0] == ("lr_too_high", "error")
    assert findings(sgd(1e-6))[0][0] == "lr_too_low"
    assert findings(keras.optimizers.Adadelta(0.001))[0] == ("wrong_optimizer", "error")
    assert findings(sgd(), clip=1e-4)[0] == ("clip_too_tight", "error")
    assert findings(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.02, 10)))[0][0] == "lr_schedule"
    assert findings(keras.optimizers.Adam(2e-3), clip=1.0) == []
    assert findings(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.2, 8 * 45))) == []


def test_regularisation():
    import keras

    def hidden(factor, rate):
        penalty = keras.regularizers.L2(factor)
        return [
            keras.layers.Dense(64, activation="relu", kernel_regularizer=penalty),
            keras.layers.Dropout(rate),
        ]

    assert findings(keras.optimizers.Adam(2e-3), hidden=hidden(3.0, 0.1))[0] == ("over_regularised", "error")
    assert findings(sgd(), hidden=hidden(1e-5, 0.97))[0] == ("dropout_too_high", "error")
    assert findings(keras.optimizers.AdamW(2e-3, weight_decay=100.0))[0] == ("weight_decay_too_high", "error")
    assert findings(keras.optimizers.Adam(2e-3), hidden=hidden(1e-5, 0.3)) == []


@pytest.mark.parametrize("where", ["journal", "files"])
def test_a_finding_is_the_same_in_the_history_and_in_the_files(where, tmp_path, capsys):
    from trainrt.cli import main

    found = findings(sgd(1e-6), logdir=str(tmp_path), epochs=3)
    run = trainrt.Run.open(tmp_path)
    if where == "journal":
        assert [(f["causes"][0], f["severity"]) for f in run.recorded_findings] == found
    else:
        main(["report", str(tmp_path), "--json"])
        assert found[0][0] in capsys.readouterr().out
