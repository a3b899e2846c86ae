"""Kills trainings at random moments and counts what comes back; measures what a checkpoint costs, and what leaks.

python -m benchmarks.endure --kills 100          # kill -9 at random moments, resumed, compared bit by bit
python -m benchmarks.endure --overhead           # a checkpoint after each epoch, against none, in turn
python -m benchmarks.endure --leak 100000        # resident memory and file descriptors over so many steps
python -m benchmarks.endure                      # a small share of each
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "tests" / "endurance_child.py"
EVERY = "7"


def started(source: str, place: Path, kept: bool = True, seconds_a_step: float = 0.02) -> subprocess.Popen:
    """A training in a process of its own, which writes its outcome into `place` at its end."""
    checkpoints = str(place / "checkpoints") if kept else "-"
    command = [sys.executable, str(CHILD), source, checkpoints, str(place / "logs"), str(place / "result.json")]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command += [EVERY, str(seconds_a_step)]
    return subprocess.Popen(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcome(place: Path) -> dict:
    result = json.loads((place / "result.json").read_text())
    result.pop("last")
    return result


def kills(source: str, count: int, directory: Path, rng: random.Random) -> dict:
    """Kills a training `count` times, somewhere between its first checkpoint and its end, and starts it again.

    Returns:
      "kills"; "resumed": trainings that came to their end afterwards; "identical": of those, how many agree in every
      bit of weights, slots, metrics, History, random state and record with one that was never killed; "mid_save": kills
      that hit a checkpoint half written.
    """
    whole_place = directory / "whole"
    whole_place.mkdir()
    assert started(source, whole_place, kept=False).wait() == 0
    whole = outcome(whole_place)
    done = resumed = identical = mid_save = 0
    number = 0
    while done < count:
        place = directory / f"{source}{number}"
        number += 1
        place.mkdir()
        deaths = 0
        while True:
            process = started(source, place)
            before = len(list((place / "logs").rglob("*.trainrt")))
            while process.poll() is None and len(list((place / "logs").rglob("*.trainrt"))) == before:
                time.sleep(0.005)
            if done < count and deaths < 3:
                time.sleep(rng.random() * 2.5)
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    done, deaths = done + 1, deaths + 1
                    mid_save += bool(list((place / "checkpoints").glob("*_temp*")))
                    continue
            if process.wait() == 0:
                resumed += 1
                identical += outcome(place) == whole
            break
        sys.stdout.write(f"\r{source}: {done} kills, {resumed} trainings resumed, {identical} identical")
        sys.stdout.flush()
    print()
    return {"kills": done, "resumed": resumed, "identical": identical, "mid_save": mid_save}


def _fit(checkpoint, width: int = 512, epochs: int = 6):
    import keras
    import numpy as np

    import trainrt

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([64]), *(keras.layers.Dense(width) for _ in range(4))])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(8192, 64)).astype("float32")
    y = np.zeros((8192, width), "float32")
    marks = []
    callback = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: marks.append(time.perf_counter()))
    trainrt.fit(model, x, y, 64, epochs, 0, [callback], checkpoint=checkpoint)
    return statistics.median(b - a for a, b in itertools.pairwise(marks[1:])), model.count_params()


def overhead(pairs: int) -> None:
    """Seconds of an epoch with a checkpoint after it over seconds without, in turn; the median of the ratios."""
    ratios, epochs = [], []
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as directory:
            without, count = _fit(None)
            kept, _ = _fit(directory)
            ratios.append(kept / without)
            epochs.append(without)
    print(
        f"A checkpoint each epoch of {count:,} weights with Adam ({12 * count / 1e6:.0f} MB): "
        f"{statistics.median(ratios):.3f} times the epoch without ({statistics.median(epochs):.2f} s, {pairs} pairs)"
    )


def leak(steps: int) -> None:
    """Resident memory and descriptors from a tenth of the steps on to the end."""
    import keras
    import numpy as np

    import trainrt

    model = keras.Sequential([keras.layers.Input([8]), keras.layers.Dense(8), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(8000, 8)).astype("float32")
    seen = []

    def look(epoch, logs):
        with open("/proc/self/statm") as file:
            seen.append((int(file.read().split()[1]) * 4096, len(os.listdir("/proc/self/fd"))))

    epochs = max(10, steps // 1000)
    with tempfile.TemporaryDirectory() as directory:
        callback = keras.callbacks.LambdaCallback(on_epoch_end=look)
        trainrt.fit(model, x, x[:, :1], 8, epochs, 0, [callback], logdir=directory)
    first, last = seen[len(seen) // 10], seen[-1]
    print(
        f"{epochs * 1000:,} steps: resident memory {first[0] / 1e6:.0f} MB after a tenth, {last[0] / 1e6:.0f} MB at "
        f"the end ({100 * (last[0] / first[0] - 1):+.1f} %), file descriptors {first[1]} and {last[1]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--source", default="arrays")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--leak", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    small = not (given.kills or given.overhead or given.leak)
    if given.kills or small:
        with tempfile.TemporaryDirectory() as directory:
            print(kills(given.source, given.kills or 3, Path(directory), random.Random(given.seed)))
    if given.overhead or small:
        overhead(3 if small else 7)
    if given.leak or small:
        leak(given.leak or 20_000)


if __name__ == "__main__":
    main()
