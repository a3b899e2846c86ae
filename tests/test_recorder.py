"""No step is lost on the way from the device to the sinks, and a record of any length stays within its budget."""

import threading
import warnings

import numpy as np
import pytest

from trainrt.loop.recorder import HOST_SCALARS, Recorder
from trainrt.record.vocabulary import DEVICE_MOMENTS, JOINT, Moments, Parameter, Record, Roster
from trainrt.record.windows import AROUND, _Spikes

PARAMETERS = (Parameter("a/kernel", "a", (3, 2), "float32"), Parameter("a/bias", "a", (2,), "float32"))
ROSTER = Roster(PARAMETERS, ("gradient", "update", "weight"), ("loss", "learning_rate"))
DEVICE = len(DEVICE_MOMENTS)


class Keeps:
    def __init__(self):
        self.records, self.closed = [], None

    def open(self, roster, environment):
        self.roster = roster

    def write(self, item):
        self.records.append(item)

    def close(self, findings, end):
        self.closed = end

    @property
    def record(self) -> Record:
        return Record.concatenate(self.records)


def vectors(steps: int, seed=0) -> np.ndarray:
    """As the device packs them: sums of squares and counts that make sense, the loss is the number of the step."""
    rng = np.random.default_rng(seed)
    moments = rng.uniform(0.1, 1, (steps, 2, 3, DEVICE))
    moments[..., 0] = np.array([6, 2])[None, :, None]
    moments[..., DEVICE_MOMENTS.index("zeros")] = 0
    moments[..., DEVICE_MOMENTS.index("nonfinite")] = 0
    joint = np.zeros((steps, 2, len(JOINT)))
    joint[..., JOINT.index("steps")] = joint[..., JOINT.index("scale")] = 1
    scalars = np.stack([np.arange(steps), np.full(steps, 0.1)], axis=1)
    return np.concatenate([moments.reshape(steps, -1), joint.reshape(steps, -1), scalars], axis=1)


def record(rows: np.ndarray, chunk: int, every=1, budget=1 << 20) -> Keeps:
    sink = Keeps()
    recorder = Recorder(ROSTER, dict, [sink], budget)
    for first in range(0, len(rows), chunk):
        part = rows[first : first + chunk]
        recorder.push(first, every, part, first, first + len(part))
    recorder.close([], {"how": "finished"})
    return sink


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_short_runs_keep_every_step_for_itself(chunk):
    rows = vectors(100)
    got = record(rows, chunk, budget=1 << 30)
    assert got.record.steps.tolist() == [[s, s] for s in range(100)]
    np.testing.assert_array_equal(got.record.scalars[:, 0, 0], np.arange(100))
    np.testing.assert_allclose(got.record.wall_time, np.arange(1, 101))
    assert got.roster.scalars == (*ROSTER.scalars, *HOST_SCALARS)


@pytest.mark.parametrize("chunk", [1, 13, 500])
def test_windows_widen_and_together_hold_every_step_once(chunk):
    steps = 5000
    got = record(vectors(steps), chunk, budget=1).record
    width = got.steps[:, 1] - got.steps[:, 0] + 1
    assert (got.steps[1:, 0] == got.steps[:-1, 1] + 1).all()
    assert got.steps[0, 0] == 0
    assert got.steps[-1, 1] == steps - 1
    assert (np.diff(width[:-1]) >= 0).all(), "windows only widen"
    assert len(got) < 16 * (2 + np.log2(steps))


