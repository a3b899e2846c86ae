"""What determinism costs on the models of the zoo, or on a script: `trainrt determinism bench`.

    python benchmarks/determinism.py [--workloads mlp cnn ...] [--modes fast deterministic ...] [--rounds 3]
        [--repeats 3] [--steps 50] [--logdir DIR] [--script SCRIPT ARGUMENTS...]

Fast with XLA, fast without, deterministic without, deterministic with XLA: a fresh process each, taking turns. It
prints a table and writes bench.json and bench.svg; the same command on a CPU and on a GPU.
"""

import sys

from trainrt.cli import main

if __name__ == "__main__":
    sys.exit(main(["determinism", "bench", *sys.argv[1:]]))
