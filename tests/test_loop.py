"""fit keeps Keras's contract: the same hooks with the same logs, any data, and every bad input answered."""

import gc
import os
import re
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.loop.resident import Resident
from trainrt.record.vocabulary import Epoch, Record


def make_model(**compiled):
    keras.utils.set_random_seed(11)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(1)])
    model.compile(**{"optimizer": "adam", "loss": "mse", "metrics": ["mae"], **compiled})
    return model


def data(rows=40):
    rng = np.random.default_rng(1)
    return rng.normal(size=(rows, 4)).astype("float32"), rng.normal(size=(rows, 1)).astype("float32")


class Events(keras.callbacks.Callback):
    """Every hook with its arguments."""

    def __init__(self, stop_at=None, batches=True):
        super().__init__()
        self.seen, self.stop_at = [], stop_at
        hooks = ["train_begin", "train_end", "epoch_begin", "epoch_end", "test_begin", "test_end"]
        if batches:
            hooks += ["train_batch_begin", "train_batch_end", "test_batch_begin", "test_batch_end"]
        for name in hooks:
            setattr(self, f"on_{name}", self._hook(name))

    def _hook(self, name):
        def hook(*arguments, logs=None):
            if arguments and (arguments[-1] is None or isinstance(arguments[-1], dict)):
                *arguments, logs = arguments
            self.seen.append((name, *arguments, dict(logs or {})))
            if (name, *arguments) == self.stop_at:
                self.model.stop_training = True

        return hook


def both(arguments, compiled=None, stop_at=None, batches=True):
    """The same call with Keras and with trainrt: events, history and weights of each."""
    results = []
    for fit in (lambda model, **k: model.fit(**k), trainrt.fit):
        model, events = make_model(**(compiled or {})), Events(stop_at, batches)
        history = fit(model, callbacks=[events], verbose=0, **arguments())
        results.append((events.seen, history.history, history.epoch, [w.tobytes() for w in model.get_weights()]))
    return results


def dataset(rows=40):
    return tf.data.Dataset.from_tensor_slices(data(rows)).batch(8)


def generator():
    x, y = data()
    for i in range(0, 40, 8):
        yield x[i : i + 8], y[i : i + 8]


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        x, y = data()
        return x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]


def frames():
    import pandas as pd

    x, y = data()
    return pd.DataFrame(x), pd.DataFrame(y)


CASES = {
    "arrays": lambda: {"x": data()[0], "y": data()[1], "epochs": 3, "batch_size": 16},
    "partial_batch": lambda: {"x": data(37)[0], "y": data(37)[1], "epochs": 2},
    "validation_split": lambda: {"x": data()[0], "y": data()[1], "epochs": 3, "validation_split": 0.25},
    "validation_data": lambda: {"x": data()[0], "y": data()[1], "validation_data": data(9), "validation_batch_size": 2},
    "validation_freq": lambda: {
        "x": data()[0],
        "y": data()[1],
        "epochs": 4,
        "validation_data": data(9),
        "validation_freq": 2,
    },
    "validation_steps": lambda: {
        "x": data()[0],
        "y": data()[1],
        "epochs": 2,
        "validation_data": dataset(),
        "validation_steps": 2,
    },
    "sample_weight": lambda: {"x": data()[0], "y": data()[1], "sample_weight": np.linspace(0, 1, 40), "epochs": 2},
    "initial_epoch": lambda: {"x": data()[0], "y": data()[1], "epochs": 5, "initial_epoch": 3},
    "no_shuffle": lambda: {"x": data()[0], "y": data()[1], "epochs": 2, "shuffle": False},
    "steps_per_epoch": lambda: {"x": dataset().repeat(), "steps_per_epoch": 3, "epochs": 4},
    "steps_across_epochs": lambda: {"x": dataset(), "steps_per_epoch": 3, "epochs": 3},
    "dataset": lambda: {"x": dataset(), "epochs": 2},
    "unknown_cardinality": lambda: {"x": dataset().filter(lambda x, y: True), "epochs": 3},
    "ran_out": lambda: {"x": dataset(), "steps_per_epoch": 9, "epochs": 2},
    "generator": lambda: {"x": generator()},
    "generator_with_steps": lambda: {"x": generator(), "steps_per_epoch": 2, "epochs": 2},
    "py_dataset": lambda: {"x": Sequence(), "epochs": 2},
    "py_dataset_workers": lambda: {"x": Sequence(workers=2), "epochs": 2, "shuffle": False},
    "pandas": lambda: dict(zip("xy", frames(), strict=True)) | {"epochs": 2},
    "tensors": lambda: {"x": tf.constant(data()[0]), "y": tf.constant(data()[1]), "epochs": 2},
    "no_epochs": lambda: {"x": data()[0], "y": data()[1], "epochs": 0},
}