def test_what_a_window_holds_is_what_its_steps_held():
    rows = vectors(3000)
    fine, coarse = record(rows, 50, budget=1 << 40).record, record(rows, 50, budget=1).record
    for t in (0, len(coarse) // 2, len(coarse) - 2):
        first, last = coarse.steps[t]
        inside = (fine.steps[:, 0] >= first) & (fine.steps[:, 1] <= last)
        want = Moments(fine.moments["gradient"][inside]).merge(0)
        np.testing.assert_allclose(coarse.moments["gradient"][t], want.array, rtol=1e-12)
        loss = rows[first : last + 1, -2]
        np.testing.assert_allclose(coarse.scalars[t, 0], [loss.mean(), loss.min(), loss.max()])
        np.testing.assert_allclose(coarse.joint[t, :, 0], last - first + 1)


def test_a_step_with_something_nonfinite_keeps_a_window_of_its_own():
    rows = vectors(3000)
    column = DEVICE_MOMENTS.index("nonfinite")
    rows[2500, column] = 1
    got = record(rows, 100, budget=1).record
    assert [2500, 2500] in got.steps.tolist()
    at = got.steps.tolist().index([2500, 2500])
    assert np.isnan(got.scalars[at, ROSTER.scalars.index("learning_rate") + 1, 0]), "there is no gradient norm then"


@pytest.mark.parametrize("every", [2, 7])
def test_every_nth_step_is_the_nth_of_the_run_whatever_the_chunks(every):
    for chunk in (1, 5, 64):
        got = record(vectors(100), chunk, every=every, budget=1 << 30).record
        assert got.steps[:, 0].tolist() == list(range(0, 100, every))


def test_the_global_norm_is_that_of_all_weights_and_counts_the_clip():
    rows = vectors(4)
    cube = rows[:, : 2 * 3 * DEVICE].reshape(4, 2, 3, DEVICE)
    sumsq = cube[:, :, 0, DEVICE_MOMENTS.index("sumsq")]
    joint = rows[:, 2 * 3 * DEVICE : -2].reshape(4, 2, len(JOINT))
    joint[:, 1, JOINT.index("scale")] = 0.5
    got = record(rows, 4).record
    norm, clipped = got.scalars[:, 2, 0], got.scalars[:, 3, 0]
    np.testing.assert_allclose(norm, np.sqrt(sumsq.sum(1)))
    np.testing.assert_allclose(clipped, np.sqrt(sumsq[:, 0] + 0.25 * sumsq[:, 1]))


def test_a_sink_that_hangs_costs_resolution_and_no_step_and_nobody_waits(monkeypatch):
    monkeypatch.setattr("trainrt.loop.recorder.PATIENCE_S", 0.1)
    released = threading.Event()

    class Hangs(Keeps):
        def write(self, item):
            released.wait(60)
            super().write(item)

    sink = Hangs()
    recorder = Recorder(ROSTER, dict, [sink], 1 << 20)
    rows, chunk = vectors(6400), 32

    def push():
        for first in range(0, len(rows), chunk):
            recorder.push(first, 1, rows[first : first + chunk], first, first + chunk)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training = threading.Thread(target=push)
        training.start()
        training.join(60)
        assert not training.is_alive(), "the training waits for the sink"
        released.set()
        recorder.close([], {"how": "finished"})
    assert sum("coarser" in str(w.message) for w in told) == 1
    assert covered(sink.record) == 6400
    assert len(sink.record) < 6400
    loss = sink.record.scalars[:, ROSTER.scalars.index("loss"), 2]
    assert loss.max() == 6399, "the largest value of a scalar is that of its step"


def leaping(steps: int, at: int, seed=0) -> np.ndarray:
    """Rows whose loss is noise around 1 but for one step, where it is 5."""
    rows = vectors(steps)
    loss = rows.shape[1] - 2
    rows[:, loss] = np.random.default_rng(seed).normal(1, 0.05, steps)
    rows[at, loss] = 5
    return rows


@pytest.mark.parametrize("at", [1000, 1023, 1024, 1025, 1999])
def test_a_spike_and_the_steps_around_it_keep_their_resolution(at):
    kept = record(leaping(2000, at), 32, budget=1 << 16).record
    widths = {int(step): int(b - a) + 1 for a, b in kept.steps for step in range(a, b + 1)}
    assert all(widths[s] == 1 for s in range(at - AROUND, min(at + AROUND, 1999) + 1))
    assert widths[at - 50] > 1
    assert widths[min(at + 50, 1999)] > 1 or at > 1900


@pytest.mark.parametrize("spikes", [(), (200,), (129, 500, 501, 515, 2047), range(0, 2048, 40), range(700, 1400)])
def test_the_same_spikes_are_found_whether_blocks_come_one_by_one_or_together(spikes):
    loss = np.random.default_rng(1).normal(1, 0.05, 2048)
    loss[list(spikes)] += 4
    loss[1700] = np.nan

    def found(chunk):
        of = _Spikes(0)
        parts = [np.repeat(loss[i : i + chunk, None, None], 3, axis=2) for i in range(0, 2048, chunk)]
        steps = [np.zeros((len(part), 2), np.int64) for part in parts]
        return np.concatenate([of.of(Record(s, s[:, 0], {}, s, part)) for s, part in zip(steps, parts, strict=True)])

    together = found(2048)
    assert (found(16) == together).all()
    assert together[[step for step in spikes if 64 <= step < 720]].all(), "later ones may be a new level"


def test_a_new_level_of_the_loss_is_no_spike_for_ever():
    rows = leaping(6000, 0)
    rows[3000:, -2] += 50
    kept = record(rows, 32, budget=1 << 16).record
    late = kept.steps[kept.steps[:, 0] > 3300]
    assert (late[:, 1] > late[:, 0]).mean() > 0.9


@pytest.mark.parametrize("budget", [1 << 18, 1 << 20])
def test_spikes_everywhere_leave_the_record_within_its_budget(budget):
    rows = leaping(60_000, 0)
    rows[::40, -2] = 5
    rows[::97, DEVICE_MOMENTS.index("nonfinite")] = 1
    kept = record(rows, 256, budget=budget).record
    assert sum(array.nbytes for array in (*kept.moments.values(), kept.joint, kept.scalars)) <= 2 * budget
    assert covered(kept) == 60_000


def covered(kept: Record) -> int:
    """Steps that are in a window, when none is in two."""
    assert (kept.steps[1:, 0] == kept.steps[:-1, 1] + 1).all()
    return int((kept.steps[:, 1] - kept.steps[:, 0] + 1).sum())


def test_a_passport_that_cannot_be_made_costs_the_passport_alone():
    def passport():
        raise RuntimeError("no such thing")

    def train(sink):
        recorder = Recorder(ROSTER, passport, [sink], 1 << 20)
        recorder.push(0, 1, vectors(8), 0, 8)
        recorder.close([], {"how": "finished"})

    sink = Keeps()
    with pytest.warns(RuntimeWarning, match="no passport"):
        train(sink)
    assert covered(sink.record) == 8
