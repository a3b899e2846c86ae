"""The laws of moments and records."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainrt.record.run import Run
from trainrt.record.vocabulary import JOINT, MOMENTS, Moments, Parameter, Record, Roster, unique

SPECIAL = [0.0, -0.0, 1.0, -2.5, 1e30, -1e30, 1e-30, 5e-324, 1e-40, np.nan, np.inf, -np.inf]
elements = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e3, 1e3))
tensors = hnp.arrays(np.float64, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7), elements=elements)


def twin(x: np.ndarray) -> dict[str, float]:
    """The attributes of moments by a plain loop over the elements."""
    flat = [float(v) for v in np.asarray(x).reshape(-1)]
    finite = [v for v in flat if np.isfinite(v)]
    squares = sum(v * v for v in finite)
    nan = float("nan")
    return {
        "count": len(flat),
        "finite": len(finite),
        "sum": sum(finite),
        "sumsq": squares,
        "absmax": max(map(abs, finite), default=0.0),
        "mean": sum(finite) / len(finite) if finite else nan,
        "rms": (squares / len(finite)) ** 0.5 if finite else nan,
        "norm": squares**0.5,
        "peak_norm": squares**0.5,
        "trough_norm": squares**0.5,
        "zeros": flat.count(0.0),
        "zero_share": flat.count(0.0) / len(flat) if flat else nan,
        "nonfinite": len(flat) - len(finite),
        "nonfinite_share": (len(flat) - len(finite)) / len(flat) if flat else nan,
    }


@given(tensors)
def test_moments_are_those_of_a_loop_over_the_elements(x):
    moments, expected = Moments.of(x), twin(x)
    scale = expected["absmax"] * max(len(x.reshape(-1)), 1)
    for name, value in expected.items():
        # Sums may cancel, so their error is measured against the elements.
        slack = 1e-12 * scale if name in ("sum", "mean") else 0
        np.testing.assert_allclose(getattr(moments, name), value, rtol=1e-9, atol=slack, err_msg=name)


@given(st.lists(tensors, min_size=1, max_size=5))
def test_merged_counts_sums_and_extremes_are_those_of_the_concatenation(parts):
    merged = Moments(np.stack([Moments.of(part).array for part in parts])).merge(0)
    whole = twin(np.concatenate([part.reshape(-1) for part in parts]))
    scale = whole["absmax"] * max(whole["count"], 1)
    for name in ("count", "sum", "sumsq", "absmax", "mean", "rms", "zeros", "zero_share", "nonfinite"):
        slack = 1e-12 * scale if name in ("sum", "mean") else 0
        np.testing.assert_allclose(getattr(merged, name), whole[name], rtol=1e-9, atol=slack, err_msg=name)
    norms = [twin(part)["norm"] for part in parts]
    np.testing.assert_allclose(merged.peak_norm, max(norms), rtol=1e-9)
    np.testing.assert_allclose(merged.trough_norm, min(norms), rtol=1e-9)


@given(st.lists(tensors | st.none(), min_size=2, max_size=6), st.randoms(use_true_random=False), st.data())
def test_merge_is_associative_and_free_of_order(parts, random, data):
    rows = [np.full(len(MOMENTS), np.nan) if part is None else Moments.of(part).array for part in parts]
    at = data.draw(st.integers(1, len(rows) - 1))
    nested = [Moments(np.stack(half)).merge(0).array for half in (rows[:at], rows[at:])]
    shuffled = random.sample(rows, len(rows))
    flat = Moments(np.stack(rows)).merge(0).array
    slack = 1e-12 * max(np.nan_to_num(row[3] * row[0]) for row in rows)
    for other in (Moments(np.stack(nested)).merge(0).array, Moments(np.stack(shuffled)).merge(0).array):
        np.testing.assert_allclose(other, flat, rtol=1e-9, atol=slack)


def test_what_was_not_measured_is_nan_and_leaves_a_merge_unchanged():
    row = Moments.of(np.arange(5.0)).array
    unmeasured = np.full_like(row, np.nan)
    np.testing.assert_array_equal(Moments(np.stack([row, unmeasured])).merge(0).array, row)
    assert np.isnan(Moments(np.stack([unmeasured, unmeasured])).merge(0).array).all()
    np.testing.assert_array_equal(Moments(np.stack([row, unmeasured])).join([np.array([0, 1])]).array[0], row)
    assert np.isnan(Moments(np.stack([unmeasured, unmeasured])).join([np.array([1])]).array).all()


@given(st.lists(tensors, min_size=1, max_size=5), st.data())
def test_joined_weights_have_the_moments_of_one_tensor(parts, data):
    indices = st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=4, unique=True).map(np.array)
    groups = data.draw(st.lists(indices, min_size=1, max_size=3))
    joined = Moments(np.stack([Moments.of(part).array for part in parts])).join(groups)
    for g, group in enumerate(groups):
        whole = Moments.of(np.concatenate([parts[i].reshape(-1) for i in group]))
        slack = 1e-12 * whole.absmax * max(whole.count, 1)
        np.testing.assert_allclose(joined.array[g], whole.array, rtol=1e-9, atol=slack)


def test_joined_peak_and_trough_bound_those_of_the_steps():
    rng = np.random.default_rng(0)
    steps = [[rng.normal(size=5) * rng.exponential(), rng.normal(size=9) * rng.exponential()] for _ in range(20)]
    windows = Moments(np.array([[Moments.of(w).array for w in step] for step in steps])).merge(0)
    joined = windows.join([np.array([0, 1])])
    norms = [np.sqrt(sum((w**2).sum() for w in step)) for step in steps]
    assert joined.trough_norm[0] <= min(norms) <= max(norms) <= joined.peak_norm[0]


def test_moments_refuse_another_number_of_columns():
    with pytest.raises(ValueError, match="last axis of 8"):
        Moments(np.zeros((3, 6)))


def test_rows_from_the_device_are_completed_with_their_own_norm():
    row = Moments.of(np.array([3.0, 4.0])).array
    np.testing.assert_array_equal(Moments.from_device(row[None, :6]).array[0], row)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_windows_merged_as_records_hold_every_step(widths):
    rng = np.random.default_rng(len(widths))
    n = sum(widths)
    run = Run.synthetic(
        steps=n,
        parameters=2,
        gradient_norm=rng.exponential(size=(n, 2)),
        clip_scale=rng.random((n, 2)),
        element_rate=rng.random((n, 2)),
        loss=rng.random(n),
    )
    record = Record.concatenate(run._chunks)
    ends = np.cumsum(widths)
    windows = Record.concatenate([record[end - width : end].merge() for width, end in zip(widths, ends, strict=True)])
    again, once = windows.merge(), record.merge()
    np.testing.assert_array_equal(again.steps, [[0, n - 1]])
    np.testing.assert_array_equal(again.wall_time, record.wall_time[-1:])
    for i, name in enumerate(JOINT):
        reduce = {"largest_rate": np.max, "smallest_rate": np.min}.get(name, np.sum)
        np.testing.assert_allclose(again.joint[0, :, i], reduce(record.joint[..., i], axis=0), rtol=1e-9)
    np.testing.assert_allclose(again.scalars, once.scalars, rtol=1e-9)
    np.testing.assert_allclose(
        once.scalars[0, 0], [v(run.scalar("loss")) for v in (np.mean, np.min, np.max)], rtol=1e-9
    )
    for subject in record.moments:
        np.testing.assert_allclose(again.moments[subject], once.moments[subject], rtol=1e-9)


def test_merged_joint_sums_are_nan_just_where_no_step_was_measured():
    record = Run.synthetic(steps=3, parameters=2, gradient_norm=[[1, np.nan]] * 2 + [[np.nan, np.nan]])._chunks[0]
    joint = record.merge().joint[0]
    assert joint[0, JOINT.index("steps")] == 2
    assert np.isnan(joint[1]).all()


def test_a_scalar_that_was_nan_in_a_step_has_a_mean_of_nan_and_finite_extremes():
    record = Run.synthetic(steps=4, loss=[1.0, np.nan, 3.0, 2.0])._chunks[0].merge()
    np.testing.assert_array_equal(record.scalars[0, 0], [np.nan, 1.0, 3.0])
    record = Run.synthetic(steps=2, loss=[np.inf, -np.inf])._chunks[0].merge()
    np.testing.assert_array_equal(record.scalars[0, 0], [np.nan, -np.inf, np.inf])


def test_a_roster_survives_json():
    parameters = (Parameter("dense/kernel", "dense", (3, 4), "float32"), Parameter("scale", "scale", (), "bfloat16"))
    roster = Roster(parameters, ("gradient", "update", "weight", "velocity"), ("loss",))
    assert Roster.from_json(roster.to_json()) == roster
    assert roster.slots == ("velocity",)
    assert [parameter.size for parameter in parameters] == [12, 1]


def test_an_empty_record_has_the_shapes_of_its_roster():
    roster = Run.synthetic(parameters=3).roster
    empty = Record.empty(roster)
    assert len(empty) == 0
    assert len(Record.concatenate([empty, empty])) == 0
    assert {subject: cube.shape for subject, cube in empty.moments.items()} == dict.fromkeys(roster.subjects, (0, 3, 8))


@given(st.lists(st.sampled_from("abc")))
def test_unique_names_are_unique_and_begin_with_the_name(names):
    result = unique(names)
    assert len(set(result)) == len(names)
    assert [name.split("#")[0] for name in result] == names