@pytest.mark.filterwarnings("ignore:.*shuffle=True.*", "ignore:Your input ran out of data")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batches", [True, False], ids=["batch_hooks", "epoch_hooks"])
def test_hooks_logs_and_weights_are_those_of_keras(case, batches):
    want, got = both(CASES[case], batches=batches)
    assert got[0] == want[0]
    assert got[1:] == want[1:]


@pytest.mark.filterwarnings("ignore:.*shuffle=True.*")
@pytest.mark.parametrize(
    "compiled",
    [{"steps_per_execution": 2}, {"steps_per_execution": 7}, {"run_eagerly": True}, {"jit_compile": True}],
    ids=str,
)
@pytest.mark.parametrize("case", ["arrays", "partial_batch", "dataset"])
def test_every_way_to_compile_runs_as_in_keras(compiled, case):
    want, got = both(CASES[case], compiled)
    assert [e[:-1] for e in got[0]] == [e[:-1] for e in want[0]]
    for name in want[1]:
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-4)


@pytest.mark.parametrize(
    "stop_at", [("train_batch_end", 1), ("epoch_end", 1), ("train_batch_begin", 2), ("epoch_begin", 1)], ids=str
)
def test_stop_training_stops_where_keras_stops(stop_at):
    want, got = both(CASES["arrays"], stop_at=stop_at)
    assert got == want


def test_steps_run_many_in_a_call_unless_somebody_listens(monkeypatch):
    from trainrt.loop.step import Step

    calls = []
    run = Step.run
    monkeypatch.setattr(
        Step, "run", lambda self, it, first, count, *how: calls.append(count) or run(self, it, first, count, *how)
    )
    x, y = data(8 * 60)
    trainrt.fit(make_model(), x, y, batch_size=8, verbose=0)
    assert sum(calls) == 60
    assert len(calls) < 20
    calls.clear()
    trainrt.fit(make_model(), x, y, batch_size=8, verbose=0, callbacks=[Events()])
    assert calls == [1] * 60


def test_a_second_fit_goes_on_without_tracing_again():
    model, reference = make_model(), make_model()
    traces = []
    train_step = model.train_step
    model.train_step = lambda data: traces.append(1) or train_step(data)
    for _ in range(2):
        trainrt.fit(model, *data(), verbose=0)
        reference.fit(*data(), verbose=0)
        count = len(traces)
    assert count == len(traces)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), reference.get_weights(), strict=True))
    trainrt.fit(model, *data(), verbose=0)
    assert len(traces) == count


@pytest.mark.parametrize("observe", [True, False])
def test_the_data_goes_with_the_fit(observe, monkeypatch):
    kept = []
    make = Resident.__init__

    def noted(self, *arguments):
        make(self, *arguments)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(Resident, "__init__", noted)
    model = make_model()
    gc.disable()
    try:
        trainrt.fit(model, *data(), verbose=0, observe=observe)
        assert [one() for one in kept] == [None]
    finally:
        gc.enable()


def test_the_positional_order_is_that_of_keras():
    import inspect

    keras_names = list(inspect.signature(keras.Model.fit).parameters)[1:]
    ours = inspect.signature(trainrt.fit).parameters
    assert list(ours)[1 : len(keras_names) + 1] == keras_names
    for name, parameter in inspect.signature(keras.Model.fit).parameters.items():
        if name != "self":
            assert ours[name].default == parameter.default
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in ("model", *keras_names))


def test_a_model_without_anything_to_train_is_left_to_keras_unless_more_was_asked_for(tmp_path):
    model = make_model()
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=".") as warned:
        trainrt.fit(model, *data(), verbose=0)
    messages = [str(warning.message) for warning in warned]
    assert any("does not have any trainable weights" in message for message in messages)
    assert any("does not observe this run" in message for message in messages)
    with pytest.raises(ValueError, match=r"no trainable weights.*trainable = True"):
        trainrt.fit(model, *data(), verbose=0, logdir=tmp_path)
    assert not os.listdir(tmp_path)


