"""sum_duplicates trains an embedding as the same model with one-hot inputs; without it trainrt trains as Keras does."""

import keras
import numpy as np
import pytest

import trainrt

IDS, WIDTH = 7, 4


def models(optimizer):
    """An embedding, and a Dense layer without bias on one-hot inputs: the same model, the same weights."""
    keras.utils.set_random_seed(1)
    tables = []
    for one_hot in (False, True):
        first = keras.layers.Dense(WIDTH, use_bias=False) if one_hot else keras.layers.Embedding(IDS, WIDTH)
        shape, dtype = ((10, IDS), "float32") if one_hot else ((10,), "int32")
        layers = [keras.Input(shape, dtype=dtype), first, keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        if tables:
            model.set_weights(tables[0].get_weights())
        model.compile(optimizer(), "mse")
        tables.append(model)
    return tables


def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, IDS, (32, 10)).astype("int32"), rng.standard_normal((32, 1)).astype("float32")


def train(model, x, y, fit=trainrt.fit, **arguments):
    history = fit(model, x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, **arguments)
    return model.get_weights()[0], history


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.05),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.05),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "adam_clipped": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.1),
}


@pytest.mark.parametrize("observe", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_embedding_trains_as_one_hot_inputs_do(optimizer, observe):
    table, dense = models(OPTIMIZERS[optimizer])
    x, y = data()
    want, _ = train(dense, np.eye(IDS, dtype="float32")[x], y)
    got, _ = train(table, x, y, sum_duplicates=True, observe=observe)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)


def test_without_it_the_bits_are_those_of_keras_and_the_mathematics_is_another():
    x, y = data()
    table, dense = models(OPTIMIZERS["adam"])
    ours, history = train(table, x, y)
    want, _ = train(dense, np.eye(IDS, dtype="float32")[x], y)
    kerass, _ = train(models(OPTIMIZERS["adam"])[0], x, y, lambda model, *a, **k: model.fit(*a, **k))
    np.testing.assert_array_equal(ours, kerass)
    assert np.abs(ours - want).max() > 0.01
    assert "unsummed_duplicates" in {finding.rule for finding in history.findings}
    summed = train(models(OPTIMIZERS["adam"])[0], x, y, sum_duplicates=True)[1]
    assert "unsummed_duplicates" not in {finding.rule for finding in summed.findings}
