"""The command line: `trainrt report`, `compare`, `explain`, `demo`, `doctor`, `kernels`.

Imports are inside the commands, so that each starts as fast as it can; `report`, `compare` and `explain` need
no TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainrt import __version__
from trainrt.banners import load_tensorflow
from trainrt.determinism import commands as determinism
from trainrt.record.vocabulary import unique
from trainrt.report import as_json, print_report, say

if TYPE_CHECKING:
    from trainrt.record.run import Run

BAD_INPUT = 2
"""Exit status when what was asked for is not there; argparse uses it too."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      The exit status: 0, 2 when the input is bad, 130 after Ctrl-C; that of `doctor` is told in its module.
    """
    options = _parser().parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, `head` for one, has seen enough. Python would complain once more while it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainrt", description="Tells why a TensorFlow model does not learn.")
    parser.add_argument("--version", action="version", version=f"trainrt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="print what is wrong with a recorded run")
    report.add_argument("logdir", type=Path, help="the directory given to trainrt.fit, or one above it")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with plots")
    report.add_argument("--all", action="store_true", help="report every run in the directory, not the newest alone")
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", help="say what likely explains that BAD did not do what GOOD did")
    compare.add_argument("good", type=Path, metavar="GOOD", help="log directory of a run that was well")
    compare.add_argument(
        "bad", type=Path, nargs="+", metavar="BAD", help="log directory of the run in question; or more"
    )
    compare.add_argument("--good", type=Path, action="append", default=[], dest="more", metavar="DIR",
                         help="another run that was well, to see how much good runs vary; may be repeated")  # fmt: skip
    compare.add_argument("--bits", action="store_true", help="say instead where the bits of the two part")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with plots")
    compare.set_defaults(command=_compare)

    determinism.add(commands)

    explain = commands.add_parser("explain", help="list the rules, or print what one means")
    explain.add_argument("rule", nargs="?", help="name of a rule, or of a cause that a finding named")
    explain.set_defaults(command=_explain)

    demo = commands.add_parser("demo", help="train a healthy and a faulty model on digits, and see what is found")
    demo.add_argument("--logdir", type=Path, default=Path("trainrt-demo"), help="where to write (%(default)s)")
    demo.add_argument("--epochs", type=_positive, default=None, help="epochs of each run")
    demo.set_defaults(command=_demo)

    doctor = commands.add_parser("doctor", help="say what this machine has, which paths are taken, what to install")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--require", choices=("gpu", "kernels"), action="append", default=[],
                        help="exit with 2 where it is missing; may be repeated")  # fmt: skip
    doctor.set_defaults(command=_doctor)

    kernels = commands.add_parser("kernels", help="build the native kernels ahead, see where they stand, remove them")
    kernels.add_argument("action", choices=("build", "status", "clean"))
    kernels.add_argument("--force", action="store_true", help="build even if they are there")
    kernels.add_argument("--target", default="native", help="for which processor: native, or a value for -march")
    kernels.add_argument("--gpu", action=argparse.BooleanOptionalAction,
                         help="build the GPU kernels too, with nvcc; by default where there is a GPU")  # fmt: skip
    kernels.add_argument("--directory", type=Path, help="where to, instead of the user's cache; see TRAINRT_KERNELS")
    kernels.set_defaults(command=_kernels)

    launch = commands.add_parser("launch", help="train a script with several workers on this machine")
    launch.add_argument("-n", "--workers", type=_positive, required=True, help="how many")
    launch.add_argument("--restarts", type=_not_negative, default=0, metavar="N",
                        help="start all again up to N times when one dies (%(default)s)")  # fmt: skip
    launch.add_argument("script", help="a Python file that makes a MultiWorkerMirroredStrategy")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    launch.set_defaults(command=_launch)
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
    return value


def _report(options: argparse.Namespace) -> int:
    from trainrt.findings import diagnose
    from trainrt.record.run import Run

    if not options.logdir.exists():
        return _refuse(
            f"{options.logdir} does not exist. Give the directory that was passed as trainrt.fit(logdir=...)."
        )
    try:
        found = Run.find(options.logdir)
        if not found:
            return _refuse(
                f"no trainrt run lies in {options.logdir}. Write one: trainrt.fit(..., logdir={str(options.logdir)!r})."
            )
        chosen = found if options.all else found[-1:]
        runs = [Run.open(path) for path in chosen]
    except (OSError, ValueError) as error:
        return _refuse(f"{options.logdir} cannot be read: {error}")
    others = [str(path) for path in found if path not in chosen]
    reports = [(path, run, diagnose(run)) for path, run in zip(chosen, runs, strict=True)]
    if options.html:
        return _write_page(options.html, options.logdir, chosen, runs)
    if options.json:
        body = {"runs": [as_json(path, run, findings) for path, run, findings in reports], "others": others}
        print(json.dumps(body, indent=2, allow_nan=False))
        return 0
    for path, run, findings in reports:
        print_report(path, run, findings)
    if others:
        say(
            f"{len(others)} other run{'s' if len(others) > 1 else ''} here (this was the newest; --all reports all): "
            + ", ".join(others)
        )
    return 0


def _compare(options: argparse.Namespace) -> int:
    from trainrt.comparison import compare
    from trainrt.comparison.render import render_all
    from trainrt.record.run import Run

    if options.bits:
        return _compare_bits(options)
    try:
        goods, bads = [[Run.open(path) for path in paths] for paths in ((options.good, *options.more), options.bad)]
        compared = [compare(goods, bad) for bad in bads]
    except (OSError, ValueError) as error:
        return _refuse(f"these runs cannot be compared: {error}")
    if options.html:
        paths = (options.good, *options.bad)
        named = [(str(path), run) for path, run in zip(paths, (goods[0], *bads), strict=True)]
        return _write_comparison(options.html, named)
    if options.json:
        print(json.dumps({"comparisons": [each.to_dict() for each in compared]}, indent=2, allow_nan=False))
        return 0
    render_all(compared)
    return 0


def _compare_bits(options: argparse.Namespace) -> int:
    """0: identical; 1: they differ, or nothing was recorded that proves it."""
    from trainrt.record.bits import compare_bits
    from trainrt.record.run import Run

    try:
        verdicts = [compare_bits(Run.open(options.good), Run.open(bad)) for bad in options.bad]
    except (OSError, ValueError) as error:
        return _refuse(f"these runs cannot be compared: {error}")
    if options.json:
        said = [{**dataclasses.asdict(verdict), "identical": verdict.identical} for verdict in verdicts]
        print(json.dumps({"bits": said}, indent=2, default=str))
    else:
        for bad, verdict in zip(options.bad, verdicts, strict=True):
            say(f"{options.good} and {bad}")
            say(str(verdict))
    return 0 if all(verdict.identical for verdict in verdicts) else 1


def _write_comparison(file: Path, named: list[tuple[str, Run]]) -> int:
    from trainrt.plugin import report_html

    names = unique(name for name, _ in named)
    try:
        report_html.write(file, [(name, run) for name, (_, run) in zip(names, named, strict=True)], compare=True)
    except OSError as error:
        return _refuse(f"{file} cannot be written: {error}")
    say(f"{file} compares {len(named)} runs; open it in a browser.")
    return 0


def _write_page(file: Path, logdir: Path, paths: list[Path], runs: list[Run]) -> int:
    from trainrt.plugin import report_html

    names = [path.relative_to(logdir).as_posix() if path.is_relative_to(logdir) else str(path) for path in paths]
    named = [(path.name if name == "." else name, run) for name, path, run in zip(names, paths, runs, strict=True)]
    try:
        report_html.write(file, named[::-1])
    except OSError as error:
        return _refuse(f"{file} cannot be written: {error}")
    say(f"{file} holds {len(runs)} run{'s' if len(runs) > 1 else ''}; open it in a browser.")
    return 0


def _kernels(options: argparse.Namespace) -> int:
    load_tensorflow()
    from trainrt.update import cuda, native

    if options.action == "clean":
        removed = native.clean()
        say(f"Removed {len(removed)} from {native.cache()}." if removed else f"Nothing to remove in {native.cache()}.")
        return 0
    if options.action == "build":
        try:
            say(str(native.build(options.force, options.target, options.directory)))
        except native.BuildError as error:
            return _refuse(str(error))
        return _build_gpu(options)
    status = native.status()
    say(f"library   {status.path or status.reason}")
    say(f"compiler  {status.compiler or 'none found'}")
    say(f"flags     {' '.join(status.flags)}")
    gpu = cuda.status()
    say(f"GPU       {gpu.path or gpu.reason}")
    return 0 if status.path else 1


def _build_gpu(options: argparse.Namespace) -> int:
    """The GPU kernels too, where that was asked for, or there is a GPU and what it takes."""
    import tensorflow as tf

    from trainrt.update import cuda, native

    wanted = options.gpu if options.gpu is not None else bool(tf.config.list_physical_devices("GPU"))
    if not wanted:
        return 0
    try:
        say(str(cuda.build(options.force, options.directory)))
    except native.BuildError as error:
        if options.gpu:
            return _refuse(str(error))
        say(str(error))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from trainrt import doctor

    return doctor.run(options.json, options.require)


def _launch(options: argparse.Namespace) -> int:
    from trainrt.distribution import launch

    if not Path(options.script).is_file():
        what = "is no file" if Path(options.script).exists() else "does not exist"
        return _refuse(f"{options.script} {what}. Give a Python file that each worker runs.")
    return launch.launch([sys.executable, options.script, *options.arguments], options.workers, options.restarts)


def _explain(options: argparse.Namespace) -> int:
    from trainrt.findings import ALL, CAUSES, explain, naming

    if options.rule is None:
        width = max(len(rule.__name__) for rule in ALL)
        for rule in ALL:
            print(f"{rule.__name__:{width}}  {explain(rule).splitlines()[0]}")
        return 0
    pages = {rule.__name__: explain(rule).partition("\n>>> ")[0].rstrip() for rule in ALL}
    if options.rule in pages:
        print(f"{options.rule}\n\n{pages[options.rule]}")
        return 0
    if options.rule in CAUSES:
        speaking = [rule.__name__ for rule in naming(options.rule, ALL)]
        print(f"{options.rule} is a cause that may be named by {', '.join(speaking) or 'no rule yet'}.")
        for name in speaking:
            print(f"\n{name}\n\n{pages[name]}")
        return 0
    names = [*pages, *sorted(CAUSES)]
    like = [name for name in names if options.rule and options.rule.lower() in name]
    like = like or difflib.get_close_matches(options.rule, names, n=5, cutoff=0.5)
    hint = f"Like it: {', '.join(like)}. " if like else ""
    return _refuse(f"there is no rule or cause {options.rule!r}. {hint}`trainrt explain` lists the rules.")


def _demo(options: argparse.Namespace) -> int:
    # TensorFlow writes a dozen lines about the CPU and missing GPU libraries when it loads.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from trainrt import demo

    return demo.run(options.logdir, **({} if options.epochs is None else {"epochs": options.epochs}))


def _refuse(words: str) -> int:
    print(f"trainrt: {words}", file=sys.stderr)
    return BAD_INPUT
