"""A step that is taken back leaves no trace: the training is the one whose data never held that batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.endurance import poison
from trainrt.findings.poison import taken_back

ROWS, BATCH = 96, 8


class OwnStep(keras.Model):
    """A train step of the user's, with the usual parts in it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def make(kind=keras.Model, dtype=None, **compiled):
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4])
    x = keras.layers.Dense(6, dtype=dtype)(inputs)
    x = keras.layers.BatchNormalization(dtype=dtype)(x)
    x = keras.layers.Dropout(0.4, dtype=dtype)(x)
    model = kind(inputs, keras.layers.Dense(1, dtype=dtype)(x))
    model.compile(**{"optimizer": "adam", "loss": "mse", "metrics": ["mae"], **compiled})
    return model


def rows():
    x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
    return x, x[:, :1].copy()


def bits(model):
    return [np.asarray(v).tobytes() for v in [*model.variables, *model.optimizer.variables]]


def poisoned(batches, where="x", value=np.nan):
    """The data with something bad in each of these batches, and the data without them."""
    x, y = rows()
    keep = np.repeat([b not in batches for b in range(ROWS // BATCH)], BATCH)
    healthy = x[keep], y[keep]
    for batch in batches:
        (x if where == "x" else y)[batch * BATCH + 3] = value
    return (x, y), healthy


def fit(model, data, **keywords):
    return trainrt.fit(model, *data, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, **keywords)


@pytest.mark.parametrize(
    ("made", "keywords"),
    [
        ({}, {}),
        ({}, {"observe": False, "clip": 1.0}),
        pytest.param(
            {"optimizer": keras.optimizers.AdamW(1e-2, use_ema=True, clipnorm=1.0)},
            {"observe": 3},
            marks=pytest.mark.slow,
        ),
        ({"jit_compile": True}, {}),
        pytest.param({"run_eagerly": True}, {}, marks=pytest.mark.slow),
        ({"kind": OwnStep, "metrics": None}, {}),
        pytest.param(
            {"optimizer": keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)},
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "unobserved clip", "ema", "xla", "eager", "own step", "accumulation"],
)
def test_a_skipped_batch_leaves_no_trace(made, keywords):
    bad, healthy = poisoned([2, 7])
    kind, compiled = made.get("kind", keras.Model), {k: v for k, v in made.items() if k != "kind"}
    if "optimizer" in compiled:
        config = compiled["optimizer"].get_config()
        fresh = lambda: {**compiled, "optimizer": type(compiled["optimizer"]).from_config(config)}  # noqa: E731
    else:
        fresh = lambda: compiled  # noqa: E731
    skipping, without = make(kind, **fresh()), make(kind, **fresh())
    skipped = fit(skipping, bad, on_nonfinite="skip", **keywords)
    whole = fit(without, healthy, on_nonfinite="skip", **keywords)
    assert bits(skipping) == bits(without)
    assert skipped.history == whole.history
    told = skipped.run.document("poison")["taken_back"]
    assert [(t["epoch"], t["batch"], t["why"]) for t in told] == [(e, b, "nonfinite") for e in (0, 1) for b in (2, 7)]


COMBINED = {
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "executions": {"steps_per_execution": 4},
    "bfloat16": {"dtype": "mixed_bfloat16"},
    "float16": {"dtype": "mixed_float16"},
    "xla bfloat16": {"dtype": "mixed_bfloat16", "jit_compile": True},
    "xla float16": {"dtype": "mixed_float16", "jit_compile": True, "steps_per_execution": 3},
    "eager float16": {"dtype": "mixed_float16", "run_eagerly": True},
    "eager executions": {"run_eagerly": True, "steps_per_execution": 4},
}


FITTED = ({}, {"trace": (1, 6)}, {"observe": 3}, {"observe": False})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "fitted"),
    [
        pytest.param(made, FITTED[(i + shift) % 4], id=f"{name} {FITTED[(i + shift) % 4]}")
        for i, (name, made) in enumerate(COMBINED.items())
        for shift in (0, 1)
    ],
)
def test_however_a_step_runs_it_is_taken_back_and_stop_stops_at_it(made, fitted, tmp_path):
    """Compiled by XLA or not at all, in other precisions, many in an execution, one a call under the profiler."""
    bad, healthy = poisoned([3, 8])
    place = {"logdir": tmp_path} if "trace" in fitted else {}
    skipping, without, stopping, short = (make(**made) for _ in range(4))
    skipped = fit(skipping, bad, on_nonfinite="skip", **fitted, **place)
    whole = fit(without, healthy, on_nonfinite="skip")
    assert bits(skipping) == bits(without)
    assert skipped.history == whole.history
    told = skipped.run.document("poison")["taken_back"]
    assert [(t["epoch"], t["batch"]) for t in told] == [(e, b) for e in (0, 1) for b in (3, 8)]
    stopped = fit(stopping, bad, on_nonfinite="stop", **fitted, **place)
    rows = [each[: 3 * BATCH] for each in healthy]
    trainrt.fit(short, *rows, batch_size=BATCH, shuffle=False, verbose=0, on_nonfinite="stop")
    assert bits(stopping) == bits(short)
    assert [t["step"] for t in stopped.run.document("poison")["taken_back"]] == [3]


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("optimizer", ["ftrl", "adam"])
def test_a_first_step_that_makes_all_variables_is_taken_back_too(optimizer, eager):
    bad, healthy = poisoned([0])

    def trained(rows):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Dense(6), keras.layers.Dropout(0.4), keras.layers.Dense(1)])
        model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=eager)
        history = fit(model, rows, on_nonfinite="skip").history
        return bits(model), history

    assert trained(bad) == trained(healthy)


