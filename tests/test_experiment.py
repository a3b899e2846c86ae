"""Experiments on a model: they name what holds it back, and leave every bit of it as it was."""

import contextlib
import json
import random
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt import digits, doors
from trainrt.experiment import Effect, Explanation, Range, changes, confirmed
from trainrt.experiment.charts import Line, chart
from trainrt.experiment.explanation import CONFIRMED, DROPPED
from trainrt.findings import CAUSES, Finding

(X, Y), _ = digits.load()
X, Y = X[:640], Y[:640]
SORTED = np.argsort(Y, kind="stable")


def make(optimizer=None, regularizer=None, dropout=0.0, normalise=False, seed=1, **compiled):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Flatten(), keras.layers.Dense(32, "relu", kernel_regularizer=regularizer)]
    layers += [keras.layers.BatchNormalization()] if normalise else []
    layers += [keras.layers.Dropout(dropout), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or sgd(0.05), loss, metrics=["accuracy"], **compiled)
    return model


def sgd(rate, **options):
    return keras.optimizers.SGD(rate, momentum=0.9, **options)


STUCK = {
    "learning rate x 10": ({"optimizer": lambda: sgd(1e-4)}, {}, (X, Y)),
    "learning rate x 0.1": ({"optimizer": lambda: sgd(0.6)}, {}, (X, Y)),
    "no clip": ({}, {"clip": 1e-4}, (X, Y)),
    "no regulariser": ({"regularizer": lambda: keras.regularizers.L2(1.0)}, {}, (X, Y)),
    "no weight decay": ({"optimizer": lambda: keras.optimizers.AdamW(1e-3, weight_decay=200.0)}, {}, (X, Y)),
    "shuffled rows": ({}, {"shuffle": False}, (X[SORTED], Y[SORTED])),
    "dropout off": ({"dropout": 0.9}, {}, ((X - X.mean()) / X.std(), Y)),
}
"""The change that must come first -> how the model is made, how it is trained, on what."""


QUICK = ("no clip", "learning rate x 10")


def _slow_but(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _slow_but(STUCK, QUICK))
def test_the_change_that_takes_the_fault_away_moves_the_loss_most(name):
    made, fit, data = STUCK[name]
    model = make(**{k: v() if callable(v) else v for k, v in made.items()})
    trainrt.fit(model, *data, epochs=1, verbose=0, **fit)
    explanation = trainrt.explain(model, *data, **fit)
    best = explanation.effects[0]
    assert best.moves, str(explanation)
    assert best.change == name, str(explanation)
    assert explanation.cause == changes.named(name).causes[0]


def test_nothing_moves_a_model_that_is_well():
    model = make()
    trainrt.fit(model, X, Y, epochs=4, verbose=0)
    explanation = trainrt.explain(model, X, Y)
    assert explanation.cause is None, str(explanation)


def test_the_optimizers_own_clip_is_taken_off():
    model = make(sgd(0.05, global_clipnorm=1e-4))
    explanation = trainrt.explain(model, X, Y, changes=["no clip"], replays=2)
    assert explanation.effects[0].moves
    assert model.optimizer.global_clipnorm == 1e-4


def test_unscaled_inputs_are_standardised():
    model = make(sgd(0.01))
    explanation = trainrt.explain(model, X * 255, Y, changes=["standardised inputs"], replays=2)
    assert explanation.effects[0].moves, str(explanation)


def test_mixed_precision_is_tried_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make()
    finally:
        keras.config.set_dtype_policy("float32")
    before = [layer.dtype_policy.name for layer in model.layers]
    explanation = trainrt.explain(model, X, Y, changes=["float32"], replays=1)
    assert [effect.change for effect in explanation.effects] == ["float32"]
    assert [layer.dtype_policy.name for layer in model.layers] == before
    assert explanation.effects[0].losses != explanation.unchanged


# ------------------------------------------------------------------------------------------------------ left as it was


