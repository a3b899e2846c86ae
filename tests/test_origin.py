"""How far the weights have gone is measured from where the fit found them, and changes nothing."""

import keras
import numpy as np
import pytest

import trainrt


def trained(x, y, epochs=3, optimizer="adam", **options):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(7, "relu"), keras.layers.Dense(10)]
    )
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    start = [v.numpy() for v in model.trainable_weights]
    return model, start, {"epochs": epochs, "batch_size": 16, "verbose": 0, "shuffle": False}


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "ftrl"])
def test_the_distance_is_that_of_the_variables(digits, optimizer, options):
    x, y = digits
    model, start, how = trained(x, y, optimizer=optimizer, **options)
    run = trainrt.fit(model, x, y, distance=True, **how).run
    far = [np.linalg.norm(v.numpy() - s) for v, s in zip(model.trainable_weights, start, strict=True)]
    np.testing.assert_allclose(run["distance_norm"][-1], far, rtol=1e-6)
    assert "distance" not in run.roster.slots


def test_a_second_fit_measures_from_where_it_found_the_weights(digits):
    x, y = digits
    model, _, how = trained(x, y)
    trainrt.fit(model, x, y, distance=True, **how)
    between = [v.numpy() for v in model.trainable_weights]
    run = trainrt.fit(model, x, y, distance=True, **how).run
    far = [np.linalg.norm(v.numpy() - s) for v, s in zip(model.trainable_weights, between, strict=True)]
    np.testing.assert_allclose(run["distance_norm"][-1], far, rtol=1e-6)


def test_measuring_the_distance_changes_no_bit(digits):
    x, y = digits
    model, _, how = trained(x, y)
    twin, _, _ = trained(x, y)
    trainrt.fit(model, x, y, distance=True, **how)
    twin.fit(x, y, **how)
    for mine, keras_s in zip(model.variables, twin.variables, strict=True):
        np.testing.assert_array_equal(mine.numpy(), keras_s.numpy())
    for mine, keras_s in zip(model.optimizer.variables, twin.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine.numpy(), keras_s.numpy())


def test_a_resumed_run_measures_from_the_first_start(digits, tmp_path):
    x, y = digits
    model, start, how = trained(x, y, epochs=1)
    trainrt.fit(model, x, y, distance=True, checkpoint=tmp_path, **how)
    model, _, how = trained(x, y, epochs=3)
    run = trainrt.fit(model, x, y, distance=True, checkpoint=tmp_path, **how).run
    far = [np.linalg.norm(v.numpy() - s) for v, s in zip(model.trainable_weights, start, strict=True)]
    np.testing.assert_allclose(run["distance_norm"][-1], far, rtol=1e-6)
