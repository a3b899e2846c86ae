"""The run's passport: what was asked for, where, from which weights to which, how it ended; and no secret."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import trainrt
from trainrt.passport import environment
from trainrt.record.digest import digest_all
from trainrt.record.run import Run

SECRET = "hunter2"
ADDRESS = f"s3://me:{SECRET}@host/x"


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 4)).astype("float32"), rng.normal(size=(32, 1)).astype("float32")


def model(optimizer="sgd", **compiled):
    keras.utils.set_random_seed(1)
    built = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh", name="hidden"), keras.layers.Dense(1)])
    built.compile(optimizer, "mse", **compiled)
    return built


def fit(built=None, *, logdir=None, **keywords):
    return trainrt.fit(built or model(), *data(), batch_size=8, verbose=0, logdir=logdir, **keywords)


def weights(built):
    return digest_all(np.asarray(w.value) for w in built.weights)


def test_it_says_what_was_asked_for_and_where(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 40, alpha=0.25)
    built = model(keras.optimizers.Adam(schedule, beta_2=0.9), metrics=["mae"], steps_per_execution=2)
    before = time.time()
    fit(built, logdir=str(tmp_path), epochs=2, validation_split=0.25, clip=0.5)
    run = Run.open(tmp_path)
    told = run.environment
    layer = told["model"]["layers"][0]
    assert (layer["name"], layer["class"], layer["config"]["units"]) == ("hidden", "Dense", 3)
    assert (told["model"]["parameters"], told["model"]["trainable_parameters"]) == (19, 19)
    optimizer = told["optimizer"]
    assert (optimizer["class"], optimizer["config"]["beta_2"]) == ("Adam", 0.9)
    rate = json.dumps(optimizer["config"]["learning_rate"])
    assert all(part in rate for part in ("CosineDecay", "0.1", "40", "0.25"))
    assert told["compile"]["loss"] == "mse"
    assert (told["compile"]["steps_per_execution"], told["compile"]["metrics"]) == (2, ["mae"])
    assert (told["fit"]["batch_size"], told["fit"]["epochs"], told["fit"]["validation_split"]) == (8, 2, 0.25)
    assert told["fit"]["x"] == "ndarray float32 [32, 4]"
    assert (told["precision"], told["floatx"], told["replicas"]) == ("float32", "float32", 1)
    assert told["versions"]["keras"] == keras.__version__
    assert told["packages"]["numpy"] == np.__version__
    assert told["variables"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert {"tf32", "deterministic_ops", "jit"} <= set(told["tensorflow"])
    assert told["devices"]
    assert told["drivers"] is None or told["drivers"]["nvidia"]
    assert told["random_states"].keys() == {"python", "numpy"}
    assert told["host"] == socket.gethostname()
    assert told["command"][0] == sys.argv[0]
    assert before - 1 <= told["start"] <= run.end["wall_time"] <= time.time() + 1


def test_a_seed_and_a_precision_are_told():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        told = fit(seed=17).run.environment
    finally:
        keras.config.set_dtype_policy(policy)
    assert (told["precision"], told["fit"]["seed"]) == ("mixed_bfloat16", 17)
    assert told["model"]["layers"][0]["dtype"] == "mixed_bfloat16"


def test_no_secret_reaches_the_disk(tmp_path, monkeypatch):
    class Private(keras.layers.Layer):
        def call(self, x):
            return x

        def get_config(self):
            return {**super().get_config(), "api_key": SECRET, "deep": {"tokens": [SECRET]}, "store": ADDRESS}

    built = keras.Sequential([keras.Input((4,)), Private(), keras.layers.Dense(1)])
    built.compile("sgd", "mse")
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_SETTING"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={ADDRESS}")
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", SECRET, f"--password={SECRET}", ADDRESS])
    fit(built, logdir=str(tmp_path))
    assert Run.open(tmp_path).environment["command"][1:3] == ["--token", "***"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


def git(directory, *words):
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    ran = subprocess.run(["git", "-C", str(directory), *name, *words], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def test_the_commit_of_the_users_project_is_told_and_whether_it_was_changed_since(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    assert environment._git() is None
    git(tmp_path, "init", "-q", "-b", "trunk")
    script.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = environment._git()
    assert clean == {"commit": git(tmp_path, "rev-parse", "HEAD"), "branch": "trunk", "dirty": False, "changed": []}
    script.write_text("2")
    assert environment._git() == {**clean, "dirty": True, "changed": ["train.py"]}


def test_git_that_hangs_costs_the_commit_alone(monkeypatch):
    def hang(*arguments, timeout, **keywords):
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert environment._git() is None


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


def at_once(epoch, logs):
    raise RuntimeError("no more")


def interrupt(epoch, logs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("callback", "how", "detail"),
    [
        (keras.callbacks.EarlyStopping("loss", patience=5), "finished", ""),
        (keras.callbacks.EarlyStopping("loss", patience=0, min_delta=100.0), "stopped", "EarlyStopping"),
        (Stop(), "stopped", "Stop"),
        (keras.callbacks.LambdaCallback(on_epoch_end=at_once), "exception", "RuntimeError: no more"),
        (keras.callbacks.LambdaCallback(on_epoch_end=interrupt), "interrupted", ""),
    ],
    ids=["finished", "early stopping", "own callback", "exception", "interrupted"],
)
def test_it_says_how_the_training_ended_and_by_whom(tmp_path, callback, how, detail):
    raised = {"exception": RuntimeError, "interrupted": KeyboardInterrupt}.get(how)
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        fit(logdir=str(tmp_path), epochs=3, callbacks=[callback])
    run = Run.open(tmp_path)
    assert (run.state, run.end["how"], run.end["detail"]) == (how, how, detail)


def test_who_may_have_stopped_it_is_told_where_several_could():
    idle = keras.callbacks.EarlyStopping("loss", patience=5)
    run = fit(epochs=3, callbacks=[idle, Stop(), keras.callbacks.TerminateOnNaN()]).run
    assert run.end["detail"] == "Stop or TerminateOnNaN"


def test_a_lambda_that_stops_is_told():
    built = model()
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: setattr(built, "stop_training", True))
    assert fit(built, epochs=3, callbacks=[stop]).run.end["detail"] == "LambdaCallback"


def test_the_weights_have_an_exact_digest_at_the_start_at_each_checkpoint_and_at_the_end(tmp_path):
    built, seen = model("adam"), []
    first = weights(built)
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(weights(built)))
    fit(built, logdir=str(tmp_path / "runs"), epochs=3, callbacks=[watch], checkpoint=str(tmp_path / "checkpoints"))
    run = Run.open(tmp_path / "runs")
    assert run.environment["weights_digest"] == first
    assert [d.content["weights_digest"] for d in run.documents if d.kind == "checkpoint"] == seen
    assert run.end["weights_digest"] == seen[-1] == weights(built)
    assert len({first, *seen}) == 4


def test_what_cannot_be_told_costs_its_own_place_alone(monkeypatch):
    monkeypatch.setattr(environment, "_model", lambda _: 1 / 0)
    told = fit().run.environment
    assert told["model"] == {"error": "ZeroDivisionError: division by zero"}
    assert told["optimizer"]["class"] == "SGD"


def test_only_listed_variables_are_written_down():
    for name in environment.VARIABLES:
        assert not environment.SECRET.search(name), name
    assert Path(environment.__file__).read_text().count("os.environ") <= 3
