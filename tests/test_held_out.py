"""Programs of kinds that the rules were not made with: a fault is named first, and what is sound is left alone."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.findings import diagnose
from trainrt.findings.examples import stuck
from trainrt.findings.generalisation import outweighing_regulariser
from trainrt.findings.gradients import vanishing
from trainrt.findings.optimizer import heavy_momentum
from trainrt.findings.outcome import outcome
from trainrt.record.vocabulary import Epoch, Parameter
from trainrt.report import summary

LAYERS, OPS = keras.layers, keras.ops
CE = "sparse_categorical_crossentropy"


def digits():
    (x, y), (x_val, y_val) = trainrt.digits.load()
    return (x.reshape(len(x), -1), y), (x_val.reshape(len(x_val), -1), y_val)


def table(rows=900, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 6)).astype("float32")
    y = np.sin(1.5 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, y.astype("float32")


def mlp(inputs, outputs, activation=None, hidden=48):
    return keras.Sequential([keras.Input((inputs,)), LAYERS.Dense(hidden, "relu"), LAYERS.Dense(outputs, activation)])


def causes(model, *data, **options):
    """The first cause of each finding of severity warning or above."""
    keras.utils.set_random_seed(5)
    history = trainrt.fit(model, *data, verbose=0, **options)
    return [finding.causes[0] for finding in history.findings if finding.severity != "info"]


class OwnStep(keras.Model):
    """A train step of its own; `turn` multiplies the gradients' loss, `part` is what it trains."""

    turn, part = 1.0, None

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            minimised = self.turn * loss
        weights = (self.part or self).trainable_variables
        self.optimizer.apply(tape.gradient(minimised, weights), weights)
        for metric in self.metrics:
            metric.update_state(loss)
        return self.get_metrics_result()


def own_step(**attributes):
    entry = keras.Input((6,))
    hidden = LAYERS.Dense(32, "relu", name="hidden")(entry)
    last = LAYERS.Dense(1, name="last")
    model = OwnStep(entry, last(LAYERS.Dense(2, "relu", name="narrow")(hidden)))
    model.part = last if attributes.pop("only_last", False) else None
    model.turn = attributes.pop("turn", 1.0)
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    return model


class Pair(keras.Model):
    """Two networks against each other, and no loss in the logs."""

    def __init__(self):
        super().__init__()
        self.maker, self.judge = mlp(4, 2), mlp(2, 1)
        self.optimizers = [keras.optimizers.Adam(1e-3) for _ in range(2)]
        self.built = True

    def call(self, x):
        return self.maker(x)

    def train_step(self, x):
        noise, says = tf.random.normal([tf.shape(x)[0], 4]), keras.losses.BinaryCrossentropy(from_logits=True)
        with tf.GradientTape(persistent=True) as tape:
            true, false = self.judge(x), self.judge(self.maker(noise))
            judged = says(tf.ones_like(true), true) + says(tf.zeros_like(false), false)
            made = says(tf.ones_like(false), false)
        for loss, network, optimizer in zip((judged, made), (self.judge, self.maker), self.optimizers, strict=True):
            weights = network.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)
        return {"judged": judged, "made": made}


def test_networks_that_tell_no_loss_are_not_said_to_have_lost_it(tmp_path):
    keras.utils.set_random_seed(1)
    model = Pair()
    model.compile()
    x = np.random.default_rng(0).standard_normal((640, 2)).astype("float32") * 3 + 5
    history = trainrt.fit(model, x, epochs=3, verbose=0, logdir=str(tmp_path))
    assert history.findings == []
    run = trainrt.Run.open(tmp_path)
    assert "loss" not in run.roster.scalars
    assert diagnose(run) == []
    assert "loss" not in dict(summary(run))


def test_labels_that_fit_nothing_and_a_validation_that_fits_nothing_are_told_apart():
    (x, y), (x_val, y_val) = digits()

    def said(y, y_val):
        model = mlp(64, 10, "softmax", 256)
        model.compile(keras.optimizers.Adam(5e-3), CE, metrics=["accuracy"])
        return causes(model, x[:480], y[:480], validation_data=(x_val, y_val), epochs=25)

    assert said(np.roll(y, 1), np.roll(y_val, 1))[:1] == ["labels_wrong"]
    assert said(y, (3 * y_val + 1) % 10)[:1] == ["train_val_mismatch"]
    assert said(y, y_val) == []


