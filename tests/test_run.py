"""The laws of `Run`: from disk, from memory, sliced, narrowed and joined it says the same."""

import builtins
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainrt.record import columns, events, synthetic
from trainrt.record.run import Run
from trainrt.record.vocabulary import JOINT, MOMENTS, SCALAR, Epoch, Moments, Parameter, Record, Roster

STEPS = 12
PARAMETERS = (
    Parameter("dense/kernel", "dense", (5, 4), "float32"),
    Parameter("dense/bias", "dense", (4,), "float32"),
    Parameter("norm/gamma", "norm", (), "bfloat16"),
    Parameter("out/kernel", "out", (3, 3), "float32"),
)
RNG = np.random.default_rng(3)


def _run(**values) -> Run:
    norm = RNG.exponential(size=(STEPS, len(PARAMETERS)))
    norm[4, 1] = np.nan
    defaults = {
        "gradient_norm": norm,
        "update_ratio": RNG.exponential(1e-3, size=norm.shape),
        "clip_scale": RNG.random(STEPS),
    }
    return Run.synthetic(STEPS, PARAMETERS, slots=("velocity",), velocity_norm=0.5, **(defaults | values))


RUN = _run()


def write(directory, run: Run, *more: bytes, sizes=(3, 1, 8), start: float | None = None):
    """An event file of a run, in chunks of these sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / events.file_name(start)
    parts = [events.encode_header(), events.encode_roster(run.roster, run.environment)]
    at = 0
    for size in sizes:
        chunk = Record.concatenate(
            [chunk if isinstance(chunk, Record) else chunk.load() for chunk in run[at : at + size]._chunks]
        )
        parts.append(events.encode_record(chunk, run.roster))
        at += size
    path.write_bytes(b"".join(map(events.frame, [*parts, *more])))
    return path


def same(left: Run, right: Run, rtol=1e-6) -> None:
    np.testing.assert_array_equal(left.steps, right.steps)
    np.testing.assert_array_equal(left.wall_time, right.wall_time)
    assert left.roster == right.roster
    for name in left.roster.scalars:
        for column in SCALAR:
            np.testing.assert_array_equal(left.scalar(name, column), right.scalar(name, column))
    assert left.statistics == right.statistics
    for name in left.statistics:
        np.testing.assert_allclose(left[name], right[name], rtol=rtol, atol=1e-12, err_msg=name)


# ------------------------------------------------------------------------------------------------ opening and tailing


def test_a_run_from_disk_is_the_run_from_memory(tmp_path):
    epochs = [Epoch(0, 5, {"loss": 1.0}), Epoch(1, 11, {"loss": 0.5})]
    more = [
        *map(events.encode_epoch, epochs),
        events.encode_findings([{"rule": "a"}], 5),
        events.encode_findings([{"rule": "a"}, {"rule": "b"}], 11),
        events.encode_end("finished", "done", step=11, wall_time=3.0),
    ]
    run = Run.open(write(tmp_path, RUN, *more).parent)
    same(run, RUN)
    assert run.epochs == epochs
    assert run.recorded_findings == [{"rule": "a"}, {"rule": "b"}]
    assert run.end == {"how": "finished", "detail": "done", "wall_time": 3.0}
    assert run.problems == []
    assert (run.path.parent, RUN.path, RUN.end) == (tmp_path, None, None)


def test_a_directory_above_runs_opens_the_newest_and_lists_all(tmp_path):
    for start, name in ((300, "b/new"), (100, "z/old"), (200, "middle")):
        write(tmp_path / name, RUN, start=start)
    (tmp_path / "empty").mkdir()
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "events.out.tfevents.900.host.1.0.v2").write_bytes(b"")
    assert Run.find(tmp_path) == [tmp_path / "z/old", tmp_path / "middle", tmp_path / "b/new"]
    assert Run.open(tmp_path).path.parent == tmp_path / "b/new"
    assert Run.open(tmp_path / "z").path.parent == tmp_path / "z/old"
    write(tmp_path, RUN, start=50)
    assert Run.open(tmp_path).path.parent == tmp_path


def test_of_runs_of_one_second_the_one_written_last_is_newest(tmp_path):
    for age, name in ((2, "b"), (1, "a"), (3, "c")):
        path = write(tmp_path / name, RUN, start=100)
        os.utime(path, (1000 - age, 1000 - age))
    assert [path.name for path in Run.find(tmp_path)] == ["c", "b", "a"]
    assert Run.open(tmp_path).path.parent.name == "a"


def test_a_file_opens_by_its_own_path_and_one_beside_it_is_reported(tmp_path):
    old = write(tmp_path, RUN[:4], sizes=(4,), start=100)
    new = write(tmp_path, RUN, start=200)
    assert len(Run.open(old)) == 4
    run = Run.open(tmp_path)
    assert (run.path, len(run)) == (new, STEPS)
    assert "2 runs" in run.problems[0]
    assert Run.find(tmp_path) == [tmp_path]


def test_no_run_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Pass logdir= to trainrt\.fit"):
        Run.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Run.open(tmp_path / "nowhere")
    assert Run.find(tmp_path / "nowhere") == []


@given(st.lists(st.floats(0, 1), max_size=6))
def test_a_run_read_while_it_is_written_ends_up_the_same(tmp_path_factory, cuts):
    directory = tmp_path_factory.mktemp("live")
    path = write(directory, RUN, events.encode_end("finished"))
    data = path.read_bytes()
    path.write_bytes(b"")
    run, before = Run.open(directory), 0
    assert (len(run), run.roster.parameters, run.end) == (0, (), None)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 1], strict=True):
        with path.open("ab") as file:
            file.write(data[int(start * len(data)) : int(stop * len(data))])
        before += run.refresh()
        assert before == len(run) == len(run.steps)
        if run.roster.parameters:
            np.testing.assert_allclose(run["update_ratio"], RUN["update_ratio"][:before], rtol=1e-6)
    same(run, RUN)
    assert (run.end["how"], run.refresh(), RUN.refresh()) == ("finished", 0, 0)


def test_a_run_taken_from_another_stays_as_it_was_taken(tmp_path):
    path = write(tmp_path, RUN)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    run = Run.open(tmp_path)
    taken, length = run[:], len(run)
    path.write_bytes(data)
    assert run.refresh() == STEPS - length > 0
    assert (len(taken), taken.refresh()) == (length, 0)


def test_a_torn_end_is_a_problem_until_the_rest_arrives(tmp_path):
    path = write(tmp_path, RUN)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    run = Run.open(tmp_path)
    assert len(run) == STEPS - 8
    assert "no whole record" in run.problems[0]
    path.write_bytes(data)
    assert (run.refresh(), run.problems) == (8, [])


def test_steps_that_are_written_again_replace_the_first(tmp_path):
    again = _run()
    chunks = [RUN[:8], again[5:]]
    epochs = (Epoch(0, 3, {}), Epoch(1, 7, {}), Epoch(1, 7, {"loss": 2.0}))
    parts = [events.encode_header(), events.encode_roster(RUN.roster, {})]
    parts += [events.encode_record(RUN[:4]._chunks[0], RUN.roster), events.encode_epoch(epochs[0])]
    parts += [events.encode_record(RUN[4:8]._chunks[0], RUN.roster), events.encode_epoch(epochs[1])]
    parts += [events.encode_record(chunks[1]._chunks[0], RUN.roster), events.encode_epoch(epochs[2])]
    (tmp_path / events.file_name()).write_bytes(b"".join(map(events.frame, parts)))
    run = Run.open(tmp_path)
    np.testing.assert_array_equal(run.steps, RUN.steps)
    np.testing.assert_allclose(run["gradient_norm"][:5], RUN["gradient_norm"][:5], rtol=1e-6)
    np.testing.assert_allclose(run["gradient_norm"][5:], again["gradient_norm"][5:], rtol=1e-6)
    assert run.epochs == [epochs[0], epochs[2]]


def test_a_deleted_run_that_is_open_can_still_be_read(tmp_path):
    path = write(tmp_path, RUN)
    run = Run.open(tmp_path)
    path.unlink()
    same(run, RUN)


# ------------------------------------------------------------------------------------------------- runs from a run


@pytest.fixture(params=["disk", "memory", "pieces"])
def run(request, tmp_path):
    """The same run from an event file, from one record, and from several."""
    if request.param == "disk":
        return Run.open(write(tmp_path, RUN).parent)
    record = RUN._chunks[0]
    if request.param == "memory":
        return Run(RUN.roster, record)
    return Run.from_records(RUN.roster, [record[:0], record[:5], record[5:6], record[6:]])


@pytest.mark.parametrize(
    "windows", [slice(None), slice(2, 9), slice(-5, None), slice(3, 4), slice(9, 2), slice(-99, 99)]
)
def test_a_slice_of_a_run_has_the_statistics_of_those_windows(run, windows):
    part = run[windows]
    np.testing.assert_array_equal(part.steps, RUN.steps[windows])
    np.testing.assert_array_equal(part.scalar("loss"), RUN.scalar("loss")[windows])
    for name in RUN.statistics:
        np.testing.assert_allclose(part[name], RUN[name][windows], rtol=1e-6, atol=1e-12, err_msg=name)
    assert len(part[1:3]) == len(RUN.steps[windows][1:3])


def test_between_takes_the_windows_that_hold_any_of_the_steps():
    record = RUN._chunks[0]
    run = Run.from_records(RUN.roster, [record[at : at + 3].merge() for at in range(0, STEPS, 3)])
    for first in range(-2, STEPS + 3):
        for last in range(first - 1, STEPS + 3):
            held = [
                bounds
                for bounds in run.steps.tolist()
                if set(range(bounds[0], bounds[1] + 1)) & set(range(first, last + 1))
            ]
            assert run.between(first, last).steps.tolist() == held


@pytest.mark.parametrize("wanted", [["out/kernel", "dense/kernel"], [3, 0], [-1, -4]])
def test_selected_weights_keep_their_numbers_in_the_order_asked(run, wanted):
    part = run.select(wanted)
    assert part.roster.parameters == (PARAMETERS[3], PARAMETERS[0])
    for name in ("update_ratio", "gradient_peak_norm", "clip_scale", "velocity_norm"):
        np.testing.assert_allclose(part[name], RUN[name][:, [3, 0]], rtol=1e-6)
    np.testing.assert_allclose(part.select("dense/kernel")["update_ratio"], RUN["update_ratio"][:, :1], rtol=1e-6)
    assert part.select([])["update_ratio"].shape == (STEPS, 0)


def test_a_layer_is_its_weights_as_one_tensor(run):
    layers = run.by_layer()
    assert layers.roster.paths == ["dense", "norm", "out"]
    assert [p.size for p in layers.roster.parameters] == [24, 1, 9]
    groups = [[0, 1], [2], [3]]
    for subject in run.roster.subjects:
        whole = RUN.moments(subject).array
        for g, group in enumerate(groups):
            for t in range(STEPS):
                twin = Moments(whole[t, group]).merge(0)
                joined = layers.moments(subject)[t, g]
                for name in ("count", "sum", "sumsq", "absmax", "zeros", "nonfinite"):
                    np.testing.assert_allclose(getattr(joined, name), getattr(twin, name), rtol=1e-6)
                np.testing.assert_allclose(joined.peak_norm, twin.norm, rtol=1e-6)
                np.testing.assert_allclose(joined.trough_norm, twin.norm, rtol=1e-6)
    for name in ("rounded", "gradient_update"):
        twin = np.stack([np.nansum(RUN.joint(name)[:, group], axis=1) for group in groups], axis=1)
        np.testing.assert_allclose(layers.joint(name), twin, rtol=1e-12)
    for name in ("clip_scale", "clip_share"):  # every weight has the scale of its step
        np.testing.assert_allclose(layers[name], RUN[name][:, [0, 2, 3]], rtol=1e-12)


def test_joining_commutes_with_slicing_and_selecting(run):
    left, right = run.by_layer()[3:7].select("dense"), run[3:7].select(["dense/kernel", "dense/bias"]).by_layer()
    same(left, right, rtol=1e-12)


def test_moments_and_joint_sums_are_those_recorded(run):
    for subject in RUN.roster.subjects:
        np.testing.assert_allclose(run.moments(subject).array, RUN._chunks[0].moments[subject], rtol=2e-7)
    for i, name in enumerate(JOINT):
        np.testing.assert_array_equal(run.joint(name), RUN._chunks[0].joint[..., i])


def test_each_column_is_read_in_one_go_with_others():
    assert sorted(sum(columns.MOMENTS_TOGETHER, ())) == sorted(MOMENTS)
    assert sorted(sum(columns.JOINTS_TOGETHER, ())) == sorted(JOINT)


def test_moments_stay_those_of_the_run_when_it_was_asked(tmp_path):
    path, chunk = tmp_path / "events.out.tfevents.1.host.1.trainrt", RUN[:4]._chunks[0]
    opening = [events.encode_header(), events.encode_roster(RUN.roster, {})]
    path.write_bytes(b"".join(map(events.frame, [*opening, events.encode_record(chunk, RUN.roster)])))
    run = Run.open(path)
    early = run.moments("gradient")
    with path.open("ab") as file:
        file.write(events.frame(events.encode_record(RUN[4:8]._chunks[0], RUN.roster)))
    assert run.refresh() == 4
    assert early.shape == (4, len(PARAMETERS))
    assert run.moments("gradient").shape == (8, len(PARAMETERS))


def test_a_run_without_windows_has_empty_statistics():
    run = Run(RUN.roster)
    assert run.steps.shape == (0, 2)
    assert run.scalar("loss").shape == (0,)
    for name in run.statistics:
        assert run[name].shape == (0, len(PARAMETERS))
        assert run.by_layer()[name].shape == (0, 3)
    assert "no steps" in repr(run)


def test_what_a_run_does_not_have_is_an_error_that_lists_what_it_has():
    for read, message in (
        (lambda: RUN.moments("momentum"), "gradient, update, weight, velocity"),
        (lambda: RUN.joint("stepz"), ", ".join(JOINT)),
        (lambda: RUN.scalar("accuracy"), "loss, learning_rate"),
        (lambda: RUN.scalar("loss", "median"), "mean, min, max"),
        (lambda: RUN.select("dense/kernl"), "dense/kernel"),
        (lambda: RUN["momentum_norm"], "velocity_norm"),
    ):
        with pytest.raises(KeyError, match=message):
            read()
    with pytest.raises(IndexError):
        RUN.select(9)
    with pytest.raises(TypeError, match=r"run\[i:i \+ 1\]"):
        RUN[3]
    with pytest.raises(ValueError, match="Slice the statistic instead"):
        RUN[::2]


def test_a_statistic_and_a_scalar_of_one_name_are_read_apart():
    run = Run.synthetic(steps=3, parameters=2, gradient_norm=2.0, scalars={"gradient_norm": 8.0**0.5})
    np.testing.assert_allclose(run["gradient_norm"], np.full((3, 2), 2.0))
    np.testing.assert_allclose(run.scalar("gradient_norm"), np.full(3, 8.0**0.5))


def test_a_table_has_a_row_for_each_window_and_weight(run):
    table = run.to_pandas(["update_ratio", "gradient_norm"])
    assert len(table) == STEPS * len(PARAMETERS)
    for (layer, weight), rows in table.groupby(["layer", "weight"]):
        index = RUN.roster.paths.index(weight)
        assert layer == PARAMETERS[index].layer
        np.testing.assert_array_equal(rows["first_step"], RUN.steps[:, 0])
        np.testing.assert_allclose(rows["update_ratio"], RUN["update_ratio"][:, index], rtol=1e-6)
    assert set(run.statistics) < set(run.to_pandas())


def test_without_pandas_the_table_names_the_remedy(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **keywords):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pandas"):
        RUN.to_pandas()


# ---------------------------------------------------------------------------------------------------- synthetic runs

PLAIN = {"loss", "learning_rate"}


SLOTS = ("velocity", "momentum")


@pytest.mark.parametrize("name", sorted(set(synthetic.names(SLOTS)) - PLAIN))
def test_a_synthetic_run_has_the_statistic_it_was_given(name):
    value = RNG.uniform(0.1, 0.9, size=(5, 2))
    alive = {f"{s}_norm": 1.0 for s in SLOTS if name not in (f"{s}_norm", f"{s}_rms")}
    run = Run.synthetic(5, 2, slots=SLOTS, **alive, **{name: value})
    np.testing.assert_allclose(run[name], value, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_synthetic_run_has_the_scalar_it_was_given(name):
    values = np.arange(1.0, 6.0)
    run = Run.synthetic(5, 2, scalars={"accuracy": values[::-1]}, **{name: values})
    np.testing.assert_array_equal(run.scalar(name), values)
    np.testing.assert_array_equal(run.scalar("accuracy"), values[::-1])


def test_a_synthetic_run_is_healthy_unless_told_otherwise():
    run = Run.synthetic()
    np.testing.assert_allclose(run["update_ratio"], 1e-3)
    np.testing.assert_allclose(run["gradient_norm"], 1.0)
    assert (np.diff(run.scalar("loss")) < 0).all()
    for name in ("unchanged_share", "clip_share", "rounded_share", "gradient_nonfinite", "gradient_zero_share"):
        assert (run[name] == 0).all()


def test_the_moments_of_a_synthetic_run_could_be_those_of_tensors():
    run = Run.synthetic(
        4,
        2,
        slots=("velocity",),
        gradient_norm=[1, 2, np.nan, 0.5],
        gradient_zero_share=0.25,
        update_nonfinite_share=0.1,
    )
    for subject in run.roster.subjects:
        m = run.moments(subject)
        ok = ~np.isnan(m.count)
        assert (m.zeros + m.nonfinite <= m.count)[ok].all()
        assert (m.rms <= m.absmax * (1 + 1e-12))[ok].all()
        assert (m.absmax <= m.norm * (1 + 1e-12))[ok].all()


def test_synthetic_values_that_cannot_be_are_refused():
    for values, error, message in (
        ({"update_ration": 1}, TypeError, "update_ratio"),
        ({"update_ratio": 1, "update_norm": 1}, ValueError, "Give one"),
        ({"weight_rms": 1, "weight_norm": 1}, ValueError, "Give one"),
        ({"gradient_norm": 1, "gradient_zero_share": 1}, ValueError, "contradict"),
        ({"gradient_norm": 0, "gradient_zero_share": 0.5}, ValueError, "contradict"),
        ({"gradient_norm": [1, 2, 3]}, ValueError, r"\[64\]"),
    ):
        with pytest.raises(error, match=message):
            Run.synthetic(**values)


def test_a_synthetic_run_survives_the_disk(tmp_path):
    write(tmp_path, RUN)
    same(Run.open(tmp_path), RUN)
    assert isinstance(RUN.roster, Roster)
