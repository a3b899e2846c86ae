"""Nothing that lies in a log directory or a checkpoint is run, and neither leads anywhere else."""

import ast
import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.endurance.checkpoint import Store
from trainrt.record.digest import digest_all

PACKAGE = Path(trainrt.__file__).parent
RUNS_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}
"""Modules that run what they read."""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_in_the_package_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not RUNS_DATA.intersection(name.partition(".")[0] for name in (*names, *module))
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else None
            assert called not in ("eval", "exec", "compile", "__import__"), f"line {node.lineno}"
            assert not any(k.arg == "allow_pickle" for k in node.keywords), f"line {node.lineno}"


def forged(directory, meta, arrays=()):
    """A checkpoint as somebody else would write it, with a digest that is right."""
    text = json.dumps({"version": 1, **meta}).encode()
    digest = digest_all([*arrays, np.frombuffer(text, np.uint8)])
    checkpoint = tf.train.Checkpoint(
        arrays=[tf.Variable(a) for a in arrays], meta=tf.Variable(text), digest=tf.Variable(digest)
    )
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write(str(directory / "trainrt-9"))


@pytest.mark.parametrize(
    "meta",
    [{"value": {"__array__": 7}}, {"value": {"__array__": "0"}}, {"value": {"__array__": [0]}}, {"version": "one"}],
    ids=["number", "text", "list", "version"],
)
def test_a_forged_checkpoint_that_makes_no_sense_is_refused(tmp_path, meta):
    forged(tmp_path, meta)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="None of the 1 checkpoints"):
        Store(tmp_path, 3).newest()


def fit(epochs=1, **keywords):
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((8, 2), "float32")
    return trainrt.fit(model, x, x[:, :1], epochs=epochs, verbose=0, **keywords)


class Unreachable(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch:
            raise OSError("https://me:hunter2@host/data: no answer")


def test_what_is_written_of_a_run_holds_no_secret(tmp_path, monkeypatch):
    secrets = ["--api-key", "hunter2", "--token=hunter2", "WANDB_API_KEY=hunter2", "s3://me:hunter2@bucket/data"]
    monkeypatch.setattr(sys, "argv", ["train.py", *secrets])
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "DATABASE_URL"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=gs://me:hunter2@bucket")
    with pytest.raises(OSError, match="hunter2"):
        fit(2, logdir=tmp_path / "logs", checkpoint=tmp_path / "checkpoints", callbacks=[Unreachable()])
    run = trainrt.Run.open(tmp_path / "logs")
    assert "train.py" in run.environment["command"]
    assert run.end["how"] == "exception"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 1
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/../../outside", ""])
def test_a_checkpoint_leads_no_record_out_of_its_log_directory(tmp_path, name):
    (tmp_path / "outside").mkdir()
    fit(checkpoint=tmp_path / "c", logdir=tmp_path / "logs")
    store = Store(tmp_path / "c", 3)
    store.save({**store.newest().meta, "run": name})
    store.wait()
    history = fit(epochs=2, checkpoint=tmp_path / "c", logdir=tmp_path / "logs")
    assert history.run.path is None or (tmp_path / "logs") in history.run.path.parents
    assert not list((tmp_path / "outside").iterdir())
