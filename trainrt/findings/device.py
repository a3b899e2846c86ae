"""A card that is hot, full, shared, broken or idle: rules that read the document "telemetry".

They speak of time alone, as those of `wall_time` do, and come after whatever keeps the model from learning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.findings.finding import Finding
from trainrt.findings.rules import about, rule
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document  # noqa: F401 - for the examples

THROTTLED, BUSY = 0.1, 0.3
"""Share of the samples of a busy card that name a reason for slow clocks; busy is a utilisation of so much."""
SAMPLES = 10
"""Fewest samples of a card to say something of it."""
FULL = 0.95
"""TensorFlow's peak, over the card's memory."""
OTHERS_BYTES = 200 << 20
"""Memory of other processes on the card; a display server takes less."""
SLOW_BITS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat",
    0x40: "heat",
    0x80: "power brake",
}


@rule
def throttled(run: Run) -> Iterator[Finding]:
    """A GPU that runs at lowered clocks while it is busy.

    Means:   the driver named heat, the power cap or a hardware slowdown as the reason for the clocks.
    Matters: the same step takes longer, and the longer the hotter.
    Try:     cooling and the card's neighbours first; the power limit if it was lowered.
    Source:  NVML's clocks throttle reasons.

    >>> hot = {"gpu0/utilisation": [0.9] * 20, "gpu0/throttle": [64.0] * 20, "step": [1] * 20}
    >>> [f.causes for f in throttled(Run.synthetic(documents=[Document("telemetry", 9, {"samples": hot})]))]
    [('throttled',)]
    >>> list(throttled(Run.synthetic()))
    []
    """
    for card, values, described in _cards(run):
        bits, busy = values.get("throttle"), values.get("utilisation")
        if bits is None or busy is None:
            continue
        known = ~np.isnan(bits) & (np.nan_to_num(busy) >= BUSY)
        flags = np.nan_to_num(bits).astype(int)
        slowed = known & ((flags & sum(SLOW_BITS)) > 0)
        if known.sum() < SAMPLES or slowed.sum() < THROTTLED * known.sum():
            continue
        reasons = list(dict.fromkeys(w for bit, w in SLOW_BITS.items() if (flags[slowed] & bit).any()))
        temperature = values.get("temperature_c", np.full(1, np.nan))
        hottest = f", at up to {np.nanmax(temperature):.0f} C" if not np.isnan(temperature).all() else ""
        # At its power limit a healthy card runs at full load: what it loses are its last few percent.
        only_power = reasons == ["power cap"]
        yield about(
            run,
            "throttled",
            "info" if only_power else "warning",
            0.9,
            ("throttled",),
            f"GPU {card}{described} lowered its clocks for {' and '.join(reasons)} in "
            f"{slowed.sum() / known.sum():.0%} of the samples in which it was busy{hottest}.",
            {"card": card, "share": float(slowed.sum() / known.sum()), "reasons": reasons},
            ("The card is at its power limit: nvidia-smi -q -d POWER shows whether it was lowered.",)
            if only_power
            else ("Check the cooling: fans, dust, the room, the card beside it.",),
        )


@rule
def memory_nearly_full(run: Run) -> Iterator[Finding]:
    """A GPU whose memory TensorFlow has used up to the last.

    Means:   the peak of TensorFlow's own allocations is close to what the card has.
    Matters: the next larger batch or longer sequence ends the training with an error.
    Try:     a smaller batch, mixed precision, rematerialisation.
    Source:  tf.config.experimental.get_memory_info; the driver's own figure is always full, since TensorFlow reserves.

    >>> full = {"cards": [{"memory_total_bytes": 100.0}], "samples": {"gpu0/tf_peak_bytes": [50.0, 97.0]}}
    >>> [f.causes for f in memory_nearly_full(Run.synthetic(documents=[Document("telemetry", 9, full)]))]
    [('memory_nearly_full',)]
    >>> list(memory_nearly_full(Run.synthetic()))
    []
    """
    totals = [card.get("memory_total_bytes") for card in run.document("telemetry").get("cards") or ()]
    for card, values, described in _cards(run):
        peak = values.get("tf_peak_bytes")
        total = totals[card] if card < len(totals) else None
        if peak is None or not total or np.nanmax(peak) < FULL * total:
            continue
        yield about(
            run,
            "memory_nearly_full",
            "warning",
            0.8,
            ("memory_nearly_full",),
            f"TensorFlow used up to {np.nanmax(peak) / total:.0%} of the memory of GPU {card}{described}.",
            {"card": card, "peak_bytes": float(np.nanmax(peak)), "total_bytes": total},
            (
                "Use a smaller batch.",
                'Use half the bytes: keras.mixed_precision.set_global_policy("mixed_bfloat16") above the model.',
            ),
        )


@rule
def shared_device(run: Run) -> Iterator[Finding]:
    """A GPU that another process uses as well.

    Means:   for at least half of the time another process held memory on the card.
    Matters: both are slowed down, and step times say little.
    Try:     nvidia-smi names it; CUDA_VISIBLE_DEVICES picks another card.
    Source:  NVML's list of compute processes.

    >>> both = {"gpu0/others_bytes": [4e9] * 20, "gpu0/others": [1.0] * 20}
    >>> [f.causes for f in shared_device(Run.synthetic(documents=[Document("telemetry", 9, {"samples": both})]))]
    [('shared_device',)]
    >>> list(shared_device(Run.synthetic()))
    []
    """
    for card, values, described in _cards(run):
        others = values.get("others_bytes")
        if others is None or len(others) < SAMPLES or np.mean(np.nan_to_num(others) >= OTHERS_BYTES) < 0.5:
            continue
        count = int(np.nanmax(values.get("others", np.ones(1))))
        yield about(
            run,
            "shared_device",
            "warning",
            0.7,
            ("shared_device",),
            f"On GPU {card}{described} {count} other process{'es' if count > 1 else ''} held up to "
            f"{np.nanmax(others) / 2**30:.1f} GiB while this run trained.",
            {"card": card, "others": count, "bytes": float(np.nanmax(others))},
            ("See whose they are with nvidia-smi; choose a free card with CUDA_VISIBLE_DEVICES.",),
        )


@rule
def ecc_errors(run: Run) -> Iterator[Finding]:
    """A GPU whose memory had errors that could not be corrected.

    Means:   the counter of uncorrectable ECC errors rose while the run trained.
    Matters: numbers may have been wrong from that step on; the card may be failing.
    Try:     train from a checkpoint before that step, on another card; have the card tested.
    Source:  NVML's volatile ECC counters.

    >>> bad = {"gpu0/ecc_uncorrected": [0.0, 0.0, 2.0], "step": [10, 20, 30]}
    >>> [f.causes for f in ecc_errors(Run.synthetic(steps=40, documents=[Document("telemetry", 9, {"samples": bad})]))]
    [('ecc_errors',)]
    >>> list(ecc_errors(Run.synthetic()))
    []
    """
    for card, values, described in _cards(run):
        errors = values.get("ecc_uncorrected")
        if errors is None or np.isnan(errors).all():
            continue
        first = errors[~np.isnan(errors)][0]
        risen = np.nan_to_num(errors, nan=first) > first
        if not risen.any():
            continue
        last = int(run.steps[-1, 1])
        step = min(int(values["step"][np.argmax(risen)]), last) if "step" in values else 0
        yield about(
            run,
            "ecc_errors",
            "error",
            0.9,
            ("ecc_errors",),
            f"GPU {card}{described} had {np.nanmax(errors) - first:.0f} memory errors that it could not correct, the "
            f"first by step {step}.",
            {"card": card, "errors": float(np.nanmax(errors) - first)},
            ("Do not trust what was trained since; go back to an earlier checkpoint, on another card.",),
            steps=(step, last),
        )


@rule
def idle_device(run: Run) -> Iterator[Finding]:
    """A GPU that has little to do.

    Means:   over the run its utilisation was low.
    Matters: the training could be several times as fast on the same card.
    Try:     a larger batch; where the time goes is in the report's lines on time.
    Source:  NVML's utilisation: the share of the time in which any kernel ran.

    >>> idle = {"gpu0/utilisation": [0.1] * 60, "step": list(range(60))}
    >>> [f.rule for f in idle_device(Run.synthetic(documents=[Document("telemetry", 9, {"samples": idle})]))]
    ['idle_device']
    >>> list(idle_device(Run.synthetic()))
    []
    """
    for card, values, described in _cards(run):
        busy = values.get("utilisation")
        if busy is None or len(busy) < 3 * SAMPLES or np.isnan(busy).all():
            continue
        usual = float(np.nanmedian(busy))
        if usual >= BUSY:
            continue
        yield about(
            run,
            "idle_device",
            "info",
            0.7,
            ("idle_device",),
            f"GPU {card}{described} was busy for {usual:.0%} of the time.",
            {"card": card, "median": usual},
            ("Use a larger batch.", 'See what holds it up: trainrt.fit(..., trace="auto").'),
        )


def _cards(run: Run) -> Iterator[tuple[int, dict[str, np.ndarray], str]]:
    """Number of each card, name -> [samples] of all it told, NaN where it did not, and its name in brackets."""
    documents = [d.content for d in run.documents if d.kind == "telemetry"]
    names = {name for content in documents for name in content.get("samples", {})}
    numbers = sorted({int(n.partition("/")[0][3:]) for n in names if n.startswith("gpu")})
    described: list[Mapping[str, Any]] = next(
        (content["cards"] for content in reversed(documents) if content.get("cards")), []
    )
    for number in numbers:
        values = {}
        for name in names:
            own = name.startswith(f"gpu{number}/")
            if not own and name != "step":
                continue
            rows: list[float] = []
            for content in documents:
                samples = content.get("samples", {})
                length = max(map(len, samples.values()), default=0)
                rows += [np.nan if v is None else float(v) for v in samples.get(name, [None] * length)]
            values[name.partition("/")[2] if own else name] = np.array(rows)
        title = described[number].get("name") if number < len(described) else None
        yield number, values, f" ({title})" if title else ""
