"""How long a long run takes to open, and how much memory.

    python -m benchmarks.opening [--steps 1000000] [--weights 200] [--rounds 5]

Writes a bounded record of so many steps as `fit` would. Then, each time in a process of its own:

  open     `Run.open`: every byte is checked
  ratio    and `run["update_ratio"]` after it
  memory   largest resident size of the process by then, its imports included
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.plugin import write

READ = """
import resource, sys, time
from trainrt.record.run import Run
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
begun = time.perf_counter()
run = Run.open(sys.argv[1])
opened, memory = time.perf_counter(), peak()
assert len(run["update_ratio"]) == len(run)
print(opened - begun, memory, time.perf_counter() - opened, peak())
"""


def measure(directory: Path, rounds: int) -> list[tuple[float, ...]]:
    """Seconds to open, MB by then, seconds of a statistic, MB by then; of each round."""
    command = [sys.executable, "-c", READ, str(directory)]
    said = [subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout for _ in range(rounds)]
    return [tuple(map(float, line.split())) for line in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--weights", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        size = write(Path(scratch) / "run", options.steps, options.weights)
        rounds = measure(Path(scratch) / "run", options.rounds)
    what = f"{options.steps:,} steps of {options.weights} weights, {size / 1e6:.0f} MB"
    print(f"{what}; median and worst of {len(rounds)} processes")
    for i, (name, unit) in enumerate((("open", "s"), ("memory", "MB"), ("ratio", "s"), ("memory", "MB"))):
        values = [each[i] for each in rounds]
        print(f"{name:8} {statistics.median(values):8.2f} {max(values):8.2f} {unit}")


if __name__ == "__main__":
    main()
