"""The machine under a training, once a second: the process, and each GPU that it uses, from a thread of their own.

What a card, a driver or a user's rights do not give is left out and said once, in `notes`; the rest goes on. Samples
carry the step at which they were taken. They are written as documents "telemetry" of about a minute each, and in a long
run of more: the record of a run of any length stays small.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

TICK_S, SAMPLE_S = 0.05, 1.0
"""How often the thread looks at what the training thread does, and how often it samples."""

CHUNK, CHUNKS_A_WIDTH = 60, 8
"""Samples of a document, and documents until a sample stands for twice as many seconds."""

LARGEST = frozenset({"rss_bytes", "memory_bytes", "process_bytes", "others_bytes", "temperature_c", "tf_peak_bytes"})
"""Of these a sample that stands for several seconds keeps the largest value, of flags (`throttle`) all, else the mean.
"""


class Host:
    """The process: cores it keeps busy, resident memory, bytes it reads and writes; and the machine's busy share."""

    def __init__(self):
        self._before: dict[str, float] = {}
        self._at = 0.0
        self.sample()

    def sample(self) -> dict[str, float]:
        """`cpu_cores`, `rss_bytes`, `read_bytes_s`, `write_bytes_s` and `machine_cpu` since the last call."""
        now, found = time.monotonic(), {}
        span = max(now - self._at, 1e-9)
        counters: dict[str, float] = {"cpu": time.process_time()}
        with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm") as file:
            found["rss_bytes"] = float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError, ValueError):
            with open("/proc/self/io") as file:
                fields = dict(line.split(": ") for line in file.read().splitlines())
            counters |= {"read": float(fields["read_bytes"]), "write": float(fields["write_bytes"])}
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open("/proc/stat") as file:
                ticks = [float(field) for field in file.readline().split()[1:9]]
            counters |= {"all": sum(ticks), "idle": ticks[3] + ticks[4]}
        grown = {name: value - self._before.get(name, value) for name, value in counters.items()}
        found["cpu_cores"] = grown["cpu"] / span
        for name in ("read", "write"):
            if name in grown:
                found[f"{name}_bytes_s"] = grown[name] / span
        if grown.get("all"):
            found["machine_cpu"] = 1 - grown["idle"] / grown["all"]
        self._before, self._at = counters, now
        return found


