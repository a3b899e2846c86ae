"""What is observed is what happened: against NumPy, for any optimizer, however the step hands over its gradients."""

import inspect
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt import doors
from trainrt.record.vocabulary import SLOTS_EVERY, Moments
from trainrt.update import native


def _optimizers():
    """Every optimizer of Keras that makes itself from its defaults."""
    skipped = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
    for name, kind in inspect.getmembers(keras.optimizers, inspect.isclass):
        if name not in skipped and issubclass(kind, keras.optimizers.Optimizer):
            broken = name == "Muon" and keras.__version__.startswith("3.12.")
            marks = pytest.mark.skip(reason="Keras 3.12's Muon raises in model.fit too") if broken else ()
            yield pytest.param(kind, id=name, marks=marks)


class Twin(keras.callbacks.Callback):
    """Snapshots every variable after each batch."""

    def __init__(self):
        super().__init__()
        self.weights, self.slots = [], []

    def on_train_begin(self, logs=None):
        self.weights.append([v.numpy() for v in self.model.trainable_variables])

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([v.numpy() for v in self.model.trainable_variables])
        self.slots.append({v.path.rpartition("/")[2]: v.numpy() for v in self.model.optimizer.variables})


def _model(optimizer, **compiled):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, "tanh", name="hidden"), keras.layers.Dense(1, name="out")]
    )
    model.compile(optimizer, "mse", **compiled)
    return model


def _data(rows=48):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 4)).astype("float32")
    return x, (x.sum(1, keepdims=True) > 0).astype("float32")


