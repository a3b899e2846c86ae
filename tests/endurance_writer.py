"""Forks processes that write a record as fast as they can, kills each in the middle, and reads what it left.

    python endurance_writer.py DIRECTORY KILLS SEED

Prints a line of JSON: for each kill how many chunks had been written and flushed, and how many windows were read back.
Forking saves importing TensorFlow for each of them.
"""

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from trainrt.record.run import Run
from trainrt.record.synthetic import build
from trainrt.sinks.tensorboard import TensorBoard

WINDOWS = 3


def chunk(number):
    losses = np.arange(number * WINDOWS, (number + 1) * WINDOWS, dtype=float)
    roster, record = build(
        WINDOWS,
        40,
        100,
        "float32",
        ("momentum",),
        dict.fromkeys(("step_s", "gradient_norm", "clipped_gradient_norm"), 1.0),
        {"loss": losses},
    )
    record.steps[:] += number * WINDOWS
    return roster, record


def write(directory, flushed):
    chunks = [chunk(number) for number in range(60)]
    sink = TensorBoard(directory)
    sink.open(chunks[0][0], {"pid": os.getpid()})
    number = 0
    while True:
        sink.write(chunks[number][1] if number < 60 else chunk(number)[1])
        number += 1
        flushed[:8] = struct.pack("<q", number)


def kill_one(directory, delay):
    flushed = mmap.mmap(-1, 8)
    child = os.fork()
    if not child:
        write(directory, flushed)
        os._exit(0)
    while not struct.unpack("<q", flushed[:8])[0]:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("the writer ended by itself")
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run = Run.open(directory)
    right = bool((run.scalar("loss") == run.steps[:, 0]).all() and (np.diff(run.steps[:, 0]) == 1).all())
    torn = bool(run.problems)
    return {"flushed": struct.unpack("<q", flushed[:8])[0], "read": len(run) / WINDOWS, "right": right, "torn": torn}


if __name__ == "__main__":
    directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    random.seed(seed)
    results = []
    for number in range(kills):
        place = directory / str(number)
        place.mkdir()
        results.append(kill_one(place, random.random() * 0.05))
    print(json.dumps(results))
