"""A look into the model tells the truth about it, and leaves no trace in it."""

import itertools
import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.looks import anatomy, forward, look, probe, reference

LAYERS = keras.layers


def dense():
    return keras.Sequential(
        [
            keras.Input((64,)),
            LAYERS.Dense(24, "relu", kernel_regularizer=keras.regularizers.L2(0.01)),
            LAYERS.BatchNormalization(),
            LAYERS.Dropout(0.4),
            LAYERS.Dense(10, "softmax"),
        ]
    )


def nested():
    inner = keras.Sequential([keras.Input((32,)), LAYERS.Dense(16, "tanh"), LAYERS.GaussianNoise(0.1)], name="inner")
    inputs = keras.Input((64,))
    x = LAYERS.Dense(32, "relu", activity_regularizer="l1")(inputs)
    return keras.Model(inputs, LAYERS.Dense(10, "softmax")(LAYERS.Add()([inner(x), LAYERS.Dense(16)(x)])))


def convolutional():
    layers = [LAYERS.Conv2D(4, 3, activation="relu"), LAYERS.BatchNormalization(), LAYERS.Flatten()]
    return keras.Sequential(
        [keras.Input((64,)), LAYERS.Reshape((8, 8, 1)), *layers, LAYERS.Dense(10), LAYERS.Softmax()]
    )


def recurrent():
    layers = [LAYERS.Reshape((4, 16)), LAYERS.GRU(6, recurrent_dropout=0.2), LAYERS.Dense(10, "softmax")]
    return keras.Sequential([keras.Input((64,)), *layers])


@keras.saving.register_keras_serializable()
class Subclassed(keras.Model):
    """Layers of its own, a counter in Python, a raw variable, and noise from every kind of generator."""

    def __init__(self):
        super().__init__()
        self.hidden, self.logits = LAYERS.Dense(16, "relu"), LAYERS.Dense(10, "softmax")
        self.drop = LAYERS.Dropout(0.3)
        self.calls = 0
        self.seen = tf.Variable(0.0, trainable=False)

    def call(self, inputs, training=False):
        self.calls += 1
        if tf.executing_eagerly():
            self.seen.assign_add(1.0)
            random.random(), np.random.rand(), tf.random.uniform([])
        return self.logits(self.drop(self.hidden(inputs), training=training))


MODELS = (dense, nested, convolutional, recurrent, Subclassed)
SMALL = (dense, Subclassed)


def data(rows=64):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, rows)
    return (rng.normal(size=(rows, 64)) + y[:, None] / 10).astype("float32"), y


def compiled(build, seed=3):
    keras.utils.set_random_seed(seed)
    model = build()
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def trained(build, fit, x, y=None, **arguments):
    model = compiled(build)
    history = fit(model, x, y, epochs=3, verbose=0, **arguments)
    drawn = random.random(), np.random.rand(), float(tf.random.uniform([])), float(keras.random.uniform([]))
    variables = (*model.variables, *model.optimizer.variables, *model.metrics_variables)
    return model, history, [np.asarray(v) for v in variables], drawn


def stock(model, *arguments, **keywords):
    return model.fit(*arguments, **keywords)


@pytest.fixture
def often(monkeypatch):
    """Looks as often as can be, whatever it costs."""
    monkeypatch.setattr(probe.Prober, "_affordable", lambda self, when: True)
    monkeypatch.setattr(probe, "FIRST", 1)
    monkeypatch.setattr(probe, "SECOND", 2)
    monkeypatch.setattr(probe, "GROWTH", 2)


