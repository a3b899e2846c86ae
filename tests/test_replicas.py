"""What trainrt refuses to train under, and what it makes of digests; the strategies are in test_distribute.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt import doors
from trainrt.distribution import lockstep


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def _fit(model):
    trainrt.fit(model, np.zeros((4, 3), np.float32), np.zeros((4, 1), np.float32), verbose=0)


def _pretends(kind, replicas):
    """A strategy of that type without the cluster that making one takes."""
    return type(kind.__name__, (kind,), {"__init__": lambda self: None, "num_replicas_in_sync": replicas})()


def test_a_parameter_server_is_refused_with_the_reason(model):
    model._distribute_strategy = _pretends(tf.distribute.ParameterServerStrategy, 2)
    with pytest.raises(ValueError, match=r"asynchronous.*MultiWorkerMirroredStrategy"):
        _fit(model)


def test_a_strategy_that_was_never_tried_is_refused(model):
    model._distribute_strategy = _pretends(tf.distribute.experimental.CentralStorageStrategy, 2)
    with pytest.raises(ValueError, match=r"Received: model\.distribute_strategy=CentralStorageStrategy"):
        _fit(model)


def test_keras_distribution_is_refused_as_it_does_nothing_here(model, monkeypatch):
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "DataParallel")
    with pytest.raises(ValueError, match=r"does nothing on TensorFlow.*MirroredStrategy"):
        _fit(model)


def test_a_model_from_outside_of_its_strategy_is_refused(model, monkeypatch):
    pretended = _pretends(tf.distribute.MirroredStrategy, 2)
    monkeypatch.setattr(type(model), "distribute_strategy", property(lambda self: pretended))
    with pytest.raises(ValueError, match=r"made outside of the strategy.*strategy.scope"):
        _fit(model)


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ([[1, 5], [1, 5], [1, 5]], {}),
        ([[1, 5], [1, 6], [1, 5]], {1: [1]}),
        ([[2, 5], [1, 5], [1, 5]], {0: [0]}),
        ([[1, 5], [1, 6]], {1: [1]}),
        ([[1, 5], [2, 6], [3, 5], [1, 5]], {0: [1, 2], 1: [1]}),
    ],
)
def test_the_odd_ones_out_are_those_whose_bits_fewer_have(digests, odd):
    found = lockstep._odd_ones_out(np.array(digests, np.int64))
    assert {variable: replicas.tolist() for variable, replicas in found.items()} == odd


def test_seeds_are_those_of_keras_on_one_device():
    ours, theirs = keras.random.SeedGenerator(7), keras.random.SeedGenerator(7)
    with doors.distinct_seeds():
        drawn = [ours.next().numpy().tolist() for _ in range(3)]
    assert drawn == [theirs.next().numpy().tolist() for _ in range(3)]