class Cards:
    """The NVIDIA cards that this process may use, through NVML.

    Attributes:
      cards: For each: `name`, `uuid`, `mig`, `memory_total_bytes`, `power_limit_w`, as far as they are known.
      notes: What could not be asked, a line each.
    """

    def __init__(self, environment: Mapping[str, str] | None = None):
        self.cards: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._handles: list[tuple[Any, Any]] = []
        self._mute: set[tuple[int, str]] = set()
        self._lost: set[int] = set()
        self._counters: dict[tuple[int, str], tuple[float, float]] = {}
        try:
            import pynvml

            self._nvml = pynvml
            pynvml.nvmlInit()
        except Exception as error:
            self._nvml = None
            # A machine without an NVIDIA card has no driver either: nothing to say about it.
            if os.path.exists("/proc/driver/nvidia") or os.path.exists("/dev/nvidiactl"):
                self.notes.append(f"The GPUs are not watched: {_words(error)}")
            return
        try:
            self._handles = self._visible(os.environ if environment is None else environment)
        except pynvml.NVMLError as error:
            self.notes.append(f"The GPUs are not watched: {_words(error)}")
        for index in range(len(self._handles)):
            self.cards.append(self._described(index))

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _visible(self, environment: Mapping[str, str]) -> list[tuple[Any, Any]]:
        """(card or MIG instance, its card) of each device that CUDA shows this process, in CUDA's order."""
        n = self._nvml
        every = []
        for i in range(n.nvmlDeviceGetCount()):
            try:
                every.append(n.nvmlDeviceGetHandleByIndex(i))
            except n.NVMLError as error:
                self.notes.append(f"GPU {i} is not watched: {_words(error)}")
        asked = environment.get("CUDA_VISIBLE_DEVICES")
        if asked is None:
            chosen: list[Any] = list(every)
        else:
            chosen = self._named(asked, every)
        names = {self._ask(-1, "name", n.nvmlDeviceGetName, handle) for handle in every}
        by_bus = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        if len(names) > 1 and not by_bus and asked and not asked.startswith(("GPU-", "MIG-")):
            self.notes.append(
                "The cards differ, and CUDA numbers the fastest first: which one is meant by its number is not sure. "
                "Set CUDA_DEVICE_ORDER=PCI_BUS_ID."
            )
        return [pair for handle in chosen for pair in self._instances(handle)]

    def _named(self, asked: str, every: Sequence[Any]) -> list[Any]:
        """The handles that a CUDA_VISIBLE_DEVICES names; as CUDA does, up to the first that it does not know."""
        n, chosen = self._nvml, []
        for name in (part.strip() for part in asked.split(",")):
            if name.startswith("MIG-"):
                try:
                    chosen.append(n.nvmlDeviceGetHandleByUUID(name.encode()))
                except n.NVMLError as error:
                    self.notes.append(f"{name} is not watched: {_words(error)}")
                    break
            elif name.startswith("GPU-"):
                match = [h for h in every if str(self._ask(-1, "uuid", n.nvmlDeviceGetUUID, h)).startswith(name)]
                if len(match) != 1:
                    break
                chosen.append(match[0])
            elif name.isdecimal() and int(name) < len(every):
                chosen.append(every[int(name)])
            else:
                break
        return chosen

    def _instances(self, handle) -> list[tuple[Any, Any]]:
        """A MIG instance and its card; for a card in MIG mode its first instance, all that CUDA shows."""
        n = self._nvml
        with contextlib.suppress(n.NVMLError):
            if n.nvmlDeviceIsMigDeviceHandle(handle):
                return [(handle, n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))]
        with contextlib.suppress(n.NVMLError):
            if n.nvmlDeviceGetMigMode(handle)[0]:
                for i in range(n.nvmlDeviceGetMaxMigDeviceCount(handle)):
                    with contextlib.suppress(n.NVMLError):
                        return [(n.nvmlDeviceGetMigDeviceHandleByIndex(handle, i), handle)]
        return [(handle, handle)]

    def _described(self, index: int) -> dict[str, Any]:
        n, (handle, card) = self._nvml, self._handles[index]
        memory = self._ask(index, "memory", n.nvmlDeviceGetMemoryInfo, handle)
        limit = self._ask(index, "power limit", n.nvmlDeviceGetEnforcedPowerLimit, card)
        return {
            "name": self._ask(index, "name", n.nvmlDeviceGetName, card),
            "uuid": self._ask(index, "uuid", n.nvmlDeviceGetUUID, handle),
            "mig": handle is not card,
            "memory_total_bytes": None if memory is None else float(memory.total),
            "power_limit_w": None if limit is None else limit / 1000,
        }

    def sample(self) -> list[dict[str, float]]:
        """For each card, name -> value of what it tells now; empty once it is lost."""
        return [{} if i in self._lost else self._sample(i) for i in range(len(self._handles))]

    def _sample(self, index: int) -> dict[str, float]:
        n, (handle, card) = self._nvml, self._handles[index]
        found: dict[str, float] = {}

        def ask(what: str, function, *arguments):
            return None if index in self._lost else self._ask(index, what, function, *arguments)

        rates = ask("utilisation", n.nvmlDeviceGetUtilizationRates, handle)
        if rates is not None:
            found |= {"utilisation": rates.gpu / 100, "memory_utilisation": rates.memory / 100}
        memory = ask("memory", n.nvmlDeviceGetMemoryInfo, handle)
        if memory is not None:
            found["memory_bytes"] = float(memory.used)
        processes = ask("processes", n.nvmlDeviceGetComputeRunningProcesses, handle)
        if processes is not None:
            used = [(p.pid, float(p.usedGpuMemory or 0)) for p in processes]
            found["process_bytes"] = sum(size for pid, size in used if pid == os.getpid())
            found["others_bytes"] = sum(size for pid, size in used if pid != os.getpid())
            found["others"] = float(sum(pid != os.getpid() for pid, _ in used))
        power = ask("power", n.nvmlDeviceGetPowerUsage, card)
        if power is not None:
            found["power_w"] = power / 1000
        temperature = ask("temperature", n.nvmlDeviceGetTemperature, card, n.NVML_TEMPERATURE_GPU)
        if temperature is not None:
            found["temperature_c"] = float(temperature)
        for name, clock in (("sm_mhz", n.NVML_CLOCK_SM), ("memory_mhz", n.NVML_CLOCK_MEM)):
            mhz = ask(f"{name} clock", n.nvmlDeviceGetClockInfo, card, clock)
            if mhz is not None:
                found[name] = float(mhz)
        reasons = ask("throttle reasons", n.nvmlDeviceGetCurrentClocksThrottleReasons, card)
        if reasons is not None:
            found["throttle"] = float(reasons)
        for name, counter in (("pcie_send", n.NVML_PCIE_UTIL_TX_BYTES), ("pcie_receive", n.NVML_PCIE_UTIL_RX_BYTES)):
            rate = ask(f"{name} rate", n.nvmlDeviceGetPcieThroughput, card, counter)
            if rate is not None:
                found[f"{name}_bytes_s"] = rate * 1024.0
        links = ask("NVLink traffic", self._links, card)
        for name, total in (links or {}).items():
            found |= self._rate(index, name, total)
        for name, kind in (
            ("ecc_corrected", n.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ("ecc_uncorrected", n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        ):
            errors = ask("ECC errors", n.nvmlDeviceGetTotalEccErrors, card, kind, n.NVML_VOLATILE_ECC)
            if errors is not None:
                found[name] = float(errors)
        return found

    def _links(self, card) -> dict[str, float]:
        """Bytes that all NVLinks of a card have carried since it was reset."""
        n = self._nvml
        ids = {
            "nvlink_send": n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            "nvlink_receive": n.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        }
        values = n.nvmlDeviceGetFieldValues(card, [(field, 0xFFFFFFFF) for field in ids.values()])
        for value in values:
            if value.nvmlReturn:
                raise n.NVMLError(value.nvmlReturn)
        return {name: value.value.ullVal * 1024.0 for name, value in zip(ids, values, strict=True)}

    def _rate(self, index: int, name: str, total: float) -> dict[str, float]:
        now = time.monotonic()
        before = self._counters.get((index, name))
        self._counters[index, name] = (now, total)
        if before is None or now <= before[0]:
            return {}
        return {f"{name}_bytes_s": (total - before[1]) / (now - before[0])}

    def _ask(self, index: int, what: str, function, *arguments):
        """What NVML answers; None, now and from now on, for what it does not."""
        n = self._nvml
        if (index, what) in self._mute:
            return None
        try:
            return function(*arguments)
        except n.NVMLError as error:
            code = getattr(error, "value", None)
            where = f"GPU {index}" if index >= 0 else "A GPU"
            if code == n.NVML_ERROR_GPU_IS_LOST:
                self._lost.add(index)
                self.notes.append(f"{where} fell off the bus: it is watched no more.")
            elif code not in (n.NVML_ERROR_TIMEOUT, n.NVML_ERROR_IN_USE):
                self._mute.add((index, what))
                self.notes.append(f"{where} does not tell its {what}: {_words(error)}")
            return None


class Telemetry(contextlib.AbstractContextManager):
    """The thread that samples while the context lasts.

    Args:
      document: Takes the kind of a document and what describes it, see `Journal.document`.
      step: Returns the number of steps done.
      glance: Called some twenty times a second, see `Timing.glance`.
      memory: Returns TensorFlow's own bytes and peak bytes for each GPU.
      cards: Made when the thread starts.
    """

    def __init__(
        self,
        document: Callable[[str, Callable[[], Mapping[str, Any]]], None],
        step: Callable[[], int],
        glance: Callable[[], None] = lambda: None,
        memory: Callable[[], Sequence[Mapping[str, float]]] = lambda: (),
        cards: Callable[[], Cards] = Cards,
    ):
        self._document, self._step, self._glance, self._memory = document, step, glance, memory
        self._make_cards = cards
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trainrt-telemetry", daemon=True)
        self._rows: list[dict[str, Any]] = []
        self._merging: list[dict[str, Any]] = []
        self._written = 0
        self._noted = 0

    def __enter__(self) -> Telemetry:
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._stop.set()
        self._thread.join(10.0)

    def _work(self) -> None:
        try:
            host, cards = Host(), self._make_cards()
            due = time.monotonic() + SAMPLE_S
            while not self._stop.wait(TICK_S):
                self._glance()
                if time.monotonic() >= due:
                    due = max(due + SAMPLE_S, time.monotonic() + SAMPLE_S / 2)
                    self._take(self._sampled(host, cards), cards)
            self._take(self._sampled(host, cards), cards)
            self._merge()
            self._write(cards)
            cards.close()
        except Exception as error:  # watching must never take the training down
            words = f"The telemetry ended: {_words(error)}"
            self._document("telemetry", lambda: {"notes": [words], "samples": {}, "cards": []})

    def _sampled(self, host: Host, cards: Cards) -> dict[str, Any]:
        row: dict[str, Any] = {"time": time.time(), "step": self._step(), **host.sample()}
        own = self._memory()
        for i, card in enumerate(cards.sample()):
            known = {**card, **(own[i] if i < len(own) else {})}
            row |= {f"gpu{i}/{name}": value for name, value in known.items()}
        return row

    def _take(self, row: dict[str, Any], cards: Cards) -> None:
        self._merging.append(row)
        if len(self._merging) >= 2 ** (self._written // CHUNKS_A_WIDTH):
            self._merge()
        if len(self._rows) >= CHUNK:
            self._write(cards)

    def _merge(self) -> None:
        if self._merging:
            self._rows.append(merged(self._merging))
            self._merging = []

    def _write(self, cards: Cards) -> None:
        rows, self._rows = self._rows, []
        notes, self._noted = cards.notes[self._noted :], len(cards.notes)
        if not rows and not notes:
            return
        names = sorted({name for row in rows for name in row})
        samples = {name: [_plain(row.get(name)) for row in rows] for name in names}
        content = {"cards": cards.cards, "samples": samples, "notes": notes, "pid": os.getpid()}
        self._written += 1
        self._document("telemetry", lambda: content)


def merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several samples as one: of flags all, of levels the largest, of counts the last, else the mean."""
    if len(rows) == 1:
        return dict(rows[0])
    found: dict[str, Any] = {}
    for name in {name for row in rows for name in row}:
        values = [row[name] for row in rows if name in row]
        kind = name.rpartition("/")[2]
        if kind == "throttle":
            found[name] = float(np.bitwise_or.reduce([int(v) for v in values]))
        elif kind in ("time", "step") or kind.startswith("ecc"):
            found[name] = values[-1]
        else:
            found[name] = max(values) if kind in LARGEST else float(np.mean(values))
    return found


def _plain(value):
    """Four digits are enough, and a third of the bytes."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.13g}") if abs(value) > 1e9 and value < 1e10 else float(f"{value:.5g}")


def _words(error: Exception) -> str:
    return f"{type(error).__name__.removeprefix('NVMLError_')}: {error}".splitlines()[0]
