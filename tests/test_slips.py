"""What a user gets wrong is answered with what was expected, what came and what to do, and never with a traceback."""

import re

import keras
import numpy as np
import pytest

import trainrt
from trainrt import cli, digits
from trainrt.record.run import Run

(X, Y), _ = digits.load()
X, Y = X[:96], Y[:96]


def make(compiled=True):
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    if compiled:
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def one_for_all(moments):
    return 1.0


SLIPS = {
    "a model class": (TypeError, "make a model of it", lambda m, d: trainrt.fit(keras.Sequential, X, Y)),
    "data before model": (TypeError, "The model comes first", lambda m, d: trainrt.fit(X, Y, m)),
    "a clip of another shape": (ValueError, "tf.fill", lambda m, d: trainrt.fit(m, X, Y, verbose=0, clip=one_for_all)),
    "checkpoints in a file": (FileExistsError, "Pass a directory", lambda m, d: trainrt.fit(m, X, Y, checkpoint=d)),
    "a record in a file": (NotADirectoryError, "Pass a directory", lambda m, d: trainrt.fit(m, X, Y, logdir=d)),
    "a run that is a file": (ValueError, "Pass the logdir=", lambda m, d: Run.open(d)),
    "runs that are numbers": (TypeError, "what trainrt.fit returned", lambda m, d: trainrt.compare(3, 4)),
    "no good run": (ValueError, "or several", lambda m, d: trainrt.compare([], Run.synthetic())),
    "a model that is not compiled": (ValueError, "Call model.compile", lambda m, d: trainrt.explain(make(False), X, Y)),
    "a range without a compiled model": (ValueError, "model.compile", lambda m, d: trainrt.lr_range(make(False), X, Y)),
    "no model": (TypeError, "trainrt.explain\\(model", lambda m, d: trainrt.explain(None, X, Y)),
    "fewer labels than rows": (ValueError, "a row each", lambda m, d: trainrt.explain(m, X, Y[:5])),
    "steps that are text": (TypeError, "an int", lambda m, d: trainrt.explain(m, X, Y, steps="3")),
    "no row a batch": (ValueError, "at least 1", lambda m, d: trainrt.explain(m, X, Y, batch_size=0)),
    "a change that is no list": (TypeError, "changes=\\[", lambda m, d: trainrt.explain(m, X, Y, changes="no clip")),
    "a rate that is text": (TypeError, "numbers", lambda m, d: trainrt.lr_range(m, X, Y, low="1e-5")),
    "a range without end": (ValueError, "finite", lambda m, d: trainrt.lr_range(m, X, Y, high=float("inf"))),
    "a range of two steps": (ValueError, "or more", lambda m, d: trainrt.lr_range(m, X, Y, steps=2)),
    "a statistic without a name": (ValueError, "def my_ratio", lambda m, d: trainrt.statistic(lambda update: update)),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_answered_with_the_contract_what_came_and_the_remedy(slip, model, tmp_path):
    kind, remedy, call = SLIPS[slip]
    (tmp_path / "file").write_text("in the way")
    before = [np.asarray(v).tobytes() for v in model.variables]
    with pytest.raises(kind, match=remedy) as told:
        call(model, tmp_path / "file")
    assert "Received: " in str(told.value)
    assert [np.asarray(v).tobytes() for v in model.variables] == before, "nothing was trained"


def test_what_was_not_observed_says_so():
    history = trainrt.fit(make(), X, Y, verbose=0, observe=False)
    with pytest.raises(KeyError, match="observe=True"):
        history.run["update_ratio"]


def test_what_fit_returned_is_compared_as_it_is():
    histories = [trainrt.fit(make(), X, Y, verbose=0) for _ in range(2)]
    assert trainrt.compare(*histories).verdict


@pytest.mark.parametrize("steps", range(1, 14))
def test_runs_of_any_length_are_compared(steps):
    runs = [Run.synthetic(steps, loss=np.linspace(2, 1 + last, steps), update_ratio=1e-3) for last in (0, 0.5)]
    assert trainrt.compare(*runs).to_dict()


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "events.out.tfevents.1.host.1.0.trainrt").write_bytes(bytes(range(256)) * 9)
    trainrt.fit(make(), X, Y, verbose=0, logdir="run")
    return tmp_path


COMMANDS = [
    *(f"report {place}" for place in ("none", "empty", "file")),
    *(f"compare run {place}" for place in ("none", "empty", "file", "damaged")),
    "report run --html none/page.html",
    "compare run run --html none/page.html",
    "compare run run --good none",
    "explain clip",
    "explain no_such_thing",
    "demo --logdir file",
    "demo --epochs 0",
    "demo --epochs two",
    "launch -n 2 none.py",
    "launch -n 2 empty",
    "launch -n two none.py",
    "launch -n 2 --restarts -1 file",
    "determinism prove none.py",
    "determinism check none.py",
    "determinism bench --workloads none",
    "kernels burn",
    "doctor --require tpu",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_slip_on_the_command_line_is_answered_in_a_line_with_status_2(command, places, capfd):
    try:
        status = cli.main(command.split())
    except SystemExit as ended:  # argparse
        status = ended.code
    out, err = capfd.readouterr()
    assert status == cli.BAD_INPUT
    last = err.strip().splitlines()[-1]
    assert re.match(r"trainrt[ a-z]*: .{20,}", last)
    assert "Traceback" not in out + err


def test_a_record_of_which_nothing_can_be_read_is_not_called_well(places, capsys):
    assert cli.main(["report", "damaged"]) == 0
    assert "nothing to judge" in capsys.readouterr().out


def test_a_cause_is_explained_by_the_rules_that_name_it(capsys):
    assert cli.main(["explain", "clip_too_tight"]) == 0
    assert "\nlearning_rate\n" in capsys.readouterr().out


def test_a_name_that_is_almost_right_is_answered_with_the_right_one(capsys):
    cli.main(["explain", "lr_to_low"])
    assert "lr_too_low" in capsys.readouterr().err