def _looks(run):
    return [d.content for d in run.documents if d.kind == "probe"]


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
def test_looking_changes_no_bit_of_the_training_nor_of_any_generator(build, often):
    x, y = data()
    _, want, variables, drawn = trained(build, stock, x, y, batch_size=16)
    model, got, seen, also = trained(build, trainrt.fit, x, y, batch_size=16)
    assert [one.get("skipped") for one in _looks(got.run)] == [None] * 6  # steps 0, 1, 2, 4, 8 and the end
    assert all(not one["errors"] for one in _looks(got.run))
    assert got.history == want.history
    assert also == drawn
    for left, right in zip(variables, seen, strict=True):
        np.testing.assert_array_equal(left, right)
    if build is Subclassed:
        assert float(model.seen) == 0
        assert "call" not in vars(model.hidden)


@pytest.mark.parametrize("build", SMALL, ids=lambda f: f.__name__)
def test_looking_at_a_pipeline_changes_no_bit_either(build, often):
    def pipeline():
        return tf.data.Dataset.from_tensor_slices(data()).batch(16)

    _, want, variables, drawn = trained(build, stock, pipeline(), shuffle=False)
    _, got, seen, also = trained(build, trainrt.fit, pipeline(), shuffle=False)
    assert {one["source"] for one in _looks(got.run)} == {"first rows"}
    assert got.history == want.history
    assert also == drawn
    for left, right in zip(variables, seen, strict=True):
        np.testing.assert_array_equal(left, right)


def test_without_observation_nothing_is_looked_at(often):
    x, y = data()
    _, history, _, _ = trained(dense, lambda m, *a, **k: trainrt.fit(m, *a, observe=False, **k), x, y)
    assert not _looks(history.run)
    assert not history.run.document("model")


def _twin(model, x):
    """The outputs of each layer of a sequential model in training mode without dropout, by calling one by one."""
    outputs = {}
    for layer in model.layers:
        x = layer(x)
        outputs[layer.name] = np.asarray(x)
    return outputs


def test_numbers_of_the_layers_are_those_of_numpy():
    x, _ = data()
    model = keras.Sequential([keras.Input((64,)), LAYERS.Dense(12, "relu"), LAYERS.Dense(5, "tanh")])
    model.layers[0].bias.assign(np.where(np.arange(12) < 4, -100.0, 0.0))
    with forward.untouched(model):
        calls = forward.run(model, tf.constant(x), training=True).calls
    twin = _twin(model, x)
    assert [call.layer.name for call in calls] == list(twin)
    for call in calls:
        activation = anatomy.activation_of(call.layer)
        told = forward.describe(np.asarray(call.outputs[0]), activation)
        a = twin[call.layer.name].astype(np.float64)
        assert told["zero_units"] == np.mean([(column == 0).all() for column in a.T])
        assert told["zero_share"] == (a == 0).mean()
        assert told["constant_units"] == np.mean([np.ptp(column) == 0 for column in a.T])
        np.testing.assert_allclose(told["mean"], a.mean(), rtol=1e-5)
        np.testing.assert_allclose(told["std"], a.std(), rtol=1e-4)
        np.testing.assert_allclose(told["spread"], np.sqrt(a.var(axis=0).mean() / np.square(a).mean()), rtol=1e-4)
        assert (told["min"], told["max"]) == (np.float32(a.min()), np.float32(a.max()))
        if activation == "tanh":
            flat = 1 - a**2 < forward.FLAT
            np.testing.assert_allclose(told["saturated_share"], flat.mean(), atol=1e-6)
    assert told["units"] == 5


def test_units_that_are_equal_are_counted_and_nonfinite_ones_do_not_hide_the_rest():
    a = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    a[:, 2] = a[:, 0]
    assert forward.describe(a, None)["equal_units"] == pytest.approx(1 / 3)
    a[3, 1] = np.nan
    told = forward.describe(a, None)
    assert told["nonfinite_share"] == pytest.approx(1 / a.size)
    assert np.isfinite(told["mean"])


def _sample(x, y, weight=None):
    return look.Sample(tf.constant(x), tf.constant(y), weight, len(x), "arrays")