def test_a_rare_class_that_was_sampled_more_often_is_no_noise():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 10)).astype("float32")
    signal = x[:, 0] * x[:, 1] + 0.7 * x[:, 2] + 0.8 * rng.standard_normal(4000)
    y = (signal > np.quantile(signal, 0.985)).astype("float32")
    rare, usual = np.flatnonzero(y[:3200]), np.flatnonzero(y[:3200] == 0)
    drawn = np.concatenate([usual, rng.choice(rare, len(usual) // 2)])
    model = mlp(10, 1, "sigmoid", 24)
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=["accuracy"])
    validation = (x[3200:], y[3200:])
    assert causes(model, x[drawn], y[drawn], batch_size=64, epochs=6, validation_data=validation) == []


@pytest.mark.parametrize(
    ("weight", "scale", "cause"), [(1, 1, []), (0, 1, ["wrong_loss"]), (1, 3e3, ["targets_unnormalised"])]
)
def test_an_output_beside_another(weight, scale, cause):
    x, y = table()
    sign = (x[:, :1] * x[:, 3:4] > 0).astype("float32")
    entry = keras.Input((6,))
    body = LAYERS.Dense(64, "relu")(LAYERS.Dense(64, "relu")(entry))
    heads = {"price": LAYERS.Dense(1, name="price")(body), "kind": LAYERS.Dense(1, "sigmoid", name="kind")(body)}
    model = keras.Model(entry, heads)
    losses = {"price": "mse", "kind": "binary_crossentropy"}
    model.compile(
        keras.optimizers.Adam(3e-3),
        losses,
        loss_weights={"price": 1.0, "kind": float(weight)},
        metrics={"kind": ["accuracy"]},
    )
    assert causes(model, x, {"price": y * scale + 3 * (scale - 1), "kind": sign}, epochs=20)[:1] == cause


@pytest.mark.parametrize(
    ("attributes", "cause"), [({}, []), ({"turn": -1.0}, ["flipped_sign"]), ({"only_last": True}, ["graph_cut"])]
)
def test_a_train_step_of_its_own(attributes, cause):
    x, y = table()
    assert causes(own_step(**attributes), x, y, validation_split=0.2, epochs=25)[:1] == cause


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_under_the_smallest_number_of_float16(scaled):
    (x, y), _ = digits()
    narrow = keras.DTypePolicy("mixed_float16")
    hidden = LAYERS.Dense(32, "relu", dtype=narrow)
    model = keras.Sequential(
        [keras.Input((64,)), hidden, LAYERS.Dense(10, dtype=narrow), LAYERS.Softmax(dtype="float32")]
    )
    small = lambda y, p: 1e-6 * keras.losses.sparse_categorical_crossentropy(y, p)  # noqa: E731
    optimizer = keras.optimizers.Adam(3e-3, epsilon=1e-13)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, small, metrics=["accuracy"])
    assert causes(model, x, y, epochs=4)[:1] == ([] if scaled else ["update_rounding"])


def test_class_numbers_of_pixels_under_a_loss_of_differences():
    rng = np.random.default_rng(0)
    masks = np.repeat(np.repeat(rng.integers(0, 3, (300, 4, 4, 1)), 3, 1), 3, 2)
    x = (masks - 1 + 0.3 * rng.standard_normal(masks.shape)).astype("float32")
    for loss, cause in (("mse", ["wrong_loss"]), (CE, [])):
        convolution = LAYERS.Conv2D(12, 3, padding="same", activation="relu")
        model = keras.Sequential([keras.Input((12, 12, 1)), convolution, LAYERS.Conv2D(3, 1, activation="softmax")])
        model.compile(keras.optimizers.Adam(1e-2), loss)
        assert causes(model, x, masks, epochs=12)[:1] == cause


def test_a_softmax_where_several_classes_hold_at_once():
    x, _ = table(1200)
    y = np.stack([x[:, 0] > 0, x[:, 1] > -0.5, x[:, 2] + x[:, 3] > 0], 1).astype("float32")
    for activation, cause in (("softmax", ["wrong_output_activation"]), ("sigmoid", [])):
        model = mlp(6, 3, activation)
        model.compile(keras.optimizers.Adam(5e-3), "binary_crossentropy", metrics=["binary_accuracy"])
        assert causes(model, x, y, epochs=12)[:1] == cause


def test_nodes_of_a_graph_of_which_few_have_a_label():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 600)
    x = (np.eye(4)[y] + 0.3 * rng.standard_normal((600, 4))).astype("float32")
    parts = np.split(rng.permutation(600), [40, 240])
    known, held_back = (np.isin(np.arange(600), part).astype("float32") for part in parts[:2])
    model = mlp(4, 4, "softmax", 16)
    model.compile(keras.optimizers.Adam(3e-2), CE, weighted_metrics=["accuracy"])
    options = {"epochs": 60, "batch_size": 600, "shuffle": False}
    assert causes(model, x, y, sample_weight=known, validation_data=(x, y, held_back), **options) == []


