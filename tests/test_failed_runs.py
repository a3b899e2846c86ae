"""A training that an error ends, be it before its first step: the record tells what was asked for and why."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.plugin.summary import verdict
from trainrt.record.run import Run

notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="an error takes notes from Python 3.11 on")


def classifier(*first):
    layers = [*first, keras.layers.Dense(4, "softmax", name="head")]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def run_of(tmp_path):
    (path,) = Run.find(tmp_path)
    return Run.open(path)


def fails(model, x, y, tmp_path):
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        trainrt.fit(model, x, y, verbose=0, logdir=str(tmp_path))
    return raised.value


def labels_from_one():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 6)).astype("float32"), rng.integers(1, 5, 64)


@notes
def test_labels_that_no_output_stands_for_are_named_below_the_error(tmp_path):
    error = fails(classifier(), *labels_from_one(), tmp_path)
    assert "labels_contradict_loss (label_range) at head, step 0: Labels of 1 to 4 for 4 outputs" in error.__notes__[0]
    assert "try: Labels from 0: y = y - 1." in error.__notes__[0]


def test_the_record_of_a_run_without_steps_tells_what_was_asked_for(tmp_path):
    fails(classifier(), *labels_from_one(), tmp_path)
    run = run_of(tmp_path)
    assert len(run.steps) == 0
    assert run.environment["optimizer"]["class"] == "Adam"
    assert [parameter.path.rpartition("/")[2] for parameter in run.roster.parameters] == ["kernel", "bias"]
    assert run.end["how"] == "exception"
    assert "Received a label value of" in run.end["detail"]
    assert "File " not in run.end["detail"]
    assert [finding.causes[0] for finding in trainrt.diagnose(run)] == ["label_range"]


ROWS = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
CLASSES = np.arange(64) % 4
AXES = {
    "numbers for shares": ("categorical_crossentropy", ROWS, CLASSES, "wrong_loss", "sparse_categorical_crossentropy"),
    "numbers for sigmoids": ("binary_crossentropy", ROWS, CLASSES, "wrong_loss", "sparse_categorical_crossentropy"),
    "rows for numbers": ("sparse_categorical_crossentropy", ROWS, np.eye(4)[CLASSES], "wrong_loss", "'categorical_"),
    "not flattened": ("sparse_categorical_crossentropy", ROWS[:, None], CLASSES, "output_shape", "Flatten()"),
}


@pytest.mark.parametrize("case", AXES)
def test_where_keras_gives_shapes_the_way_out_is_given(case, tmp_path):
    loss, x, y, cause, advice = AXES[case]
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(4, "softmax")])
    model.compile("adam", loss)
    with pytest.raises(ValueError, match=r"rank \(ndim\)"):
        trainrt.fit(model, x, y, verbose=0, logdir=str(tmp_path))
    (finding,) = trainrt.diagnose(run_of(tmp_path))
    assert finding.causes == (cause,)
    assert advice in finding.advice[0]


def test_ids_that_the_table_does_not_hold_are_named(tmp_path):
    words = np.random.default_rng(0).integers(0, 51, (256, 6))
    words[0, 0] = 50
    table = keras.layers.Embedding(50, 8, name="words")
    fails(classifier(table, keras.layers.Flatten()), words, np.zeros(256, int), tmp_path)
    (finding,) = trainrt.diagnose(run_of(tmp_path))
    assert (finding.causes, finding.where) == (("ids_out_of_range",), ("words",))
    assert finding.advice[0] == "keras.layers.Embedding(51, ...)."


def test_an_error_of_the_program_s_own_is_left_as_it_is(tmp_path):
    class Breaks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise RuntimeError("mine")

    x, y = labels_from_one()
    with pytest.raises(RuntimeError, match="mine") as raised:
        trainrt.fit(classifier(), x, y - 1, verbose=0, logdir=str(tmp_path), callbacks=[Breaks()])
    assert not getattr(raised.value, "__notes__", [])
    assert run_of(tmp_path).end["detail"] == "RuntimeError: mine"


def test_the_view_heads_a_failed_run_with_its_cause(tmp_path):
    fails(classifier(), *labels_from_one(), tmp_path)
    run = run_of(tmp_path)
    said = verdict(run, run.recorded_findings)
    assert said == {"level": "error", "title": "Likely cause: label range"}


def test_the_view_says_why_a_run_was_not_observed(tmp_path):
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            super().make_train_function(force)

    model = Own([keras.Input((6,)), keras.layers.Dense(4, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    x, y = labels_from_one()
    with pytest.warns(UserWarning, match="does not observe this run"):
        trainrt.fit(model, x, y - 1, verbose=0, logdir=str(tmp_path))
    assert verdict(run_of(tmp_path), [])["title"] == "Not observed: the model has a train function of its own"