def test_loss_gradient_and_what_a_step_did_are_those_of_a_tape():
    x, y = data()
    model = compiled(dense)
    model.fit(x, y, verbose=0)
    sample = _sample(x, y)
    taken = look.take(model, sample, 5, "schedule", None)
    assert not taken.errors
    seeds = [np.asarray(v) for v in model.variables if "seed" in v.name]
    rng = np.random.default_rng(1)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True), training=True)
    want = tape.gradient(loss, [v.value for v in model.trainable_variables])
    # The same dropout masks: the tape has moved the seeds on, and the look has not.
    for variable, value in zip([v for v in model.variables if "seed" in v.name], seeds, strict=True):
        variable.assign(value)
    for got, expected in zip(taken.gradients, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    before = [np.asarray(v) for v in model.trainable_variables]
    for variable in model.trainable_variables:
        variable.assign_add(1e-3 * rng.normal(size=variable.shape))
    advanced = look.advance(model, sample, taken, 1)
    told = look.content(taken, sample, [v.path for v in model.trainable_variables], advanced)
    moved = [np.asarray(v) - b for v, b in zip(model.trainable_variables, before, strict=True)]
    predicted = sum(float((np.asarray(g) * u).sum()) for g, u in zip(want, moved, strict=True))
    np.testing.assert_allclose(told["advance"]["predicted"], predicted, rtol=1e-3)
    np.testing.assert_allclose(told["advance"]["before"], float(loss), rtol=1e-5)
    after = float(model.compute_loss(x, y, model(x, training=True), training=True))
    np.testing.assert_allclose(told["advance"]["after"], after, rtol=1e-5)
    np.testing.assert_allclose(told["advance"]["actual"], after - float(loss), rtol=1e-3, atol=1e-6)
    kernel = model.layers[0].kernel
    np.testing.assert_allclose(
        told["gradient"]["regularised"][kernel.path][1], 2 * 0.01 * np.linalg.norm(before[0]), rtol=1e-5
    )


def test_modes_are_told_apart_and_batch_norm_from_dropout():
    x, y = data()
    model = compiled(dense)
    model.fit(x, y, verbose=0)
    told = look.content(look.take(model, _sample(x, y), 1, "end", None), _sample(x, y), [], None)
    inference = np.asarray(model(x, training=False), np.float64)
    hidden = np.asarray(model.layers[0](x), np.float64)
    norm = model.layers[1]
    normal = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + norm.epsilon)
    batch = np.asarray(model.layers[3](normal * np.asarray(norm.gamma) + np.asarray(norm.beta)), np.float64)
    want = np.sqrt(np.square(inference - batch).mean()) / batch.std()
    np.testing.assert_allclose(told["inference"]["batchnorm"], want, rtol=1e-3)
    loss = keras.losses.sparse_categorical_crossentropy
    np.testing.assert_allclose(told["inference"]["batchnorm_loss"], np.mean(loss(y, batch)), rtol=1e-3)
    np.testing.assert_allclose(told["loss"]["inference"], np.mean(loss(y, inference)), rtol=1e-4)
    assert told["accuracy"]["inference"] == (inference.argmax(-1) == y).mean()


CROSSENTROPIES = {
    "sparse": (keras.losses.SparseCategoricalCrossentropy(), False, lambda y: y, 4),
    "sparse_logits": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), True, lambda y: y, 4),
    "one_hot": (keras.losses.CategoricalCrossentropy(), False, lambda y: np.eye(4, dtype="float32")[y], 4),
    "binary": (keras.losses.BinaryCrossentropy(), False, lambda y: (y[:, None] > 1).astype("float32"), 1),
    "binary_logits": (keras.losses.BinaryCrossentropy(from_logits=True), True, lambda y: y[:, None] > 1, 1),
}