MASK = {"shape": [None, 24, 24, 1], "min": 0.0, "max": 1.0, "mean": [0.01], "std": [0.0995], "labels": None}


def first_causes(run):
    return [finding.causes[0] for finding in diagnose(run) if finding.severity != "info"]


def test_a_mask_that_is_nearly_all_background():
    logs = {"accuracy": 0.99, "val_accuracy": 0.99, "loss": 0.056, "val_loss": 0.056}
    assert first_causes(stuck(targets=MASK, logs=logs))[:1] == ["class_imbalance"]
    assert first_causes(stuck(targets={**MASK, "mean": [0.4], "std": [0.3]}, logs=logs))[:1] != ["class_imbalance"]


def test_padding_is_no_amount():
    inputs = {"dtype": "int32", "zero_share": 0.97, "mean": [0.5], "std": [3.0]}
    layers = [{"name": "e", "class": "Embedding", "config": {"mask_zero": False}}]
    (padded,) = [f for f in diagnose(stuck(inputs=inputs, layers=layers)) if f.rule == "constant_inputs"]
    assert "padding" in padded.message
    assert "mask_zero" in padded.advice[0]
    masked = [{"name": "e", "class": "Embedding", "config": {"mask_zero": True}}]
    assert not [f for f in diagnose(stuck(inputs=inputs, layers=masked)) if f.rule == "constant_inputs"]


def test_a_small_gradient_of_small_inputs_is_none_that_vanished():
    layers = [f"layer{i}" for i in range(4)]
    deep = [Parameter(f"{n}/{w}", n, s, "float32") for n in layers for w, s in (("kernel", (8, 8)), ("bias", (8,)))]
    kernels = np.geomspace(1e-7, 1, 4)
    assert [f.rule for f in vanishing(stuck(parameters=deep, gradient_norm=np.repeat(kernels, 2) * np.ones((200, 1))))]
    beside = np.stack([kernels, np.ones(4)], 1).reshape(-1)
    assert not list(vanishing(stuck(parameters=deep, gradient_norm=beside * np.ones((200, 1)))))


def test_a_momentum_that_follows_the_gradient_and_runs_past_the_minimum():
    heavy = {"optimizer": {"class": "SGD", "config": {"learning_rate": 0.1, "momentum": 0.9995}}}
    along = {"slots": ["momentum"], "gradient_momentum_cosine": -0.8, "momentum_norm": 1.0}
    past = np.concatenate([np.geomspace(0.69, 0.01, 60), np.full(140, 0.7)])
    assert [f.causes[0] for f in heavy_momentum(stuck(losses=past, **heavy, **along))] == ["momentum_too_high"]
    assert not list(heavy_momentum(stuck(**heavy, **along)))


def test_a_regulariser_that_won_within_a_few_steps():
    won = {"data_loss": np.full(200, 0.4), "added_loss": np.append([0.6, 0.3, 0.1], np.full(197, 1e-8))}
    (found,) = outweighing_regulariser(stuck(scalars=won))
    assert "60%" in found.message
    assert "add_loss" in found.advice[0]
    assert not list(outweighing_regulariser(stuck(scalars=won | {"added_loss": np.full(200, 1e-8)})))


def test_a_run_without_a_loss_is_not_known_to_be_poor():
    run = stuck(logs={"accuracy": None})
    run.epochs = [Epoch(0, 199, {"judged": 0.7})]
    assert outcome(run).poor(0.5) is False
    run.roster = dataclasses.replace(run.roster, scalars=("other", *run.roster.scalars[1:]))
    assert not [f for f in diagnose(run) if f.severity != "info"]