def _close(got: Moments, tensor: np.ndarray, rtol=2e-6):
    want = Moments.of(tensor)
    for name in ("count", "zeros", "nonfinite"):
        assert getattr(got, name) == getattr(want, name), name
    for name in ("rms", "absmax"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=rtol, err_msg=name)
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-4, atol=1e-6 * float(want.absmax), err_msg="mean")


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("kind", list(_optimizers()))
def test_updates_and_weights_are_those_of_the_variables(kind, kernels, monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", kernels)
    twin = Twin()
    history = trainrt.fit(_model(kind()), *_data(), batch_size=16, epochs=2, verbose=0, shuffle=False, callbacks=[twin])
    run = history.run
    assert len(run) == 6
    assert [p.path for p in run.roster.parameters] == [v.path for v in history.model.trainable_variables]
    for t, (before, after) in enumerate(itertools.pairwise(twin.weights)):
        for p, (old, new) in enumerate(zip(before, after, strict=True)):
            _close(run.moments("weight")[t, p], new)
            _close(run.moments("update")[t, p], new - old)


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("kind", list(_optimizers()))
def test_every_slot_is_paired_with_its_weight(kind, kernels, monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", kernels)
    twin = Twin()
    history = trainrt.fit(_model(kind()), *_data(), batch_size=16, verbose=0, shuffle=False, callbacks=[twin])
    run, optimizer = history.run, history.model.optimizer
    last = twin.slots[-1]
    floating = {
        v.path.rpartition("/")[2]: v
        for v in optimizer.variables
        if len(v.shape) and keras.backend.is_float_dtype(v.dtype)
    }
    seen = set()
    for slot in run.roster.slots:
        for p, parameter in enumerate(run.roster.parameters):
            moments = run.moments(slot)[-1, p]
            name = f"{parameter.path.replace('/', '_')}_{slot}"
            if name in floating:
                _close(moments, last[name])
                seen.add(name)
    unnamed = {"Adafactor", "Muon"}  # their slots carry other names; the pairs are tested by count
    if kind.__name__ not in unnamed:
        assert seen == set(floating)


class Lion(keras.optimizers.Optimizer):
    """A user's own, whose slots have names of their own."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._drift, self._age = self.add_optimizer_variables(variables, ["drift", "age"])

    def update_step(self, gradient, variable, learning_rate):
        i = self._get_variable_index(variable)
        self.assign(self._drift[i], 0.5 * self._drift[i] + 0.5 * gradient)
        self.assign_add(self._age[i], keras.ops.ones_like(variable))
        self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * keras.ops.sign(self._drift[i]))


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize(
    "wrap",
    [lambda o: o, lambda o: keras.optimizers.LossScaleOptimizer(o, initial_scale=4.0)],
    ids=["bare", "in a loss scale"],
)
@pytest.mark.parametrize(
    ("make", "names"),
    [(lambda: keras.optimizers.Adam(0.1), ("momentum", "velocity")), (lambda: Lion(0.1), ("drift", "age"))],
    ids=["adam", "own"],
)
def test_slots_have_their_real_names_whoever_made_the_optimizer(make, names, wrap, kernels, monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", kernels)
    optimizer = make()
    history = trainrt.fit(_model(wrap(optimizer)), *_data(), batch_size=16, verbose=0, shuffle=False)
    run = history.run
    assert run.roster.slots == names
    slots = {v.path.rpartition("/")[2]: v.numpy() for v in optimizer.variables}
    for slot in names:
        for p, parameter in enumerate(run.roster.parameters):
            _close(run.moments(slot)[-1, p], slots[f"{parameter.path.replace('/', '_')}_{slot}"])


@pytest.mark.skipif(not hasattr(keras.optimizers, "OptimizerMap"), reason="this Keras has none")
@pytest.mark.parametrize("kernels", ["0", "1"])
def test_slots_of_several_optimizers_in_one_are_those_of_their_own_weights(kernels, monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", kernels)
    adam, sgd = keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.1, momentum=0.9)
    several = keras.optimizers.OptimizerMap(default_optimizer=sgd)
    several[".*hidden/.*"] = adam
    optimizer = keras.optimizers.MultiOptimizer(several)
    run = trainrt.fit(_model(optimizer), *_data(), batch_size=16, verbose=0, shuffle=False).run
    assert run.roster.slots == ("momentum", "velocity")
    slots = {v.path.rpartition("/")[2]: v.numpy() for part in (adam, sgd) for v in part.variables}
    for p, parameter in enumerate(run.roster.parameters):
        for slot in ("momentum", "velocity"):
            known = slots.get(f"{parameter.path.replace('/', '_')}_{slot}")
            if known is None:
                assert np.isnan(run.moments(slot)[-1, p].count)
            else:
                _close(run.moments(slot)[-1, p], known)
    assert np.isnan(run["velocity_norm"]).any(axis=0).tolist() == ["hidden" not in path for path in run.roster.paths]


def test_gradients_are_those_of_the_tape_and_the_loss_is_that_of_the_step():
    x, y = _data(16)
    model = _model(keras.optimizers.SGD(0.1))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - y))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    run = trainrt.fit(model, x, y, batch_size=16, verbose=0, shuffle=False).run
    for p, gradient in enumerate(gradients):
        _close(run.moments("gradient")[0, p], gradient.numpy(), rtol=1e-5)
    np.testing.assert_allclose(run.scalar("loss")[0], loss, rtol=1e-6)
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients))
    np.testing.assert_allclose(run.scalar("gradient_norm")[0], norm, rtol=1e-6)
    np.testing.assert_allclose(run.joint("gradient_update")[0].sum(), -0.1 * norm**2, rtol=1e-5)


def test_the_recorded_loss_is_of_the_batch_and_not_the_running_mean():
    x, y = _data(48)
    twin = []

    class Loss(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            twin.append(logs["loss"])

    run = trainrt.fit(_model("sgd"), x, y, batch_size=16, verbose=0, shuffle=False, callbacks=[Loss()]).run
    np.testing.assert_allclose(np.cumsum(run.scalar("loss")) / np.arange(1, 4), twin, rtol=1e-5)


def test_the_loss_is_told_from_its_parts():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer="l1")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile("sgd", "mse")
    x, y = _data(16)
    kernel = model.layers[1].kernel.numpy()
    data = float(np.mean((model.predict(x, verbose=0) - y) ** 2))
    run = trainrt.fit(model, x, y, batch_size=16, verbose=0, shuffle=False).run
    np.testing.assert_allclose(run.scalar("regularization_loss")[0], 0.5 * np.square(kernel).sum(), rtol=1e-5)
    np.testing.assert_allclose(run.scalar("data_loss")[0], data, rtol=1e-5)
    parts = sum(run.scalar(name)[0] for name in ("data_loss", "regularization_loss", "added_loss"))
    np.testing.assert_allclose(run.scalar("loss")[0], parts, rtol=1e-6)
    assert run.scalar("added_loss")[0] > 0


@pytest.mark.parametrize("kernels", ["0", "1"])
def test_a_clip_scales_what_the_optimizer_gets_and_says_so(kernels, monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", kernels)
    model = _model(keras.optimizers.SGD(1.0))
    run = trainrt.fit(model, *_data(), batch_size=16, verbose=0, clip=0.01).run
    norm = run.scalar("gradient_norm")
    np.testing.assert_allclose(run.scalar("clipped_gradient_norm"), 0.01, rtol=1e-6)
    np.testing.assert_allclose(run["clip_scale"], np.repeat((0.01 / norm)[:, None], 4, axis=1), rtol=1e-6)
    np.testing.assert_allclose(run["clip_share"], 1.0)
    update = np.sqrt(np.square(run.moments("update").norm).sum(1))
    np.testing.assert_allclose(update, 0.01, rtol=1e-4)


@pytest.mark.parametrize("own", [{"clipnorm": 0.02}, {"global_clipnorm": 0.02}])
def test_the_optimizers_own_clip_is_recorded(own):
    run = trainrt.fit(_model(keras.optimizers.SGD(1.0, **own)), *_data(), batch_size=16, verbose=0).run
    applied = run.moments("gradient").norm * run["clip_scale"]
    np.testing.assert_allclose(run.moments("update").norm, applied, rtol=1e-4)
    assert (run["clip_scale"] < 1).any()


def test_a_loss_scale_is_divided_out():
    plain = trainrt.fit(_model(keras.optimizers.SGD(0.1)), *_data(), batch_size=16, verbose=0, shuffle=False).run
    for optimizer in (
        keras.optimizers.SGD(0.1, loss_scale_factor=256.0),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=256.0),
    ):
        scaled = trainrt.fit(_model(optimizer), *_data(), batch_size=16, verbose=0, shuffle=False).run
        np.testing.assert_allclose(scaled.moments("gradient").rms, plain.moments("gradient").rms, rtol=1e-5)
        np.testing.assert_allclose(scaled.scalar("loss"), plain.scalar("loss"), rtol=1e-5)
        assert scaled.scalar("loss_scale")[0] == 256


def test_sparse_gradients_are_measured_as_the_dense_ones_they_stand_for():
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Embedding(10, 4, name="words"), keras.layers.Flatten(), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x = np.array([[1, 1, 2], [2, 3, 1]])
    before = model.layers[0].embeddings.numpy()
    run = trainrt.fit(model, x, np.ones((2, 1)), batch_size=2, verbose=0).run
    update = model.layers[0].embeddings.numpy() - before
    gradient = run.moments("gradient")[0, 0]
    assert gradient.zeros == 7 * 4
    np.testing.assert_allclose(gradient.norm, np.linalg.norm(update), rtol=1e-5)


def test_a_weight_that_the_loss_does_not_reach_is_not_measured_rather_than_zero():
    inputs = keras.Input((4,))
    lost = keras.layers.Dense(2, name="lost")
    head = keras.layers.Dense(1, name="head")

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.lost, self.head = lost, head

        def call(self, x):
            self.lost(x)
            return self.head(x)

    del inputs
    model = Model()
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        history = trainrt.fit(model, *_data(), batch_size=16, verbose=0)
    run = history.run
    at = [i for i, p in enumerate(run.roster.parameters) if p.layer.endswith("lost")]
    assert len(at) == 2
    assert np.isnan(run.moments("gradient").rms[:, at]).all()
    assert (run.moments("update").zero_share[:, at] == 1).all()
    assert ("dead_update", "graph_cut") in [(f.rule, f.causes[0]) for f in history.findings]


def test_several_optimizers_of_one_model_are_all_observed():
    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            self.generator, self.critic = keras.layers.Dense(4, name="generator"), keras.layers.Dense(1, name="critic")

        def compile(self, **keywords):
            super().compile(**keywords)
            self.critic_optimizer = keras.optimizers.SGD(0.1, name="critic_sgd")

        def train_step(self, x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.critic(self.generator(x)))
            gradients = tape.gradient(loss, self.generator.trainable_variables)
            self.optimizer.apply(gradients, self.generator.trainable_variables)
            for _ in range(2):
                with tf.GradientTape() as tape:
                    loss = -tf.reduce_mean(self.critic(self.generator(x)))
                gradients = tape.gradient(loss, self.critic.trainable_variables)
                self.critic_optimizer.apply(gradients, self.critic.trainable_variables)
            return {"loss": loss}

    model = Gan()
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    run = trainrt.fit(model, _data()[0], batch_size=16, verbose=0).run
    layers = [p.layer.rpartition("/")[2] for p in run.roster.parameters]
    assert layers == ["generator"] * 2 + ["critic"] * 2
    assert np.isfinite(run["update_ratio"][:, [0, 2]]).all()
    assert (run.joint("steps")[:, 2:] == 2).all(), "two updates in one step are both counted"
    np.testing.assert_allclose(run.scalar("learning_rate/critic_sgd"), 0.1)
    assert np.isnan(run.moments("momentum").rms[:, 2:]).all()


def test_a_step_that_hides_its_update_is_trained_and_said_so():
    class Hidden(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = keras.layers.Dense(1)

        def call(self, x):
            return self.head(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.head(x) - y))
            gradients = tape.gradient(loss, self.head.trainable_variables)

            def apply():
                self.optimizer.apply(gradients, self.head.trainable_variables)
                return True

            tf.cond(loss > 0, apply, lambda: False)
            return {"loss": loss}

    def trained(fit):
        keras.utils.set_random_seed(2)
        model = Hidden()
        model.compile("sgd")
        model(_data()[0])
        model.optimizer.build(model.trainable_variables)
        return fit(model, *_data(), batch_size=16, verbose=0), model.get_weights()

    _, want = trained(lambda model, *a, **k: model.fit(*a, **k))
    with pytest.warns(UserWarning, match=r"does not observe this run.*tf\.cond"):
        history, got = trained(trainrt.fit)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(history.run) == 0
    assert history.run.environment["observed"] is False


def test_the_list_of_all_variables_is_no_slot_though_it_may_be_as_long_as_that_of_the_weights():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.trainable_weights)
    assert len(optimizer.variables) == len(model.trainable_weights)
    assert doors.slots(optimizer, model.trainable_weights) == {}


ADAPTIVE = {  # kind, options -> (slot, t -> (factor on the learning rate, inside, outside, correction))
    "adam": (
        keras.optimizers.Adam, {}, "velocity",
        lambda t: ((1 - 0.999**t) ** 0.5 / (1 - 0.9**t), 0, 1e-3, 1 - 0.999**t),
    ),
    "amsgrad": (
        keras.optimizers.Adam, {"amsgrad": True}, "velocity_hat",
        lambda t: ((1 - 0.999**t) ** 0.5 / (1 - 0.9**t), 0, 1e-3, 1 - 0.999**t),
    ),
    "nadam": (
        keras.optimizers.Nadam, {}, "velocity",
        lambda t: ((1 - 0.999**t) ** 0.5, 0, 1e-3 * (1 - 0.999**t) ** 0.5, 1 - 0.999**t),
    ),
    "rmsprop": (keras.optimizers.RMSprop, {"momentum": 0.9}, "velocity", lambda t: (1, 1e-3, 0, 1)),
    "adagrad": (keras.optimizers.Adagrad, {}, "accumulator", lambda t: (1, 1e-3, 0, 1)),
}  # fmt: skip


class Gradients(Twin):
    """Of the loss at the weights before each step, besides what `Twin` takes."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.gradients = batches, []

    def on_train_batch_begin(self, batch, logs=None):
        x, y = self.batches[batch]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x) - y))
        gradients = tape.gradient(loss, [v.value for v in self.model.trainable_variables])
        self.gradients.append([g.numpy().astype(np.float64) for g in gradients])


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_what_an_optimizer_divides_by_and_decays_is_that_of_its_variables(name, scaled, kernels, monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", kernels)
    kind, options, slot, scalars = ADAPTIVE[name]
    optimizer = kind(0.01, epsilon=1e-3, weight_decay=0.1, clipnorm=0.05, **options)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    if scaled:
        optimizer.clipnorm = None
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    x, y = _data()
    twin = Gradients([(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)])
    model = _model(optimizer)
    run = trainrt.fit(model, x, y, batch_size=16, verbose=0, shuffle=False, callbacks=[twin]).run
    paths = [v.path for v in model.trainable_variables]
    for t in range(3):
        factor, inside, outside, correction = scalars(t + 1)
        for p, path in enumerate(paths):
            g = twin.gradients[t][p]
            norm = np.linalg.norm(g)
            clipped = g if scaled else g * min(1.0, 0.05 / norm)
            own = {n: twin.slots[t].get(f"{path.replace('/', '_')}_{n}") for n in (slot, "momentum")}
            v = own[slot].astype(np.float64)
            divisor = np.sqrt(v + inside) + outside
            rates = 0.01 * factor / divisor
            wanted = {
                "normalized_gradient_rms": np.sqrt(np.mean(np.square(clipped / divisor)) * correction),
                "epsilon_share": np.mean(v < (outside**2 if outside else inside)),
                "element_rate": rates.mean(),
                "element_rate_max": rates.max(),
                "element_rate_min": rates.min(),
                "decay_norm": 0.0 if "bias" in path else 0.001 * np.linalg.norm(twin.weights[t + 1][p]),
            }
            if own["momentum"] is not None:
                m = own["momentum"].astype(np.float64)
                wanted["gradient_momentum_cosine"] = (g * m).sum() / (norm * np.linalg.norm(m))
            for statistic, value in wanted.items():
                np.testing.assert_allclose(
                    run[statistic][t, p], value, rtol=1e-4, atol=1e-9, err_msg=f"{statistic} {path}"
                )
            if "bias" not in path:  # the weight after the step stands for the one before: off by the update at most
                before, update = (np.linalg.norm(x) for x in (twin.weights[t][p], run.moments("update")[t, p].norm))
                assert abs(run["decay_norm"][t, p] - 0.001 * before) <= 0.001 * update * (1 + 1e-5)
    assert (run["skipped_share"] == 0).all()
    if name in ("adam", "amsgrad", "nadam"):
        np.testing.assert_allclose(run.scalar("bias_correction"), [1 - 0.999**t for t in (1, 2, 3)], rtol=1e-4)


@pytest.mark.parametrize(("kind", "every"), [(keras.optimizers.Adam, 1), (keras.optimizers.Lamb, 1), ("adam", 3)])
def test_with_kernels_slots_are_held_against_the_gradient_in_every_eighth_step_and_all_else_in_each(kind, every):
    if native.load() is None:
        pytest.skip(str(native.status().reason))
    optimizer = kind if isinstance(kind, str) else kind()
    run = trainrt.fit(_model(optimizer), *_data(), batch_size=1, verbose=0, epochs=every, observe=every).run
    held = run.joint("slot_steps")[:, 0] == 1
    number = np.arange(len(run))
    np.testing.assert_array_equal(held, (number < SLOTS_EVERY) | (number % SLOTS_EVERY == 0))
    np.testing.assert_array_equal(np.isnan(run["gradient_momentum_cosine"][:, 0]), ~held)
    for name in ("update_ratio", "gradient_norm", "momentum_norm", "decay_norm", "gradient_update_cosine"):
        assert np.isfinite(run[name][:, 0]).all(), name


def test_an_optimizer_without_a_second_moment_has_no_rates():
    run = trainrt.fit(_model(keras.optimizers.SGD(0.1, momentum=0.9)), *_data(), batch_size=16, verbose=0).run
    for name in ("normalized_gradient_rms", "epsilon_share", "element_rate", "element_rate_max", "element_rate_min"):
        assert np.isnan(run[name]).all(), name
    np.testing.assert_allclose(run["gradient_momentum_cosine"][0], -1, rtol=1e-5)
    assert (run["decay_norm"] == 0).all()


def test_steps_that_loss_scaling_skips_are_told():
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.1, weight_decay=0.1), initial_scale=2.0**126
    )
    twin = []

    class Inner(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            twin.append(int(optimizer.inner_optimizer.iterations.numpy()))

    x, y = _data()
    history = trainrt.fit(_model(optimizer), x * 1e3, y * 1e3, batch_size=16, epochs=4, verbose=0, callbacks=[Inner()])
    skipped = np.diff([0, *twin]) == 0
    assert 0 < skipped.sum() < len(skipped)
    run = history.run
    np.testing.assert_array_equal(run["skipped_share"], np.repeat(skipped[:, None], 4, axis=1))
    assert (run["decay_norm"][skipped] == 0).all()
    assert (run["decay_norm"][~skipped] > 0).any()