@pytest.mark.parametrize("name", CROSSENTROPIES)
def test_a_constant_prediction_costs_the_entropy_of_the_labels(name):
    loss, _, encode, units = CROSSENTROPIES[name]
    labels = np.array([0] * 10 + [1] * 20 + [2] * 30 + [3] * 4)
    y = encode(labels)
    model = keras.Sequential([keras.Input((2,)), LAYERS.Dense(units)])
    model.compile("sgd", loss)
    model.fit(np.zeros((64, 2)), y, verbose=0)
    told = reference.losses(model, y, None, model(np.zeros((64, 2))))
    counts = np.bincount(labels) if units > 1 else np.bincount(labels > 1)
    share = counts / counts.sum()
    assert told["constant"] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-3)
    assert told["perfect"] < told["constant"] < told["opposite"]


def test_numbers_are_predicted_best_by_their_mean_or_their_median():
    y = np.random.default_rng(0).exponential(size=(50, 1)).astype("float32")
    for loss, best in (("mse", y.var()), ("mae", np.abs(y - np.median(y)).mean())):
        model = keras.Sequential([keras.Input((2,)), LAYERS.Dense(1)])
        model.compile("sgd", loss)
        model.fit(np.zeros((50, 2)), y, verbose=0)
        told = reference.losses(model, y, None, model(np.zeros((50, 2))))
        assert told["constant"] == pytest.approx(best, rel=1e-4)
        assert told["perfect"] == 0


def _document(build, loss="sparse_categorical_crossentropy", see=True):
    x, y = data(32)
    model = build()
    model.compile("sgd", loss, metrics=["accuracy"])
    model(x[:2])
    with forward.untouched(model):
        seen = forward.run(model, tf.constant(x), training=True) if see else None
    return anatomy.describe(model, y, seen, [])


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
def test_the_output_and_its_activation_are_found_in_every_kind_of_model(build):
    document = _document(build)
    (output,) = document["outputs"]
    assert (output["activation"], output["units"], output["softmax_axis"]) == ("softmax", 10, -1)
    assert document["kind"] == {"Subclassed": "subclassed", "nested": "functional"}.get(build.__name__, "sequential")
    assert document["losses"][0] == {
        "output": 0,
        "name": "sparse_categorical_crossentropy",
        "custom": False,
        "from_logits": False,
        "config": {},
    }
    assert document["metrics"] == ["accuracy"]
    assert document["targets"][0]["integers"]
    weights = [weight["path"] for layer in document["layers"] for weight in layer["weights"]]
    assert len(weights) == len(set(weights))


@pytest.mark.parametrize("build", MODELS[:-1], ids=lambda f: f.__name__)
def test_what_is_told_without_running_agrees_with_what_is_seen(build):
    still, seen = _document(build, see=False), _document(build)
    assert [o["activations"] for o in still["outputs"]] == [o["activations"] for o in seen["outputs"]]


def test_a_subclassed_model_that_was_not_seen_is_not_guessed_at():
    document = _document(Subclassed, see=False)
    assert not document["complete"]
    assert not document["outputs"]
    assert sorted(layer["class"] for layer in document["layers"]) == ["Dense", "Dense", "Dropout"]


def test_two_softmaxes_and_a_dead_end_are_told():
    def build():
        layers = [LAYERS.Dense(10, "softmax"), LAYERS.Dropout(0.1), LAYERS.Softmax()]
        return keras.Sequential([keras.Input((64,)), *layers])

    assert _document(build)["outputs"][0]["activations"] == ["softmax", "softmax"]


def test_weights_behind_a_cut_are_unreached(often):
    x, y = data()

    def build():
        cut = LAYERS.Lambda(keras.ops.stop_gradient, name="cut")
        return keras.Sequential([keras.Input((64,)), LAYERS.Dense(8, "relu"), cut, LAYERS.Dense(10, "softmax")])

    with pytest.warns(UserWarning, match="Gradients do not exist"):
        _, history, _, _ = trained(build, trainrt.fit, x, y)
    first = _looks(history.run)[0]
    assert len(first["gradient"]["unreached"]) == 2
    assert history.run.document("model")["unreached"] == first["gradient"]["unreached"]


