"""Equal weights, slots, metrics and history, to the last bit, whatever model, optimizer, clip and precision.

The fast suite draws a few combinations; `pytest -m slow` tries every optimizer of Keras on every family of models.
"""

import inspect

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trainrt

layers = keras.layers
STEPS = 200


def _dense():
    return keras.Sequential([keras.Input((8,)), layers.Dense(13, "relu"), layers.Dropout(0.2), layers.Dense(3)])


def _convolutional():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Reshape((4, 2, 1)),
            layers.Conv2D(5, 2, activation="relu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def _normalised():
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(7), layers.BatchNormalization(), layers.LayerNormalization(), layers.Dense(3)]
    )


def _recurrent():
    return keras.Sequential([keras.Input((8,)), layers.Reshape((4, 2)), layers.LSTM(5), layers.Dense(3)])


def _gated():
    return keras.Sequential([keras.Input((8,)), layers.Reshape((4, 2)), layers.GRU(5), layers.Dense(3)])


def _embedded():
    return keras.Sequential([keras.Input((8,)), layers.Embedding(11, 4), layers.Flatten(), layers.Dense(3)])


def _attentive():
    inputs = keras.Input((8,))
    x = layers.Reshape((4, 2))(inputs)
    x = layers.MultiHeadAttention(2, 3)(x, x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def _regularised():
    constraint = keras.constraints.MaxNorm(1.0)
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(9, "tanh", kernel_regularizer="l2", kernel_constraint=constraint),
            layers.Dense(3, activity_regularizer="l1"),
        ]
    )


MODELS = {
    f.__name__.strip("_"): f
    for f in (_dense, _convolutional, _normalised, _recurrent, _gated, _embedded, _attentive, _regularised)
}
OPTIMIZERS = {
    name: kind
    for name, kind in inspect.getmembers(keras.optimizers, inspect.isclass)
    if issubclass(kind, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
}
OPTIONS = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.05},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.01},
    "ema": {"use_ema": True, "ema_overwrite_frequency": 7},
    "accumulation": {"gradient_accumulation_steps": 3},
    "loss_scale": {"loss_scale_factor": 128.0},
    "schedule": {"learning_rate": keras.optimizers.schedules.CosineDecay(0.01, STEPS)},
}
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16")


def _state(fit, model, optimizer, options, precision, batch_size, observe):
    """Trains from the same seeds: all variables and the history."""
    keras.utils.set_random_seed(5)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        built = MODELS[model]()
        own = {"momentum": 0.9} if optimizer == "SGD" else {}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        built.compile(OPTIMIZERS[optimizer](**own, **options), loss, metrics=["accuracy"])
        rng = np.random.default_rng(0)
        rows = 10 * batch_size - 1
        x = rng.integers(0, 11, (rows, 8)).astype("int32" if model == "embedded" else "float32")
        y = rng.integers(0, 3, rows)
        history = fit(built, x, y, batch_size=batch_size, epochs=STEPS // 10, verbose=0, **observe)
    finally:
        keras.config.set_dtype_policy(before)
    variables = (*built.variables, *built.optimizer.variables, *built.metrics_variables)
    return [np.asarray(v) for v in variables], history.history


def _bits(values) -> bytes:
    """All bits, but that a NaN is a NaN: which sign TensorFlow gives it depends on the place in a vector register."""
    a = np.array(values)
    if a.dtype.kind not in "iub":
        a[np.isnan(a)] = np.nan
    return a.tobytes()


def _same(model, optimizer, option="plain", precision="float32", batch_size=4, observe=True):
    case = (model, optimizer, OPTIONS[option], precision, batch_size)
    try:
        want, want_history = _state(lambda m, *a, **k: m.fit(*a, **k), *case, {})
    except Exception as error:  # Keras itself cannot train it: L1 in bfloat16, say
        with pytest.raises(type(error)):
            _state(trainrt.fit, *case, {"observe": observe})
        return
    got, history = _state(trainrt.fit, *case, {"observe": observe})
    assert {k: _bits(v) for k, v in history.items()} == {k: _bits(v) for k, v in want_history.items()}
    for mine, keras_own in zip(got, want, strict=True):
        assert _bits(mine) == _bits(keras_own)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    model=st.sampled_from(sorted(MODELS)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    option=st.sampled_from(sorted(OPTIONS)),
    precision=st.sampled_from(PRECISIONS),
    batch_size=st.integers(2, 9),
    observe=st.sampled_from([True, False, 5]),
)
def test_any_training_is_the_same_to_the_last_bit(model, optimizer, option, precision, batch_size, observe):
    _same(model, optimizer, option, precision, batch_size, observe)


@pytest.mark.parametrize("model", ["normalised", "embedded", "attentive", "regularised"])
def test_families_of_models_with_sgd(model):
    _same(model, "SGD")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_optimizer_on_every_family(model, optimizer):
    _same(model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_option_of_every_optimizer(optimizer, option):
    _same("normalised", optimizer, option)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_every_precision_on_every_family(model, precision):
    for optimizer in ("SGD", "Adam"):
        _same(model, optimizer, precision=precision)
