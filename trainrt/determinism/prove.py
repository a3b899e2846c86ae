"""Runs a script several times in fresh processes and says whether its bits are the same, or where they part.

Fresh processes, because what was traced, cached or chosen in one process is the same all through it: a repetition in
the same process cannot see an input pipeline that races, or an algorithm that is picked anew at each start.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainrt.record import events
from trainrt.record.bits import Verdict, compare_bits
from trainrt.record.run import CERTIFICATE, Run
from trainrt.record.vocabulary import Document

CHILD = (sys.executable, "-m", "trainrt.determinism.child")


class ScriptFailed(RuntimeError):
    """A script did not come to its end; the message holds its last words."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What a proof says.

    Attributes:
      script: What ran.
      mode: "deterministic", "deterministic, xla", or "fast".
      runs: For each process the records that its calls of `fit` wrote.
      verdicts: For each process but the first and each call of `fit`, the comparison with the first process.
    """

    script: str
    mode: str
    runs: tuple[tuple[Path, ...], ...]
    verdicts: tuple[tuple[Verdict, ...], ...]

    @property
    def identical(self) -> bool:
        """Whether every process gave the same bits, proven by digests."""
        same = len({len(paths) for paths in self.runs}) == 1
        return same and all(verdict.identical is True for row in self.verdicts for verdict in row)

    @property
    def worst(self) -> Verdict | None:
        """The comparison that parts first; None where none does."""
        parted = [verdict for row in self.verdicts for verdict in row if verdict.identical is False]
        return min(parted, key=lambda v: v.difference.step if v.difference else sys.maxsize, default=None)

    @property
    def distinct(self) -> int:
        """How many different results there were, as far as the comparisons with the first process tell."""
        ends = [tuple((Run.open(path).end or {}).get("weights_digest") for path in paths) for paths in self.runs]
        return len(set(ends))

    def __str__(self) -> str:
        processes = f"{len(self.runs)} processes, {self.mode}"
        if not any(self.runs):
            return f"NOT PROVEN  {self.script} did not call fit."
        if self.identical:
            digests = sum(verdict.digests for verdict in self.verdicts[0])
            steps = sum(verdict.steps for verdict in self.verdicts[0])
            return f"PROVEN  bit-identical in {processes}: {digests:,} digests of {steps:,} steps, and all weights."
        counts = sorted({len(paths) for paths in self.runs})
        if len(counts) > 1:
            return f"NOT PROVEN  the processes called fit {' and '.join(map(str, counts))} times."
        if self.worst is None:
            return f"NOT PROVEN  {self.verdicts[0][0]}"
        return f"DIFFERS  {self.distinct} distinct results in {processes}.\n{self.worst}"

    def content(self) -> dict[str, Any]:
        """For the record of a run."""
        worst = self.worst
        difference = dataclasses.asdict(worst.difference) if worst and worst.difference else None
        return {
            "identical": self.identical,
            "result": f"bit-identical in {len(self.runs)} processes" if self.identical else str(self).split("\n")[-1],
            "script": self.script,
            "mode": self.mode,
            "processes": len(self.runs),
            "digests": sum(v.digests for row in self.verdicts[:1] for v in row),
            "steps": sum(v.steps for row in self.verdicts[:1] for v in row),
            "difference": difference,
            "time": time.time(),
        }


def prove(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    runs: int = 3,
    fast: bool = False,
    xla: bool = False,
    every: int = 1,
    steps: int | None = None,
    seed: int = 0,
    logdir: str | Path = "trainrt-prove",
    environment: Mapping[str, str] | None = None,
) -> Certificate:
    """Runs `python script arguments` in fresh processes, compares their bits, and signs the records.

    Args:
      runs: How many processes, at least two; one after the other.
      fast: In TensorFlow's fast mode, with seeds alone: to see whether, and where, it varies.
      xla: Deterministic, with XLA.
      every: All stages of every n-th step are digested.
      steps: At most so many steps of each `fit`; None: as the script says.
      seed: Of all random generators, set before the script begins; what it seeds itself counts.
      logdir: Where the records go, a directory for each proof.
      environment: Variables for the processes.

    Raises:
      ValueError: Fewer than two runs.
      FileNotFoundError: There is no such script.
      ScriptFailed: A process failed.
    """
    if runs < 2:
        raise ValueError(f"A proof compares processes: `runs` must be at least 2. Received: runs={runs}.")
    if not Path(script).is_file():
        raise FileNotFoundError(f"{script} does not exist. Give a training script, a Python file.")
    place = Path(logdir) / time.strftime("%Y%m%d-%H%M%S")
    options = ["--every", str(every), "--seed", str(seed), *(["--fast"] if fast else []), *(["--xla"] if xla else [])]
    options += ["--steps", str(steps)] if steps else []
    paths = []
    for number in range(runs):
        directory = place / f"process-{number}"
        directory.mkdir(parents=True)
        command = [*CHILD, "record", "--logdir", str(directory), *options, str(script), *arguments]
        launch(command, environment)
        paths.append(tuple(Run.find(directory)))
    opened = [[Run.open(path) for path in each] for each in paths]
    verdicts = tuple(tuple(compare_bits(a, b) for a, b in zip(opened[0], each, strict=False)) for each in opened[1:])
    mode = "fast" if fast else "deterministic, xla" if xla else "deterministic"
    certificate = Certificate(str(script), mode, tuple(paths), verdicts)
    for path in (path for each in paths for path in each):
        sign(path, certificate.content())
    return certificate


def launch(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs a process to its end; what it printed.

    Raises:
      ScriptFailed: It failed.
    """
    # Names are hashed alike in each process, or sets of them would be walked in another order.
    variables = {**os.environ, "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"), **(environment or {})}
    variables.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables)
    if result.returncode:
        last = "\n".join(result.stderr.strip().splitlines()[-25:])
        raise ScriptFailed(f"{' '.join(command)} ended with status {result.returncode}:\n{last}")
    return result.stdout


def sign(path: Path, content: Mapping[str, Any]) -> None:
    """Appends a certificate to the record of a run that has ended."""
    run = Run.open(path)
    assert run.path is not None
    step = int(run.steps[-1, 1]) if len(run) else 0
    with open(run.path, "ab") as file:
        file.write(events.frame(events.encode_document(Document(CERTIFICATE, step, content))))