def test_a_model_that_raises_in_a_look_trains_on_and_the_document_says_why(often, monkeypatch):
    x, y = data()

    def broken(*_, **__):
        raise RuntimeError("not today")

    _, want, variables, _ = trained(dense, stock, x, y)
    monkeypatch.setattr(forward, "run", broken)
    _, got, seen, _ = trained(dense, trainrt.fit, x, y)
    assert got.history == want.history
    for left, right in zip(variables, seen, strict=True):
        np.testing.assert_array_equal(left, right)
    assert [one["skipped"] for one in _looks(got.run)] == ["RuntimeError: not today"]
    assert got.run.document("model")["layers"]


def test_custom_train_steps_are_left_alone(often):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = LAYERS.Dense(10, "softmax")

        def call(self, x):
            return self.out(x)

        def train_step(self, batch):
            return super().train_step(batch)

    x, y = data()
    _, history, _, _ = trained(Own, trainrt.fit, x, y)
    assert [one["skipped"] for one in _looks(history.run)] == ["the model has a train step of its own"]
    assert history.run.document("model")["why"] == "the model has a train step of its own"


@pytest.mark.parametrize("known", [probe.Cost(), probe.Cost(1.0, 0.0, 1.0)], ids=["first fit", "later fit"])
def test_looks_stay_within_their_budget(known, monkeypatch):
    """By a clock of our own: looks that cost 1 s each, in a run of 1 s a step."""
    x, y = data()
    model = compiled(dense)
    model.fit(x, y, verbose=0)
    clock = itertools.count()
    now = [0.0]
    monkeypatch.setattr(probe.time, "monotonic", lambda: now[0])
    sample = _sample(x, y)

    def dear(*_):
        now[0] += 1.0
        next(clock)
        return look.Look(0, "", {}, forward.Pass(None, []), None, None, {}, None, None, [], [], None)

    monkeypatch.setattr(probe, "take", dear)
    prober = probe.Prober(model, lambda: None, lambda: None, lambda *_: None, enabled=True)
    prober._sample = sample
    prober.cost, practised = known, known.take is not None
    monkeypatch.setattr(prober, "_estimate", lambda: 0.0)
    for step in range(2000):
        prober.before(step)
        now[0] += 1.0
        prober.after(step + 1, 1)
    prober.end(2000)
    looks_taken = next(clock)
    assert 2 <= looks_taken <= (0 if practised else 2) + probe.SHARE * now[0]


def test_a_later_fit_knows_what_a_look_costs(often):
    x, y = data()
    model = compiled(dense)
    trainrt.fit(model, x, y, verbose=0)
    _, _, known = model.train_function._trainrt
    assert min(known.take, known.advance, known.last) > 0
    trainrt.fit(model, x, y, verbose=0)
    assert model.train_function._trainrt[2] is known


def test_multiplications_of_attention_are_counted():
    inputs = keras.Input((32, 64))
    model = keras.Model(inputs, LAYERS.Dense(8)(LAYERS.MultiHeadAttention(4, 16)(inputs, inputs)))
    projections, products, dense_layer = 32 * 4 * 64 * 64, 2 * 32 * 32 * 64, 32 * 64 * 8
    assert probe._macs(forward.layers_of(model)) == pytest.approx(projections + products + dense_layer, rel=0.1)


def test_rows_that_never_come_do_not_make_the_loop_run_a_step_a_call():
    """A pipeline of which no batch can be kept, such as one of strings."""
    model = compiled(dense)
    model.fit(*data(), verbose=0)
    told = []
    prober = probe.Prober(model, lambda: None, lambda: None, lambda kind, _: told.append(kind), enabled=True)
    step, calls = 0, 0
    while step < 10_000:
        prober.before(step)
        ran = min(prober.room(step), 10_000 - step)
        step, calls = step + ran, calls + 1
        prober.after(step, ran)
    prober.end(step)
    assert calls < 20
    assert told[-1] == "probe", "the end says that nothing was seen, and why"
