"""`trainrt determinism check|prove|bench`: the commands, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainrt.banners import load_tensorflow

FOUND, BAD_INPUT = 1, 2
"""Exit statuses: something stands against determinism; the input is bad."""


def add(commands: Any) -> None:
    """Adds the command to the subparsers of `trainrt`."""
    determinism = commands.add_parser("determinism", help="check, prove or price the same bits each time")
    actions = determinism.add_subparsers(title="actions", required=True, metavar="ACTION")

    check = actions.add_parser("check", help="list the ops that would raise on a GPU, go through the host, or vary")
    check.add_argument("script", help="a training script, up to its first fit; or a model that was saved compiled")
    check.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(command=_guarded(_check))

    prove = actions.add_parser("prove", help="run a script in fresh processes and compare every bit")
    prove.add_argument("--runs", type=int, default=3, help="processes (%(default)s)")
    prove.add_argument("--steps", type=int, help="at most so many steps of each fit; all by default")
    prove.add_argument("--every", type=int, default=1, help="digest the stages of every n-th step (%(default)s)")
    prove.add_argument("--seed", type=int, default=0, help="set before the script begins (%(default)s)")
    mode = prove.add_mutually_exclusive_group()
    mode.add_argument("--fast", action="store_true", help="in TensorFlow's fast mode, to see where it varies")
    mode.add_argument("--xla", action="store_true", help="deterministic with XLA")
    prove.add_argument("--logdir", type=Path, default=Path("trainrt-prove"), help="where to write (%(default)s)")
    prove.add_argument("--json", action="store_true", help="print JSON")
    prove.add_argument("script", help="a training script")
    prove.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    prove.set_defaults(command=_guarded(_prove))

    bench = actions.add_parser("bench", help="price determinism: fast and deterministic, with XLA and without")
    bench.add_argument("--workloads", nargs="+", help="of the zoo; all by default")
    bench.add_argument("--modes", nargs="+", help="all four by default")
    bench.add_argument("--rounds", type=int, default=3, help="processes of each mode (%(default)s)")
    bench.add_argument("--repeats", type=int, default=3, help="timed repetitions in each process (%(default)s)")
    bench.add_argument("--steps", type=int, default=50, help="steps of a repetition (%(default)s)")
    bench.add_argument("--logdir", type=Path, default=Path("trainrt-bench"), help="where to write (%(default)s)")
    bench.add_argument("--script", nargs=argparse.REMAINDER, default=[], metavar="SCRIPT",
                       help="a training script and its arguments, instead of the zoo; comes last")  # fmt: skip
    bench.set_defaults(command=_guarded(_bench))


def _guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        try:
            return command(options)
        except (OSError, ValueError, RuntimeError) as error:
            print(f"trainrt: {error}", file=sys.stderr)
            return BAD_INPUT

    return run


def _check(options: argparse.Namespace) -> int:
    load_tensorflow()
    from trainrt.determinism import modes, preflight
    from trainrt.determinism.saved import specs_of

    path = Path(options.script)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. Give a training script, or a model that was saved compiled.")
    modes.enable(0)
    if path.suffix == ".py":
        issues = _check_script(options)
    else:
        model, spec = specs_of(path)
        issues = preflight.check(model, spec, spec)
    if options.json:
        print(json.dumps([dataclasses.asdict(issue) for issue in issues], indent=2))
    else:
        print("\n\n".join(map(str, issues)) or "Nothing found: no op of the step raises, copies or varies.")
    return FOUND if any(issue.effect != preflight.HOST and issue.where != "XLA" for issue in issues) else 0


def _check_script(options: argparse.Namespace) -> list:
    from trainrt.determinism import preflight, saved, script

    found: list = []

    def checked(model: Any, *args: Any, **kwargs: Any) -> None:
        arguments = script.named(args, kwargs)
        spec = saved.spec_of_data(arguments)
        validated = arguments.get("validation_data") is not None or arguments.get("validation_split")
        found.extend(preflight.check(model, spec, spec if validated else None))
        raise script.Enough

    with contextlib.redirect_stdout(sys.stderr):  # what the script prints is not of the answer
        script.run(options.script, options.arguments, checked)
    return found


def _prove(options: argparse.Namespace) -> int:
    from trainrt.determinism.prove import prove

    certificate = prove(
        options.script,
        options.arguments,
        runs=options.runs,
        fast=options.fast,
        xla=options.xla,
        every=options.every,
        steps=options.steps,
        seed=options.seed,
        logdir=options.logdir,
        tell=_tell,
    )
    if options.json:
        print(json.dumps({**certificate.content(), "distinct": certificate.distinct}, indent=2))
    else:
        print(certificate)
        print(f"The records, signed, are in {certificate.runs[0][0].parent.parent}")
    return 0 if certificate.identical else FOUND


def _bench(options: argparse.Namespace) -> int:
    load_tensorflow()
    from trainrt.determinism import bench
    from trainrt.determinism.zoo import ZOO

    for given, known, what in ((options.workloads, ZOO, "workloads"), (options.modes, bench.MODES, "modes")):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise ValueError(f"The {what} are {', '.join(known)}. Received: {', '.join(unknown)}.")
    script, *arguments = options.script or [None]
    options.logdir.mkdir(parents=True, exist_ok=True)
    outcomes = bench.bench(
        options.workloads or list(ZOO),
        script,
        arguments,
        modes=tuple(options.modes or bench.MODES),
        rounds=options.rounds,
        repeats=options.repeats,
        steps=options.steps,
        logdir=options.logdir,
        tell=_tell,
    )
    machine = bench.machine(outcomes)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(bench.table(outcomes))
    for outcome in outcomes:
        if outcome.divergence:
            print(f"{outcome.workload}, {outcome.mode}, parts at {outcome.divergence}")
    (options.logdir / "bench.json").write_text(bench.as_json(outcomes, machine))
    (options.logdir / "bench.svg").write_text(bench.plot(outcomes))
    print(f"Written: {options.logdir / 'bench.json'}, {options.logdir / 'bench.svg'}")
    return BAD_INPUT if all(outcome.failed for outcome in outcomes) else 0


def _tell(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
