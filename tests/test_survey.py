"""What is said of the data is what is in it, however little of it is looked at."""

import numpy as np
import pytest

from trainrt.passport import survey
from trainrt.passport.survey import FIRST, THINNED, Leaf, Survey, overlap, scheduled

LEAVES = [Leaf("input", ""), Leaf("target", "")]
ROWS, BATCH = 16_000, 16


def data(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 6)).astype("float32") * [1, 2, 3, 4, 5, 6] + 7, rng.integers(0, 5, rows)


def passing(x, y, every=True, full=True):
    """A survey of a pass over batches, of each or of those that a pipeline shows."""
    seen = Survey(LEAVES, full)
    for number, first in enumerate(range(0, len(x), BATCH)):
        batch = x[first : first + BATCH], y[first : first + BATCH]
        if every:
            seen.see(*batch)
        elif scheduled(number) or not np.isfinite(batch[0]).all():
            seen.see(*batch, number=number)
    seen.passed(-(-len(x) // BATCH))
    return seen


def test_a_whole_pass_tells_what_numpy_tells():
    x, y = data()
    told = passing(x, y).summary()
    (inputs,), (targets,) = told["inputs"], told["targets"]
    assert (inputs["min"], inputs["max"]) == (x.min(), x.max())
    np.testing.assert_allclose(inputs["mean"], x.mean(0), atol=0.05)
    np.testing.assert_allclose(inputs["std"], x.std(0), rtol=0.02)
    assert targets["labels"]["counts"] == {str(k): int(n) for k, n in enumerate(np.bincount(y))}
    assert told["rows"] == told["seen"]["rows"] == len(x)
    assert told["duplicates"]["share"] == 0


def test_arrays_seen_at_once_tell_what_their_batches_tell():
    x, y = data(rows=3000)
    x[5] = np.nan
    order = np.random.default_rng(1).permutation(len(x))
    whole = Survey(LEAVES)
    whole.see_all([x, y], order, BATCH)
    a, b = whole.summary(), passing(x[order], y[order]).summary()
    for key in ("batches", "rows", "batch_size", "seen"):
        assert a[key] == b[key], key
    for role in ("inputs", "targets"):
        for key in ("min", "max", "nan_share", "shape", "dtype", "labels"):
            assert a[role][0].get(key) == b[role][0].get(key), key


def test_what_is_not_shown_changes_little_and_is_owned_up_to():
    x, y = data()
    whole, some = passing(x, y).summary(), passing(x, y, every=False).summary()
    shown = FIRST + -(-(len(x) // BATCH - FIRST) // THINNED)
    assert some["seen"] == {"batches": shown, "rows": shown * BATCH, "share": shown * BATCH / len(x)}
    assert (some["rows"], some["batches"]) == (whole["rows"], whole["batches"])
    np.testing.assert_allclose(some["inputs"][0]["mean"], whole["inputs"][0]["mean"], atol=0.5)
    assert whole["inputs"][0]["min"] <= some["inputs"][0]["min"]
    kept, all_of = (each["targets"][0]["labels"]["counts"] for each in (some, whole))
    shares = np.array([[c[k] / sum(c.values()) for k in sorted(c)] for c in (kept, all_of)])
    assert np.abs(shares[0] - shares[1]).max() < 0.05


def test_not_one_nan_of_a_pass_is_missed():
    x, y = data()
    unseen = next(n for n in range(FIRST, 4 * FIRST) if not scheduled(n)) * BATCH
    for row in (0, unseen, unseen + 1):
        x[row, 2] = np.nan
    x[unseen, 3] = np.inf
    whole, some = (passing(x, y, every=every).summary()["inputs"][0] for every in (True, False))
    assert some["nan_share"] == pytest.approx(3 / x.size) == pytest.approx(whole["nan_share"])
    assert some["inf_share"] == pytest.approx(1 / x.size) == pytest.approx(whole["inf_share"])
    later = passing(x, y, every=False, full=False)
    assert later.summary()["inputs"][0]["nan_share"] == pytest.approx(3 / x.size, rel=0.1)


@pytest.mark.parametrize("run", [1, 37, 1000])
def test_runs_of_labels_are_as_long_as_they_are_where_batches_are_left_out(run):
    labels = np.arange(ROWS) // run % 7
    found = passing(data()[0], labels, every=False).summary()["targets"][0]["labels"]
    assert found["run_length"] == pytest.approx(run, rel=0.25)
    assert (found["batch_entropy"] < 0.5 * found["batch_entropy_shuffled"]) == (run > 1)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_validation_rows_that_were_trained_on_are_counted_by_a_sample_of_either(every, share):
    x, y = data()
    shared = int(share * 4000)
    other = np.concatenate([x[np.random.default_rng(2).permutation(len(x))[:shared]], data(3)[0][: 4000 - shared]])
    train, validation = passing(x, y, every=every), passing(other, np.zeros(len(other), int))
    found = overlap(train.known, validation.known, train.share)
    assert found["share"] == pytest.approx(share, abs=0.02 if every else 0.15)
    assert found["shown"] == train.share


def test_rows_that_occur_twice_are_counted_where_few_are_kept():
    x, y = data()
    x[ROWS // 2 :] = x[: ROWS // 2]
    order = np.random.default_rng(1).permutation(ROWS)
    assert passing(x[order], y).summary()["duplicates"]["share"] == pytest.approx(0.5, abs=0.02)


def test_knowing_how_many_rows_come_leaves_as_many_in_the_sample():
    x, y = data()
    ends = []
    for expected in (0, ROWS):
        seen = Survey(LEAVES, expected=expected)
        seen.see(x, y)
        assert survey.ROWS / 4 < len(seen.known.counts) <= survey.ROWS
        ends.append((seen.known.limit, seen.known.counts))
    assert ends[0] == ends[1]


def test_the_same_order_has_the_same_hashes_and_another_has_others():
    x, y = data(rows=2000)
    order = np.random.default_rng(4).permutation(len(x))
    first, again, other = (passing(x[o], y[o], full=i == 0).hashes for i, o in enumerate((order, order, order[::-1])))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_arrays_too_large_to_be_looked_at_whole_are_looked_at_evenly(monkeypatch):
    monkeypatch.setattr(survey, "SCAN_BYTES", 200 << 10)
    monkeypatch.setattr(survey, "_SCAN_BLOCK", 10 << 10)
    x, y = data()
    seen = Survey(LEAVES)
    seen.see_all([x, y], np.arange(len(x)), BATCH)
    told = seen.summary()
    assert 0 < told["seen"]["share"] < 0.5
    assert told["rows"] == len(x)
    np.testing.assert_allclose(told["inputs"][0]["mean"], x.mean(0), atol=0.5)