@pytest.mark.parametrize("made", [{}, *({"run_eagerly": True, "steps_per_execution": n} for n in (1, 4))], ids=str)
def test_a_spike_stops_at_its_step(made):
    x = np.random.default_rng(0).normal(size=(90 * BATCH, 4)).astype("float32")
    y = x[:, :1].copy()
    y[80 * BATCH : 81 * BATCH] = 1e4
    stopping, short = make(optimizer="sgd", **made), make(optimizer="sgd")
    keywords = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    history = trainrt.fit(stopping, x, y, on_spike="stop", **keywords)
    trainrt.fit(short, x[: 80 * BATCH], y[: 80 * BATCH], **keywords)
    assert history.run.document("poison")["taken_back"] == [{"step": 80, "epoch": 0, "batch": 80, "why": "loss"}]
    assert int(stopping.optimizer.iterations) == 80
    if not made:
        assert bits(stopping) == bits(short)


def test_nothing_changes_where_nothing_is_taken_back():
    guarded, free = make(), make()
    history = fit(guarded, rows(), on_nonfinite="skip", on_spike="skip")
    assert fit(free, rows()).history == history.history
    assert bits(guarded) == bits(free)


def test_a_step_taken_back_tells_of_its_gradient_alone():
    model = make()
    run = fit(model, poisoned([2])[0], on_nonfinite="skip").run
    assert run.steps[2].tolist() == [2, 2]
    assert (run["gradient_nonfinite_share"][2] > 0).any()
    assert np.isnan(run["update_ratio"][2]).all()
    assert np.isfinite(run["update_ratio"][3]).all()


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_stop_ends_before_the_poisoned_update(eager, monkeypatch):
    # The stop is in the middle of a call.
    monkeypatch.setattr("trainrt.loop.pace.Pace.took", lambda pace, steps, seconds: setattr(pace, "steps", 6))
    bad, healthy = poisoned([3])
    stopped, short = make(run_eagerly=eager), make(run_eagerly=eager)
    history = fit(stopped, bad, on_nonfinite="stop")
    trainrt.fit(
        short, healthy[0][: 3 * BATCH], healthy[1][: 3 * BATCH], BATCH, 1, 0, shuffle=False, on_nonfinite="stop"
    )
    assert bits(stopped) == bits(short)
    assert history.epoch == [0]
    assert history.run.end["how"] == "stopped"
    assert history.run.document("poison")["ended"]
    (finding,) = taken_back(history.run)
    assert (finding.severity, finding.steps) == ("error", (3, 3))
    assert "bad_numbers" in {each.rule for each in history.findings}  # the cause, which takes the symptom in
    assert int(stopped.optimizer.iterations) == 3


