"""Several outputs are judged one by one; targets in their order are a fault where the model runs after them."""

import math

import numpy as np
import pytest

import trainrt
from trainrt.findings import program
from trainrt.findings.examples import learning
from trainrt.findings.looks import example
from trainrt.findings.outcome import outcome
from trainrt.passport.survey import Leaf, Survey
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document, Epoch

PRICE = {"name": "price", "min": -3.0, "max": 3.0, "mean": [0.0], "std": [2.0], "labels": {"kind": "continuous"}}
SOLD = {"name": "sold", "min": 0.0, "max": 1.0, "mean": [0.5], "std": [0.5]}
SOLD |= {"labels": {"kind": "binary", "classes": 2, "counts": {"0": 50, "1": 50}}}
LOSSES = {"price": "mse", "sold": "binary_crossentropy"}


def two(logs, targets=(PRICE, SOLD), losses=LOSSES, outputs=("model/price", "model/sold")):
    """A run of two outputs that ended with these logs."""
    model = {
        "outputs": [{"layer": path, "activation": "linear", "units": 1, "shape": [None, 1]} for path in outputs],
        "losses": [{"output": i, "custom": False, "from_logits": False} for i in range(len(outputs))],
    }
    data = {"train": {"source": "arrays", "rows": 100, "inputs": [], "targets": list(targets), "weights": []}}
    return Run.synthetic(
        steps=64,
        environment={"compile": {"loss": losses}, "fit": {"epochs": 1}},
        epochs=[Epoch(0, 63, {**logs, **{f"val_{key}": value for key, value in logs.items()}})],
        documents=[Document("data", 63, data), Document("model", 0, model)],
    )


def test_skill_of_several_outputs_is_their_mean_and_each_has_its_own():
    ended = outcome(two({"loss": 1.0, "price_loss": 1.0, "sold_loss": 0.3, "sold_accuracy": 0.75}))
    assert ended.of("price").skill == pytest.approx(1 - 1.0 / 4.0)
    assert ended.of("sold").skill == pytest.approx(0.5)
    assert ended.skill == pytest.approx((0.75 + 0.5) / 2)
    assert (ended.of("price").kind, ended.of("sold").kind) == ("numbers", "classes")


def test_an_output_that_is_not_known_leaves_the_whole_unknown():
    assert math.isnan(outcome(two({"loss": 1.0, "sold_loss": 0.3, "sold_accuracy": 0.75})).skill)


def test_a_loss_of_ones_own_is_asked_what_constant_and_right_predictions_cost():
    def skill(value, **reference):
        look = example(0, reference={"constant": 2.0, "perfect": 0.5, "opposite": 9.0, "exact": 0.0} | reference)
        logs = {"loss": value, "accuracy": math.nan, "val_loss": value, "val_accuracy": math.nan}
        return outcome(learning(loss="my_loss", documents=[look], logs=logs)).skill

    assert skill(2.0) == pytest.approx(0.0)
    assert skill(0.5) == pytest.approx(1.0)
    assert skill(1.1) == pytest.approx(0.6)
    # It likes wrong predictions better: its outputs mean something else.
    assert math.isnan(skill(1.1, opposite=0.1))


def test_targets_in_a_list_are_named_by_their_place():
    places = ({**PRICE, "name": "0"}, {**SOLD, "name": "1"})
    ends = program.ends(two({}, targets=places, losses=["mse", "binary_crossentropy"]))
    assert [(end.name, end.loss, end.head.layer) for end in ends] == [
        ("price", "mean_squared_error", "model/price"),
        ("sold", "binary_crossentropy", "model/sold"),
    ]


def test_the_order_of_numbers_is_told_from_a_shuffle():
    y = np.random.default_rng(0).normal(size=(320, 1)).astype("float32")

    def within(values):
        survey = Survey([Leaf("input", ""), Leaf("target", "")])
        for i in range(0, 320, 32):
            survey.see(values[i : i + 32], values[i : i + 32])
        labels = survey.summary()["targets"][0]["labels"]
        return labels["batch_variance"] / labels["batch_variance_shuffled"]

    assert within(np.sort(y, axis=0)) < 0.1 < 0.8 < within(y)


def rows(seed=1, count=480):
    r = np.random.default_rng(seed)
    x = r.normal(0, 1, (count, 6)).astype("float32")
    return x, (np.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.7 * x[:, 3]).astype("float32")


def test_a_head_that_cannot_reach_its_targets_is_named_alone():
    import keras

    def findings(activation):
        keras.utils.set_random_seed(2)
        x, y = rows()
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(32, "relu")(inputs)
        heads = {
            "price": keras.layers.Dense(1, activation, name="price")(hidden),
            "sold": keras.layers.Dense(1, "sigmoid", name="sold")(hidden),
        }
        model = keras.Model(inputs, heads)
        model.compile(keras.optimizers.Adam(1e-2), LOSSES, metrics={"sold": ["accuracy"]})
        return trainrt.fit(model, x, {"price": y, "sold": (y > 0).astype("float32")}, epochs=20, verbose=0).findings

    wrong = findings("sigmoid")
    assert (wrong[0].causes[0], wrong[0].where) == ("wrong_output_activation", ("price",))
    assert findings(None) == []


def test_sorted_targets_of_a_regression_are_named_and_a_shuffle_is_met_with_silence():
    import keras

    def findings(shuffle):
        keras.utils.set_random_seed(3)
        x, y = rows()
        order = np.argsort(y)
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)]
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        arguments = {"epochs": 12, "validation_data": rows(7, 160), "shuffle": shuffle, "verbose": 0}
        return trainrt.fit(model, x[order], y[order], **arguments).findings

    assert findings(False)[0].causes[0] == "unshuffled_data"
    assert findings(True) == []


def test_a_constraint_is_found_behind_the_name_of_a_sequential_model():
    import keras

    keras.utils.set_random_seed(4)
    x, y = rows()
    tight = keras.constraints.MaxNorm(0.01)
    layers = [keras.layers.Dense(16, "relu", kernel_constraint=tight), keras.layers.Dense(1, kernel_constraint=tight)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    findings = trainrt.fit(model, x, y, epochs=8, verbose=0).findings
    assert findings[0].causes[0] == "constraint_binds"
