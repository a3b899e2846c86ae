"""Kills trainings at random moments and counts what comes back; measures what a checkpoint costs, and what leaks.

python -m benchmarks.endure --kills 100          # kill -9 at random moments, resumed, compared bit by bit
python -m benchmarks.endure --kills 20 --source dataset --seed 3 --into parts.jsonl    # in parts that add up
python -m benchmarks.endure --overhead           # a checkpoint after each epoch, against none, in turn
python -m benchmarks.endure --leak 100000        # resident memory and file descriptors over so many steps
python -m benchmarks.endure --fuzz 2000          # damaged records and checkpoints: what is read of them
python -m benchmarks.endure --large              # a thousand variables, a gigabyte of weights
python -m benchmarks.endure                      # a small share of each
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def kills(source: str, count: int, directory: Path, rng: random.Random, until: float = math.inf) -> dict[str, Any]:
    """Kills a training `count` times at random moments, its start among them, and starts it again after each.

    After every third kill the newest of several checkpoints is damaged as well, once in a training.

    Args:
      until: No training is begun after this time, `time.monotonic`.

    Returns:
      "kills"; "trainings": that came to their end after 1 to 3 kills each; "identical": of those, how many agree in
      every bit of weights, slots, metrics, History, random state and record with one that was never killed; "mid_save":
      kills that hit a checkpoint half written; "damaged": newest checkpoints that were damaged before the next start;
      "lost_s": seconds of training that each kill took out of the record.
    """
    whole_place = directory / "whole"
    whole_place.mkdir()
    assert started(source, whole_place, kept=False).wait() == 0
    whole = outcome(whole_place)
    told: dict[str, Any] = dict.fromkeys(("kills", "trainings", "identical", "mid_save", "damaged"), 0) | {"lost_s": []}
    while told["kills"] < count and time.monotonic() < until:
        place = directory / f"{source}{told['trainings']}"
        place.mkdir()
        deaths, hurt = 0, False
        while (process := _until_random(source, place, rng, told["kills"] < count and deaths < 3)) is None:
            deaths += 1
            told["kills"] += 1
            told["mid_save"] += bool(list((place / "checkpoints").glob("*_temp*")))
            told["lost_s"] += _lost(place)
            if not hurt and told["kills"] % 3 == 0:
                hurt = _damage(place / "checkpoints", rng)
                told["damaged"] += hurt
        told["trainings"] += 1
        told["identical"] += process.wait() == 0 and outcome(place) == whole
        sys.stdout.write(f"\r{source}: {told['kills']} kills, {told['trainings']} ended, {told['identical']} identical")
        sys.stdout.flush()
    print()
    return told


def _until_random(source: str, place: Path, rng: random.Random, kill: bool) -> subprocess.Popen | None:
    """Starts the training; None when it was killed, else its process, which comes to its end by itself.

    One of eight kills comes while the process starts and reads its checkpoint, one of eight as soon as a checkpoint is
    being written, the others while it trains.
    """
    (place / "result.json.progress").unlink(missing_ok=True)
    before = len(list((place / "logs").rglob("*.trainrt")))
    process = started(source, place)
    if not kill:
        return process
    kind = rng.randrange(8)
    if kind == 0:
        time.sleep(rng.random() * 8)
    else:
        while process.poll() is None and len(list((place / "logs").rglob("*.trainrt"))) == before:
            time.sleep(0.005)
        time.sleep(rng.random() * 2.5)
        while kind == 1 and process.poll() is None and not list((place / "checkpoints").glob("*_temp*")):
            time.sleep(0.0005)
    if process.poll() is not None:
        return process
    process.kill()
    process.wait()
    return None


def _lost(place: Path) -> list[float]:
    """Seconds from the last step that reads back to the last step that was done; empty where none was."""
    from trainrt.record.run import Run

    progress = place / "result.json.progress"
    first, last = struct.unpack("<dd", progress.read_bytes()) if progress.exists() else (0.0, 0.0)
    if not last:
        return []
    try:
        known = float(Run.open(place / "logs").wall_time[-1])
    except (OSError, ValueError, IndexError):
        known = first
    return [max(0.0, last - max(known, first))]


def _damage(checkpoints: Path, rng: random.Random) -> bool:
    """Cuts a file of the newest checkpoint short, or changes one byte of it, if there is one before it."""
    numbers = sorted(int(p.stem.rpartition("-")[2]) for p in checkpoints.glob("trainrt-*.index"))
    if len(numbers) < 2:
        return False
    path = rng.choice(sorted(checkpoints.glob(f"trainrt-{numbers[-1]}.*")))
    data = bytearray(path.read_bytes())
    where = rng.randrange(len(data))
    if rng.random() < 0.5:
        del data[where:]
    else:
        data[where] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return True


def told_of_kills(parts: Sequence[Mapping[str, Any]]) -> str:
    """The parts of several runs as one line."""
    total = {name: sum(part[name] for part in parts) for name in parts[0] if name not in ("lost_s", "source")}
    lost = [seconds for part in parts for seconds in part["lost_s"]]
    return (
        f"{total['kills']} kills in {total['trainings']} trainings ({total['mid_save']} in the middle of a save, "
        f"{total['damaged']} followed by damage to the newest checkpoint): {total['identical']} of "
        f"{total['trainings']} ended bit-identical. Lost of the record: {statistics.median(lost):.2f} s in the median, "
        f"{max(lost):.2f} s at most."
    )


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


def fuzz(count: int, rng: random.Random) -> None:
    """Reads files that were cut, overwritten, spliced and filled with noise: what is read is right, or refused."""
    import warnings

    import numpy as np

    from trainrt.endurance.checkpoint import Store
    from trainrt.record.run import Run

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _record(place / "run")
        (file,) = (place / "run").glob("*.trainrt")
        told = dict.fromkeys(("whole", "in part, and said so", "refused", "wrong", "crashed"), 0)
        for data in _damaged(file.read_bytes(), count, rng):
            file.write_bytes(data)
            try:
                run = Run.open(place / "run")
                steps = run.steps[:, 0]
                right = len(np.unique(steps)) == len(steps) and bool((run.scalar("loss") == steps).all())
                whole = len(steps) == 180 and not run.problems
                kind = "wrong" if not right else "whole" if whole else "in part, and said so"
                if kind == "in part, and said so" and not run.problems and run.state == "finished":
                    kind = "wrong"
            except (ValueError, OSError, KeyError):
                kind = "refused"
            except Exception as error:
                print(repr(error))
                kind = "crashed"
            told[kind] += 1
        print(f"{count} damaged records: " + ", ".join(f"{n} {kind}" for kind, n in told.items()))

        store = Store(place / "checkpoints", keep=3)
        for number in (1, 2):
            store.save({"number": number, "step": number, "values": np.full(5000, number, np.float32)})
            store.wait()
        told = dict.fromkeys(("the newest", "the one before, and said so", "wrong"), 0)
        files = sorted((place / "checkpoints").glob("trainrt-2.*"))
        share = max(1, count // 10)
        for file in files:
            kept = file.read_bytes()
            for data in _damaged(kept, share, rng):
                file.write_bytes(data)
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    saved = Store(place / "checkpoints", keep=3).newest()
                number = 0 if saved is None else saved.meta["number"]
                right = saved is not None and bool((saved.meta["values"] == number).all()) and number == 2 - bool(said)
                told["wrong" if not right else tuple(told)[2 - number]] += 1
            file.write_bytes(kept)
        print(
            f"{share * len(files)} damaged checkpoints, read: " + ", ".join(f"{n} {kind}" for kind, n in told.items())
        )


def _record(directory: Path) -> None:
    """180 steps whose loss is their number."""
    import numpy as np

    from trainrt.record.synthetic import build
    from trainrt.sinks.tensorboard import TensorBoard

    directory.mkdir()
    sink = TensorBoard(directory)
    for first in range(0, 180, 3):
        losses = np.arange(first, first + 3, dtype=float)
        norms = dict.fromkeys(("step_s", "gradient_norm", "clipped_gradient_norm"), 1.0)
        roster, record = build(3, 4, 100, "float32", ("momentum",), norms, {"loss": losses})
        record.steps[:] += first
        if not first:
            sink.open(roster, {"pid": os.getpid()})
        sink.write(record)
    sink.close([], {"how": "finished", "detail": "", "step": 179})


def _damaged(data: bytes, count: int, rng: random.Random) -> Iterator[bytes]:
    for _ in range(count):
        new, kind = bytearray(data), rng.randrange(6)
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        if kind == 0:
            del new[a:]
        elif kind == 1:
            for _ in range(rng.choice((1, 8, 64))):
                new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            new[a:b] = rng.randbytes(b - a)
        elif kind == 3:
            del new[a:b]
        elif kind == 4:
            new[a:a] = data[a:b]
        else:
            new[a:b] = bytes(b - a)
        yield bytes(new)


def large() -> None:
    """A model of a thousand variables and one of a gigabyte: what trainrt adds to the time and the memory of a run."""
    for make in (_deep, _wide):
        for how in ("bare", "observed", "observed, with checkpoints"):
            command = [
                sys.executable,
                "-c",
                f"from benchmarks import endure; endure._one(endure.{make.__name__}, {how!r})",
            ]
            subprocess.run(command, check=True, cwd=ROOT)


def _deep(keras):
    inputs = outputs = keras.Input([8])
    for _ in range(500):
        outputs = keras.layers.Add()([outputs, keras.layers.Dense(8, "tanh")(outputs)])
    return keras.Model(inputs, outputs), 8


def _wide(keras):
    return keras.Sequential([keras.Input([16384]), keras.layers.Dense(16384, use_bias=False)]), 16384


def _one(make, how: str) -> None:
    import resource

    import keras
    import numpy as np

    import trainrt

    model, width = make(keras)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(24, width)).astype("float32")
    with tempfile.TemporaryDirectory() as directory:
        keywords: dict[str, Any] = {"verbose": 0, "epochs": 2}
        if how != "bare":
            keywords["logdir"] = f"{directory}/logs"
        if "checkpoints" in how:
            keywords["checkpoint"] = trainrt.Checkpoint(f"{directory}/checkpoints", keep=1)
        fit = keras.Model.fit if how == "bare" else trainrt.fit
        begun = time.perf_counter()
        fit(model, x, x, 8, **keywords)
        took = time.perf_counter() - begun
        size = sum(file.stat().st_size for file in Path(directory).glob("logs/**/*") if file.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{len(model.weights):,} variables, {4 * model.count_params() / 1e6:,.0f} MB, {how}: {took:.1f} s for 6 steps "
        f"with their trace, {peak:.2f} GB at most, a record of {size / 1e3:.0f} kB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--source", default="arrays", help="of the data: a name in tests/endurance_child.py")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no other training after so many")
    parser.add_argument("--into", help="a file that this part of the kills is added to; all parts are summed up")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--leak", type=int, default=0)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--fuzz", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    small = not (given.kills or given.overhead or given.leak or given.large or given.fuzz)
    if given.kills or small:
        with tempfile.TemporaryDirectory() as directory:
            until = time.monotonic() + given.seconds
            told = kills(given.source, given.kills or 3, Path(directory), random.Random(given.seed), until)
        parts = [{"source": given.source, **told}]
        if given.into:
            with open(given.into, "a") as file:
                file.write(json.dumps(parts[0]) + "\n")
            parts = [json.loads(line) for line in Path(given.into).read_text().splitlines()]
        print(told_of_kills(parts))
    if given.overhead or small:
        overhead(3 if small else 7)
    if given.fuzz or small:
        fuzz(given.fuzz or 200, random.Random(given.seed))
    if given.large:
        large()
    if given.leak or small:
        leak(given.leak or 20_000)


if __name__ == "__main__":
    main()