def test_too_many_in_a_row_end_the_training_and_no_fewer_do():
    x, y = rows()
    y[BATCH * 1 :] = np.inf
    model = make()
    told = fit(model, (x, y), on_nonfinite="skip").run.document("poison")
    assert told["count"] == poison.CONSECUTIVE + 1
    assert told["ended"]
    assert all(np.isfinite(np.asarray(v)).all() for v in model.weights)
    y[:] = rows()[1]
    y[BATCH * 1 : BATCH * (1 + poison.CONSECUTIVE)] = np.inf
    told = fit(make(), (x, y), on_nonfinite="skip").run.document("poison")
    assert (told["count"], told["ended"]) == (2 * poison.CONSECUTIVE, False)


def test_under_loss_scaling_overflow_is_left_to_the_loss_scale():
    model = make(
        dtype="mixed_float16",
        optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=2.0**30),
    )
    history = fit(model, rows(), on_nonfinite="skip")
    assert history.run.document("poison") == {}
    assert float(model.optimizer.dynamic_scale) < 2.0**30


def test_a_spike_is_skipped_and_does_not_enter_its_own_history():
    x = np.random.default_rng(0).normal(size=(200 * BATCH, 4)).astype("float32")
    y = x[:, :1].copy()
    for batch in (100, 101, 150):
        y[batch * BATCH : (batch + 1) * BATCH] = 1e4
    x[10 * BATCH : 11 * BATCH] *= 1e3  # too early to know what is usual
    model = make(optimizer="sgd")
    keywords = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    history = trainrt.fit(model, x[11 * BATCH :], y[11 * BATCH :], on_spike="skip", **keywords)
    told = history.run.document("poison")["taken_back"]
    assert [t["batch"] for t in told] == [100 - 11, 101 - 11, 150 - 11]
    assert {t["why"] for t in told} == {"loss"}
    early = trainrt.fit(make(optimizer="sgd"), x[: 40 * BATCH], y[: 40 * BATCH], on_spike="stop", **keywords)
    assert early.run.document("poison") == {}


def test_a_model_whose_gradients_nobody_sees_is_refused():
    class Hidden(keras.Model):
        def train_step(self, data):
            x, _ = data
            self.trainable_variables[0].assign_add(tf.ones_like(self.trainable_variables[0]))
            return {"loss": tf.reduce_mean(self(x))}

    with pytest.raises(ValueError, match="look at the gradients"):
        fit(make(Hidden), rows(), on_nonfinite="skip")


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_what_spiked_before_a_death_is_known_after_it(tmp_path, eager):
    """The guard's own history is a part of the state that is saved, and so is what was told of it."""
    x = np.random.default_rng(0).normal(size=(70 * BATCH, 4)).astype("float32")
    y = x[:, :1].copy()
    x[7 * BATCH] = np.nan
    y[20 * BATCH : 21 * BATCH] = 30.0  # a spike in the second epoch alone: the first has shown too few steps by then
    place = {"checkpoint": tmp_path / "c", "logdir": tmp_path / "l"}

    def trained(epochs, **keywords):
        model = make(optimizer="sgd", run_eagerly=eager)
        keywords = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **keywords}
        return model, trainrt.fit(model, x, y, epochs=epochs, on_nonfinite="skip", on_spike="skip", **keywords)

    trained(1, **place)
    resumed, history = trained(2, **place)
    whole, never_died = trained(2)
    assert bits(resumed) == bits(whole)
    told = history.run.document("poison")
    assert told == never_died.run.document("poison")
    taken = [(t["epoch"], t["batch"]) for t in told["taken_back"]]
    assert {(0, 7), (1, 7), (1, 20)}.issubset(taken)
    assert (0, 20) not in taken
