"""What a run wrote outlives what happens to the process, the disk and the directory; training goes on meanwhile."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import trainrt
from trainrt.endurance.checkpoint import Checkpoint

HERE = Path(__file__).parent
SURROUNDINGS = {**os.environ, "PYTHONPATH": str(Path(trainrt.__file__).parent.parent)}


def fit(callbacks=(), epochs=2, rows=64, width=4, **keywords):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(width), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(rows, 4)).astype("float32")
    history = trainrt.fit(model, x, x[:, :1], 4, epochs, 0, list(callbacks), **keywords)
    return history, [np.asarray(v).tobytes() for v in [*model.variables, *model.optimizer.variables]]


def at_epoch_end(do):
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: do())


def test_what_was_flushed_before_a_kill_reads_back_at_fifty_random_points(tmp_path):
    command = [sys.executable, str(HERE / "endurance_writer.py"), str(tmp_path), "50", "0"]
    done = subprocess.run(command, env=SURROUNDINGS, capture_output=True, text=True, timeout=300, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 50
    assert all(r["right"] and r["read"] >= r["flushed"] for r in results)
    assert len({r["flushed"] for r in results}) > 10  # the kills came at different moments


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def warned(call):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in told if "trainrt" in str(w.message)]


def test_a_full_disk_ends_the_record_and_not_the_training(small_disk):
    (history, bits), told = warned(lambda: fit(epochs=30, logdir=small_disk))
    assert bits == fit(epochs=30)[1]
    assert len(told) == 1
    assert "training goes on" in told[0]
    assert len(history.run) == len(np.unique(history.run.steps[:, 0]))
    assert history.run.steps[-1, 1] == 30 * 16 - 1
    disk = trainrt.Run.open(small_disk)
    assert len(disk)
    np.testing.assert_array_equal(disk.scalar("loss"), history.run.scalar("loss")[: len(disk)])


def test_a_disk_that_becomes_read_only_ends_the_record_and_not_the_training(small_disk):
    def seal():
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, capture_output=True)

    place = {"logdir": small_disk / "l", "checkpoint": small_disk / "c"}
    made = threading.Event()

    def once():
        if not made.is_set():
            made.set()
            seal()

    try:
        (_, bits), told = warned(lambda: fit([at_epoch_end(once)], epochs=5, **place))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the file system cannot be sealed here: {error.stderr.decode().strip()}")
    assert bits == fit(epochs=5)[1]
    assert any("training goes on" in each for each in told)
    with pytest.raises(OSError, match="Read-only"):
        fit(logdir=small_disk / "l")
    with pytest.raises(OSError, match=r"Read-only|no permission"):
        fit(checkpoint=small_disk / "c")


def test_a_disk_too_full_for_checkpoints_is_told_of_once_and_the_last_whole_one_stays(small_disk, tmp_path):
    blocker = small_disk / "blocker"

    def fill():
        with contextlib.suppress(OSError), open(blocker, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    fills = iter([fill])

    def once():
        if len(list((small_disk / "c").glob("*.index"))) > 1:
            for do in fills:
                do()

    (_, bits), told = warned(lambda: fit([at_epoch_end(once)], epochs=9, checkpoint=small_disk / "c"))
    assert bits == fit(epochs=9)[1]
    assert len(told) == 1
    assert "could not be written, training goes on" in told[0]
    blocker.unlink()
    assert fit([at_epoch_end(lambda: None)], epochs=10, checkpoint=small_disk / "c")[1] == fit(epochs=10)[1]


def test_a_log_directory_that_is_deleted_ends_no_training(tmp_path):
    gone = at_epoch_end(lambda: shutil.rmtree(tmp_path, ignore_errors=True))
    history, bits = fit([gone], epochs=3, logdir=tmp_path / "logs")
    assert bits == fit(epochs=3)[1]
    assert history.run.steps[-1, 1] == 3 * 16 - 1


def test_a_directory_of_checkpoints_that_is_deleted_ends_no_training(tmp_path):
    gone = at_epoch_end(lambda: shutil.rmtree(tmp_path / "c", ignore_errors=True))
    (_, bits), _ = warned(lambda: fit([gone], epochs=3, checkpoint=tmp_path / "c"))
    assert bits == fit(epochs=3)[1]


def test_where_nothing_can_be_written_nothing_is_trained(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        fit(logdir=tmp_path / "file" / "logs")
    with pytest.raises(OSError, match="file"):
        fit(checkpoint=tmp_path / "file" / "checkpoints")


def test_a_record_reads_while_it_is_written_and_copied_and_moved(tmp_path):
    seen = []

    def look():
        last = seen[-1][0] if seen else 0
        until = time.monotonic() + 60  # a window waits for its delivery, a second or so where nothing else runs
        while len(trainrt.Run.open(tmp_path / "logs")) <= last and time.monotonic() < until:
            time.sleep(0.1)
        copy = tmp_path / f"copy{len(seen)}"
        shutil.copytree(tmp_path / "logs", copy)
        here, there = trainrt.Run.open(tmp_path / "logs"), trainrt.Run.open(copy)
        assert len(there) <= len(here)
        seen.append((len(there), here.state))

    history, _ = fit([at_epoch_end(look)], logdir=tmp_path / "logs")
    assert [state for _, state in seen] == ["running", "running"]
    assert 0 < seen[0][0] < seen[1][0]
    shutil.move(tmp_path / "logs", tmp_path / "moved")
    moved = trainrt.Run.open(tmp_path / "moved")
    np.testing.assert_array_equal(moved.scalar("loss"), history.run.scalar("loss"))
    assert moved.state == "finished"


def test_a_run_that_is_resumed_reads_on_in_the_reader_that_was_open(tmp_path):
    place = {"logdir": tmp_path / "l", "checkpoint": Checkpoint(tmp_path / "c", every=5)}
    calls = iter(range(100))

    def die(batch, logs):
        if next(calls) == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit([keras.callbacks.LambdaCallback(on_train_batch_end=die)], epochs=1, **place)
    reader = trainrt.Run.open(tmp_path / "l")
    assert reader.steps[:, 0].tolist() == list(range(14))
    history, _ = fit(epochs=1, **place)
    reader.refresh()
    assert reader.steps[:, 0].tolist() == list(range(16))
    np.testing.assert_array_equal(reader.scalar("loss"), history.run.scalar("loss"))
    assert reader.state == "finished"


def test_no_descriptor_and_no_thread_is_left_behind(tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    fit(epochs=1, logdir=tmp_path / "l", checkpoint=tmp_path / "c0")
    before = count()
    for number in range(3):
        fit(epochs=1, logdir=tmp_path / "l", checkpoint=tmp_path / f"c{number + 1}")
    assert count() <= before


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_bits_of_a_run_that_never_died(tmp_path, monkeypatch):
    """`benchmarks/endure.py` does this a hundred times."""
    monkeypatch.syspath_prepend(str(HERE.parent))
    from benchmarks import endure

    outcome = endure.kills("arrays", 3, tmp_path, random.Random(0))
    assert outcome["kills"] == 3
    assert outcome["identical"] == outcome["trainings"] > 0
    assert all(seconds < 2 for seconds in outcome["lost_s"])