BAD = {
    "not_compiled": (lambda: keras.Sequential([keras.layers.Dense(1)]), {}, ValueError, "compile"),
    "not_a_model": (lambda: "model", {}, TypeError, "Keras 3 model"),
    "a_layer": (lambda: keras.layers.Dense(1), {}, TypeError, "Keras 3 model"),
    "negative_clip": (make_model, {"clip": -1.0}, ValueError, "positive"),
    "nan_clip": (make_model, {"clip": float("nan")}, ValueError, "positive"),
    "zero_clip": (make_model, {"clip": 0}, ValueError, "clip=None"),
    "clip_type": (make_model, {"clip": "1.0"}, TypeError, "global norm"),
    "clip_bool": (make_model, {"clip": True}, TypeError, "global norm"),
    "clip_class": (make_model, {"clip": trainrt.clip.GlobalNorm}, TypeError, "global norm"),
    "clip_twice": (
        lambda: make_model(optimizer=keras.optimizers.SGD(clipnorm=1.0)),
        {"clip": 1.0},
        ValueError,
        "twice",
    ),
    "observe_type": (make_model, {"observe": "yes"}, TypeError, "observe"),
    "observe_float": (make_model, {"observe": 2.0}, TypeError, "observe"),
    "observe_zero": (make_model, {"observe": 0}, ValueError, "observe=False"),
    "observe_negative": (make_model, {"observe": -3}, ValueError, "observe=False"),
    "distance_type": (make_model, {"distance": 1}, TypeError, "distance"),
    "distance_unobserved": (make_model, {"distance": True, "observe": False}, ValueError, "observe=False"),
    "experiment_type": (make_model, {"experiment": "yes"}, TypeError, "experiment"),
    "experiment_negative": (make_model, {"experiment": -1}, ValueError, "seconds"),
    "experiment_unobserved": (make_model, {"experiment": True, "observe": False}, ValueError, "Leave one out"),
    "budget_type": (make_model, {"record_budget": 1e8}, TypeError, "record_budget"),
    "budget_small": (make_model, {"record_budget": 1000}, ValueError, "observe=False"),
    "trace_type": (make_model, {"trace": 3}, TypeError, "start, stop"),
    "trace_order": (make_model, {"trace": (5, 5)}, ValueError, "start < stop"),
    "trace_outside": (make_model, {"trace": (0, 10**6)}, ValueError, "steps of the run, 0 to 2"),
    "trace_word": (make_model, {"trace": "always"}, TypeError, "'auto'"),
    "on_nonfinite_value": (make_model, {"on_nonfinite": "ignore"}, ValueError, "report"),
    "on_spike_value": (make_model, {"on_spike": "ignore"}, ValueError, "stop"),
    "deterministic_type": (make_model, {"deterministic": 1}, TypeError, "True, False"),
    "seed_type": (make_model, {"seed": 1.5}, TypeError, "must be an int"),
    "seed_range": (make_model, {"seed": -1}, ValueError, "from 0 to"),
    "sinks_type": (make_model, {"sinks": "file"}, TypeError, "list or tuple"),
    "sinks_item": (make_model, {"sinks": [object()]}, TypeError, "open, write and close"),
    "logdir_type": (make_model, {"logdir": 3}, TypeError, "path"),
    "logdir_empty": (make_model, {"logdir": ""}, TypeError, "path"),
    "empty": (make_model, {"x": np.zeros((0, 4)), "y": np.zeros((0, 1))}, ValueError, "data is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_before_anything_happens(case):
    make, arguments, error, match = BAD[case]
    model = make()
    before = [w.copy() for w in model.get_weights()] if isinstance(model, keras.Model) and model.built else []
    x, y = data()
    with pytest.raises(error, match=match):
        trainrt.fit(model, **{"x": x, "y": y, "verbose": 0, **arguments})
    if before:
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_a_logdir_that_cannot_be_written_is_said_before_the_first_step(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    model = make_model()
    with pytest.raises(OSError, match="`logdir` cannot be written"):
        trainrt.fit(model, *data(), verbose=0, logdir=file / "runs")
    assert int(model.optimizer.iterations) == 0


@pytest.mark.filterwarnings("ignore:.*shuffle=True.*", "ignore:Your input ran out of data")
def test_data_that_ends_before_the_first_batch_is_an_error():
    with pytest.raises(ValueError, match="before the first batch"):
        trainrt.fit(make_model(), dataset().filter(lambda x, y: False), verbose=0)


def test_an_exception_of_the_users_loses_no_record(tmp_path):
    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trainrt.fit(make_model(), *data(), batch_size=8, verbose=0, logdir=tmp_path, callbacks=[Fails()])
    run = trainrt.Run.open(tmp_path)
    assert len(run) == 5
    assert run.end["how"] == "exception"
    assert "mine" in run.end["detail"]


class Keeps:
    """A sink of the user's."""

    def __init__(self):
        self.calls = []

    def open(self, roster, environment):
        self.roster = roster
        self.calls.append("open")

    def write(self, item):
        self.calls.append(item)

    def close(self, findings, end):
        self.calls.append(end)


def test_a_sink_gets_every_step_and_the_end():
    sink = Keeps()
    trainrt.fit(make_model(), *data(), batch_size=8, epochs=2, verbose=0, sinks=[sink])
    assert sink.calls[0] == "open"
    assert sink.calls[-1]["how"] == "finished"
    steps = np.concatenate([c.steps for c in sink.calls if isinstance(c, Record)])
    assert steps.tolist() == [[s, s] for s in range(10)]
    assert [c.epoch for c in sink.calls if isinstance(c, Epoch)] == [0, 1]


def test_a_sink_that_fails_is_left_out_and_the_training_goes_on():
    class Broken(Keeps):
        def write(self, item):
            raise OSError("disk full")

    good = Keeps()
    with pytest.warns(RuntimeWarning, match="sink Broken failed.*disk full"):
        history = trainrt.fit(make_model(), *data(), batch_size=8, verbose=0, sinks=[Broken(), good])
    assert len(history.run) == 5
    assert good.calls[-1]["how"] == "finished"


def test_history_carries_the_run_and_what_is_on_disk_is_the_same(tmp_path):
    history = trainrt.fit(
        make_model(), *data(), batch_size=8, epochs=2, validation_split=0.2, verbose=0, logdir=tmp_path
    )
    disk = trainrt.Run.open(tmp_path)
    for name in ("update_ratio", "gradient_norm", "momentum_norm", "unchanged_share"):
        np.testing.assert_allclose(disk[name], history.run[name], rtol=1e-6)
    assert disk.roster == history.run.roster
    assert [dict(e.logs) for e in disk.epochs] == [dict(e.logs) for e in history.run.epochs]
    assert disk.epochs[-1].logs["val_loss"] == history.history["val_loss"][-1]
    assert [f.rule for f in trainrt.diagnose(disk)] == [f.rule for f in history.findings]
    assert disk.end["how"] == "finished"


def test_two_runs_never_share_a_directory(tmp_path):
    for _ in range(2):
        trainrt.fit(make_model(), *data(), verbose=0, logdir=tmp_path)
    assert len(trainrt.Run.find(tmp_path)) == 2


def test_stock_tensorboard_shows_the_plain_scalars(tmp_path):
    from tensorboard.backend.event_processing import plugin_event_accumulator

    history = trainrt.fit(make_model(), *data(), batch_size=8, epochs=2, verbose=0, logdir=tmp_path, clip=0.1)
    reader = plugin_event_accumulator.EventAccumulator(str(history.run.path), size_guidance={"tensors": 0})
    reader.Reload()
    tags = set(reader.Tags()["tensors"])
    wanted = {
        "train/loss",
        "train/learning_rate",
        "train/steps_per_second",
        "gradient/norm",
        "gradient/norm_clipped",
        "gradient/clip_share",
        "update_ratio/log10_median",
        "update_ratio/log10_min",
        "update_ratio/log10_max",
        "epoch/loss",
    }
    assert wanted <= tags
    loss = [tf.make_ndarray(e.tensor_proto) for e in reader.Tensors("train/loss")]
    np.testing.assert_allclose(loss, history.run.scalar("loss"), rtol=1e-6)


def test_what_is_found_is_said_once_under_the_bar_and_again_at_the_end(digits, monkeypatch, capsys):
    from trainrt import demo
    from trainrt.loop import journal

    monkeypatch.setattr(journal, "FIRST_LOOK_S", 0.0)
    history = trainrt.fit(demo.build(), *digits, batch_size=8, epochs=30, verbose=2, clip=1e-5)
    lines = capsys.readouterr().out.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith("trainrt: error: learning_rate (clip_too_tight)")]
    assert len(said) == 1
    after = [line for line in lines[said[0] + 1 :] if not line.startswith("trainrt: ")]  # what else is found on the way
    assert after[0].startswith("Epoch "), "it stands between two epochs"
    assert history.findings[0].causes[0] == "clip_too_tight"
    assert any("clip_too_tight" in line for line in lines[said[0] + 1 :])


def test_verbose_0_says_nothing(digits, capsys):
    from trainrt import demo

    trainrt.fit(demo.build(), *digits, batch_size=8, epochs=30, verbose=0, clip=1e-5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("optimizer", "how"), [("adam", "fused pass|native ops"), ("ftrl", "by its own apply .*Ftrl")])
def test_a_run_says_once_which_path_its_optimizer_takes(optimizer, how, capsys):
    model = make_model()
    model.compile(optimizer, "mse")
    for _ in range(2):
        trainrt.fit(model, *data(), verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "the optimizer" in line]
    assert len(lines) == 1
    assert re.search(how, lines[0])
