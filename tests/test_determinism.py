"""deterministic=True switches everything on in time, or says why it is too late; the passport tells what bits need."""

import os
import random
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

import trainrt
from trainrt.determinism import modes


@pytest.fixture
def fast_again(monkeypatch):
    """Leaves the process as it was: TensorFlow has no public way back."""
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.setattr(modes, "_enabled", [])
    yield
    config.disable_op_determinism()
    os.environ.pop("NCCL_ALGO", None)


def model_of(*layers, **compiled):
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers, keras.layers.Flatten(), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": "adam", "loss": loss, **compiled})
    return model


def run_script(text, *arguments, **variables):
    """A script in a fresh process; what it printed."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_all_is_switched_on_and_what_changed_is_told(digits, fast_again, capsys):
    keras.utils.set_random_seed(1)
    history = trainrt.fit(model_of(), *digits, deterministic=True, seed=3, verbose=2)
    printed = capsys.readouterr().out
    assert modes.is_enabled()
    assert os.environ["NCCL_ALGO"] == "Ring"
    told = history.run.environment["determinism"]
    assert told["enforced"] is True
    assert told["seed"] == 3
    assert any("op determinism" in change for change in told["changes"])
    assert any("seeded with 3" in change for change in told["changes"])
    assert all(f"trainrt: {change}." in printed for change in told["changes"])


def test_a_seed_seeds_every_generator(fast_again):
    drawn = []
    for _ in range(2):
        modes.enter(model_of(), False, 5) if drawn else modes.enable(5)
        drawn.append((random.random(), np.random.rand(), float(tf.random.uniform([])), float(keras.random.uniform([]))))
    assert drawn[0] == drawn[1]


def test_weights_drawn_before_a_seed_are_refused_with_the_remedy(digits):
    text = """
        import keras, numpy as np, trainrt
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x = np.ones((8, 4), "float32")
        for arguments in ({}, {"seed": 1}):
            try:
                trainrt.fit(model, x, x[:, :1], deterministic=True, verbose=0, **arguments)
            except (ValueError, RuntimeError) as error:
                print(type(error).__name__, error)
        trainrt.determinism.enable(1)
        before = model.get_weights()[0].tobytes()
        try:
            trainrt.fit(model, x, x[:, :1], deterministic=True, seed=1, verbose=0)
            print("trained" if model.get_weights()[0].tobytes() != before else "untouched")
        except RuntimeError as error:
            print(error)
    """
    first, second, third = run_script(text).splitlines()
    assert "needs a seed" in first
    assert "RuntimeError" in second
    assert "trainrt.determinism.enable" in second
    assert third == "trained"


def test_a_model_that_was_traced_in_the_fast_mode_is_refused(digits, fast_again):
    keras.utils.set_random_seed(1)
    model = model_of()
    trainrt.fit(model, *digits, verbose=0)
    with pytest.raises(RuntimeError, match=r"train_function of .* was made in the fast mode.*process of its own"):
        trainrt.fit(model, *digits, deterministic=True, seed=1, verbose=0)
    assert not modes.is_enabled()


def test_memory_on_a_gpu_means_too_late(monkeypatch):
    gpu = type("Device", (), {"name": "/physical_device:GPU:0", "device_type": "GPU"})()
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [gpu])
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", lambda name: {"peak": 4096, "current": 0})
    with pytest.raises(RuntimeError, match=r"GPU:0 in the fast mode.*TF_DETERMINISTIC_OPS=1"):
        trainrt.determinism.enable(1)
    assert not modes.is_enabled()


def test_xla_goes_off_and_comes_back_only_when_asked_for(digits, fast_again):
    keras.utils.set_random_seed(1)
    jitted = model_of(jit_compile=True)
    history = trainrt.fit(jitted, *digits, deterministic=True, seed=1, verbose=0)
    assert not jitted.jit_compile
    assert any("XLA is off" in change for change in history.run.environment["determinism"]["changes"])
    jitted = model_of()
    history = trainrt.fit(jitted, *digits, deterministic="xla", seed=1, verbose=0)
    assert jitted.jit_compile
    assert history.run.environment["determinism"]["xla"]
    eager = model_of(run_eagerly=True)
    with pytest.raises(ValueError, match="run_eagerly"):
        trainrt.fit(eager, *digits, deterministic="xla", seed=1, verbose=0)


def test_the_fingerprint_changes_with_what_the_bits_depend_on_and_with_nothing_else(digits, fast_again):
    x, y = digits

    def fingerprint(x=x, seed=1, optimizer="adam", **arguments):
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        model = model_of(optimizer=optimizer)
        run = trainrt.fit(model, x, y, deterministic=True, seed=seed, verbose=0, **arguments).run
        return run.environment["determinism"]["fingerprint"]

    same = fingerprint()
    assert fingerprint() == same
    assert fingerprint(callbacks=[keras.callbacks.LambdaCallback()]) == same
    other = x.copy()
    other[0, 0, 0] += 1
    changed = [fingerprint(other), fingerprint(seed=2), fingerprint(optimizer="sgd"), fingerprint(batch_size=16)]
    assert same not in changed
    assert len(set(changed)) == len(changed)


@pytest.mark.parametrize("arguments", [{}, {"observe": 3}, {"observe": False}, {"digests": 2}], ids=str)
def test_whatever_is_observed_runs_in_deterministic_mode(arguments, digits, fast_again):
    keras.utils.set_random_seed(1)
    x, y = digits
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    for data in ({"x": x, "y": y, "batch_size": 16}, {"x": dataset, "shuffle": False}):
        keras.utils.set_random_seed(1)
        history = trainrt.fit(model_of(), **data, **arguments, epochs=2, deterministic=True, seed=1, verbose=0)
        assert len(history.history["loss"]) == 2
