"""Runs a script several times in fresh processes and says whether its bits are the same, or where they part.

Fresh processes, because what was traced, cached or chosen in one process is the same all through it: a repetition in
the same process cannot see an input pipeline that races, or an algorithm that is picked anew at each start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainrt.record import events
from trainrt.record.bits import Verdict, compare_bits
from trainrt.record.run import CERTIFICATE, Run
from trainrt.record.vocabulary import Document

CHILD = (sys.executable, "-m", "trainrt.determinism.child")

LAST_WORDS = "\f"
"""Stands in a process's errors before what it says of its end."""


class ScriptFailed(RuntimeError):
    """A script did not come to its end, or there is nothing in it to look at; the message holds its last words."""


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
        same = len({len(paths) for paths in self.runs}) == 1 and any(self.runs)
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
        if self.identical:
            digests = sum(verdict.digests for verdict in self.verdicts[0])
            steps = sum(verdict.steps for verdict in self.verdicts[0])
            return f"PROVEN  bit-identical in {processes}: {digests:,} digests of {steps:,} steps, and all weights."
        counts = sorted({len(paths) for paths in self.runs})
        if len(counts) > 1:
            return f"NOT PROVEN  the processes called fit {' and '.join(map(str, counts))} times."
        if self.worst is None:
            doubt = next(verdict for row in self.verdicts for verdict in row if not verdict.identical)
            return f"NOT PROVEN  {doubt}"
        return f"DIFFERS  {self.distinct} distinct results in {processes}.\n{self.worst}"

    def _against(self) -> str:
        """What stands against it, in one line."""
        return str(self.worst or self).partition("\n")[0]

    def content(self) -> dict[str, Any]:
        """For the record of a run."""
        worst = self.worst
        difference = dataclasses.asdict(worst.difference) if worst and worst.difference else None
        return {
            "identical": self.identical,
            "result": f"bit-identical in {len(self.runs)} processes" if self.identical else self._against(),
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
    tell: Callable[[str], None] = lambda line: None,
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
      tell: Is told what runs now.

    Raises:
      ValueError: A bad argument, such as fewer than two runs.
      FileNotFoundError: There is no such script.
      ScriptFailed: A process failed, or trained nothing.
    """
    if runs < 2:
        raise ValueError(f"A proof compares processes: `runs` must be at least 2. Received: runs={runs}.")
    if fast and xla:
        raise ValueError("`xla` is of the deterministic mode. Received: fast=True, xla=True. Leave one of them out.")
    for name, value, least in (("every", every, 0), ("steps", steps, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value}.")
    if not Path(script).is_file():
        raise FileNotFoundError(f"{script} is no file. Give a training script, a Python file.")
    place = fresh(Path(logdir))
    options = ["--every", str(every), "--seed", str(seed), *(["--fast"] if fast else []), *(["--xla"] if xla else [])]
    options += ["--steps", str(steps)] if steps else []
    paths = []
    for number in range(runs):
        tell(f"process {number + 1} of {runs}")
        directory = place / f"process-{number}"
        directory.mkdir()
        command = [*CHILD, "record", "--logdir", str(directory), *options, str(script), *arguments]
        launch(command, environment)
        paths.append(tuple(Run.find(directory)))
        if not paths[-1]:
            raise ScriptFailed(f"{script} called fit, but no call of it came to its first step.")
    opened = [[Run.open(path) for path in each] for each in paths]
    verdicts = tuple(tuple(compare_bits(a, b) for a, b in zip(opened[0], each, strict=False)) for each in opened[1:])
    mode = "fast" if fast else "deterministic, xla" if xla else "deterministic"
    certificate = Certificate(str(script), mode, tuple(paths), verdicts)
    for path in (path for each in paths for path in each):
        sign(path, certificate.content())
    return certificate


def fresh(directory: Path, name: str = "") -> Path:
    """Makes a directory below, named by the time, and by a number where one of that second is there already."""
    stamp = f"{name}{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        place = directory / (stamp if number == 1 else f"{stamp}-{number}")
        with contextlib.suppress(FileExistsError):
            place.mkdir(parents=True)
            return place
    raise AssertionError


def launch(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs a process to its end; what it printed.

    Raises:
      ScriptFailed: It failed.
    """
    # Names are hashed alike in each process, or sets of them would be walked in another order.
    variables = {**os.environ, "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"), **(environment or {})}
    variables.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables)
    if result.returncode < 0:
        raise ScriptFailed(f"{' '.join(command)} was killed by signal {-result.returncode}; 9 may be want of memory.")
    if result.returncode:
        raise ScriptFailed("\n".join(result.stderr.rpartition(LAST_WORDS)[2].strip().splitlines()[-40:]))
    return result.stdout


def sign(path: Path, content: Mapping[str, Any]) -> None:
    """Appends a certificate to the record of a run that has ended."""
    run = Run.open(path)
    assert run.path is not None
    step = int(run.steps[-1, 1]) if len(run) else 0
    with open(run.path, "ab") as file:
        file.write(events.frame(events.encode_document(Document(CERTIFICATE, step, content))))
