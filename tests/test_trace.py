"""A traced run trains the same, and its trace says truthfully where the time of a step went."""

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import trainrt
from trainrt.device import trace, trace_reading
from trainrt.device.phases import PHASES, Scopes, layers_of
from trainrt.device.words import trace_lines
from trainrt.findings import diagnose, findings_of_time
from trainrt.record.vocabulary import Document

START, STOP = 6, 11


class Listening(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        pass


def model_of(**compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(32, "relu"), keras.layers.Dropout(0.1), keras.layers.Dense(4)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": "adam", "loss": loss, "metrics": ["accuracy"], **compiled})
    return model


def data(steps=16, batch=8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(steps * batch, 16)).astype("float32"), rng.integers(0, 4, steps * batch)


def as_dataset(x, y):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8).prefetch(1)


def fit(model, *arrays, **keywords):
    arrays = arrays or data()
    keywords = {"batch_size": 8} | keywords if len(arrays) > 1 else {"shuffle": False} | keywords
    return trainrt.fit(model, *arrays, **{"verbose": 0, "clip": 1.0, **keywords})


def traces(history):
    return [dict(d.content) for d in history.run.documents if d.kind == "trace"]


WAYS = {
    "arrays": ({}, None),
    "dataset": ({}, as_dataset),
    "xla": ({"jit_compile": True}, None),
    "generic optimizer": ({"optimizer": keras.optimizers.Lamb}, None),
    "several steps an execution": ({"steps_per_execution": 4}, None),
    "eager": ({"run_eagerly": True}, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_traced_run_trains_the_same_bits(way, tmp_path):
    compiled, convert = WAYS[way]
    made = {k: v() if isinstance(v, type) else v for k, v in compiled.items()}
    arrays = (convert(*data()),) if convert else data()
    plain = model_of(**made)
    fit(plain, *arrays)
    made = {k: v() if isinstance(v, type) else v for k, v in compiled.items()}
    traced = model_of(**made)
    history = fit(traced, *arrays, trace=(START, STOP), logdir=str(tmp_path))
    for left, right in zip(plain.get_weights(), traced.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    told = traces(history)
    assert len(told) == 1
    first, last = told[0]["steps"]
    assert first <= START
    assert last >= STOP - 1
    assert told[0]["steps_seen"] == last - first + 1
    if way not in ("several steps an execution",):
        assert (first, last) == (START, STOP - 1)
    json.dumps(told[0], allow_nan=False)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    path = tmp_path_factory.mktemp("traced")
    return fit(model_of(), trace=(START, STOP), logdir=str(path))


def space_of(history):
    file = history.run.path / traces(history)[0]["file"]
    return file, xplane_pb2.XSpace.FromString(file.read_bytes())


def test_the_trace_lies_where_the_profile_tab_looks_and_nothing_else_is_left(traced):
    file, _ = space_of(traced)
    assert file.parent.parent == traced.run.path / "plugins" / "profile"
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    assert file.name.endswith(".xplane.pb")


def test_the_phases_are_rows_of_their_own_within_the_steps(traced):
    _, space = space_of(traced)
    host = next(plane for plane in space.planes if plane.name == trace_reading.HOST)
    rows = {line.name.split()[-1]: line for line in host.lines if line.name.startswith(trace_reading.ROW)}
    assert set(rows) >= {"input", "forward", "backward", "clip", "update", "statistics"}
    phase_s = traces(traced)[0]["phase_s"]
    for phase, line in rows.items():
        assert {host.event_metadata[e.metadata_id].name for e in line.events} == {phase}
        total = sum(e.duration_ps for e in line.events) * 1e-12
        assert total / (STOP - START) == pytest.approx(phase_s[phase], rel=1e-6)


def test_profilers_tools_compute_a_step_time_from_the_markers(traced):
    convert = pytest.importorskip("xprof.convert.raw_to_tool_data")
    file, _ = space_of(traced)
    body, _ = convert.xspace_to_tool_data([str(file)], "overview_page", {})
    found = [
        table["p"]["steptime_ms_average"] for table in json.loads(body) if "steptime_ms_average" in table.get("p", {})
    ]
    own = traces(traced)[0]["step_s"]
    assert 0 < float(found[0]) / 1e3 <= own["max"] * 1.05


@pytest.mark.parametrize(("optimizer", "xla"), [("adam", False), ("lion", False), ("adam", True)])
def test_every_phase_of_an_observed_and_clipped_step_is_seen(optimizer, xla):
    told = traces(fit(model_of(optimizer=optimizer, jit_compile=xla), trace=(START, STOP)))[0]
    seen = {phase for phase, seconds in told["phase_s"].items() if seconds > 0}
    assert seen >= set(PHASES) - {"host"}
    assert told["share"]["compute"] > 0
    assert told["share"]["idle"] is None, "a CPU's trace knows no idle device"
    assert told["kernels"] is None
    assert told["named"] > 0.8


def test_layers_are_named_as_the_model_names_them(traced):
    names = {layer.path for layer in traced.model.layers if layer.weights}
    assert {name for name in traces(traced)[0]["layers"] if "/dense" in name} == names


def test_a_loop_in_the_step_keeps_phases_and_layers():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12, 4)), keras.layers.LSTM(8), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    x, y = np.ones((128, 12, 4), "float32"), np.zeros((128, 2), "float32")
    told = traces(fit(model, x, y, trace=(START, STOP)))[0]
    assert told["steps_seen"] == STOP - START
    assert max(told["layers"], key=told["layers"].get) == model.layers[0].path
    assert told["phase_s"]["backward"] > 0


def test_a_trace_without_a_log_directory_is_told_and_leaves_no_file():
    told = traces(fit(model_of(), trace=(START, STOP)))[0]
    assert told["steps_seen"] == STOP - START
    assert "file" not in told


def test_what_the_trace_says_is_in_the_report(traced):
    from trainrt.report import summary

    lines = [words for label, words in summary(trainrt.Run.open(traced.run.path)) if label == "trace"]
    assert any("backward" in line for line in lines)
    assert lines == trace_lines(traces(traced)[0])


def test_a_window_past_the_end_of_its_epoch_ends_with_it():
    told = traces(fit(model_of(), epochs=2, trace=(14, 20)))
    assert [t["steps"] for t in told] == [[14, 15]]


def test_a_window_is_bounded_and_says_so():
    with pytest.warns(RuntimeWarning, match=f"at most {trace.MOST_STEPS} steps"):
        told = traces(fit(model_of(), *data(steps=150), trace=(2, 140)))
    assert told[0]["steps"] == [2, 1 + trace.MOST_STEPS]


def test_another_profiler_costs_a_line_and_not_the_training(tmp_path):
    tf.profiler.experimental.start(str(tmp_path))
    try:
        with pytest.warns(RuntimeWarning, match="another profiler is running"):
            history = fit(model_of(), trace=(START, STOP))
    finally:
        tf.profiler.experimental.stop(save=False)
    assert traces(history) == []
    assert history.run.steps[-1, 1] == 15


def test_steps_run_alike_on_a_worker_whose_profiler_does_not_start(monkeypatch):
    def broken(*_, **__):
        raise tf.errors.UnavailableError(None, None, "no permission")

    monkeypatch.setattr(tf.profiler.experimental, "start", broken)
    tracing = trace.Tracing((4, 6), None, lambda *_: None, Scopes)
    with pytest.warns(RuntimeWarning, match="no permission"):
        assert not tracing.begin(4)
    assert [tracing.singly(step) for step in range(2, 8)] == [False, True, True, True, False, False]
    assert not tracing.begin(5)


def test_an_error_in_the_window_stops_the_profiler(tmp_path):
    class Failing(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == START + 1:
                raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fit(model_of(), trace=(START, STOP), callbacks=[Failing()], logdir=str(tmp_path))
    run = trainrt.Run.open(tmp_path)
    assert run.document("trace")["steps"] == [START, START + 1]
    tf.profiler.experimental.start(str(tmp_path))
    tf.profiler.experimental.stop(save=False)


def test_a_step_of_ones_own_is_traced_too():
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            if self.train_function is None or force:
                super().make_train_function(force)
                function = self.train_function
                self.train_function = lambda iterator: function(iterator)

    model = Own([keras.Input((16,)), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    x, _ = data()
    with pytest.warns(UserWarning, match="does not observe"):
        told = traces(fit(model, x, x[:, :4], trace=(START, STOP)))
    assert [t["steps_seen"] for t in told] == [STOP - START]


# ---------------------------------------------------------------------------------------------------------------- auto


class Clockwork(trace.Tracing):
    """Records the windows that it would trace; calls take what they are told."""

    def __init__(self):
        super().__init__("auto", None, lambda *_: None, Scopes)
        self.windows = []

    def _start(self, step):
        self.windows.append(self._window)
        self._into = ""

    def stop(self):
        if self._into is not None:
            self._into, self._window = None, None
            self._done += 1
            self._calls = self._calls[:1]


def run_of(tracing, *stretches):
    """Runs calls of (steps, seconds a step) until each stretch is over, as the loop does."""
    step = 0
    for steps, seconds in stretches:
        end = step + steps
        while step < end:
            count = min(50, end - step, tracing.room(step))
            tracing.begin(step)
            step += count
            tracing.took(step, count, count * (seconds(step) if callable(seconds) else seconds))
    return tracing.windows


def test_auto_waits_until_the_step_time_has_settled():
    falling = run_of(Clockwork(), (300, lambda step: 1.0 / step), (5000, 0.003))
    assert len(falling) == 1
    assert 200 < falling[0][0] < 700
    assert falling[0][1] - falling[0][0] == trace.AUTO_STEPS


def test_auto_traces_again_when_steps_become_slower_and_only_then():
    assert len(run_of(Clockwork(), (5000, 0.003))) == 1
    windows = run_of(Clockwork(), (2000, 0.003), (2000, 0.009))
    assert len(windows) == 2
    assert windows[1][0] > 2000
    hiccup = run_of(Clockwork(), (2000, 0.003), (100, 0.009), (2000, 0.003))
    assert len(hiccup) == 1
    assert len(run_of(Clockwork(), *((3000, 0.003 * 2**n) for n in range(8)))) == trace.AUTO_WINDOWS


def test_auto_says_when_it_traced_nothing():
    with pytest.warns(RuntimeWarning, match="traced nothing"):
        assert traces(fit(model_of(), trace="auto")) == []


def test_auto_traces_a_real_run():
    # Eight epochs of single steps: more calls than it waits for.
    told = traces(fit(model_of(), epochs=8, trace="auto", callbacks=[Listening()]))
    assert told[0]["steps_seen"] >= 1
    assert told[0]["untraced_step_s"] > 0


# ------------------------------------------------------------------------------------------------- arithmetic of phases


def events_of(rows):
    events = trace_reading._Events()
    for begin, end, name in rows:
        events.add(begin, end - begin, name, name.rpartition("/")[2])
    return events


def test_times_are_those_of_a_timeline_painted_by_hand():
    rng = np.random.default_rng(0)
    names = [
        "net/dense/MatMul",
        "gradient_tape/net/dense/MatMul",
        "adam/Mul",
        "trainrt_clip/Mul",
        "trainrt_input/Gather",
    ]
    scopes = Scopes(("adam",), {"net/dense": "dense"})
    for _ in range(20):
        starts = np.sort(rng.choice(np.arange(0, 900, 10), 5, replace=False))
        markers = [(i, int(b), int(b) + 9) for i, b in enumerate(starts)]
        rows = [(int(b), int(b) + int(rng.integers(1, 60)), names[rng.integers(5)]) for b in rng.integers(0, 950, 40)]
        waits = [(int(b), int(b) + 3) for b in starts]
        told = trace_reading.told(markers, waits, events_of(rows), [], {}, scopes)
        line = {phase: np.zeros(2000, bool) for phase in PHASES}
        window = np.zeros(2000, bool)
        window[starts[0] : markers[-1][2]] = True
        waiting = np.zeros(2000, bool)
        for begin, end in waits:
            waiting[begin:end] = True
        for begin, end, name in rows:
            if not waiting[begin]:
                line[scopes.phase(name)][begin:end] = True
        line["input"] |= waiting
        total = window.sum()
        for phase in PHASES:
            if phase != "host":
                expected = (line[phase] & window).sum() * 1e-12 / 5
                assert told["phase_s"][phase] == pytest.approx(expected, rel=1e-9, abs=1e-20), phase
        assert told["share"]["input"] == pytest.approx((line["input"] & window).sum() / total)
        assert told["share"]["host"] >= 0


def test_own_time_of_a_stage_leaves_out_the_stages_below_it():
    stages = {}
    trace_reading._own_times([(0, 100, "Root"), (10, 60, "Root::Map"), (20, 30, "Root::Map::Batch")], stages)
    assert {k: round(v * 1e12) for k, v in stages.items()} == {"Root": 50, "Root::Map": 40, "Root::Map::Batch": 10}


MS = 10**9
"""Picoseconds."""


def gpu_trace(kernel_ms, every_ms, kernels=2, steps=4, waits_ms=0.0):
    """The trace of a card that runs `kernels` of so many ms in a step of 10 ms, one each `every_ms`, on one stream."""
    space = xplane_pb2.XSpace()
    host = space.planes.add(name=trace_reading.HOST)
    host.event_metadata[1].name, host.event_metadata[2].name = trace_reading.MARKER, trace_reading.INPUT
    host.stat_metadata[1].name = "step_num"
    python = host.lines.add(name="python")
    gpu = space.planes.add(name="/device:GPU:0 (Tesla)")
    gpu.stat_metadata[1].name = "tf_op"
    stream, copies = gpu.lines.add(name="Stream #7(Compute)"), gpu.lines.add(name="Stream #9(MemcpyH2D)")
    names = ("net/dense/MatMul:MatMul", "gradient_tape/net/dense/MatMul:MatMul", "adam/Mul:Mul")
    for n, name in enumerate(names, start=1):
        gpu.event_metadata[n].name = f"sgemm_{n}"
        gpu.event_metadata[n].stats.add(metadata_id=1, str_value=name)
    gpu.event_metadata[9].name = "MemcpyH2D"
    for step in range(steps):
        begin = step * 10 * MS
        event = python.events.add(metadata_id=1, offset_ps=begin, duration_ps=8 * MS)
        event.stats.add(metadata_id=1, int64_value=step)
        if waits_ms:
            python.events.add(metadata_id=2, offset_ps=begin, duration_ps=int(waits_ms * MS))
        copies.events.add(metadata_id=9, offset_ps=begin, duration_ps=1000)
        for n in range(kernels):
            offset = begin + int((waits_ms + 0.5 + n * every_ms) * MS)
            stream.events.add(metadata_id=1 + n % len(names), offset_ps=offset, duration_ps=int(kernel_ms * MS))
    return space.SerializeToString()


def told_of(trace_bytes):
    return trace_reading.read(trace_bytes, Scopes(("adam",), layers={"net/dense": "dense"}))


def test_kernels_of_a_gpu_are_counted_and_its_idle_time_is_told():
    told, annotated = told_of(gpu_trace(kernel_ms=1, every_ms=3))
    assert told["device"]
    assert told["kernels"] == pytest.approx({"a_step": 2, "median_s": 1e-3, "busy_s": 2e-3}), "copies are no kernels"
    assert told["share"]["idle"] == pytest.approx(1 - 8 / 38, rel=1e-4)
    assert told["phase_s"]["forward"] == pytest.approx(told["phase_s"]["backward"]) == pytest.approx(1e-3)
    assert told["layers"] == pytest.approx({"dense": 2e-3})
    assert {op["kind"] for op in told["ops"]} >= {"sgemm_1", "sgemm_2"}
    assert "trainrt" in str(xplane_pb2.XSpace.FromString(annotated))
    lines = trace_lines({"steps": [0, 3], **told})
    assert any("the GPU idle 79%" in line for line in lines)
    assert any("2 kernels a step" in line for line in lines)


@pytest.mark.parametrize(
    ("card", "bound"),
    [
        ({"kernel_ms": 0.004, "every_ms": 0.02, "kernels": 300}, True),
        ({"kernel_ms": 0.018, "every_ms": 0.02, "kernels": 450}, False),  # short kernels, but no gaps between them
        ({"kernel_ms": 1.0, "every_ms": 3.0}, False),  # idle, but not for launches
        ({"kernel_ms": 0.004, "every_ms": 0.02, "kernels": 60, "waits_ms": 7.0}, False),  # it waits for its input
    ],
)
def test_a_launch_bound_card_is_found_by_its_trace_alone(card, bound):
    told, _ = told_of(gpu_trace(**card))
    run = trainrt.Run.synthetic(steps=8, documents=[Document("trace", 3, {"steps": [0, 3], **told})])
    found = [finding.rule for finding in findings_of_time(diagnose(run))]
    assert found == (["launch_bound"] if bound else [])


def test_a_phase_that_grew_from_one_trace_to_the_next_is_named():
    traces = [told_of(gpu_trace(kernel_ms=ms, every_ms=3))[0] for ms in (0.5, 2.5)]
    told = [
        Document("trace", step, {"steps": [step - 4, step - 1], **t}) for step, t in zip((40, 360), traces, strict=True)
    ]
    run = trainrt.Run.synthetic(steps=400, scalars={"step_s": np.repeat([0.02, 0.1], 200)}, documents=told)
    (finding,) = [f for f in diagnose(run) if f.rule == "slow_down"]
    assert "forward" in finding.message or "backward" in finding.message


def test_a_card_that_may_not_be_traced_is_one_line_in_the_report(tmp_path):
    space = xplane_pb2.XSpace.FromString(gpu_trace(kernel_ms=1, every_ms=3))
    del space.planes[1]  # CUPTI is not there, or not for this user: TensorFlow writes the host's part
    (tmp_path / "t.xplane.pb").write_bytes(space.SerializeToString())
    told = trace._told(str(tmp_path), None, Scopes(), {"steps": [0, 3], "gpus": 1})
    assert told["steps_seen"] == 4
    assert told["share"]["idle"] is None
    (line,) = [line for line in trace_lines(told) if "CUPTI" in line]
    assert "NVreg_RestrictProfilingToAdminUsers=0" in line
    assert not tmp_path.exists(), "nothing is left behind"


def test_a_profiler_that_cannot_stop_costs_a_line_and_not_the_training(monkeypatch):
    stop = tf.profiler.experimental.stop

    def broken(*arguments):
        stop(save=False)
        raise tf.errors.InternalError(None, None, "no space left on device")

    monkeypatch.setattr(tf.profiler.experimental, "stop", broken)
    with pytest.warns(RuntimeWarning, match="was lost, training goes on: no space left"):
        history = fit(model_of(), trace=(START, STOP))
    assert traces(history) == []
    assert history.run.steps[-1, 1] == 15


def test_a_scope_that_is_numbered_belongs_to_the_layer_whose_weight_it_reads():
    layers = layers_of([("net_1/dense_1/Cast/ReadVariableOp", "net/dense"), ("net_1/dense_1_2/Cast", "net/dense_1")])
    scopes = Scopes(layers=layers)
    assert scopes.layer("gradient_tape/net_1/dense_1/MatMul/MatMul_1") == "net/dense"
    assert scopes.layer("net_1/dense_1_2/BiasAdd") == "net/dense_1"


@pytest.fixture(autouse=True)
def _resources():
    # TensorFlow's profiler leaves its temporary file handles to the collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
