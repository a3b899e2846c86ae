"""Are the findings right? Faulty programs with known causes, their fixed twins, and healthy ones.

    python -m benchmarks.diagnosis [--record DIR] [--published FILE] [--only ID,ID] [--seed 2]    trains, then judges
    python -m benchmarks.diagnosis --record DIR --seconds 240     goes on where it was left, and stops after the case
                                                                  that is trained then
    python -m benchmarks.diagnosis --from DIR [--published FILE] [--verbose] [--halves]           judges what is there

The set is a directory with `fault_cases.json`, `fault_builder.py` and `fault_baselines.py`: `TRAINRT_FAULTS`, by
default `../shared/faults` beside the checkout. Each program is trained once by `trainrt.fit`. Printed:

  flagged        faulty programs with a finding of severity warning or above
  first, three   those whose root cause is the first cause of the first, or of any of the first three such findings
  equivalent     the same, counting what a fix would address as well (the set's `accept`)
  false alarms   fixed and healthy programs with such a finding
  misses         a line for each program that any of this is wrong for
  published      the same for the rules of UMLAUT, AutoTrainer, DeepDiagnosis, DeepLocalize and TheDeepChecker, as the
                 set re-implements them (a training of its own for each program; kept in the file)
  cost           CPU seconds of all rules on a run of 100,000 steps of 200 weights that learnt nothing, which asks most
                 of them, each time in a process of its own that has read nothing of it before; and over the training
                 time of the cases

A published finding names several causes at once, and any of them counts; of ours only the likeliest does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainrt.findings import SEVERITIES, Finding, diagnose
from trainrt.record.run import Run

FAULTS = os.environ.get("TRAINRT_FAULTS", str(Path(__file__).parents[1].parent / "shared" / "faults"))
ALARM = SEVERITIES.index("warning")
TARGETS = {"flagged": 0.95, "first": 0.70, "three": 0.85, "false alarms": 0.05}


def cases() -> dict[str, dict[str, Any]]:
    """Id -> case of the set."""
    path = Path(FAULTS) / "fault_cases.json"
    if not path.exists():
        raise SystemExit(f"The fault set is a directory with fault_cases.json. Received: {FAULTS}. Set TRAINRT_FAULTS.")
    return {case["id"]: case for case in json.loads(path.read_text())["cases"]}


def variants(case: dict[str, Any]) -> tuple[str, ...]:
    return ("healthy",) if case.get("healthy") else ("faulty", "fixed")


# ------------------------------------------------------------------------------------------------------------ recording


def record(directory: Path, chosen: dict[str, dict], seed: int, seconds: float = math.inf) -> None:
    """Trains each program that is not in `directory` yet, into `directory/ID/VARIANT`; begins none after `seconds`."""
    sys.path.insert(0, FAULTS)
    import fault_builder
    import keras

    import trainrt

    until = time.monotonic() + seconds
    for name, case in chosen.items():
        for variant in variants(case):
            place = directory / name / variant
            if (place / "done.json").exists():
                continue
            if time.monotonic() > until:
                return
            # What was cut short is begun again.
            shutil.rmtree(place, ignore_errors=True)
            keras.backend.clear_session()
            built = fault_builder.build_full(case, variant, seed)
            begun = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                history = trainrt.fit(built.model, built.x, built.y, logdir=str(place), **built.fit_kwargs)
            took = time.perf_counter() - begun
            score = fault_builder.score(built)["score"]
            (place / "done.json").write_text(json.dumps({"seconds": took, "score": score, "seed": seed}))
            print(f"{took:6.1f} s  {score:6.3f}  {name} {variant}: {_said(history.findings)}", flush=True)
            del built, history
            gc.collect()


def _said(findings: list[Finding]) -> str:
    return "; ".join(f"{f.severity[0]} {f.rule} {'/'.join(f.causes)} {f.confidence:.2f}" for f in findings) or "-"


# -------------------------------------------------------------------------------------------------------------- judging


def judge(directory: Path, chosen: dict[str, dict]) -> tuple[dict[tuple[str, str], list[Finding]], list[float]]:
    """(id, variant) -> findings of the record, as the rules are now; and the share of the training time of each."""
    found, shares = {}, []
    for name, case in chosen.items():
        for variant in variants(case):
            place = directory / name / variant
            if not (place / "done.json").exists():
                continue
            run = Run.open(place)
            begun = time.process_time()
            found[name, variant] = diagnose(run)
            shares.append((time.process_time() - begun) / json.loads((place / "done.json").read_text())["seconds"])
    return found, shares


def alarms(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if SEVERITIES.index(finding.severity) >= ALARM]


def named(findings: list[Finding], most: int) -> list[str]:
    """The likeliest cause of each of the first `most` alarms."""
    return [finding.causes[0] for finding in alarms(findings)[:most]]


def scores(found: dict[tuple[str, str], list[Finding]], chosen: dict[str, dict]) -> dict[str, tuple[int, int]]:
    """What was counted -> how many, of how many."""
    faulty = [name for name, variant in found if variant == "faulty"]
    fine = [key for key in found if key[1] != "faulty"]

    def hits(most: int, label: str) -> int:
        return sum(
            any(cause in chosen[name]["fault"][label] for cause in named(found[name, "faulty"], most))
            for name in faulty
        )

    return {
        "flagged": (sum(bool(alarms(found[name, "faulty"])) for name in faulty), len(faulty)),
        "first": (hits(1, "kinds"), len(faulty)),
        "three": (hits(3, "kinds"), len(faulty)),
        "first, or equivalent": (hits(1, "accept"), len(faulty)),
        "three, or equivalent": (hits(3, "accept"), len(faulty)),
        "false alarms": (sum(bool(alarms(found[key])) for key in fine), len(fine)),
    }


def show(found: dict[tuple[str, str], list[Finding]], chosen: dict[str, dict], verbose: bool) -> None:
    for (name, variant), findings in found.items():
        if variant == "faulty":
            kinds, accept = chosen[name]["fault"]["kinds"], chosen[name]["fault"]["accept"]
            first, three = named(findings, 1), named(findings, 3)
            verdict = (
                "" if set(first) & set(kinds)
                else "second " if set(three) & set(kinds)
                else "equal  " if set(three) & set(accept)
                else "WRONG  " if three
                else "SILENT "
            )  # fmt: skip
            wanted = "/".join(kinds)
        else:
            verdict, wanted = ("ALARM  " if alarms(findings) else ""), "-"
        if verdict or verbose:
            print(f"{verdict or 'ok     '} {name} {variant}  wanted {wanted}\n            {_said(findings)}")
            if verbose:
                for finding in findings:
                    print(f"               {finding.message}")


def table(rows: dict[str, dict[str, tuple[int, int]]]) -> None:
    """A row for each set of rules."""
    columns = list(next(iter(rows.values())))
    print("\n| rules | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in rows.items():
        cells = [
            f"{row[c][0]} of {row[c][1]} ({row[c][0] / max(row[c][1], 1):.2f})" if c in row else "" for c in columns
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def halves(found: dict[tuple[str, str], list[Finding]], chosen: dict[str, dict], rounds: int = 200) -> None:
    """How far the scores vary over random halves of the cases: what a threshold picked on one of them may be worth."""
    names, draws = sorted({name for name, _ in found}), []
    for i in range(rounds):
        half = set(random.Random(i).sample(names, len(names) // 2))
        draws.append(scores({key: value for key, value in found.items() if key[0] in half}, chosen))
    print("\nOver random halves of the cases, 5th to 95th percentile:")
    for column in draws[0]:
        shares = sorted(draw[column][0] / max(draw[column][1], 1) for draw in draws)
        print(f"  {column:22} {shares[rounds // 20]:.2f} to {shares[-rounds // 20]:.2f}")


# ------------------------------------------------------------------------------------------------------ published rules


def published(path: Path, chosen: dict[str, dict], seed: int) -> dict[str, dict[str, tuple[int, int]]]:
    """The scores of each published set of rules; trains what is not in the file yet."""
    sys.path.insert(0, FAULTS)
    import fault_baselines

    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name, case in chosen.items() if any(f"{name}:{v}" not in known for v in variants(case))]
    if missing:
        arguments = argparse.Namespace(out=str(path), ids=",".join(missing), seed=seed)
        with contextlib.redirect_stdout(io.StringIO()):
            fault_baselines.run(arguments)
        known = json.loads(path.read_text())
    rows = {}
    for tool in fault_baselines.RULES:
        said = {tuple(key.rsplit(":", 1)): each["found"][tool] for key, each in known.items() if "found" in each}
        said = {key: value for key, value in said.items() if key[0] in chosen}
        faulty = [name for name, variant in said if variant == "faulty"]
        fine = [key for key in said if key[1] != "faulty"]

        def hits(most: int, label: str, said=said, faulty=faulty) -> int:
            return sum(
                any(set(kinds) & set(chosen[n]["fault"][label]) for _, _, kinds in said[n, "faulty"][:most])
                for n in faulty
            )

        rows[tool] = {
            "flagged": (sum(bool(said[name, "faulty"]) for name in faulty), len(faulty)),
            "first": (hits(1, "kinds"), len(faulty)),
            "three": (hits(3, "kinds"), len(faulty)),
            "first, or equivalent": (hits(1, "accept"), len(faulty)),
            "three, or equivalent": (hits(3, "accept"), len(faulty)),
            "false alarms": (sum(bool(said[key]) for key in fine), len(fine)),
        }
    return rows


# ----------------------------------------------------------------------------------------------------------------- cost


def long_run(directory: str) -> Run:
    """A long run of `directory` that learnt nothing."""
    from trainrt.findings.examples import stuck

    run, poor = Run.open(directory), stuck()
    run.environment, run.epochs, run.documents = poor.environment, poor.epochs, poor.documents
    run.end = {"how": "finished"}
    return run


def seconds(run: Run, rules=None) -> float:
    """CPU seconds of the rules."""
    begun = time.process_time()
    diagnose(run, rules)
    return time.process_time() - begun


def cost(steps: int = 100_000, weights: int = 200, rounds: int = 7) -> tuple[list[float], dict[str, float]]:
    """CPU seconds of all rules on a long run, in fresh processes and sorted; and of each rule alone, in this one."""
    from benchmarks.plugin import write
    from trainrt.findings import ALL

    with tempfile.TemporaryDirectory() as scratch:
        directory = str(Path(scratch) / "run")
        write(Path(directory), steps, weights)
        code = "import sys; from benchmarks.diagnosis import *; print(seconds(long_run(sys.argv[1])))"
        command = [sys.executable, "-c", code, directory]
        fresh = [float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(rounds)]
        run = long_run(directory)
        return sorted(fresh), {rule.__name__: seconds(run, [rule]) for rule in ALL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", type=Path, help="train into this directory what is not there yet")
    parser.add_argument("--from", dest="source", type=Path, help="judge what this directory holds, train nothing")
    parser.add_argument("--only", help="ids of cases, with commas between")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no training after so long")
    parser.add_argument(
        "--published", type=Path, help="file of what the published rules said; trained into it if missing"
    )
    parser.add_argument("--verbose", action="store_true", help="all cases, with the messages")
    parser.add_argument(
        "--halves", action="store_true", help="the spread of the scores over random halves of the cases"
    )
    parser.add_argument("--no-cost", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    chosen = cases()
    if given.only:
        chosen = {name: chosen[name] for name in given.only.split(",")}
    with tempfile.TemporaryDirectory() as scratch:
        directory = given.source or given.record or Path(scratch)
        if given.source is None:
            record(directory, chosen, given.seed, given.seconds)
        found, shares = judge(directory, chosen)
    if not found:
        raise SystemExit(f"No record of any case in {directory}.")
    show(found, chosen, given.verbose)
    rows = {"trainrt": scores(found, chosen)}
    if given.published:
        rows |= published(given.published, chosen, given.seed)
    table(rows)
    if given.halves:
        halves(found, chosen)
    print(
        "\nTargets: "
        + ", ".join(f"{name} {'at most' if 'alarm' in name else 'at least'} {v}" for name, v in TARGETS.items())
    )
    print(f"Rules over training time: median {statistics.median(shares):.4f}, worst {max(shares):.4f} of the cases.")
    if not given.no_cost:
        fresh, each = cost()
        slowest = sorted(each.items(), key=lambda item: -item[1])[:5]
        print(
            f"All rules on 100,000 steps of 200 weights, {len(fresh)} fresh processes: median "
            f"{statistics.median(fresh):.2f} s, worst {fresh[-1]:.2f} s; "
            + ", ".join(f"{n} {s:.2f}" for n, s in slowest)
        )


if __name__ == "__main__":
    main()
