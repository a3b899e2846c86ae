"""One fresh process of a proof or a benchmark: `python -m trainrt.determinism.child record|time ...`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import trainrt
from trainrt.determinism import bench, modes, script
from trainrt.determinism.digests import Digests
from trainrt.determinism.prove import LAST_WORDS, ScriptFailed


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainrt.determinism.child")
    commands = parser.add_subparsers(required=True, dest="command")
    record = commands.add_parser("record")
    record.add_argument("--logdir", required=True)
    record.add_argument("--every", type=int, default=1)
    record.add_argument("--seed", type=int, default=0)
    record.add_argument("--steps", type=int)
    record.add_argument("--fast", action="store_true")
    record.add_argument("--xla", action="store_true")
    record.add_argument("script")
    record.add_argument("arguments", nargs=argparse.REMAINDER)
    timed = commands.add_parser("time")
    timed.add_argument("--logdir", required=True)
    timed.add_argument("--mode", required=True, choices=bench.MODES)
    timed.add_argument("--steps", type=int, required=True)
    timed.add_argument("--repeats", type=int, required=True)
    timed.add_argument("--workload")
    timed.add_argument("script", nargs="?")
    timed.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        (bench.child if options.command == "time" else _record)(options)
    except ScriptFailed as error:
        sys.exit(f"{LAST_WORDS}{error}")


def _record(options: argparse.Namespace) -> None:
    import keras

    fit = trainrt.fit  # the real one: the script's calls of it are taken over
    if options.fast:
        keras.utils.set_random_seed(options.seed)
    else:
        modes.enable(options.seed)
    deterministic: Any = False if options.fast else modes.XLA if options.xla else True

    def recorded(model: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = script.named(args, kwargs)
        arguments |= {"logdir": options.logdir, "deterministic": deterministic, "digests": Digests(options.every)}
        arguments.pop("checkpoint", None)  # the second process would go on where the first ended
        return fit(model, **arguments)

    script.limit(options.steps)
    script.run(options.script, options.arguments, recorded)


if __name__ == "__main__":
    main()