class OwnStep(keras.Model):
    """A model whose train step, and optimizers, are its own."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(16, "relu"), keras.layers.Dense(10)
        self.other = keras.optimizers.Adam(1e-3)

    def call(self, x):
        return self.out(self.hidden(keras.ops.reshape(x, (-1, 64))))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, self(x, training=True), True))
        weights = self.trainable_variables
        gradients = tape.gradient(loss, weights)
        self.other.apply(gradients[:2], weights[:2])
        self.optimizer.apply(gradients[2:], weights[2:])
        return {"loss": loss}


def own_step():
    keras.utils.set_random_seed(3)
    model = OwnStep()
    model.compile(sgd(0.01), "mse")
    return model


MODELS = {
    "dropout and batch norm": lambda: make(dropout=0.5, normalise=True),
    "adam": lambda: make(keras.optimizers.Adam()),
    "schedule": lambda: make(keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.9))),
    "clip and decay": lambda: make(keras.optimizers.AdamW(1e-3, weight_decay=0.1, clipnorm=0.5)),
    "averaged": lambda: make(sgd(0.05, use_ema=True)),
    "regularised": lambda: make(regularizer=keras.regularizers.L2(0.1)),
    "eager": lambda: make(dropout=0.5, run_eagerly=True),
    "own step": own_step,
}


def everything(model):
    """The bits of every variable and generator that a training draws from."""
    optimizers = [v for optimizer in doors.optimizers(model) for v in optimizer.variables]
    metrics = [v for metric in model.metrics for v in metric.variables]
    shared = doors.global_seed_state()
    values = [*model.variables, *optimizers, *metrics, *([] if shared is None else [shared])]
    generators = [random.getstate(), np.random.get_state()[1].tobytes(), doors.eager_random_state()]
    return [np.asarray(v).tobytes() for v in values], generators


def experiments(model):
    names = ["learning rate x 10", "no clip", "another optimizer", "dropout off", "no regulariser"]
    trainrt.explain(model, X[:128], Y[:128], steps=3, replays=2, batches=2, changes=names)
    if not isinstance(model, OwnStep):
        trainrt.lr_range(model, X[:128], Y[:128], steps=6, replays=1)


@pytest.mark.parametrize("name", _slow_but(MODELS, ("dropout and batch norm", "clip and decay", "own step")))
def test_an_experiment_leaves_every_bit_as_it_was(name):
    model = MODELS[name]()
    trainrt.fit(model, X[:128], Y[:128], epochs=1, verbose=0)
    before = everything(model)
    attributes = {k: v for k, v in vars(model.optimizer).items() if isinstance(v, (int, float, str, type(None)))}
    experiments(model)
    assert everything(model) == before
    assert {
        k: v for k, v in vars(model.optimizer).items() if isinstance(v, (int, float, str, type(None)))
    } == attributes


@pytest.mark.parametrize(("name", "how"), [("dropout and batch norm", "trainrt"), ("adam", "keras")])
def test_training_goes_on_as_if_there_had_been_no_experiment(name, how):
    def trained(with_experiment):
        model = MODELS[name]()
        fit = trainrt.fit if how == "trainrt" else keras.Model.fit
        fit(model, X[:128], Y[:128], epochs=1, verbose=0)
        if with_experiment:
            experiments(model)
        history = fit(model, X[:128], Y[:128], epochs=2, verbose=0)
        return history.history, [np.asarray(v).tobytes() for v in model.variables]

    assert trained(True) == trained(False)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = make()
    trainrt.fit(model, X[:128], Y[:128], epochs=1, verbose=0)
    before = everything(model)

    @contextlib.contextmanager
    def breaks(replay):
        with changes.named("learning rate x 10").make(replay):
            yield
            raise ZeroDivisionError

    monkeypatch.setattr("trainrt.experiment.explanation.CHANGES", (changes.Change("broken", (), "", breaks),))
    with pytest.raises(ZeroDivisionError):
        trainrt.explain(model, X[:128], Y[:128], steps=2, replays=1)
    assert everything(model) == before


def test_a_model_that_was_never_trained_is_built_and_left_at_its_start():
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trainrt.explain(model, X[:64], Y[:64], steps=2, replays=1)
    assert int(model.optimizer.iterations) == 0
    assert all(not np.asarray(v).any() for v in model.optimizer.variables[2:])


# ------------------------------------------------------------------------------------------------------ what it takes


def test_a_dataset_gives_what_its_arrays_give():
    losses = []
    for data in ((X[:256], Y[:256]), (tf.data.Dataset.from_tensor_slices((X[:256], Y[:256])).batch(32),)):
        explanation = trainrt.explain(make(), *data, shuffle=False, steps=8, replays=1, changes=[])
        losses.append(explanation.unchanged[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_pydataset_is_read():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return X[32 * i : 32 * i + 32], Y[32 * i : 32 * i + 32]

    assert trainrt.explain(make(), Batches(), steps=3, replays=1, changes=["learning rate x 10"]).effects


def test_data_that_can_be_read_only_once_is_refused():
    with pytest.raises(TypeError, match="again and again"):
        trainrt.explain(make(), ((X, Y) for _ in range(3)))


@pytest.mark.parametrize("name", ["steps", "replays", "batches"])
def test_numbers_under_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        trainrt.explain(make(), X, Y, **{name: 0})


def test_an_unknown_change_is_refused_and_the_known_are_listed():
    with pytest.raises(ValueError, match="learning rate x 10"):
        trainrt.explain(make(), X, Y, changes=["more luck"])


def test_a_spent_budget_ends_the_experiment_and_says_what_was_not_tried():
    explanation = trainrt.explain(make(), X[:64], Y[:64], steps=2, replays=1, budget_s=0.0)
    assert not explanation.effects
    assert any("budget" in why for why in explanation.untried.values())


def test_every_change_names_known_causes():
    assert {cause for change in changes.CHANGES for cause in change.causes} <= CAUSES
    assert len({change.name for change in changes.CHANGES}) == len(changes.CHANGES)


# ------------------------------------------------------------------------------------------------------------ findings


def explained(**moves):
    effects = tuple(
        Effect(name, (1.0,), 0.5, 0.0, moved, changes.named(name).causes, "Do it.")
        for name, moved in ((k.replace("_", " "), v) for k, v in moves.items())
    )
    return Explanation(2.0, (1.5,), effects, {}, 8, 1.0)


def finding(*causes):
    return Finding("some_rule", "warning", 0.5, causes, (), (0, 9), "words")


def test_what_an_experiment_confirms_is_certain_and_what_it_speaks_against_is_not():
    explanation = explained(no_clip=True, dropout_off=False)
    judged = explanation.judge(
        [finding("dropout_too_high"), finding("capacity"), finding("lr_too_low", "clip_too_tight")]
    )
    assert [(each.causes[0], each.confidence) for each in judged] == [
        ("clip_too_tight", CONFIRMED),
        ("capacity", 0.5),
        ("dropout_too_high", DROPPED),
    ]
    assert judged[0].evidence["experiment"]["change"] == "no clip"


def test_an_explanation_is_json():
    assert json.dumps(explained(no_clip=True).to_dict(), allow_nan=False)


# -------------------------------------------------------------------------------------------------- learning rate range


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_suggested_rate_takes_off_most_of_what_the_best_of_a_grid_does(kind):
    def optimizer(rate):
        return sgd(rate) if kind == "sgd" else keras.optimizers.Adam(rate)

    def loss(rate):
        history = make(optimizer(rate)).fit(X, Y, epochs=3, verbose=0)
        return history.history["loss"][-1]

    suggestion = trainrt.lr_range(make(optimizer(1e-6)), X, Y).suggestion
    grid = {rate: loss(rate) for rate in 10.0 ** np.arange(-4, 1)}
    worst, best = max(grid.values()), min(grid.values())
    assert worst - loss(suggestion) > 0.7 * (worst - best), (suggestion, grid)


def test_a_model_that_learns_at_no_rate_gets_no_suggestion():
    model = make()
    model.trainable_variables[0].assign(keras.ops.zeros_like(model.trainable_variables[0]))
    found = trainrt.lr_range(model, np.zeros_like(X), np.random.RandomState(0).randint(0, 10, len(Y)), steps=30)
    assert found.suggestion is None
    assert "something else" in str(found)


def test_a_schedule_is_overridden_and_left():
    schedule = keras.optimizers.schedules.ExponentialDecay(1e-5, 10, 0.9)
    model = make(keras.optimizers.Adam(schedule))
    assert trainrt.lr_range(model, X, Y).suggestion is not None
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.0, 0.1)])
def test_a_range_that_does_not_rise_is_refused(low, high):
    with pytest.raises(ValueError, match="must rise"):
        trainrt.lr_range(make(), X, Y, low=low, high=high)


def test_a_plot_is_well_formed_and_has_a_curve_for_each_line(tmp_path):
    rates = np.geomspace(1e-5, 1.0, 20)
    losses = np.where(rates < 0.5, 2 - rates, np.nan)
    found = Range(rates, losses, losses, 0.01, 0.001)
    tree = ElementTree.fromstring(found.svg())
    curves = [e for e in tree.iter() if e.tag.endswith("path") and e.get("fill") == "none"]
    assert len(curves) == 2
    for name in ("a.svg", "a.html"):
        found.save(str(tmp_path / name))
        assert "<svg" in (tmp_path / name).read_text()
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("values", [[np.nan] * 3, [1.0] * 3, [1.0, np.inf, 2.0]])
def test_a_chart_of_degenerate_values_is_drawn(values):
    assert ElementTree.fromstring(chart([Line("<&>", np.arange(3.0), np.array(values))], "x", "y")) is not None


@pytest.mark.parametrize("rate", [1e-5, 1e-4])
def test_fit_confirms_by_experiment_what_is_not_sure_and_trains_the_same(digits, rate, capsys):
    x, y = digits
    runs = []
    for experiment in (False, 30):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
        model.compile(keras.optimizers.SGD(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        history = trainrt.fit(model, x, y, batch_size=8, epochs=15, verbose=0, experiment=experiment)
        runs.append((history.findings, [v.numpy() for v in (*model.variables, *model.optimizer.variables)]))
    (guessed, before), (judged, after) = runs
    assert guessed[0].causes[0] == judged[0].causes[0] == "lr_too_low"
    assert guessed[0].confidence < judged[0].confidence == CONFIRMED
    assert "experiment" in judged[0].evidence
    assert not capsys.readouterr().out, "verbose=0 is silent"
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sure_finding_needs_no_experiment():
    sure = Finding("r", "error", 0.9, ("lr_too_low",), (), (0, 1), "m", {}, ())
    assert confirmed([sure], None, 1.0, verbose=False) == [sure]


def test_an_experiment_that_cannot_be_made_leaves_the_findings_and_says_so():
    unsure = Finding("r", "error", 0.4, ("lr_too_low",), (), (0, 1), "m", {}, ())
    with pytest.warns(UserWarning, match="could not be made"):
        assert confirmed([unsure], make("sgd"), 1.0, verbose=False, x=iter([])) == [unsure]
